"""Graphs that give the best tokens or a drawn one: names, parity for the VQ graph and its dense twin, every way to be wrong."""

import contextlib
import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from checkpoints import save_tiny, tiny_head, tiny_model

from export_vq import feeds
from export_vq.bundle import Bundle
from export_vq.choice_errors import TEMPERATURE, ChoiceErrors, boundary_bound
from export_vq.errors import UserError
from export_vq.files import sha256
from export_vq.graph import ExportOptions, export_onnx, head_graph
from export_vq.head_output import HeadOutput
from export_vq.inspection import inspect_path
from export_vq.load import load_model
from export_vq.parity import CaseInput, check_parity
from export_vq.ranking import order_of_draws
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, TorchRunner, signature_of
from export_vq.steps import export_step

K = 7
CASES = [
    CaseInput("batch 1", np.random.default_rng(0).integers(2, 97, (1, 12)), 7, (0,)),
    CaseInput("batch 3, left padding", np.random.default_rng(1).integers(2, 97, (3, 14)), 9, (0, 3, 5)),
]
GRAPHS = [
    ("product", "topk", False),
    ("single", "topk", True),
    ("single", "sample", False),
    ("product", "sample", True),
    ("additive", "logits", True),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One of GRAPHS -> (loaded, folder, artifacts) of a tiny Llama, exported once; single heads have no bias."""

    @functools.cache
    def export(graph):
        kind, output, last_token = graph
        loaded = tiny_model("llama", kind, bias=kind != "single")
        folder = tmp_path_factory.mktemp(output)
        return loaded, folder, export_onnx(loaded, folder, ExportOptions(output=output, top_k=K, last_token=last_token))

    return export


@pytest.fixture(params=GRAPHS, ids=lambda graph: "-".join(map(str, graph)))
def exported(request, exports):
    return exports(request.param)


def _check(loaded, path, signature, wrap=lambda runner: runner, **options):
    with TorchRunner(loaded, signature) as reference, OrtRunner(path, signature, native=False) as candidate:
        return check_parity(reference, wrap(candidate), CASES, dtype="fp32", greedy_tokens=8, **options)


@pytest.mark.parametrize("graph", ["vq", "dense"])
def test_the_graph_gives_what_pytorch_gives(exported, graph):
    loaded, folder, artifacts = exported
    signature = signature_of(artifacts[graph])
    report = _check(loaded, folder / artifacts[graph].path, signature)
    assert report, report.failures
    rows = 1 + 5, 3 * (1 + 5)  # last token: one of the prefill, then every step, of each row
    assert report.total.positions == (sum(rows) if signature.last_token else 12 + 3 * 14 - 8)
    assert report.total.logit_range > 1  # logits that hardly vary would agree by chance
    assert (report.greedy_equal, report.greedy_tokens) == ((0, 0) if signature.output == "sample" else (8, 8))
    assert (report.boundary_draws is None) == (signature.output != "sample")
    assert report.output == signature.output


def test_names_dimensions_and_types_are_as_contracted(exported):
    _, folder, artifacts = exported
    signature = signature_of(artifacts["vq"])
    s = 1 if signature.last_token else "sequence_length"
    for kind, artifact in artifacts.items():
        onnx.checker.check_model(folder / artifact.path, full_check=True)
        graph = onnx.load(folder / artifact.path).graph
        outputs, inputs = (
            {
                v.name: (
                    [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
                    v.type.tensor_type.elem_type,
                )
                for v in values
                if not v.name.startswith(("present.", "past_key_values."))
            }
            for values in (graph.output, graph.input)
        )
        real, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
        lead = ["batch_size", s]
        width = artifact.spec.num_codebooks * artifact.spec.num_codes
        scores = {"code_logits": ([*lead, width], real)} if kind == "vq" else {}
        assert (
            outputs
            == {
                "logits": {"logits": ([*lead, 97], real)},
                "topk": {"values": ([*lead, K], real), "ids": ([*lead, K], whole), "logsumexp": (lead, real), **scores},
                "sample": {"ids": (lead, whole), "logprob": (lead, real)},
            }[signature.output]
        )
        drawn_with = {name: inputs[name] for name in inputs if name in ("temperature", "uniform")}
        wanted = {"temperature": ([1], real), "uniform": (lead, real)} if signature.output == "sample" else {}
        assert drawn_with == wanted
    assert f"VQ{ {'logits': 'GatherScatter', 'topk': 'TopK', 'sample': 'Sample'}[signature.output] }" in " ".join(
        inspect_path(folder / "model.onnx").notes
    )


def test_the_runner_hands_out_the_tables_of_the_head(exported):
    loaded, folder, artifacts = exported
    with OrtRunner(folder / "model.onnx", signature_of(artifacts["vq"]), native=False) as runner:
        head = runner.head
    with OrtRunner(folder / "dense.onnx", signature_of(artifacts["dense"]), native=False) as runner:
        assert runner.head is None
    np.testing.assert_array_equal(head.codes, loaded.head.codes.numpy(), strict=True)
    if loaded.head.bias is None:
        assert head.bias is None
    else:
        np.testing.assert_array_equal(head.bias, loaded.head.bias.detach().numpy(), strict=True)


@pytest.mark.parametrize(("kind", "output"), [("product", "topk"), ("single", "sample")])
def test_fp16_is_no_worse_than_twice_pytorch_in_fp16(kind, output, tmp_path):
    loaded = tiny_model("llama", kind)
    artifacts = export_onnx(loaded, tmp_path, ExportOptions(dtype="fp16", output=output, top_k=K))
    signature = signature_of(artifacts["vq"])
    oracle, native = TorchRunner(loaded, signature, torch.float64), TorchRunner(loaded, signature, torch.float16)
    with OrtRunner(tmp_path / "model.onnx", signature, native=False) as candidate:
        report = check_parity(oracle, candidate, CASES, dtype="fp16", native=native)
    assert report, report.failures
    assert report.oracle_error > 1e-5  # fp16 really was used
    prompt = feeds.prefill(signature, CASES[0].ids, np.ones_like(CASES[0].ids))
    outputs = native.infer(prompt | feeds.draws(signature, CASES[0].ids, np.random.default_rng(0)))
    types = {name: array.dtype for name, array in outputs.items() if name in artifacts["vq"].output_names}
    whole, wide, half = np.dtype(np.int64), np.dtype(np.float32), np.dtype(np.float16)
    given = {"values": wide, "ids": whole, "logsumexp": wide, "logprob": wide, "code_logits": half}
    assert types == {name: given.get(name, half) for name in artifacts["vq"].output_names}


class Changed:
    """A runner whose outputs are changed on the way."""

    def __init__(self, runner, change):
        self.name, self.signature, self._runner, self._change = runner.name, runner.signature, runner, change

    def infer(self, given):
        outputs = self._runner.infer(given)
        return outputs | self._change(outputs)


WRONG = {
    "value": ("topk", lambda out: {"values": out["values"] + np.float32(0.01)}, "largest value error"),
    "normaliser": ("topk", lambda out: {"logsumexp": out["logsumexp"] + np.float32(0.01)}, "largest value error"),
    "token": (
        "topk",
        lambda out: {"ids": np.concatenate([(out["ids"][..., :1] + 1) % 97, out["ids"][..., 1:]], -1)},
        "value error",
    ),
    "order": ("topk", lambda out: {n: out[n][..., ::-1] for n in ("values", "ids")}, "out of order"),
    "twice": ("topk", lambda out: {n: np.repeat(out[n][..., :1], K, -1) for n in ("values", "ids")}, "out of order"),
    "out of range": ("topk", lambda out: {"ids": out["ids"] + 97}, "out of order"),
    "code logits": ("topk", lambda out: {"code_logits": out["code_logits"] * np.float32(1.01)}, "code_logits error"),
    "nan": ("topk", lambda out: {"values": out["values"] * np.float32(np.nan)}, "value error is nan"),
    "neighbour": ("sample", lambda out: {"ids": (out["ids"] + 1) % 97}, "are not the token that their number asks for"),
    "chance": ("sample", lambda out: {"logprob": out["logprob"] + np.float32(0.01)}, "largest log-probability error"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_choice_fails(exports, name):
    output, change, words = WRONG[name]
    loaded, folder, artifacts = exports(GRAPHS[0] if output == "topk" else GRAPHS[2])
    signature = signature_of(artifacts["vq"])
    report = _check(loaded, folder / "model.onnx", signature, lambda runner: Changed(runner, change))
    assert not report
    assert any(words in failure for failure in report.failures), report.failures


def test_a_draw_is_right_inside_its_share_and_counted_at_its_boundary():
    """Four tokens of equal chance, one codebook: drawn in the order of (code, id), 1 3 0 2."""
    order = order_of_draws(np.array([[1], [0], [1], [0]]))
    assert order.tolist() == [1, 3, 0, 2]
    bound = boundary_bound(0.0, 4)
    assert bound == pytest.approx((256 + 8) * 2**-24, rel=1e-3)
    uniform = np.array([0.0, 0.25, 0.499, 0.5, 0.75, 1 - 2**-24])
    logprob = np.full(6, np.log(0.25), np.float32)

    def judged(ids, numbers):
        errors = ChoiceErrors(order)
        reference = {"logits": np.zeros((6, 4), np.float32)}
        errors.add(reference, {"ids": np.array(ids), "logprob": logprob}, np.full(6, -1), numbers)
        return errors.draws_outside(bound), errors.stats().top1_agreement

    assert judged([1, 3, 3, 0, 2, 2], uniform) == ((0, 0, 0.0), 1.0)
    (near, beyond, _), agreement = judged([1, 3, 3, 0, 2, 2], uniform + np.array([0, -bound / 2, 0, -bound / 2, 0, 0]))
    assert (near, beyond, agreement) == (2, 0, 4 / 6)
    (near, beyond, margin), _ = judged([3, 1, 3, 0, 2, 2], uniform + np.array([0, 0.1, 0, 0, 0, 0]))
    assert (near, beyond) == (0, 2)
    assert margin == pytest.approx(0.25)


def test_errors_of_the_best_tokens_against_plain_formulas():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((70, 50))
    other = logits + 0.001 * rng.standard_normal((70, 50))
    ids = np.argsort(-other, axis=1)[:, :6]
    given = {
        "values": np.take_along_axis(other, ids, 1),
        "ids": ids,
        "logsumexp": np.log(np.exp(other).sum(1)),
    }
    errors = ChoiceErrors(np.arange(50))
    targets = rng.integers(0, 50, 70)
    errors.add({"logits": logits}, given, targets)
    stats = errors.stats()
    wrong = np.abs(given["values"] - np.take_along_axis(logits, ids, 1))
    swapped = np.abs(given["values"] - -np.sort(-logits, axis=1)[:, :6])
    norm = np.abs(given["logsumexp"] - np.log(np.exp(logits).sum(1)))
    assert stats.max_abs == pytest.approx(max(wrong.max(), swapped.max(), norm.max()))
    shares = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    known = (ids == targets[:, None]).any(1)
    assert known.any()
    assert stats.perplexity_reference == pytest.approx(np.exp(-shares[np.arange(70), targets][known].mean()))
    assert stats.top1_agreement == (ids[:, 0] == logits.argmax(1)).mean()
    assert 0 < stats.kl_mean < 1e-5
    assert errors.disordered == 0


def test_a_softcap_stands_in_the_way_of_choosing_and_not_of_the_last_token(tmp_path):
    loaded = tiny_model("gemma3_text", "single")
    loaded.model.config.final_logit_softcapping = 2.0
    with pytest.raises(UserError, match=r"--output is topk, expected logits: .* softcap .* --output logits"):
        export_onnx(loaded, tmp_path, ExportOptions(output="topk"))
    artifact = export_onnx(loaded, tmp_path, ExportOptions(last_token=True))["vq"]
    report = _check(loaded, tmp_path / "model.onnx", signature_of(artifact))
    assert report, report.failures


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": "topk", "top_k": 98}, r"--top-k is 98, expected 1 to 97"),
        ({"output": "topk", "top_k": 0}, r"--top-k is 0, expected 1 to 97"),
        ({"output": "tokens"}, r"--output is 'tokens', expected one of logits, topk, sample"),
    ],
)
def test_what_no_head_gives_is_refused(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export_onnx(tiny_model(), tmp_path, ExportOptions(**options))
    assert not list(tmp_path.iterdir())


class Quiet:
    """Progress that nobody watches."""

    def step(self, _):
        return contextlib.nullcontext()

    def skipped(self, name):
        pass


def test_a_graph_made_with_other_options_is_not_kept(tmp_path):
    save_tiny(tmp_path / "model.pt")
    source, bundle = sha256(tmp_path / "model.pt"), Bundle(tmp_path / "out")
    loaded = load_model(tmp_path / "model.pt")
    made = []

    def load():
        made.append(1)
        return loaded

    for options, count in [
        (ExportOptions(output="topk", top_k=3), 1),
        (ExportOptions(output="topk", top_k=3), 1),
        (ExportOptions(output="topk", top_k=4), 2),
    ]:
        kept = export_step(load, source, bundle, options, Quiet())
        assert len(made) == count
        assert (kept["vq"].output, kept["vq"].top_k) == ("topk", options.top_k)
    assert ExportOptions(top_k=9).head_output == ExportOptions().head_output  # it counts for topk only
    assert ExportOptions(last_token=True).head_output != ExportOptions().head_output
    old = {n: v for n, v in kept["vq"].to_json().items() if n not in ("output", "top_k", "last_token")}
    read = OnnxArtifact.from_json(old)
    assert (read.output, read.top_k, read.last_token) == ("logits", 0, False)


@pytest.mark.parametrize("kind", ["vq", "dense"])
@pytest.mark.parametrize("word", ["topk", "sample"])
def test_an_empty_batch_goes_through(kind, word):
    import onnxruntime as ort

    head = tiny_head("product", 24, 31, bias=False)
    model = head_graph(head, kind, output=HeadOutput(word, 3 if word == "topk" else 0))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    for rows in (0, 2):
        hidden = np.ones((rows, 1, 24), np.float32)
        signature = feeds.Signature((), False, output=word)
        given = {"hidden_states": hidden} | feeds.draws(
            signature, hidden[:, :, 0], np.random.default_rng(0), TEMPERATURE
        )
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, given), strict=True))
        assert outputs["ids"].shape == ((rows, 1, 3) if word == "topk" else (rows, 1))
