"""What the stages hand to each other: frozen dataclasses that save to JSON and come back equal.

Measuring and judging can so happen on different machines. Nothing here computes; properties only derive.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from export_vq import contract
from export_vq.errors import UserError
from export_vq.files import write_text

R = TypeVar("R", bound="Record")


class Record:
    """Base of the records: to and from JSON."""

    def to_json(self) -> dict[str, Any]:
        """The record as plain dicts, lists, numbers and strings."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_json(cls: type[R], data: dict[str, Any]) -> R:
        """The record that `to_json` wrote; unknown fields are refused by the constructor.

        Raises:
            TypeError, ValueError: it is none; the sentence names the field.
        """
        if not isinstance(data, dict):
            raise TypeError(f"{cls.__name__} is {_kind(data)}, expected a dict")
        hints = typing.get_type_hints(cls)
        return cls(**{name: _revive(hints.get(name, Any), value, name) for name, value in data.items()})

    def save(self, path: Path) -> None:
        """Write the record as a JSON file, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=True) + "\n")

    @classmethod
    def load(cls: type[R], path: Path) -> R:
        """Read a file that `save` wrote.

        Raises:
            UserError: the file is missing or is no such record.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: not a readable {cls.__name__} ({error}); delete it and run again") from error


def _revive(hint: Any, value: Any, name: str) -> Any:
    """Rebuild nested records and tuples from what JSON made of them; what is of another type than the field is refused."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        return None if value is None and len(inner) < len(args) else _revive_one_of(inner, value, name)
    if origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_revive(args[0], item, name) for item in value)
        if len(args) != len(value):
            raise ValueError(f"{name} has {len(value)} items, expected {len(args)}")
        return tuple(_revive(arg, item, name) for arg, item in zip(args, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _revive(args[1], item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    wanted = (int, float) if hint is float else origin or hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{name} is {_kind(value)}, expected {getattr(hint, '__name__', hint)}")
    return value


def _revive_one_of(hints: list[Any], value: Any, name: str) -> Any:
    if len(hints) == 1:
        return _revive(hints[0], value, name)
    if not isinstance(value, tuple(typing.get_origin(hint) or hint for hint in hints)):
        raise TypeError(f"{name} is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "null"


@dataclass(frozen=True)
class HeadSpec(Record):
    """The shape of a VQ-Logits head.

    kind 'single' has codebook [1, K, D], 'product' [M, K, D/M], 'additive' [M, K, D]. With `tie_embedding` the model's
    input embedding is the head's dense twin, its rows read from the same codes and codebooks.
    """

    kind: str
    hidden_size: int
    vocab_size: int
    num_codebooks: int
    num_codes: int
    has_bias: bool = False
    has_rotation: bool = False
    tie_embedding: bool = False

    @property
    def section(self) -> dict[str, Any]:
        """The `vq_logits` section of a checkpoint's config; `tie_embedding` is left out where it is false, its default."""
        names = ("kind", "num_codebooks", "num_codes", "has_bias", "has_rotation")
        section = {name: getattr(self, name) for name in names}
        return {**section, "tie_embedding": True} if self.tie_embedding else section

    @property
    def codebook_shape(self) -> tuple[int, int, int]:
        width = self.hidden_size // self.num_codebooks if self.kind == "product" else self.hidden_size
        return (self.num_codebooks, self.num_codes, width)

    @property
    def float_numbers(self) -> int:
        """Floating-point parameters of the head: codebook, bias, rotation."""
        m, k, width = self.codebook_shape
        bias = self.vocab_size if self.has_bias else 0
        rotation = self.hidden_size**2 if self.has_rotation else 0
        return m * k * width + bias + rotation

    @property
    def code_bytes(self) -> int:
        """Bytes of the code ids, packed to 8, 16 or 32 bits each."""
        return self.vocab_size * self.num_codebooks * contract.code_bits(self.num_codes) // 8

    def head_bytes(self, bytes_per_number: int = 2) -> int:
        """Bytes of the whole head, everything counted: codebook, codes (packed), bias, rotation."""
        return self.float_numbers * bytes_per_number + self.code_bytes

    def dense_bytes(self, bytes_per_number: int = 2) -> int:
        """Bytes of the full-softmax head that it stands for."""
        return self.dense_numbers * bytes_per_number

    @property
    def dense_numbers(self) -> int:
        """Parameters of the full-softmax head that it stands for."""
        return self.vocab_size * (self.hidden_size + (1 if self.has_bias else 0))


