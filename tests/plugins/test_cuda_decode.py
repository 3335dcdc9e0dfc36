"""VQTopK and VQSample of libvq.so on the GPU, on torch tensors, against the definition in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOAT = 2.0**-24
"""A rounding of float32, relative."""


@dataclass(frozen=True)
class Head:
    """`code_logits` T [rows, M, K], `codes` int64 [V, M], `bias` T [V] or None, `words` int32 [M, W]; all on the GPU."""

    code_logits: torch.Tensor
    codes: torch.Tensor
    bias: torch.Tensor | None
    words: torch.Tensor
    code_bits: int

    def logits(self) -> torch.Tensor:
        """float64 [rows, V]."""
        wide = self.code_logits.double()
        total = sum(wide[:, m, self.codes[:, m]] for m in range(wide.shape[1]))
        return total if self.bias is None else total + self.bias.double()

    def bound(self) -> float:
        """What a logit may be off by: a float32 rounding for each of M + 1 sums of the largest terms there are."""
        terms = self.code_logits.double().abs().amax((0, 2)).sum() + (0 if self.bias is None else self.bias.abs().max())
        return (self.code_logits.shape[1] + 1) * FLOAT * float(terms)


def head(rows, num_codebooks, num_codes, vocab_size, dtype, *, bias=True, coarse=False, seed=0) -> Head:
    """A random head. coarse: multiples of 1/4, whose sums are exact, so that many values are equal and ids decide."""
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        drawn = torch.randn(shape, generator=random, device="cuda") * 3
        return ((drawn * 4).round() / 4 if coarse else drawn).clamp(-15, 15).to(dtype)

    codes = torch.randint(num_codes, (vocab_size, num_codebooks), generator=random, device="cuda")
    bits = 8 if num_codes <= 256 else 16
    ids = codes.T.contiguous().cpu().numpy().astype({8: np.uint8, 16: np.uint16}[bits])
    words = np.pad(ids, ((0, 0), (0, -vocab_size % (128 // bits)))).view(np.int32)
    scores = normal(rows, num_codebooks, num_codes)
    return Head(scores, codes, normal(vocab_size) if bias else None, torch.from_numpy(words).cuda(), bits)


class Library:
    """The calls of capi/decode_cuda.h."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self.c.vq_make_buckets_cuda.argtypes = [pointer, pointer, size, ctypes.POINTER(pointer)]
        self.c.vq_free_buckets_cuda.argtypes = [pointer]
        self.c.vq_free_buckets_cuda.restype = None
        self.c.vq_top_k_workspace_cuda.argtypes = [size] * 5
        self.c.vq_top_k_workspace_cuda.restype = size
        self.c.vq_sample_workspace_cuda.argtypes = [size] * 4
        self.c.vq_sample_workspace_cuda.restype = size
        self.c.vq_top_k_cuda.argtypes = [*[pointer] * 7, *[size] * 5, number, number, pointer, pointer]
        self.c.vq_sample_cuda.argtypes = [*[pointer] * 8, *[size] * 4, number, number, pointer, pointer]

    @contextmanager
    def buckets(self, op: Head, wanted: bool) -> Iterator[ctypes.c_void_p]:
        made = ctypes.c_void_p()
        if wanted:
            codes = op.codes[:, 0].to(torch.int32).cpu()
            bias = None if op.bias is None else op.bias.float().cpu()
            status = self.c.vq_make_buckets_cuda(
                codes.data_ptr(), None if bias is None else bias.data_ptr(), len(codes), ctypes.byref(made)
            )
            assert status == 0, f"cudaError_t {status}"
        try:
            yield made
        finally:
            self.c.vq_free_buckets_cuda(made)

    def top_k(self, op: Head, k: int, buckets=None) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
        """What puts the kernels on the current stream, and the outputs that they write: values, ids, logsumexp."""
        rows, *sizes = *op.code_logits.shape, op.codes.shape[0]
        out = (
            torch.full((rows, k), torch.nan, device="cuda"),
            torch.full((rows, k), -1, dtype=torch.int64, device="cuda"),
            torch.full((rows,), torch.nan, device="cuda"),
        )
        workspace = torch.empty(self.c.vq_top_k_workspace_cuda(rows, *sizes, k), dtype=torch.uint8, device="cuda")

        def run() -> None:
            pointers = [
                t.data_ptr() if t is not None else None for t in (op.code_logits, op.words, op.bias, *out, workspace)
            ]
            stream = torch.cuda.current_stream().cuda_stream
            number = TYPE_NUMBERS[op.code_logits.dtype]
            status = self.c.vq_top_k_cuda(*pointers, rows, *sizes, k, op.code_bits, number, buckets, stream)
            assert status == 0, f"cudaError_t {status}"

        return run, out

    def sample(self, op: Head, temperature, uniform, buckets=None):
        """The same, with outputs ids and logprob."""
        rows, *sizes = *op.code_logits.shape, op.codes.shape[0]
        out = (torch.full((rows,), -1, dtype=torch.int64, device="cuda"), torch.full((rows,), torch.nan, device="cuda"))
        workspace = torch.empty(self.c.vq_sample_workspace_cuda(rows, *sizes), dtype=torch.uint8, device="cuda")

        def run() -> None:
            inputs = (op.code_logits, op.words, op.bias, temperature, uniform)
            pointers = [t.data_ptr() if t is not None else None for t in (*inputs, *out, workspace)]
            stream = torch.cuda.current_stream().cuda_stream
            number = TYPE_NUMBERS[op.code_logits.dtype]
            status = self.c.vq_sample_cuda(*pointers, rows, *sizes, op.code_bits, number, buckets, stream)
            assert status == 0, f"cudaError_t {status}"

        return run, out


