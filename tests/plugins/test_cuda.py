"""The CUDA kernel of libvq.so on torch tensors, against the definition in float64."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MANTISSA_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
MIN_EXPONENTS = {torch.float32: -125, torch.float16: -13, torch.bfloat16: -125}
"""Of the smallest normal number, as frexp counts."""
GUARD = 64
"""Elements on both sides of the logits that the kernel may not touch."""

Launch = Callable[["Problem", torch.Tensor, torch.cuda.Stream], None]


@dataclass(frozen=True)
class Problem:
    """A random op: `code_logits` T [rows, M, K], `codes` int64 [V, M], `bias` T [V] or None, `words` int32 [M, W]; all on the GPU."""

    code_logits: torch.Tensor
    codes: torch.Tensor
    bias: torch.Tensor | None
    words: torch.Tensor
    code_bits: int

    def buffer(self, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Poison with the logits [rows, V] in it, `offset` elements off alignment; -> whole buffer, logits."""
        rows, vocab_size = self.code_logits.shape[0], self.codes.shape[0]
        whole = torch.full(
            (GUARD + offset + rows * vocab_size + GUARD,), torch.nan, dtype=self.code_logits.dtype, device="cuda"
        )
        first = GUARD + offset
        return whole, whole[first : first + rows * vocab_size].view(rows, vocab_size)

    def check(self, whole: torch.Tensor, logits: torch.Tensor) -> None:
        """Every logit within a float32 rounding for each of M + 1 sums and one rounding of T; the guards untouched."""
        outside = torch.ones_like(whole, dtype=torch.bool)
        first = logits.storage_offset()
        outside[first : first + logits.numel()] = False
        assert bool(whole[outside].isnan().all()), "written outside of the logits"
        expected, magnitude = self._sums(lambda x: x.double()), self._sums(lambda x: x.double().abs())
        sums = (self.codes.shape[1] + 1) * 2.0**-24 * magnitude
        exponent = torch.frexp(expected.abs() + sums).exponent.clamp(min=MIN_EXPONENTS[logits.dtype])
        rounding = torch.ldexp(torch.ones_like(sums), exponent - MANTISSA_BITS[logits.dtype] - 1)
        wrong = ~((logits.double() - expected).abs() <= sums + rounding)  # NaN is wrong too
        assert not bool(wrong.any()), (
            f"{int(wrong.sum())} of {wrong.numel()} logits, the first at {wrong.nonzero()[0].tolist()}"
        )

    def _sums(self, widen: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        wide = widen(self.code_logits)
        total = torch.zeros(wide.shape[0], self.codes.shape[0], dtype=torch.float64, device="cuda")
        for m in range(wide.shape[1]):
            total += wide[:, m, self.codes[:, m]]
        return total if self.bias is None else total + widen(self.bias)


def problem(
    rows: int,
    num_codebooks: int,
    num_codes: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    random = torch.Generator("cuda").manual_seed(seed)
    code_logits = torch.randn(rows, num_codebooks, num_codes, generator=random, device="cuda").to(dtype)
    codes = torch.randint(num_codes, (vocab_size, num_codebooks), generator=random, device="cuda")
    bits = 8 if num_codes <= 256 else 16
    ids = codes.T.contiguous().cpu().numpy().astype({8: np.uint8, 16: np.uint16}[bits])
    words = np.pad(ids, ((0, 0), (0, -vocab_size % (128 // bits)))).view(np.int32)
    values = torch.randn(vocab_size, generator=random, device="cuda").to(dtype) if bias else None
    return Problem(code_logits, codes, values, torch.from_numpy(words).cuda(), bits)


@pytest.fixture(scope="module")
def launch(native_library: Callable[[str], Path]) -> Launch:
    """launch(problem, logits, stream): puts the kernel on the stream, and fails with the status of the launch."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    function = ctypes.CDLL(str(native_library("vq"))).vq_gather_scatter_cuda
    function.restype = ctypes.c_int
    function.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    if function(None, None, None, None, 0, 1, 1, 1, 8, 0, None) == 801:
        pytest.skip("libvq.so was built without CUDA")

    def run(op: Problem, logits: torch.Tensor, stream: torch.cuda.Stream) -> None:
        rows, num_codebooks, num_codes = op.code_logits.shape
        status = function(
            op.code_logits.data_ptr(),
            op.words.data_ptr(),
            None if op.bias is None else op.bias.data_ptr(),
            logits.data_ptr(),
            rows,
            num_codebooks,
            num_codes,
            op.codes.shape[0],
            op.code_bits,
            TYPE_NUMBERS[logits.dtype],
            stream.cuda_stream,
        )
        assert status == 0, f"cudaError_t {status}"

    return run


def run_and_check(launch: Launch, op: Problem, offset: int = 0) -> None:
    whole, logits = op.buffer(offset)
    launch(op, logits, torch.cuda.current_stream())
    op.check(whole, logits)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("num_codebooks", "num_codes", "vocab_size"),
    [
        (1, 1, 1),
        (1, 2, 7),
        (3, 257, 4097),
        (1, 1280, 128256),
        (1, 4096, 50257),
        (2, 30011, 1999),
        (1, 65536, 70000),
        (8, 256, 49152),
        (144, 256, 4096),
        (256, 255, 10007),
        (8, 4096, 8192),
    ],
)
def test_sizes(launch: Launch, num_codebooks: int, num_codes: int, vocab_size: int, dtype: torch.dtype) -> None:
    for rows, bias, offset in itertools.product((1, 3, 64), (True, False), (0, 1)):
        run_and_check(launch, problem(rows, num_codebooks, num_codes, vocab_size, dtype, bias=bias, seed=rows), offset)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_batch_of_1_to_257_rows(launch: Launch, dtype: torch.dtype) -> None:
    for rows in range(1, 258):
        run_and_check(launch, problem(rows, 2, 300, 1031 + rows % 2, dtype, seed=rows))


def test_an_empty_batch_writes_nothing(launch: Launch) -> None:
    op = problem(0, 2, 16, 100, torch.float16)
    whole, logits = op.buffer()
    launch(op, logits, torch.cuda.current_stream())
    assert bool(whole.isnan().all())


@pytest.mark.parametrize("host_threads", [1, 8])
def test_streams_at_once(launch: Launch, host_threads: int) -> None:
    """Different sizes in flight on eight streams, launched by one host thread and by eight."""
    dtypes = list(DTYPES.values())
    ops = [problem(17 + i, 1 + 7 * i, 100 + 700 * i, 20000 + i, dtypes[i % 3], seed=i) for i in range(8)]
    streams = [torch.cuda.Stream() for _ in ops]
    buffers = [op.buffer() for op in ops]
    torch.cuda.synchronize()

    def many(i: int) -> None:
        for _ in range(20):
            launch(ops[i], buffers[i][1], streams[i])

    with ThreadPoolExecutor(host_threads) as pool:
        list(pool.map(many, range(len(ops))))
    torch.cuda.synchronize()
    for op, (whole, logits) in zip(ops, buffers, strict=True):
        op.check(whole, logits)


@pytest.mark.parametrize("num_codes", [256, 20000])
def test_graph_capture_and_replay(launch: Launch, num_codes: int) -> None:
    """What was captured reads and writes the same memory at every replay; 20,000 codes need more than 48 KiB a block."""
    op = problem(5, 3, num_codes, 50257, torch.float16)
    whole, logits = op.buffer()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch(op, logits, stream)
    torch.cuda.synchronize()
    assert bool(whole.isnan().all()), "capturing ran the kernel"
    for seed in range(3):
        random = torch.Generator("cuda").manual_seed(seed)
        op.code_logits.copy_(torch.randn(op.code_logits.shape, generator=random, device="cuda"))
        logits.fill_(torch.nan)
        graph.replay()
        op.check(whole, logits)


def test_more_elements_than_32_bits_count(launch: Launch) -> None:
    """rows * V beyond 2^31. One codebook without bias only copies numbers, so the answer is exact."""
    rows, vocab_size = 16768, 128256
    assert rows * vocab_size > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 8 << 30:
        pytest.skip(f"needs 8 GiB of GPU memory, {free >> 30} GiB are free")
    op = problem(rows, 1, 1280, vocab_size, torch.float16, bias=False)
    whole, logits = op.buffer()
    launch(op, logits, torch.cuda.current_stream())
    for first in range(0, rows, 512):
        part = op.code_logits[first : first + 512, 0][:, op.codes[:, 0]]
        assert torch.equal(logits[first : first + 512], part), f"rows from {first}"
    assert bool(whole[:GUARD].isnan().all())
    assert bool(whole[-GUARD:].isnan().all())
