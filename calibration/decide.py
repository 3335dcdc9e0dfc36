"""What is quantised, and with which numbers: found on the VQ graph; its dense twin is treated in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from export_vq.calibration.counts import Counts
from export_vq.calibration.documents import Ids
from export_vq.calibration.gptq import Grid, gptq
from export_vq.calibration.make import Decisions, Maker
from export_vq.calibration.moments import Moments
from export_vq.calibration.options import HALF, WITH_RANGES, CalibrationOptions
from export_vq.calibration.products import Product, chosen, products
from export_vq.calibration.ranges import magnitude
from export_vq.calibration.sensitivity import sensitivity
from export_vq.calibration.source import Source, in_plain_form
from export_vq.contract import HEAD_PREFIX
from export_vq.errors import UserError
from export_vq.progress import Progress
from export_vq.records import LayerDivergence
from export_vq.runners import signature_of

PROBED = 1
"""Blocks of the calibration text that a layer's sensitivity is measured on."""


def decide(source: Source, blocks: Ids, options: CalibrationOptions, maker: Maker, progress: Progress) -> Decisions:
    """Count on blocks of tokens int64 [n, S], and choose.

    Raises:
        UserError: an option names a layer that is not there, or all layers, or activations hold NaN or infinity.
    """
    counts = Counts(source, blocks, options.threads, progress)
    if options.precision in HALF:
        return Decisions(magnitudes=counts.extremes())
    graph = source.graph
    found = products(graph)
    names = [p.name for p in chosen(found, options.kept_names, head=options.quantise_head)]
    if not names:
        raise UserError(
            f"--keep-in-fp16 names all layers, so nothing is left to quantise; name fewer than {options.keep}"
        )
    four = {p.name for p in chosen(found, options.eight_names, head=True, option="--keep-in-int8")}
    decisions = Decisions(names, in_8_bits=frozenset(p.name for p in found if p.name not in four))
    if options.alpha:
        largest = {name: histogram.channels for name, histogram in counts.histograms(graph, {}).items()}
        decisions = dataclasses.replace(decisions, smoothed=names, largest=largest)
    smoothed = graph.clone()
    maker.smooth(smoothed, decisions)
    if options.precision in WITH_RANGES:
        seen = counts.histograms(smoothed, {"smooth": [options.alpha, names]} if options.alpha else {})
        ranges = {name: magnitude(h, options.method, options.precision) for name, h in seen.items()}
        decisions = dataclasses.replace(decisions, magnitudes=ranges)
    if options.precision == "int4" and options.rounding == "gptq":
        decisions = dataclasses.replace(decisions, grid=_grids(counts.moments(), options))
    elif options.precision not in WITH_RANGES:
        counts.check()
    everything = options.sensitivity or options.kept_most_sensitive or options.eight_most_sensitive
    # What a quantised codebook costs alone is always told.
    probed = [name for name in names if everything or name.startswith(HEAD_PREFIX)]
    return _spared(_costs(source, smoothed, blocks, probed, options, decisions, progress), options, decisions)


def _grids(moments: Moments, options: CalibrationOptions) -> Callable[[Product], Grid]:
    """A product's weight in 4 bits; found once for the VQ graph, its dense twin and the sensitivities."""
    found: dict[str, Grid] = {}

    def grid(layer: Product) -> Grid:
        if layer.name not in found:
            symmetric = options.runtime == "tensorrt"
            found[layer.name] = gptq(
                layer.numbers(), moments[str(layer.activation.name)], options.block, symmetric=symmetric
            )
        return found[layer.name]

    return grid


def _costs(
    source: Source,
    smoothed: ir.Model,
    blocks: Ids,
    names: list[str],
    options: CalibrationOptions,
    decisions: Decisions,
    progress: Progress,
) -> dict[str, float]:
    if not names:
        return {}
    with progress.step("sensitivity") as tell:
        return sensitivity(
            in_plain_form(smoothed),
            names,
            options,
            decisions.magnitudes,
            signature_of(source.artifact),
            blocks[:PROBED],
            source.folder,
            lambda part: tell("sensitivity", part),
            grid=decisions.grid,
        )


def _spared(costs: dict[str, float], options: CalibrationOptions, decisions: Decisions) -> Decisions:
    """Without the layers that cost most, or with 8 bits for them, where the options ask for it."""
    order = sorted(costs, key=lambda name: -costs[name])
    kept = order[: options.kept_most_sensitive]
    eight = order[len(kept) :][: options.eight_most_sensitive]
    return dataclasses.replace(
        decisions,
        names=[name for name in decisions.names if name not in kept],
        costs=tuple(LayerDivergence(name, costs[name], name in kept) for name in order),
        in_8_bits=decisions.in_8_bits | frozenset(eight),
    )
