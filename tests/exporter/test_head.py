"""The head against its dense twin and against a float64 oracle, over all kinds, sizes and leading shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export_vq.head import VQHead, gather_scatter, oracle_logits

EPS = torch.finfo(torch.float32).eps

SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 31, 64])
LEADS = st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=1, max_size=3).map(tuple)  # ranks 1 to 3, empty batches too


@st.composite
def heads(draw: st.DrawFn) -> VQHead:
    """Any valid head: kinds, odd and prime sizes, bias or not, rotation (any matrix, not only orthogonal) or not."""
    kind = draw(st.sampled_from(["single", "product", "additive"]))
    m = 1 if kind == "single" else draw(st.sampled_from([1, 2, 3, 5, 8]))
    k, v, width = draw(SIZES), draw(st.sampled_from([1, 2, 7, 31, 101, 128])), draw(SIZES)
    d = m * width if kind == "product" else width
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return VQHead.from_tensors(
        kind,
        torch.randn(m, k, width, generator=random),
        torch.randint(0, k, (v, m), generator=random),
        torch.randn(v, generator=random) if draw(st.booleans()) else None,
        torch.randn(d, d, generator=random) if kind == "product" and draw(st.booleans()) else None,
    )


def hidden_for(head: VQHead, lead: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(*lead, head.spec.hidden_size, generator=torch.Generator().manual_seed(seed))


def rounding_bound(head: VQHead, hidden: torch.Tensor) -> torch.Tensor:
    """How far any order of float32 sums can be from the exact logit: float64 [.., V].

    A sum of n products, each rounded, is off by at most n eps' sum|terms| to first order, with eps' = eps / 2 half a
    unit in the last place (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). `magnitude` is sum|terms|: the
    same head with every number made positive. A logit passes through at most D (rotation), D (code logits), M (codes)
    and one (bias) sums; the twin's rows add one rounding. `+ 3` covers that and the second order, and eps instead of
    eps' leaves a factor of two.
    """
    spec = head.spec
    terms = (2 if spec.has_rotation else 1) * spec.hidden_size + spec.num_codebooks + 3
    positive = VQHead.from_tensors(
        spec.kind,
        head.codebook.detach().abs(),
        head.codes,
        None if head.bias is None else head.bias.detach().abs(),
        None if head.rotation is None else head.rotation.detach().abs(),
    )
    return terms * EPS * oracle_logits(positive, hidden.abs())


@settings(max_examples=100, deadline=None)
@given(heads(), LEADS, st.integers(0, 2**31))
def test_head_twin_and_oracle_are_one_function(head, lead, seed):
    hidden = hidden_for(head, lead, seed)
    with torch.no_grad():
        logits, twin = head(hidden), head.dense_twin()(hidden)
    exact = oracle_logits(head, hidden)
    assert logits.shape == twin.shape == exact.shape == (*lead, head.spec.vocab_size)
    assert (logits.dtype, exact.dtype) == (torch.float32, torch.float64)
    bound = rounding_bound(head, hidden)
    assert bool(((logits - exact).abs() <= bound).all())
    assert bool(((twin - exact).abs() <= bound).all())


@settings(max_examples=60, deadline=None)
@given(heads(), st.integers(0, 2**31))
def test_the_oracle_is_the_formula(head, seed):
    """One logit at a time, in Python floats, from the sentence that defines the head."""
    spec, hidden = head.spec, hidden_for(head, (), seed)
    book, codes = head.codebook.double().tolist(), head.codes.tolist()
    turned = hidden.double() if head.rotation is None else hidden.double() @ head.rotation.detach().double()
    h, width = turned.tolist(), spec.codebook_shape[2]
    exact = oracle_logits(head, hidden)
    bias = [0.0] * spec.vocab_size if head.bias is None else head.bias.tolist()
    bound = 2 * rounding_bound(head, hidden) * (2**-52 / EPS)  # both sides are float64
    for v in range(spec.vocab_size):
        y = bias[v]
        for m in range(spec.num_codebooks):
            part = h[m * width : (m + 1) * width] if spec.kind == "product" else h
            y += math.fsum(a * b for a, b in zip(part, book[m][codes[v][m]], strict=True))
        assert abs(float(exact[v]) - y) <= float(bound[v])


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    m=st.sampled_from([1, 2, 3, 8, 16]),
    k=SIZES,
    v=st.sampled_from([1, 7, 128]),
    with_bias=st.booleans(),
    lead=LEADS,
    seed=st.integers(0, 2**31),
)
def test_half_precision_sums_in_float32_and_rounds_once(dtype, m, k, v, with_bias, lead, seed):
    """Against the float64 sum rounded once.

    n float32 additions are off by at most n eps / 2 times the sum of all magnitudes. Rounding to T never reorders, so the
    result lies between the two ends of that span, each rounded once: the same number or, at a rounding border, its
    neighbour. One codebook without bias adds nothing and must be exact.
    """
    random = torch.Generator().manual_seed(seed)
    code_logits = torch.randn(*lead, m * k, generator=random).mul(8).to(dtype)
    codes = torch.randint(0, k, (v, m), generator=random, dtype=torch.int32)
    bias = torch.randn(v, generator=random).to(dtype) if with_bias else None
    found = gather_scatter(code_logits, codes, bias)
    assert found.dtype == dtype
    exact = gather_scatter(code_logits.double(), codes, None if bias is None else bias.double())
    magnitude = gather_scatter(code_logits.double().abs(), codes, None if bias is None else bias.double().abs())
    slack = (m - 1 + with_bias) * EPS / 2 * magnitude
    low, high = (exact - slack).to(dtype), (exact + slack).to(dtype)
    assert bool(((low <= found) & (found <= high)).all())
    # Away from cancellation, where float32 holds all of the sum, the span is at most one unit of T wide.
    sound = slack < exact.abs() * torch.finfo(dtype).eps / 4
    assert bool((high <= torch.nextafter(low, torch.full_like(low, math.inf)))[sound].all())


def test_half_precision_sums_do_not_round_on_the_way():
    """2048 + 1 is 2048 in float16: sums kept in it would end at 2048, the sum in float32 is 2056."""
    codes = torch.zeros(1, 9, dtype=torch.int32)
    code_logits = torch.tensor([2048.0] + 8 * [1.0], dtype=torch.float16)
    assert gather_scatter(code_logits, codes).tolist() == [2056.0]
    assert gather_scatter(code_logits[:8], codes[:, :8], torch.ones(1, dtype=torch.float16)).tolist() == [2056.0]


def test_worked_example():
    """M = 2, K = 2: y[v] = s[0, codes[v, 0]] + s[1, codes[v, 1]] + bias[v]."""
    s = torch.tensor([1.0, 2.0, 10.0, 20.0])
    codes = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]])
    assert gather_scatter(s, codes).tolist() == [11.0, 21.0, 12.0, 22.0, 22.0]
    assert gather_scatter(s, codes, torch.tensor([0.0, 0.0, 0.5, 0.0, -1.0])).tolist() == [11.0, 21.0, 12.5, 22.0, 21.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_twin_keeps_the_dtype_and_its_rows_are_the_token_vectors(dtype):
    random = torch.Generator().manual_seed(0)
    head = VQHead.from_tensors(
        "additive", torch.randn(3, 5, 8, generator=random).to(dtype), torch.randint(0, 5, (17, 3), generator=random)
    )
    twin = head.dense_twin()
    assert twin.weight.dtype == dtype
    assert torch.equal(twin.weight, head.token_vectors().to(dtype))
    some = torch.tensor([16, 0, 3])
    assert torch.equal(head.token_vectors(some), head.token_vectors()[some])


@settings(max_examples=60, deadline=None)
@given(heads(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), LEADS, st.integers(0, 2**31))
def test_embedded_tokens_are_the_rows_of_the_twin_bit_for_bit(head, dtype, lead, seed):
    """Both are summed and turned in float64, then rounded once."""
    head = head.to(dtype)
    tokens = torch.randint(0, head.spec.vocab_size, lead, generator=torch.Generator().manual_seed(seed))
    rows = head.embed(tokens)
    assert (rows.dtype, rows.shape) == (dtype, (*lead, head.spec.hidden_size))
    assert torch.equal(rows, head.dense_twin().weight[tokens])


@pytest.mark.parametrize("kind", ["single", "product", "additive"])
def test_gradients_reach_codebook_and_rotation_through_the_embedding(kind):
    random = torch.Generator().manual_seed(0)
    double = {"generator": random, "dtype": torch.float64}
    m, width = {"single": (1, 6), "product": (3, 2), "additive": (2, 6)}[kind]
    rotation = torch.randn(6, 6, **double) if kind == "product" else None
    codes = torch.randint(0, 5, (11, m), generator=random)
    head = VQHead.from_tensors(kind, torch.randn(m, 5, width, **double), codes, None, rotation)
    tokens, weight = torch.tensor([[3, 3, 10], [0, 7, 3]]), torch.randn(2, 3, 6, **double)
    (head.embed(tokens) * weight).sum().backward()

    book = head.codebook.detach().clone().requires_grad_()
    parts = [book[i][codes[tokens][..., i]] for i in range(m)]
    rows = torch.cat(parts, -1) if kind == "product" else sum(parts)
    if rotation is not None:
        rotation.requires_grad_()
        rows = rows @ rotation.T
    (rows * weight).sum().backward()
    tight = {"rtol": 1e-12, "atol": 1e-12}  # sums of under 100 float64 terms of order one
    assert torch.allclose(head.codebook.grad, book.grad, **tight)
    if rotation is not None:
        assert torch.allclose(head.rotation.grad, rotation.grad, **tight)


def test_gradients_reach_every_parameter():
    """The head is trained: each parameter's gradient is the one that the dense formula gives."""
    random = torch.Generator().manual_seed(0)
    double = {"generator": random, "dtype": torch.float64}
    head = VQHead.from_tensors(
        "product",
        torch.randn(2, 3, 4, **double),
        torch.randint(0, 3, (7, 2), generator=random),
        torch.randn(7, **double),
        torch.randn(8, 8, **double),
    )
    hidden, weight = torch.randn(5, 8, **double), torch.randn(5, 7, **double)
    (head(hidden) * weight).sum().backward()

    book, rotation = (p.detach().clone().requires_grad_() for p in (head.codebook, head.rotation))
    rows = torch.cat([book[i][head.codes[:, i].long()] for i in range(2)], 1) @ rotation.T
    (hidden @ rows.T * weight).sum().backward()
    for found, wanted in ((head.codebook, book.grad), (head.rotation, rotation.grad), (head.bias, weight.sum(0))):
        grad = found if found is None else found.grad
        assert torch.allclose(grad, wanted, rtol=1e-12, atol=1e-12)  # sums of under 100 float64 terms of order one


@pytest.mark.parametrize("kind", ["single", "product", "additive"])
@pytest.mark.parametrize("optional", [False, True])
def test_a_head_comes_back_from_its_tensors(kind, optional):
    random = torch.Generator().manual_seed(0)
    m, width = {"single": (1, 12), "product": (3, 4), "additive": (3, 12)}[kind]
    head = VQHead.from_tensors(
        kind,
        torch.randn(m, 5, width, generator=random),
        torch.randint(5, (17, m), generator=random),
        torch.randn(17, generator=random) if optional else None,
        torch.randn(12, 12, generator=random) if optional and kind == "product" else None,
    )
    again = VQHead.from_tensors(**head.tensors)
    assert again.spec == head.spec
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in head.state_dict().items())
    assert not head.tensors["codebook"].requires_grad
