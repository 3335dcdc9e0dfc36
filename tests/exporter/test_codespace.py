"""Top-k, normaliser and sampling in code space against the plain route: build all V logits, then sort or sum them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from export_vq import codespace
from export_vq.head import gather_scatter

EPS = torch.finfo(torch.float32).eps
LAST = 1 - 2**-24
"""The largest uniform number that float32 can hold."""

Case = tuple[Tensor, Tensor, "Tensor | None"]
"""code_logits [.., M*K], codes [V, M], bias [V] or None."""


@st.composite
def cases(draw: st.DrawFn, values: str = "any") -> Case:
    """Code logits, codes, bias. Codes leave some of K unused; V is from 1 to 200, the lead from none to two ranks.

    `values`: "integers" are few, so that most tokens tie, and sums are exact; "rounded" adds a large integer to small
    fractions, so that different sums become equal only when rounded to float32; "real" are normal.
    """
    if values == "any":
        values = draw(st.sampled_from(["integers", "rounded", "real"]))
    m, k, v = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 2, 5, 16, 40])), draw(st.integers(1, 200))
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def numbers(*shape: int) -> Tensor:
        if values == "real":
            return 3 * torch.randn(shape, generator=random)
        return torch.randint(-2, 3, shape, generator=random).float()

    code_logits, bias = numbers(*lead, m * k), numbers(v)
    if values == "rounded":  # at 2^22 float32 counts in halves: 0.1 and 0.2 are lost, 0.3 and 0.4 become 0.5
        code_logits += 2**22
        bias = 0.1 * torch.randint(0, 10, (v,), generator=random)
    used = draw(st.integers(1, k))
    codes = torch.randint(k - used, k, (v, m), generator=random, dtype=torch.int32)
    return code_logits, codes, bias if draw(st.booleans()) else None


def by_the_tie_rule(logits: Tensor) -> Tensor:
    """All token ids [.., V], best first, equal values by rising id; sorted by Python so as to share nothing."""
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1]).tolist()
    order = [sorted(range(len(row)), key=lambda v: (-row[v], v)) for row in rows]
    return torch.tensor(order, dtype=torch.long).reshape(logits.shape)


def largest(case: Case) -> float:
    """The largest that |sum of code logits| + |bias| can be."""
    code_logits, codes, bias = case
    total = 0.0 if bias is None else float(bias.abs().max())
    return total + (codes.shape[1] * float(code_logits.abs().max()) if code_logits.numel() else 0.0)


def logsumexp_bound(case: Case, temperature: float = 1.0) -> float:
    """How far a float32 logsumexp, in one stage or by codes, can be from the exact one.

    Each exponent comes from at most M + 3 roundings (the sum of M code logits and bias, the temperature, the maximum
    taken off), each off by at most eps of the largest number there, so each term is off by that share; adding V terms
    adds V eps, exp and log a few. By codes there are two such stages.
    """
    _, codes, _ = case
    v, m = codes.shape
    return 2 * EPS * ((m + 3) * 2 * largest(case) / temperature + v + 8)


def dense64(case: Case) -> Tensor:
    """All V logits, float64 [.., V]."""
    code_logits, codes, bias = case
    return gather_scatter(code_logits.double(), codes, None if bias is None else bias.double())


# ----------------------------------------------------------------------------------------------------------- top-k


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_top_k_is_the_sorted_logits_with_ties_by_id(case, data):
    code_logits, codes, bias = case
    k = data.draw(st.sampled_from([1, 2, 5, codes.shape[0]]).filter(lambda k: k <= codes.shape[0]), label="k")
    found = codespace.top_k(code_logits, codes, bias, k)
    logits = gather_scatter(code_logits, codes, bias)  # float32 as the op defines it: M sums, one bias
    wanted = by_the_tie_rule(logits)[..., :k]
    assert torch.equal(found.ids, wanted)
    assert torch.equal(found.values, logits.gather(-1, wanted))
    assert (found.ids.dtype, found.values.dtype) == (torch.int64, torch.float32)
    assert found.logsumexp.shape == code_logits.shape[:-1]
    assert bool(((found.logsumexp - dense64(case).logsumexp(-1)).abs() <= logsumexp_bound(case)).all())


@settings(max_examples=30, deadline=None)
@given(cases("integers"))
def test_every_k_is_a_prefix_of_the_full_order(case):
    code_logits, codes, bias = case
    order = by_the_tie_rule(dense64(case))  # sums of small integers are exact in float32
    for k in range(1, codes.shape[0] + 1):
        assert torch.equal(codespace.top_k(code_logits, codes, bias, k).ids, order[..., :k])


def test_a_tie_that_only_rounding_makes_goes_to_the_lower_id():
    """2^24 + 1 is 2^24 in float32: token 1 has the larger bias, token 0 the lower id, and their logits are equal."""
    codes, bias = torch.zeros(3, 1, dtype=torch.int32), torch.tensor([0.25, 1.0, 0.5])
    found = codespace.top_k(torch.tensor([2.0**24]), codes, bias, 2)
    assert found.values.tolist() == [2.0**24, 2.0**24]
    assert found.ids.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_ranked_by_its_float32_sums(dtype):
    """1 + 2^-12 is 1 in either half type, and rounded sums would tie; the op ranks before any rounding."""
    codes = torch.tensor([[0, 0], [0, 1]])
    for table, bias in ((torch.tensor([1.0, 0.0, 0.0, 2**-12]), None), (torch.ones(4), torch.tensor([0.0, 2**-12]))):
        found = codespace.top_k(table.to(dtype), codes, None if bias is None else bias.to(dtype), 1)
        assert found.ids.tolist() == [1]
    single = codespace.top_k(torch.ones(1).to(dtype), codes[:, :1], torch.tensor([0.0, 2**-12]).to(dtype), 1)
    assert (single.ids.tolist(), single.values.tolist()) == ([1], [1 + 2**-12])


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_out_of_range_is_refused(m, k):
    with pytest.raises(ValueError, match=r"expected 1 to vocab_size \(5\)"):
        codespace.top_k(torch.zeros(m * 3), torch.zeros(5, m, dtype=torch.int32), None, k)


# -------------------------------------------------------------------------------------------------------- sampling


def layout(codes: Tensor) -> Tensor:
    """The order in which the contract lays tokens out on [0, 1): by (code, id) for M = 1, by id otherwise."""
    v, m = codes.shape
    order = sorted(range(v), key=lambda t: (int(codes[t, 0]), t)) if m == 1 else range(v)
    return torch.tensor(list(order))


def intervals(case: Case, temperature: float) -> tuple[Tensor, Tensor]:
    """Each token's exact place on [0, 1): float64 (from, to), each [.., V] by token id."""
    order = layout(case[1])
    chances = (dense64(case) / temperature).softmax(-1)[..., order]
    to = chances.cumsum(-1)
    back = order.argsort()
    return (to - chances)[..., back], to[..., back]


