"""docs/op_contract.md against exporter/contract.py: names, order, types, shapes, attributes, limits."""

import inspect
import re

import documents
import pytest

from export_vq import contract, forms
from export_vq.outputs import TENSORS

PAGE = documents.ROOT / "docs" / "op_contract.md"
TABLES = {(table.heading, table.columns[0]): table.rows for table in documents.tables(PAGE)}
WORDS = " ".join(inspect.getsource(contract).split())
"""The contract says types and shapes in words, as `codes int32 [V, M]`."""


def _names(op, column):
    return tuple(row[0] for row in TABLES[op, column])


@pytest.mark.parametrize("op", TENSORS)
def test_inputs_and_outputs_are_those_of_the_contract_in_order(op):
    inputs, outputs = TENSORS[op]
    assert _names(op, "input") == inputs
    assert _names(op, "output") == outputs


@pytest.mark.parametrize("op", TENSORS)
@pytest.mark.parametrize("column", ["input", "output"])
def test_types_and_shapes_are_those_of_the_contract(op, column):
    for name, type_, shape, _ in TABLES[op, column]:
        assert f"{name} {type_} {shape}" in WORDS


@pytest.mark.parametrize("op", TENSORS)
def test_bias_alone_is_optional(op):
    assert [name for name, *_, remark in TABLES[op, "input"] if "optional" in remark] == ["bias"]


def test_attributes_are_those_of_the_contract():
    assert _names(contract.GATHER_SCATTER, "attribute") == (contract.NUM_CODEBOOKS,)
    assert _names(contract.TOP_K, "attribute") == (contract.NUM_CODEBOOKS, contract.NUM_BEST)
    assert _names(contract.SAMPLE, "attribute") == (contract.NUM_CODEBOOKS,)
    added = {name: remark for name, _, remark in TABLES["Plugin form", "attribute"]}
    assert tuple(added) == (
        contract.CODE_BITS,
        contract.VOCAB_SIZE,
        contract.PLUGIN_NAMESPACE,
        contract.PLUGIN_VERSION,
    )
    assert added[contract.PLUGIN_NAMESPACE] == contract.DOMAIN
    assert added[contract.PLUGIN_VERSION] == str(contract.VERSION)


def test_names_and_versions_are_those_of_the_contract():
    domain, version, types, opset = (value for _, value in TABLES["Names and versions", "what"])
    assert domain == contract.DOMAIN
    assert version == str(contract.VERSION)
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    assert tuple(short[name] for name in types.split(", ")) == contract.DTYPES
    assert opset == str(forms.MIN_OPSET)


def test_limits_are_those_of_the_contract():
    limits = {what: (limit, held) for what, limit, held in TABLES["Limits", "what"]}
    assert limits["k"][0].split(",")[0] == str(contract.MAX_BEST)
    (remark,) = (remark for name, _, remark in TABLES[contract.TOP_K, "attribute"] if name == contract.NUM_BEST)
    assert remark == f"1 to {contract.MAX_BEST}, at most V"
    most = int(limits["K"][0].replace(",", ""))
    narrow, few, wide = map(int, re.findall(r"\d+", limits["K"][1]))
    assert [contract.code_bits(n) for n in (few, few + 1, most)] == [narrow, wide, wide]
    assert contract.code_bits(most + 1) > wide
    assert TABLES["Plugin form", "attribute"][0][2] == f"{narrow} or {wide}"


def test_every_op_has_its_heading():
    assert {text for _, text in documents.headings(PAGE)} >= set(TENSORS)
