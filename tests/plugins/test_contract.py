"""contract.h and contract.py say the same, name by name, in both directions."""

import re
from pathlib import Path

import pytest

from export_vq import contract

INCLUDE = Path(__file__).parents[2] / "plugins/include/vq"
HEADER = (INCLUDE / "contract.h").read_text()

NOT_IN_CPP = {
    "PLUGIN_NAMESPACE", "PLUGIN_VERSION",  # attributes that TensorRT's parser reads from the node, not the plugin
    "KINDS", "CONFIG_SECTION", "CHECKPOINT_FORMAT", "CHECKPOINT_VERSION", "HEAD_PREFIX",  # kernels know no checkpoints
    "DTYPES",  # shape.h, below
}  # fmt: skip
ONLY_IN_CPP = {"PLUGIN_VERSION": str(contract.VERSION)}
"""kPluginVersion is the version as TensorRT writes it; the Python constant of that name is the attribute's name."""


def _python_name(name):
    """kGatherScatterInputs -> GATHER_SCATTER_INPUTS."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name.removeprefix("k")).upper()


def _value(text):
    if text.startswith("{"):
        return tuple(re.findall(r'"([^"]*)"', text))
    return text.strip('"') if text.startswith('"') else int(text)


CONSTANTS = {
    _python_name(name): _value(text)
    for name, text in re.findall(r"inline constexpr [\w\s*]+?(k\w+)(?:\[\])? = (.+?);", HEADER)
}
PYTHON = {name: value for name, value in vars(contract).items() if name.isupper()}


def test_the_header_was_read():
    assert len(CONSTANTS) == HEADER.count("inline constexpr ")


@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_a_constant_of_the_header_is_that_of_python(name):
    assert CONSTANTS[name] == (ONLY_IN_CPP[name] if name in ONLY_IN_CPP else PYTHON[name])


@pytest.mark.parametrize("name", sorted(PYTHON.keys() - NOT_IN_CPP))
def test_a_constant_of_python_is_in_the_header(name):
    assert CONSTANTS[name] == PYTHON[name]


def test_input_numbers_follow_the_order_of_the_inputs():
    (body,) = re.findall(r"enum Input : int \{(.+?)\}", HEADER)
    numbers = {_python_name(name).lower(): int(number) for name, number in re.findall(r"(k\w+) = (\d+)", body)}
    assert numbers == {name: number for number, name in enumerate(contract.SAMPLE_INPUTS)}


def test_element_types_are_those_of_python():
    (body,) = re.findall(r"enum class Type : int32_t \{(.+?)\}", (INCLUDE / "shape.h").read_text())
    short = {"kFloat32": "fp32", "kFloat16": "fp16", "kBFloat16": "bf16"}
    assert tuple(short[name] for name in re.findall(r"(k\w+) = \d+", body)) == contract.DTYPES
