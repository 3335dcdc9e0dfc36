"""What is timed: the head alone, and a decode step of a whole model, VQ against dense in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from export_vq import feeds
from export_vq.bench import Workload
from export_vq.graph import head_graph
from export_vq.head import VQHead
from export_vq.head_output import HeadOutput
from export_vq.outputs import output_of
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, native_library, signature_of

CONTEXT = 128
"""Tokens in the KV cache of a decode step that is timed, where the model has positions for as many."""

STOCK = "vq, stock ops"
"""The VQ head as stock ONNX Runtime runs it, timed beside the native kernel where that is built."""


@contextmanager
def head_workloads(
    head: VQHead,
    folder: Path,
    *,
    batches: Sequence[int] = (1, 8),
    opset: int = 20,
    threads: int = 0,
    output: HeadOutput | None = None,
) -> Iterator[list[Workload]]:
    """The head alone, one workload a batch size; the sessions live as long as the context.

    Args:
        head: in float32 or float16.
        folder: an existing folder for the graphs.
        batches: rows of hidden states.
        opset, threads: of the graphs and of ONNX Runtime (0: its own choice).
        output: what the heads give; None: logits.

    Raises:
        CheckFailed: the native kernel is registered and did not run.
    """
    native = native_library() is not None
    ways = {"vq": ("vq", native), "dense": ("dense", False)} | ({STOCK: ("vq", False)} if native else {})
    with ExitStack() as stack:
        named = {}
        for i, (way, (kind, on_kernels)) in enumerate(ways.items()):
            graph = head_graph(head, kind, opset=opset, output=output)
            runner = head_runner(graph, folder / f"head-{i}.onnx", threads=threads, native=on_kernels)
            named[way] = stack.enter_context(runner)
        signature = named["vq"].signature
        yield [
            Workload("head", b, bound(named, dict.fromkeys(named, head_inputs(head, b, signature)))) for b in batches
        ]


def head_runner(graph: ir.Model, file: Path, *, threads: int, native: bool) -> OrtRunner:
    """Save the graph of an output layer alone, and open it.

    Args:
        graph: takes hidden_states T [rows, 1, D].
        file: the .onnx file to write; its weights go beside it.
        threads, native: see OrtRunner.
    """
    ir.save(graph, file, external_data=f"{file.stem}.data")
    output = output_of(tuple(str(value.name) for value in graph.graph.outputs))
    return OrtRunner(file, feeds.Signature((), False, output=output), threads=threads, native=native)


def head_inputs(head: VQHead, batch: int, signature: feeds.Signature) -> feeds.Feeds:
    """Random hidden states [batch, 1, D] in the head's type, and what a draw takes."""
    number = np.float16 if head.codebook.dtype == torch.float16 else np.float32
    random = np.random.default_rng(0)
    hidden = random.standard_normal((batch, 1, head.spec.hidden_size))
    return {"hidden_states": hidden.astype(number)} | feeds.draws(signature, hidden[:, :, 0], random)


def step_workload(named: dict[str, OrtRunner], ids: np.ndarray[Any, np.dtype[np.int64]]) -> Workload:
    """One decode step after a prompt `ids` int64 [1, S] went through the KV cache."""
    steps = {name: feeds.first_step(runner, ids) for name, runner in named.items()}
    return Workload("decode step", 1, bound(named, steps))


@contextmanager
def runners(
    folder: Path, artifacts: dict[str, OnnxArtifact], threads: int, *, native: bool
) -> Iterator[dict[str, OrtRunner]]:
    """Runners of a folder's graphs 'vq' and 'dense'; with `native` 'vq' is on our kernels, those that are built or those
    that the folder brings along, and on stock ops beside that."""
    ways = {kind: (artifact, native and kind == "vq") for kind, artifact in artifacts.items()}
    if native:
        ways[STOCK] = (artifacts["vq"], False)
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                OrtRunner(
                    folder / artifact.path,
                    signature_of(artifact),
                    threads=threads,
                    native=on_kernels,
                    bundle=folder,
                    fuse_quantised=artifact.fusible,
                )
            )
            for name, (artifact, on_kernels) in ways.items()
        }


def bound(named: dict[str, OrtRunner], given: dict[str, feeds.Feeds]) -> dict[str, Callable[[], None]]:
    """A timed run of each runner; proves that what is called native is."""
    runs = {name: runner.bound(given[name]) for name, runner in named.items()}
    if STOCK in named:
        named["vq"].demand_native()
    return runs
