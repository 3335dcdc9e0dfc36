"""The integer forms of the dense layer run in ONNX Runtime, and are what the quality report judges."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export_vq.feeds import Signature
from export_vq.quality.rivals import quantised
from export_vq.rival_graphs import GROUP, integer_graph
from export_vq.runners import OrtRunner


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("v", "d"), [(301, 64), (97, 200)])
def test_the_graph_multiplies_with_the_weight_that_is_judged(bits, v, d, tmp_path):
    random = torch.Generator().manual_seed(bits)
    weight = torch.randn(v, d, generator=random)
    hidden = torch.randn(3, 1, d, generator=random)
    ir.save(integer_graph(weight, bits), tmp_path / "head.onnx")
    with OrtRunner(tmp_path / "head.onnx", Signature((), False), threads=1, native=False) as runner:
        found = runner.infer({"hidden_states": hidden.numpy()})["logits"]
    rows = quantised(weight, bits, GROUP).weight.double()
    expected = (hidden.double() @ rows.T).numpy()
    assert found.shape == (3, 1, v)
    # The runtime rounds the input to int8 too, a group at a time: half a step of 1/127 of its largest magnitude, times
    # the weights that it meets.
    groups = torch.nn.functional.pad(hidden.double().squeeze(1), (0, -d % GROUP)).unflatten(1, (-1, GROUP))
    steps = (groups.abs().amax(-1) / 127).repeat_interleave(GROUP, 1)[:, :d]
    allowed = (0.5 * steps @ rows.abs().T).numpy()[:, None] * (1 + 2**-10)
    assert (np.abs(found - expected) <= allowed + 1e-6).all()
    assert np.abs(found - expected).max() > 0
