"""Layers of engines, as inspector and log write them, held to what a graph quantises."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export_vq.errors import CheckFailed
from export_vq.layer_info import EngineLayer, read_log, unquantised
from export_vq.proof import check_quantised, logged_layers, read_layers
from export_vq.quantised_products import QuantisedProduct

UP = QuantisedProduct("mlp.up", "dequantise_1", "int8", 32 * 48, True)
GATE = QuantisedProduct("mlp.gate", "dequantise_2", "int8", 32 * 48, True)


def line(kind, inputs, constants, nodes, profile=""):
    """As TensorRT for RTX 1.7 logs a layer."""

    def tensors(types, sizes):
        told = "Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Arbitrary) Format with stride order = [0,1,2]"
        return ", ".join(f"{{ Name: x{profile}, Dimensions: [{sizes}], {told.format(t)} }}" for t in types)

    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {'+'.join(nodes)}{profile}_myl1_6, LayerType: {kind}, Inputs: [ {tensors(inputs, '1,-1,32')}], "
        f"Constants: [ {tensors(constants, '1,32,96')}], Outputs: [ {tensors(['Float'], '1,-1,96')}], "
        f"TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    )


def read(*lines):
    return logged_layers("\n".join(["Layers:", *lines, "", "I/O Tensors:", " Name: x, IOMode: Input"]))


BOTH = ["mlp.up", "dequantise_0", "dequantise_1", "mlp.gate", "dequantise_2"]


def test_a_kernel_of_two_products_holds_the_weights_of_both():
    found = read(line("gemm", ["Int8"], ["Int8", "Float"], BOTH))
    assert found.counts == {"gemm": 1}
    assert found.computed[0].nodes == set(BOTH)
    assert found.computed[0].inputs == {"int8"}
    assert found.computed[0].held == {"int8": 32 * 96, "fp8": 0, "int4": 0}
    check_quantised(found, "vq-plain", {}, [UP, GATE])


@pytest.mark.parametrize(
    ("inputs", "constants"),
    [(["Float"], ["Float"]), (["Float"], ["Int8"]), (["Int8"], ["Float"]), (["FP8"], ["FP8"]), ([], [])],
)
def test_a_kernel_of_another_type_is_found(inputs, constants):
    with pytest.raises(CheckFailed, match=r"2 int8 products were meant, the engine computes 2 .*: mlp.up, mlp.gate;"):
        check_quantised(read(line("gemm", inputs, constants, BOTH)), "vq-plain", {}, [UP, GATE])


def test_kernels_around_a_product_do_not_pass_for_it():
    """Before it inputs are rounded, which is an output of the type; after it comes the scale, in a kernel that has its name."""
    around = line("kgen", ["Float"], ["Float"], ["mlp.up", "dequantise_1", "quantise_3"])
    assert unquantised(read(around).computed, [UP]) == ["mlp.up"]


def test_every_profile_counts():
    first, second = (line("gemm", ["Int8"], ["Int8"], BOTH, profile) for profile in ("", " [profile 1]"))
    wrong = line("gemm", ["Float"], ["Float"], BOTH, " [profile 1]")
    check_quantised(read(first, second), "vq-plain", {}, [UP, GATE])
    with pytest.raises(CheckFailed, match="2 of them"):
        check_quantised(read(first, wrong), "vq-plain", {}, [UP, GATE])


def test_an_inspector_tells_the_same_as_the_log():
    def tensors(*types):
        return [{"Name": "int4 by name", "Dimensions": [1, 32, 96], "Format/Datatype": t} for t in types]

    entry = {
        "LayerType": "gemm",
        "Inputs": tensors("Row major Int8 format"),
        "Constants": tensors("Int8", "Float"),
        "Outputs": tensors("Float"),
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in BOTH),
    }
    logged = read(line("gemm", ["Int8"], ["Int8", "Float"], BOTH)).computed
    assert read_layers(json.dumps({"Layers": [entry]})).computed == logged
    alone = {**entry, "Weights": {"Type": "Int8", "Count": 3072}}  # of a layer that is not compiled with others
    del alone["Constants"]
    assert EngineLayer.of(alone) == logged[0]


def test_where_constants_are_not_told_inputs_decide():
    """TensorRT 10.10. Weights alone cannot be seen there."""
    alone = QuantisedProduct("o", "dequantise_9", "int4", 64, False)
    entry = {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Int8"}], "Metadata": "[ONNX Layer: mlp.up]"}
    found = read_layers(json.dumps({"Layers": [entry, "another"]}))
    assert unquantised(found.computed, [UP, GATE, alone]) == ["mlp.gate"]


def test_a_log_without_layers_tells_nothing():
    assert logged_layers("") is None
    assert read_log("Engine Layer Information:\nLayer(Constant): x, Tactic: 0x0") == []


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6), st.randoms())
def test_one_product_left_out_of_its_kernel_is_missed_and_no_other_kernel_s(groups, draw: random.Random):
    """Products fused into kernels in any way; of one the numbers are in the type of the graph."""
    named = [
        [QuantisedProduct(f"p{i}.{j}", f"d{i}.{j}", "int8", n, True) for j, n in enumerate(g)]
        for i, g in enumerate(groups)
    ]
    everything = [product for group in named for product in group]

    def layers(left=None):
        return [
            EngineLayer(
                frozenset(p.name for p in group),
                frozenset({"int8"}),
                {"int8": sum(p.numbers for p in group if p != left)},
            )
            for group in named
        ]

    assert unquantised(layers(), everything) == []
    left = draw.choice(everything)
    missing = unquantised(layers(left), everything)
    assert missing
    assert {name.split(".")[0] for name in missing} == {left.name.split(".")[0]}
