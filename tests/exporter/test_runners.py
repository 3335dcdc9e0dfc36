"""The native kernels inside OrtRunner: picked where they are built, proven by the profile, the same numbers as stock ops."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import tiny_head

from export_vq.feeds import Signature
from export_vq.forms import convert
from export_vq.graph import head_graph
from export_vq.head import oracle_logits
from export_vq.runners import OrtRunner, native_library
from export_vq.workloads import STOCK, head_workloads

needs_kernels = pytest.mark.skipif(
    native_library() is None, reason="libvq_ort.so is not built; run: export-vq plugins build"
)
BARE = Signature((), False)


@pytest.fixture(params=["single", "product", "additive"])
def head(request):
    return tiny_head(request.param, 24, 1531)


@pytest.fixture
def graph(head, tmp_path):
    path = tmp_path / "head.onnx"
    ir.save(head_graph(head, "vq"), path)
    return path


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_native_and_stock_agree_and_the_profile_tells_them_apart(head, graph, threads):
    hidden = torch.randn(5, 1, 24, generator=torch.Generator().manual_seed(1))
    feeds = {"hidden_states": hidden.numpy()}
    with (
        OrtRunner(graph, BARE, threads=threads) as native,
        OrtRunner(graph, BARE, threads=threads, native=False) as stock,
    ):
        assert native.native_nodes is None
        answers = [runner.infer(feeds)["logits"] for runner in (native, stock)]
        assert (native.native_nodes, stock.native_nodes) == (1, 0)
        assert "native kernels" in native.name
        assert "native kernels" not in stock.name
        again = native.infer(feeds)["logits"]
    np.testing.assert_array_equal(again, answers[0])
    oracle = oracle_logits(head, hidden).detach().numpy()
    for answer in answers:
        np.testing.assert_allclose(answer, oracle, rtol=0, atol=1e-5 * np.ptp(oracle))


@needs_kernels
def test_a_graph_without_the_node_runs_no_kernel_of_ours(head, tmp_path):
    path = tmp_path / "plain.onnx"
    model = head_graph(head, "vq")
    convert(model, "plain")
    ir.save(model, path)
    with OrtRunner(path, BARE) as runner:
        runner.infer({"hidden_states": np.zeros((1, 1, 24), np.float32)})
        assert runner.native_nodes == 0


def test_head_workloads_time_every_way_there_is(head, tmp_path):
    with head_workloads(head, tmp_path, batches=(1, 3)) as work:
        assert [w.batch for w in work] == [1, 3]
        for workload in work:
            assert set(workload.runs) == {"vq", "dense"} | ({STOCK} if native_library() else set())
            for run in workload.runs.values():
                run()