@dataclass(frozen=True)
class OnnxArtifact(Record):
    """An exported graph and where it came from.

    `head` is 'vq' or 'dense'; `form` 'portable', 'plain', 'plugin', or 'dense' for the dense twin. `path` is the .onnx
    file's name, relative to the sidecar. `cache_shapes` gives (KV heads, head_dim) of each layer's cache.
    """

    path: str
    head: str
    form: str
    dtype: str
    opset: int
    model_type: str
    spec: HeadSpec
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    cache_shapes: tuple[tuple[int, int], ...]
    source_sha256: str
    num_bytes: int
    file_sha256: dict[str, str]
    versions: dict[str, str]
    tied_embedding: bool = False
    """The dense original shared its output layer with the input embedding; `spec` says what the VQ model's is."""
    notes: tuple[str, ...] = ()
    external_data_bytes: int = 0
    """Weights above this were to go to a .data file."""
    output: str = "logits"
    """What the head gives: 'logits', 'topk' or 'sample'."""
    top_k: int = 0
    """How many tokens a 'topk' graph gives."""
    last_token: bool = False
    """The head gives it of the last position only."""
    precision: str = ""
    """What calibrate made of the weights, and of the activations: 'int8', 'fp8', 'w8' or 'int4'; '' as exported."""

    @property
    def fusible(self) -> bool:
        """Whether ONNX Runtime's fused kernels for quantised products compute what the graph says: those of int8 do."""
        return self.precision in ("", "int8")


@dataclass(frozen=True)
class ErrorStats(Record):
    """How far a candidate's logits are from a reference's, over `positions` token positions.

    Errors are absolute; `logit_range` is the reference's max minus min; KL in nats of the reference's distribution from
    the candidate's; agreements are fractions of positions under the tie rule; perplexities over the same text.
    """

    positions: int
    max_abs: float
    mean_abs: float
    logit_range: float
    cosine_min: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    top5_agreement: float
    perplexity_reference: float
    perplexity_candidate: float
    error_histogram: tuple[tuple[float, int], ...] = ()
    """(upper edge of log10 |error|, count) over a sample of all logits."""

    @property
    def relative_max(self) -> float:
        """Largest error as a share of the logit range."""
        return self.max_abs / self.logit_range if self.logit_range else float(self.max_abs > 0)


@dataclass(frozen=True)
class ParityCase(Record):
    """One shape of the parity run: a prefill, then decode steps through the KV cache."""

    name: str
    batch: int
    prefill: int
    decode_steps: int
    left_padded: bool
    stats: ErrorStats
    cache_max_abs: float
    """Largest error of the returned KV cache."""


COMPARED = {"logits": "logit", "topk": "value", "sample": "log-probability"}
"""What graphs are compared by, by what they give."""


