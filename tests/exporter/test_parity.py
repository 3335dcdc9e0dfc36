"""The check must find what is wrong: each way in which an export can lie makes it fail."""

import json

import numpy as np
import onnx
import pytest
import torch
from checkpoints import tiny_model
from onnx import numpy_helper

from export_vq import feeds
from export_vq.graph import ExportOptions, export_onnx
from export_vq.load import load_model, save_model
from export_vq.logit_errors import ErrorAccumulator
from export_vq.parity import CaseInput, check_parity, standard_cases
from export_vq.ranking import top_ids
from export_vq.records import OnnxArtifact, ParityReport
from export_vq.runners import OrtRunner, TorchRunner, signature_of


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save_model(tiny_model("llama", "product"), folder / "model.pt")
    loaded = load_model(folder / "model.pt")
    export_onnx(loaded, folder, ExportOptions())
    return loaded, folder


def _check(exported, edit=None, tmp_path=None):
    loaded, folder = exported
    artifact = OnnxArtifact.load(folder / "model.onnx.json")
    path = folder / "model.onnx"
    if edit is not None:
        model = onnx.load(path)
        edit(model)
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
    signature = signature_of(artifact)
    rng = np.random.default_rng(0)
    cases = standard_cases(lambda width, count: rng.integers(2, 97, (count, width)), 400)
    with TorchRunner(loaded, signature) as reference, OrtRunner(path, signature) as candidate:
        return check_parity(reference, candidate, cases, dtype="fp32", greedy_tokens=12)


def _weight(model, name, change):
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def _wrong_codebook(model):
    _weight(model, "lm_head.codebook", lambda a: a.__setitem__((0, 0, 3), a[0, 0, 3] + 0.01))


def _wrong_mapping(model):
    _weight(model, "lm_head.codes", lambda a: a.__setitem__((5, 1), (a[5, 1] + 1) % 16))


def _wrong_bias(model):
    _weight(model, "lm_head.bias", lambda a: a.__setitem__(7, a[7] + 0.01))


def _swap(model, first, second):
    """The graph stays the same but for two of its inputs or outputs, which change places."""
    other = {first: second, second: first}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [other.get(name, name) for name in names]


def _wrong_cache_order_in(model):
    _swap(model, "past_key_values.1.key", "past_key_values.1.value")


def _wrong_cache_order_out(model):
    _swap(model, "present.0.key", "present.1.key")


def _nan_in_the_codebook(model):
    _weight(model, "lm_head.codebook", lambda a: a.__setitem__((0, 0, 3), np.nan))


def test_a_faithful_export_passes(exported):
    report = _check(exported)
    assert report, report.failures
    assert report.total.positions >= 400
    assert report.greedy_equal == 12
    assert report.total.relative_max < 1e-6


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_wrong_codebook, "largest logit error"),
        (_wrong_mapping, "largest logit error"),
        (_wrong_bias, "largest logit error"),
        (_nan_in_the_codebook, "largest logit error is nan"),
        (_wrong_cache_order_in, "KV cache of case"),
        (_wrong_cache_order_out, "KV cache of case"),
    ],
)
def test_a_wrong_export_fails(exported, tmp_path, edit, words):
    report = _check(exported, edit, tmp_path)
    assert not report
    assert any(words in failure for failure in report.failures), report.failures


def test_half_precision_fails_when_it_is_worse_than_twice_pytorch(exported):
    loaded, _ = exported
    signature = feeds.Signature(((2, 8), (2, 8)), True)
    oracle = TorchRunner(loaded, signature, torch.float64)
    native = TorchRunner(loaded, signature, torch.float16)
    worse = TorchRunner(loaded, signature, torch.bfloat16)  # eight times the rounding of float16
    case = [CaseInput("one", np.random.default_rng(0).integers(2, 97, (2, 24)), 20, (0, 3))]
    assert check_parity(oracle, native, case, dtype="fp16", native=native)
    report = check_parity(oracle, worse, case, dtype="fp16", native=native)
    assert not report
    assert all("twice PyTorch's own in fp16" in failure for failure in report.failures)
    with pytest.raises(ValueError, match="needs PyTorch in fp16"):
        check_parity(oracle, native, case, dtype="fp16")


def test_report_survives_json(exported):
    report = _check(exported)
    assert ParityReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_statistics_against_plain_formulas():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 70, 50)) * 4
    targets = rng.integers(0, 50, 70)
    targets[::7] = -1
    accumulator = ErrorAccumulator()
    accumulator.add(a[:9], b[:9], targets[:9])  # in two parts
    accumulator.add(a[9:], b[9:], targets[9:])
    stats = accumulator.stats()
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    kl = (p * np.log(p / q)).sum(1)
    known = targets >= 0
    assert stats.positions == 70
    assert stats.max_abs == np.abs(a - b).max()
    np.testing.assert_allclose(stats.mean_abs, np.abs(a - b).mean())
    np.testing.assert_allclose([stats.kl_mean, stats.kl_p99], [kl.mean(), np.quantile(kl, 0.99)])
    np.testing.assert_allclose(stats.perplexity_reference, np.exp(-np.log(p[known, targets[known]]).mean()))
    np.testing.assert_allclose(stats.perplexity_candidate, np.exp(-np.log(q[known, targets[known]]).mean()))
    assert stats.top1_agreement == (a.argmax(1) == b.argmax(1)).mean()
    overlap = [len(set(x) & set(y)) / 5 for x, y in zip((-a).argsort(1)[:, :5], (-b).argsort(1)[:, :5], strict=True)]
    np.testing.assert_allclose(stats.top5_agreement, np.mean(overlap))


def test_equal_values_order_by_token_id():
    assert top_ids(np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 4).tolist() == [1, 3, 2, 4]
    assert top_ids(np.array([1.0, 1.0]), 5).tolist() == [0, 1]