@pytest.fixture(scope="module")
def library(native_library) -> Library:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    library = Library(native_library("vq"))
    if library.c.vq_top_k_workspace_cuda(1, 1, 1, 1, 1) == 0:
        pytest.skip("libvq.so was built without CUDA")
    return library


def check_top_k(op: Head, k: int, values, ids, logsumexp, *, exact: bool) -> None:
    logits, bound = op.logits(), op.bound()
    best = torch.sort(logits, dim=-1, descending=True, stable=True)
    if exact:
        assert torch.equal(ids, best.indices[:, :k])
        assert torch.equal(values.double(), best.values[:, :k])
    assert float((values - best.values[:, :k]).abs().max()) <= bound
    assert float((values - logits.gather(1, ids)).abs().max()) <= bound
    falls = (values[:, 1:] < values[:, :-1]) | ((values[:, 1:] == values[:, :-1]) & (ids[:, 1:] > ids[:, :-1]))
    assert bool(falls.all())
    expected = logits.logsumexp(-1)
    # The exponentials' errors are relative to a sum of positive terms; 64 roundings are more than the sums are deep.
    assert float((logsumexp - expected).abs().max()) <= bound + FLOAT * (64 + float(expected.abs().max()))


SIZES = [
    (1, 1, 1),
    (1, 2, 7),
    (1, 1280, 128256),
    (1, 65536, 524288),
    (3, 257, 4097),
    (8, 256, 49152),
    (144, 256, 49152),
    (256, 255, 10007),
    (8, 4096, 8192),
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("num_codebooks", "num_codes", "vocab_size"), SIZES)
def test_top_k_of_every_size(library, num_codebooks, num_codes, vocab_size, dtype):
    for rows in (1, 3, 64):
        for coarse in (True, False):
            op = head(rows, num_codebooks, num_codes, vocab_size, dtype, bias=rows != 3, coarse=coarse, seed=rows)
            for with_buckets in (False, True)[: 2 if num_codebooks == 1 else 1]:
                with library.buckets(op, with_buckets) as buckets:
                    for k in {min(k, vocab_size) for k in (1, 50, 256)}:
                        run, out = library.top_k(op, k, buckets)
                        run()
                        check_top_k(op, k, *out, exact=coarse)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("num_codebooks", "num_codes", "vocab_size"), SIZES)