def place_bound(case: Case, temperature: float) -> float:
    """How far float32 can move an interval's end: each chance by its logsumexp, and V sums; in two stages for M = 1."""
    return 2 * (2 * logsumexp_bound(case, temperature) + case[1].shape[0] * EPS)


@settings(max_examples=100, deadline=None)
@given(cases("real"), st.sampled_from([0.3, 1.0, 2.5]), st.one_of(st.sampled_from([0.0, LAST]), st.floats(0, LAST)))
def test_the_drawn_token_is_the_one_whose_interval_holds_u(case, temperature, u):
    code_logits, codes, bias = case
    uniform = torch.full(code_logits.shape[:-1], u)
    ids, logprob = codespace.sample(code_logits, codes, bias, uniform, temperature)
    assert ids.shape == logprob.shape == uniform.shape
    assert (ids.dtype, logprob.dtype) == (torch.int64, torch.float32)
    start, end = (edge.gather(-1, ids[..., None])[..., 0] for edge in intervals(case, temperature))
    slack = place_bound(case, temperature)
    assert bool(((start - slack <= uniform) & (uniform <= end + slack)).all())
    exact = (dense64(case) / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert bool(((logprob - exact).abs() <= 2 * logsumexp_bound(case, temperature)).all())


@settings(max_examples=40, deadline=None)
@given(cases("real"), st.sampled_from([0.3, 1.0, 2.5]))
def test_the_middle_of_every_interval_draws_its_token(case, temperature):
    """Exact ids: the middle of an interval wider than twice the rounding cannot fall to a neighbour."""
    code_logits, codes, bias = case
    v = codes.shape[0]
    start, end = intervals(case, temperature)
    rows = code_logits[..., None, :].expand(*code_logits.shape[:-1], v, code_logits.shape[-1])
    ids, _ = codespace.sample(rows, codes, bias, ((start + end) / 2).float(), temperature)
    wide = end - start > 2 * (place_bound(case, temperature) + EPS)
    assert torch.equal(ids[wide], torch.arange(v).expand_as(ids)[wide])


@pytest.mark.parametrize("m", [1, 2])
def test_worked_example_of_the_layout(m):
    """Four tokens of equal chance; token 0 has the last code. By (code, id) it comes last, by id first."""
    codes = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0]])[:, :m]
    ids, logprob = codespace.sample(torch.zeros(5, 2 * m), codes, None, torch.tensor([0, 0.3, 0.6, 0.8, LAST]))
    assert ids.tolist() == ([1, 2, 3, 0, 0] if m == 1 else [0, 1, 2, 3, 3])
    assert logprob.tolist() == pytest.approx([-math.log(4)] * 5, abs=8 * EPS)  # a log, an exp and four sums


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dead", [0, 1])
def test_a_token_without_any_chance_is_never_drawn(m, dead):
    """Its logit is 200 lower, and exp(-200) is 0 in float32: not even u = 0 or the last u may hit it."""
    bias = torch.zeros(6)
    bias[[0, 3] if dead == 0 else [2, 5]] = -200.0  # the ends of the layout and of the code buckets
    codes = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [1, 0], [1, 0]])[:, :m]
    uniform = torch.cat([torch.linspace(0, LAST, 101), torch.tensor([0.0, 2**-149, LAST])])
    ids, _ = codespace.sample(torch.zeros(104, 2 * m), codes, bias, uniform)
    assert set(ids.tolist()) == set(range(6)) - ({0, 3} if dead == 0 else {2, 5})


