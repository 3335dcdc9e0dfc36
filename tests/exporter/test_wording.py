"""Sentences that several places print."""

import pytest

from export_vq.records import HeadSpec, RunReport
from export_vq.wording import size, size_sentence

V, D, BACKBONE = 50_000, 1000, 10_000_000
"""The dense matrix has 50 million numbers, 100 MB in fp16; the product head 256,000 of them and 100,000 code ids."""


def _report(*, tied: bool, original_tied: bool) -> RunReport:
    spec = HeadSpec("product", D, V, num_codebooks=2, num_codes=256, tie_embedding=tied)
    embedding = 0 if tied else V * D
    return RunReport(
        model="m", model_type="llama", dtype="fp32", spec=spec, tied_embedding=original_tied,
        total_numbers=BACKBONE + embedding + spec.float_numbers,
        artifacts=(), parity=(), bench=None, prompt="", continuation="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tied", "original_tied", "before", "after"),
    [
        (True, True, BACKBONE + V * D, BACKBONE),
        (True, False, BACKBONE + 2 * V * D, BACKBONE),
        (False, False, BACKBONE + 2 * V * D, BACKBONE + V * D),
    ],
)
def test_the_size_of_the_whole_model_counts_what_each_end_of_it_holds(tied, original_tied, before, after):
    report = _report(tied=tied, original_tied=original_tied)
    head = report.spec.head_bytes()
    assert f"the whole model goes from {size(2 * before)} to {size(2 * after + head)}." in size_sentence(report)


def test_an_embedding_that_stays_dense_saves_nothing():
    assert "nothing is saved on disk" in size_sentence(_report(tied=False, original_tied=True))
    assert "nothing is saved on disk" not in size_sentence(_report(tied=True, original_tied=True))