@dataclass(frozen=True)
class ParityReport(Record):
    """The export gap: is the candidate the same function as the reference? Truthy when every limit holds."""

    reference: str
    candidate: str
    dtype: str
    total: ErrorStats
    cases: tuple[ParityCase, ...]
    limits: dict[str, float]
    failures: tuple[str, ...]
    native_error: float | None = None
    """Half precision only: PyTorch's own max abs error in this dtype against the float64 oracle."""
    oracle_error: float | None = None
    """Half precision only: the candidate's max abs error against the same oracle."""
    greedy_tokens: int = 0
    greedy_equal: int = 0
    output: str = "logits"
    """What the graphs give: 'logits', 'topk' or 'sample'; errors are of logits, values or log-probabilities."""
    boundary_draws: int | None = None
    """'sample' only: draws where rounding at a boundary of the distribution chose the neighbour."""

    @property
    def compared(self) -> str:
        """What the errors are of."""
        return COMPARED[self.output]

    def __bool__(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Timing(Record):
    """Latencies of one runner on one workload, in milliseconds."""

    subject: str
    """What ran: 'head' or 'decode step'."""
    runner: str
    """'vq', 'dense', or another way to do the same."""
    batch: int
    cache: str
    """'warm': its own loop; 'cold': the CPU's caches were evicted before every run."""
    samples: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    q1_ms: float
    q3_ms: float


@dataclass(frozen=True)
class BenchReport(Record):
    """Timings of one run on one machine; ratios are only meaningful inside one report."""

    device: str
    threads: int
    dtype: str
    backend: str
    timings: tuple[Timing, ...]

    def speedup(self, subject: str, batch: int, cache: str, over: str = "dense", of: str = "vq") -> float:
        """Median of another runner over the median of one, VQ if not told otherwise."""
        found = {
            t.runner: t.median_ms for t in self.timings if (t.subject, t.batch, t.cache) == (subject, batch, cache)
        }
        return found[over] / found[of]


@dataclass(frozen=True)
class InputRange(Record):
    """The shapes of one input that an optimisation profile serves."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class EngineProfile(Record):
    """One optimisation profile of an engine: 'prefill' and 'decode' of a decoder graph, 'head' of a head alone."""

    name: str
    inputs: tuple[InputRange, ...]


@dataclass(frozen=True)
class PluginLayer(Record):
    """A layer that a plugin computes, as TensorRT tells it. Types are TensorRT's names, lower case; '' where it tells none."""

    name: str
    plugin: str
    version: str
    namespace: str
    input_dtypes: tuple[str, ...]
    output_dtypes: tuple[str, ...]


@dataclass(frozen=True)
class EngineArtifact(Record):
    """A TensorRT plan, what it was built from, and what may load it.

    `kind` is 'vq-plugin', 'vq-plain' or 'dense'; `path` and `onnx` are file names relative to the sidecar. `flavour` is
    'tensorrt' or 'tensorrt_rtx', `gpu` and `compute_capability` name the one GPU that the plan is for, both None where
    any GPU of that TensorRT may load it. `source_sha256` is of the ONNX file that was given and of its weights file.
    """

    path: str
    onnx: str
    kind: str
    dtype: str
    flavour: str
    tensorrt_version: str
    gpu: str | None
    compute_capability: str | None
    plugin_sha256: str | None
    source_sha256: dict[str, str]
    profiles: tuple[EngineProfile, ...]
    options: dict[str, Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    cache_shapes: tuple[tuple[int, int], ...]
    plugin_layers: tuple[PluginLayer, ...]
    layers: dict[str, int]
    """How many layers of each type."""
    layers_from: str
    """'engine': read back from the plan on a GPU; 'network': from the parsed network, where there was none."""
    num_bytes: int
    sha256: str
    versions: dict[str, str]
    output: str = "logits"
    top_k: int = 0
    last_token: bool = False
    """What the head gives, as in `OnnxArtifact`."""


@dataclass(frozen=True)
class Compressed(Record):
    """A checkpoint that compress wrote, and everything it was made from."""

    source_sha256: str
    text_sha256: str
    options: dict[str, Any]
    version: str
    spec: HeadSpec
    sha256: str


@dataclass(frozen=True)
class Continuation(Record):
    """What the exported model writes after a prompt, greedily; both empty where there is no tokenizer."""

    prompt: str
    text: str


@dataclass(frozen=True)
class TextQuality(Record):
    """One output layer on one text, against the dense model at the same positions: those that have a next token.

    KL in nats of the dense distribution from this one; agreements are fractions of positions under the tie rule (top-5:
    how much of the two sets of five is common). `floor` is the lowest perplexity that any training could reach on this
    text with the head's mapping of tokens to codes, 1 where every token has a vector of its own.
    """

    text: str
    positions: int
    perplexity: float
    perplexity_dense: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    top5_agreement: float
    floor: float

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.1 is ten percent worse than the dense model."""
        return self.perplexity / self.perplexity_dense - 1


@dataclass(frozen=True)
class HeadQuality(Record):
    """What an output layer costs and what it takes.

    `kind` is 'single', 'product' or 'additive' (then `spec` has the sizes), 'dense', 'int8' or 'int4'. `float_numbers` are
    the floating-point parameters: integers, be they code ids or quantised weights, count in the bytes only. `num_bytes`
    is everything, floating-point numbers in fp16; `dense_bytes` is what the dense layer takes. `total` pools the `texts`
    by their positions. `dead_codes` are those that no token uses, of M * K. `method` and `seed` say how the head was
    made, `head_ms` how long it runs alone, where that is known.
    """

    name: str
    kind: str
    float_numbers: int
    num_bytes: int
    dense_bytes: int
    total: TextQuality
    texts: tuple[TextQuality, ...]
    spec: HeadSpec | None = None
    dead_codes: int | None = None
    method: str = ""
    seed: int | None = None
    head_ms: float | None = None

    @property
    def bytes_share(self) -> float:
        """Of the dense layer's bytes."""
        return self.num_bytes / self.dense_bytes


@dataclass(frozen=True)
class Sample(Record):
    """What several models write after the same prompt, greedily: model name -> text."""

    prompt: str
    texts: dict[str, str]


@dataclass(frozen=True)
class QualityReport(Record):
    """Output layers of several kinds and sizes, held against the same dense model on the same held-out texts.

    `dense` names that model; `block` is how many tokens it saw together, so a position has less context than that.
    """

    dense: str
    block: int
    heads: tuple[HeadQuality, ...]
    samples: tuple[Sample, ...] = ()

    @property
    def positions(self) -> dict[str, int]:
        """Judged positions of each text."""
        return {text.text: text.positions for text in self.heads[0].texts} if self.heads else {}


@dataclass(frozen=True)
class LayerDivergence(Record):
    """What one layer costs when it alone is quantised: mean KL in nats of the unquantised distribution from the other."""

    name: str
    kl: float
    kept: bool
    """It was left as it was."""


@dataclass(frozen=True)
class CalibrationReport(Record):
    """A quantised graph, how it was made, and what that cost on documents that it was not made with. Truthy when every
    limit holds.

    `path` is the graph's file name relative to the report. `method` is how ranges were chosen, or how int4 was rounded, '' where
    weights alone are rounded to nearest; `block` how many weights share a scale, 0 for one a channel; `smooth` the strength of migration, 0 for none.
    `documents` counts those calibrated on and those tested on, which `document_sha256` are of. `total.perplexity_reference`
    is the unquantised VQ graph's.
    """

    path: str
    precision: str
    runtime: str
    method: str
    block: int
    smooth: float
    head: str
    samples: int
    documents: tuple[int, int]
    document_sha256: tuple[str, str]
    quantised: int
    """Products with weights that were quantised."""
    kept: tuple[str, ...]
    """Those that were not."""
    total: ErrorStats
    limits: dict[str, float]
    failures: tuple[str, ...]
    num_bytes: int
    source_bytes: int
    source_sha256: str
    versions: dict[str, str]
    sensitivity: tuple[LayerDivergence, ...] = ()
    """By falling KL; empty where it was not measured."""
    notes: tuple[str, ...] = ()

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.01 is one percent worse than the unquantised graph."""
        return self.total.perplexity_candidate / self.total.perplexity_reference - 1

    def __bool__(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class RunReport(Record):
    """Everything one run of the main job found: report.json."""

    model: str
    model_type: str
    dtype: str
    spec: HeadSpec
    tied_embedding: bool
    total_numbers: int
    """Parameters of the whole VQ model, code ids not counted."""
    artifacts: tuple[OnnxArtifact, ...]
    parity: tuple[ParityReport, ...]
    bench: BenchReport | None
    prompt: str
    continuation: str
    not_done: tuple[str, ...] = ()
    """What this machine could not do, each with the mend."""
    versions: dict[str, str] = field(default_factory=dict)
    engines: tuple[EngineArtifact, ...] = ()
    engine_bench: BenchReport | None = None
    quality: QualityReport | None = None
    """This model beside the dense original and its integer forms, on one text; None where either was not given."""
    calibrations: tuple[CalibrationReport, ...] = ()
    """The quantised graphs that `calibrate` made of this one."""

    @property
    def gap(self) -> TextQuality | None:
        """What the VQ head costs against the user's dense model. The trainer's gap, reported and never judged."""
        heads = self.quality.heads if self.quality else ()
        return next((head.total for head in heads if head.spec is not None), None)

    def __bool__(self) -> bool:
        return all(self.parity)