@pytest.mark.parametrize("m", [1, 2])
def test_sums_that_fall_short_of_the_last_u_end_on_a_token_with_a_chance(m):
    """n equal chances in float32 often add up to less than 1 - 2^-24; the token after them has no chance at all."""
    for n in range(2, 100):
        codes = torch.arange(n + 1)[:, None].repeat(1, m)
        code_logits = torch.zeros(m, n + 1)
        code_logits[:, n] = -200
        ids, logprob = codespace.sample(code_logits.flatten(), codes, None, torch.tensor(LAST))
        assert int(ids) == n - 1
        assert float(logprob) == pytest.approx(-math.log(n), abs=2 * EPS * (n + 8))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="expected above 0"):
        codespace.sample(torch.zeros(3), torch.zeros(5, 1, dtype=torch.int32), None, torch.tensor(0.5), temperature)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_follow_the_softmax(m, temperature):
    """Pearson's chi-square over 50,000 draws. With n - 1 degrees of freedom it passes n - 1 + 2 sqrt((n - 1) t) + 2 t
    with chance at most exp(-t) (Laurent and Massart 2000, lemma 1): t = 14 is a false alarm in a million. Fixed seed.
    """
    draws, v, k, t = 50_000, 40, 8, 14
    random = torch.Generator().manual_seed(m)
    codes = torch.randint(0, k, (v, m), generator=random)
    code_logits, bias = 0.8 * torch.rand(m * k, generator=random), 0.8 * torch.rand(v, generator=random)
    uniform = torch.rand(draws, generator=random)
    ids, _ = codespace.sample(code_logits.expand(draws, -1), codes, bias, uniform, temperature)
    wanted = draws * (dense64((code_logits, codes, bias)) / temperature).softmax(-1)
    # Logits span at most 0.8 (m + 1) / 0.7 < 4.6, so no token is rarer than exp(-4.6) / v, and at least 12 of each are
    # expected; 5 is the usual condition for the statistic to be chi-square.
    assert float(wanted.min()) > 5
    statistic = float(((torch.bincount(ids, minlength=v) - wanted) ** 2 / wanted).sum())
    assert statistic < (v - 1) + 2 * math.sqrt((v - 1) * t) + 2 * t


# ------------------------------------------------------------------------------------------------ more than a block


def large_case(values: int) -> Case:
    """V = 20000 in three blocks, integer logits of few values, so that ties run across all blocks."""
    v, m, k = 20_000, 2, 16
    assert 2 * codespace.BLOCK < v < 3 * codespace.BLOCK
    random = torch.Generator().manual_seed(0)
    return (
        torch.randint(0, values, (2, m * k), generator=random).float(),
        torch.randint(0, k, (v, m), generator=random, dtype=torch.int32),
        torch.randint(0, values, (v,), generator=random).float(),
    )


@pytest.mark.parametrize("k", [1, 50, codespace.BLOCK + 1, 20_000])
def test_top_k_runs_across_blocks(k):
    case = large_case(values=3)
    found = codespace.top_k(*case, k)
    order = by_the_tie_rule(dense64(case))
    assert torch.equal(found.ids, order[:, :k])
    assert torch.equal(found.values, dense64(case).gather(1, order[:, :k]).float())
    assert bool(((found.logsumexp - dense64(case).logsumexp(-1)).abs() <= logsumexp_bound(case)).all())


def test_sampling_runs_across_blocks():
    """A few tokens hold nearly all the chance, among them both sides of each border between blocks."""
    code_logits, codes, bias = large_case(values=2)
    block = codespace.BLOCK
    special = torch.tensor([0, 5, block - 1, block, 2 * block - 1, 2 * block, 19_999])
    bias[special], codes[special] = 20.0, codes[0].clone()  # equal chances
    case = code_logits[0], codes, bias
    start, end = intervals(case, 1.0)
    width = (end - start)[special]
    assert bool((width > 2 * place_bound(case, 1.0)).all())
    middle = ((start + end) / 2)[special].float()
    ids, _ = codespace.sample(code_logits[:1].expand(7, -1), codes, bias, middle)
    assert torch.equal(ids, special)
    last, _ = codespace.sample(code_logits[0], codes, bias, torch.tensor(LAST))
    assert int(last) == 19_999