def test_draws_lie_in_their_token_s_stretch(library, num_codebooks, num_codes, vocab_size, dtype):
    for rows, temperature in ((1, 1.0), (64, 0.7)):
        op = head(rows, num_codebooks, num_codes, vocab_size, dtype, bias=rows == 64, seed=rows)
        uniform = torch.rand(rows, generator=torch.Generator("cuda").manual_seed(9), device="cuda")
        heat = torch.tensor([temperature], device="cuda")
        shares = (op.logits() / float(heat)).softmax(-1)
        order = op.codes[:, 0].argsort(stable=True) if num_codebooks == 1 else torch.arange(vocab_size, device="cuda")
        upper = torch.empty_like(shares).scatter_(1, order.expand_as(shares), shares[:, order].cumsum(-1))
        bound = 2 * op.bound() / temperature + 64 * FLOAT
        for with_buckets in (False, True)[: 2 if num_codebooks == 1 else 1]:
            with library.buckets(op, with_buckets) as buckets:
                run, (ids, logprob) = library.sample(op, heat, uniform, buckets)
                run()
                end, share = upper.gather(1, ids[:, None])[:, 0], shares.gather(1, ids[:, None])[:, 0]
                assert bool((end + bound > uniform).all())
                assert bool((end - share - bound <= uniform).all())
                largest = float(op.logits().abs().max()) / temperature
                assert float((logprob - share.log()).abs().max()) <= bound + FLOAT * (2 * largest + 64)


@pytest.mark.parametrize("num_codebooks", [1, 16])
def test_draws_are_distributed_as_the_softmax(library, num_codebooks):
    """Stratified uniforms: each token comes as often as its share says, to one draw at either end of its stretch."""
    draws = 1 << 16
    one = head(1, num_codebooks, 16, 61, torch.float32, seed=2)
    op = Head(one.code_logits.expand(draws, -1, -1).contiguous(), one.codes, one.bias, one.words, one.code_bits)
    uniform = (torch.arange(draws, device="cuda", dtype=torch.float32) + 0.5) / draws
    run, (ids, _) = library.sample(op, torch.ones(1, device="cuda"), uniform)
    run()
    expected = one.logits()[0].softmax(-1) * draws
    assert float((torch.bincount(ids, minlength=61) - expected).abs().max()) <= 2 + draws * (
        2 * op.bound() + 64 * FLOAT
    )


@pytest.mark.parametrize(("num_codebooks", "num_codes"), [(1, 1280), (64, 256)])
def test_graph_capture_and_replay(library, num_codebooks, num_codes):
    op = head(5, num_codebooks, num_codes, 50257, torch.float16, coarse=True)
    uniform, heat = torch.rand(5, device="cuda"), torch.ones(1, device="cuda")
    with library.buckets(op, num_codebooks == 1) as buckets:
        top_k, best = library.top_k(op, 50, buckets)
        sample, (ids, _) = library.sample(op, heat, uniform, buckets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            top_k()
            sample()
        torch.cuda.synchronize()
        assert bool((best[1] == -1).all()), "capturing ran the kernels"
        for seed in range(3):
            new = head(5, num_codebooks, num_codes, 50257, torch.float16, coarse=True, seed=seed)
            op.code_logits.copy_(new.code_logits)
            graph.replay()
            check_top_k(op, 50, *best, exact=True)
            replayed = ids.clone()
            sample()
            assert torch.equal(ids, replayed)


def test_runs_are_the_same_to_the_last_bit(library):
    op = head(3, 144, 256, 128256, torch.bfloat16)
    run, out = library.top_k(op, 256)
    run()
    first = [t.clone() for t in out]
    for _ in range(20):
        run()
        assert all(torch.equal(a, b) for a, b in zip(out, first, strict=True))


def test_nan_ends_in_the_vocabulary(library):
    for num_codebooks in (1, 16):
        op = head(4, num_codebooks, 200, 5003, torch.float16)
        op.code_logits[0] = torch.nan
        op.code_logits[1, :, ::3] = torch.nan
        uniform = torch.tensor([0.5, 0.5, torch.nan, 0.5], device="cuda")
        with library.buckets(op, num_codebooks == 1) as buckets:
            for made in (buckets, None):
                top_k, (_, ids, _) = library.top_k(op, 256, made)
                sample, (drawn, _) = library.sample(op, torch.ones(1, device="cuda"), uniform, made)
                top_k()
                sample()
                for tokens in (ids, drawn):
                    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 5003
