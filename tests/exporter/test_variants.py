"""What `--matrix` means: combinations, folder names, refusals, and how it is written on the command line."""

import itertools

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export_vq.cli_matrix import OPTION, MatrixCommand
from export_vq.errors import UserError
from export_vq.variants import AXES, Variant, parse_matrix, variants

axes = st.dictionaries(st.sampled_from(list(AXES)), st.just(None), min_size=1).flatmap(
    lambda keys: st.fixed_dictionaries(
        {key: st.lists(st.sampled_from(AXES[key]), min_size=1, max_size=5).map(tuple) for key in keys}
    )
)


@given(axes, st.booleans())
def test_every_combination_is_a_variant_with_a_folder_of_its_own(asked, last_token):
    parsed = parse_matrix([f"{key}={','.join(values)}" for key, values in asked.items()])
    assert {key: set(values) for key, values in parsed.items()} == {key: set(v) for key, v in asked.items()}
    found = variants(parsed, "fp16", "sample", last_token)
    whole = {"dtype": ("fp16",), "output": ("sample",), "form": ("portable",), **asked}
    combinations = set(itertools.product(*(whole[key] for key in ("dtype", "output", "form"))))
    assert {(v.dtype, v.output, v.form) for v in found} == combinations
    assert len({v.name for v in found}) == len(found) == len(combinations)
    assert all(v.last_token == last_token for v in found)


def test_a_variant_has_the_same_folder_in_every_matrix():
    assert [
        v.name for v in variants(parse_matrix(["dtype=fp16,int8", "output=topk,logits"]), "fp32", "logits", False)
    ] == [
        "fp16-topk",
        "fp16-logits",
        "int8-topk",
        "int8-logits",
    ]
    assert variants(parse_matrix(["output=topk"]), "int8", "logits", False) == [Variant("int8", "topk")]
    assert Variant("fp16", "topk", "plain", last_token=True).name == "fp16-topk-plain-last"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["dtyp=fp16"], "has 'dtyp=fp16', expected KEY=VALUE,.. with a key of dtype, output, form"),
        (["fp16"], "has 'fp16', expected KEY=VALUE"),
        (["dtype=fp16,int3"], "has dtype=int3, expected one of fp32, fp16, bf16, int8, w8, int4, fp8"),
        (["dtype="], "has dtype=, expected one of"),
        (["output=top-k"], "has output=top-k, expected one of logits, topk, sample"),
        (["form=plugin"], "has form=plugin, expected one of portable, plain"),
        (["dtype=fp16", "dtype=int8"], "has dtype twice"),
    ],
)
def test_what_is_unknown_is_named(texts, words):
    with pytest.raises(UserError, match=f"--matrix {words}"):
        parse_matrix(texts)


@pytest.mark.parametrize(
    "line",
    [
        "model.pt --matrix dtype=fp16,int8 output=topk,logits",
        "--matrix dtype=fp16,int8 output=topk,logits model.pt",
        "--matrix dtype=fp16,int8 output=topk,logits --out o model.pt",
        "--out o --matrix dtype=fp16,int8 model.pt --matrix output=topk,logits",
    ],
)
def test_its_values_follow_one_another(line):
    @click.command(cls=MatrixCommand)
    @click.argument("model")
    @click.option(OPTION, "matrix", multiple=True)
    @click.option("--out")
    def command(model, matrix, out):
        return model, matrix, out

    model, matrix, out = command.main(line.split(), standalone_mode=False)
    assert (model, matrix) == ("model.pt", ("dtype=fp16,int8", "output=topk,logits"))
    assert out == ("o" if "--out" in line else None)
