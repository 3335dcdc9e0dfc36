"""Optimisation profiles: which shapes an engine serves, from the names of a graph's dynamic dimensions.

A decoder graph gets two: 'prefill', whole prompts into an empty cache, and 'decode', one token onto a filled one, so
that TensorRT chooses kernels for each. A head alone gets one, 'head'. Shapes can be overridden in trtexec's words, for
every profile (`input_ids:4x512`) or for one (`prefill/input_ids:4x512,decode/input_ids:4x1`); inputs that share a
dimension follow, and total_sequence_length is always past + sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from export_vq.errors import UserError
from export_vq.records import EngineProfile, InputRange

Shape = Sequence[int | str]
"""A graph input's dimensions: numbers where they are fixed, names where they are dynamic."""
Bounds = tuple[int, int, int]
"""Smallest, usual and largest value of a dimension."""

MAX_BATCH = 8
MAX_ROWS = 64
PROMPT = 128
CONTEXT = 2048
"""Longest sequence that a default profile serves, cache and new tokens together."""

BOUNDS = ("min", "opt", "max")
_SEQUENCE, _PAST, _TOTAL = "sequence_length", "past_sequence_length", "total_sequence_length"


def default_dimensions(names: set[str], context: int = CONTEXT) -> dict[str, dict[str, Bounds]]:
    """{profile: {dimension: bounds}} for a graph with these dynamic dimensions; the total is derived, not listed."""
    if _SEQUENCE not in names:
        return {"head": {"rows": (1, 1, MAX_ROWS), "batch_size": (1, 1, MAX_BATCH)}}
    batch = (1, 1, MAX_BATCH)
    prompt = min(PROMPT, context)
    return {
        "prefill": {"batch_size": batch, _SEQUENCE: (1, prompt, context), _PAST: (0, 0, 0)},
        "decode": {"batch_size": batch, _SEQUENCE: (1, 1, 1), _PAST: (1, max(1, context // 2), max(1, context - 1))},
    }


def make_profiles(
    inputs: Mapping[str, Shape], overrides: Mapping[str, str] | None = None, *, context: int = CONTEXT
) -> tuple[EngineProfile, ...]:
    """The profiles of a graph.

    Args:
        inputs: each graph input's shape, dynamic dimensions by name.
        overrides: 'min', 'opt' and 'max' -> shapes as on the command line, NAME:AxB[,...].
        context: longest sequence by default.

    Raises:
        UserError: an override names no input or profile, has the wrong rank or a fixed dimension wrong, contradicts
            another, or the graph has a dynamic dimension that is not known.
    """
    names = {d for shape in inputs.values() for d in shape if isinstance(d, str)}
    defaults = default_dimensions(names, context)
    given: dict[str, dict[str, dict[str, tuple[int, str]]]] = {profile: {} for profile in defaults}
    for bound, text in (overrides or {}).items():
        for profile, name, shape in _parse(text, bound, tuple(defaults)):
            for each in [profile] if profile else defaults:
                _note(given[each], bound, name, shape, inputs)
    return tuple(_profile(name, inputs, dims, given[name]) for name, dims in defaults.items())


def choose_profile(profiles: Sequence[EngineProfile], shapes: Mapping[str, Sequence[int]]) -> int:
    """Index of the narrowest profile that serves these input shapes.

    Raises:
        UserError: none does; the sentence says where each one ends.
    """
    misfits = [_misfit(profile, shapes) for profile in profiles]
    fitting = [i for i, misfit in enumerate(misfits) if misfit is None]
    if not fitting:
        raise UserError(
            f"no profile of the engine serves these shapes: {'; '.join(str(m) for m in misfits)}; build it again with "
            "--min-shapes, --opt-shapes and --max-shapes that do"
        )
    return min(fitting, key=lambda i: sum(math.prod(given.max) for given in profiles[i].inputs))


def describe(profile: EngineProfile) -> str:
    """One line: inputs with equal ranges share one entry."""
    groups: dict[str, list[str]] = {}
    for given in profile.inputs:
        span = " .. ".join("x".join(map(str, shape)) for shape in (given.min, given.opt, given.max))
        groups.setdefault(span, []).append(given.name)
    return ", ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {span}" for span, names in groups.items()
    )


def _parse(text: str, bound: str, profiles: tuple[str, ...]) -> list[tuple[str | None, str, tuple[int, ...]]]:
    """'prefill/input_ids:1x128,...' -> [(profile or None, input, shape), ...]."""
    found = []
    for item in text.split(","):
        name, colon, dims = item.strip().rpartition(":")
        numbers = dims.split("x")
        if not colon or not name or not all(number.isdecimal() for number in numbers):
            raise UserError(
                f"--{bound}-shapes has {item.strip()!r}, expected NAME:AxBx.. or PROFILE/NAME:AxBx.., as in input_ids:1x128"
            )
        head, slash, rest = name.partition("/")
        profile = head if slash and head in profiles else None
        found.append((profile, rest if profile else name, tuple(map(int, numbers))))
    return found


def _note(
    given: dict[str, dict[str, tuple[int, str]]],
    bound: str,
    name: str,
    shape: tuple[int, ...],
    inputs: Mapping[str, Shape],
) -> None:
    """Write down what an override says of each dimension: dimension -> bound -> (value, input that said so)."""
    if name not in inputs:
        raise UserError(f"--{bound}-shapes names {name!r}, expected one of the graph's inputs: {', '.join(inputs)}")
    dims = inputs[name]
    if len(shape) != len(dims):
        raise UserError(
            f"--{bound}-shapes gives {name} {len(shape)} dimensions, expected {len(dims)}: {_written(dims)}"
        )
    for dim, value in zip(dims, shape, strict=True):
        if isinstance(dim, int):
            if dim != value:
                raise UserError(f"--{bound}-shapes gives {name} {value} where it is always {dim}: {_written(dims)}")
            continue
        other, by = given.setdefault(dim, {}).setdefault(bound, (value, name))
        if other != value:
            raise UserError(
                f"--{bound}-shapes has {dim} twice: {other} by {by} and {value} by {name}; give equal numbers"
            )


def _profile(
    name: str,
    inputs: Mapping[str, Shape],
    defaults: Mapping[str, Bounds],
    given: Mapping[str, Mapping[str, tuple[int, str]]],
) -> EngineProfile:
    used = {d for shape in inputs.values() for d in shape if isinstance(d, str)}
    unknown = sorted(used - set(defaults) - {_TOTAL})
    if unknown:
        raise UserError(
            f"the graph has a dynamic dimension {unknown[0]!r}, expected {', '.join([*defaults, _TOTAL])}; "
            "give a file that export-vq wrote"
        )
    dims = {dim: _bounds(name, dim, defaults[dim], given.get(dim, {})) for dim in sorted(used - {_TOTAL})}
    if _TOTAL in used:
        past = dims.get(_PAST, (0, 0, 0))
        sums = [p + s for p, s in zip(past, dims[_SEQUENCE], strict=True)]
        dims[_TOTAL] = (sums[0], sums[1], sums[2])
        for bound, (value, by) in given.get(_TOTAL, {}).items():
            derived = dims[_TOTAL][BOUNDS.index(bound)]
            if value != derived:
                raise UserError(
                    f"--{bound}-shapes gives {by} {_TOTAL} {value} in profile {name}, expected {derived}, the sum of its "
                    f"{_PAST} and {_SEQUENCE}; leave it out, or give input_ids and past_key_values to match"
                )
    shapes = {
        n: [tuple(d if isinstance(d, int) else dims[d][i] for d in s) for i in range(3)] for n, s in inputs.items()
    }
    return EngineProfile(name, tuple(InputRange(n, *three) for n, three in shapes.items()))


def _bounds(profile: str, dim: str, default: Bounds, given: Mapping[str, tuple[int, str]]) -> Bounds:
    """The default bounds, moved as far as the given ones ask."""
    low, usual, high = (given[b][0] if b in given else value for b, value in zip(BOUNDS, default, strict=True))
    stated = [given[b][0] for b in BOUNDS if b in given]
    if "min" not in given:
        low = min([low, *stated])
    if "max" not in given:
        high = max([high, *stated])
    if "opt" not in given:
        usual = min(max(usual, low), high)
    if not low <= usual <= high:
        raise UserError(
            f"{dim} of profile {profile} would go from {low} over {usual} to {high}, expected min <= opt <= max; "
            "correct --min-shapes, --opt-shapes or --max-shapes"
        )
    return low, usual, high


def _misfit(profile: EngineProfile, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The first input that a profile does not serve, in words; None when it serves all."""
    for given in profile.inputs:
        shape = tuple(shapes[given.name])
        fits = len(shape) == len(given.min) and all(
            low <= value <= high for low, value, high in zip(given.min, shape, given.max, strict=True)
        )
        if not fits:
            return f"{given.name} is {_written(shape)}, {profile.name} takes {_written(given.min)} to {_written(given.max)}"
    return None


def _written(shape: Shape) -> str:
    return "x".join(map(str, shape))
