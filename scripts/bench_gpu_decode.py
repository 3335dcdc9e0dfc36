"""Times the heads that write no V logits, for bench_gpu.py: VQTopK and VQSample against a dense head with torch.topk.

Everything is captured into CUDA graphs, as a decode loop has it, so that what the host needs to launch is not timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

BEST = 50
HIDDEN_SIZE = 4096
HEADS = ((1, 1280), (1, 4096), (128, 256), (144, 256))
"""(num_codebooks, num_codes); one codebook has code vectors of the hidden size, more share it (product)."""


def decode(bench: Any, vocab_size: int, copy_rate: float) -> list[dict[str, Any]]:
    """Each head and batch: medians of the dense head, the VQ heads and their kernels alone, at k = 50.

    `bytes_per_second` of a kernel counts each of its constants and the code logits once; `of_copy` is its share of `copy_rate`.
    """
    torch = bench.torch
    library = _Library(bench)
    results = []
    weight = bench.normal(vocab_size, HIDDEN_SIZE, scale=HIDDEN_SIZE**-0.5)
    for num_codebooks, num_codes in HEADS:
        width = HIDDEN_SIZE // num_codebooks
        codebook = bench.normal(num_codebooks, num_codes, width, scale=width**-0.5)
        codes, words = bench.codes(num_codebooks, num_codes)
        buckets = library.buckets(codes) if num_codebooks == 1 else None
        for batch in (1, 8, 64):
            hidden = bench.normal(batch, num_codebooks, width)
            scores = torch.empty(num_codebooks, batch, num_codes, dtype=torch.float16, device="cuda")
            rows = torch.empty(batch, num_codebooks * num_codes, dtype=torch.float16, device="cuda")
            flat = hidden.view(batch, -1)[:, : num_codebooks * width]

            def project(h=hidden, c=codebook, s=scores, r=rows, b=batch) -> None:
                torch.bmm(h.transpose(0, 1), c.transpose(1, 2), out=s)
                r.view(b, *s.shape[::2]).copy_(s.transpose(0, 1))

            top_k, best = library.top_k(rows, words, num_codebooks, num_codes, vocab_size, buckets)
            sample = library.sample(rows, words, num_codebooks, num_codes, vocab_size, buckets)
            project()
            top_k()
            _check(bench, rows.view(batch, num_codebooks, num_codes), codes, *best)
            dense = weight[:, : flat.shape[1]]
            timings = bench.time(
                {
                    "dense": _captured(torch, lambda f=flat, w=dense: torch.topk(torch.mm(f, w.t()), BEST)),
                    "vq_top_k": _captured(torch, lambda p=project, t=top_k: (p(), t())),
                    "vq_sample": _captured(torch, lambda p=project, s=sample: (p(), s())),
                    "top_k": _captured(torch, top_k),
                    "sample": _captured(torch, sample),
                }
            )
            moved = (words.numel() * 4 if buckets is None else num_codes * 16) + rows.numel() * 2
            rate = moved / timings["top_k"].median_us * 1e6
            results.append(
                {
                    "batch": batch,
                    "hidden_size": HIDDEN_SIZE,
                    "vocab_size": vocab_size,
                    "num_codebooks": num_codebooks,
                    "num_codes": num_codes,
                    "k": BEST,
                    "speedup": timings["dense"].median_us / timings["vq_top_k"].median_us,
                    "bytes": moved,
                    "bytes_per_second": rate,
                    "of_copy": rate / copy_rate,
                    **{name: asdict(timing) for name, timing in timings.items()},
                }
            )
        library.free(buckets)
    return results


def print_decode(results: list[dict[str, Any]], spread: Callable[[dict[str, Any]], str]) -> None:
    print(
        f"\nhead without V logits, k={BEST}: codebook GEMM and VQTopK, against the dense GEMM and torch.topk, CUDA graphs"
    )
    for head in results:
        sizes = f"M={head['num_codebooks']} K={head['num_codes']} batch {head['batch']}"
        parts = "  ".join(
            f"{name} {spread(head[name])}" for name in ("dense", "vq_top_k", "vq_sample", "top_k", "sample")
        )
        print(f"  {sizes:24} {head['speedup']:6.1f}x  {100 * head['of_copy']:4.0f} % of copy  {parts}")


def _captured(torch: Any, work: Callable[[], object]) -> Callable[[], object]:
    """A replay of the work; it ran once before, because libraries allocate at their first call."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay  # type: ignore[no-any-return]


def _check(bench: Any, scores: Any, codes: Any, values: Any, ids: Any, logsumexp: Any) -> None:
    """What is timed computes the right thing: the last row, within the roundings of float32 sums."""
    torch = bench.torch
    logits = sum(scores[-1, m].double()[codes[:, m]] for m in range(codes.shape[1]))
    bound = (codes.shape[1] + 64) * 2.0**-24 * float(scores[-1].double().abs().amax(-1).sum() + logits.abs().max())
    right = [
        torch.allclose(values[-1].double(), torch.topk(logits, BEST).values, rtol=0, atol=bound),
        torch.allclose(values[-1].double(), logits[ids[-1]], rtol=0, atol=bound),
        abs(float(logsumexp[-1]) - float(logits.logsumexp(0))) <= bound,
    ]
    if not all(right):
        raise SystemExit("bench_gpu: the best tokens are wrong; see tests/plugins/test_cuda_decode.py")


class _Library:
    """The calls of capi/decode_cuda.h, in float16 without bias."""

    def __init__(self, bench: Any) -> None:
        self.torch = bench.torch
        self.c = bench.c
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

    def buckets(self, codes: Any) -> ctypes.c_void_p:
        host, made = codes[:, 0].to(self.torch.int32).cpu().contiguous(), ctypes.c_void_p()
        _succeeded(self.c.vq_make_buckets_cuda(host.data_ptr(), None, host.numel(), ctypes.byref(made)))
        return made

    def free(self, buckets: ctypes.c_void_p | None) -> None:
        self.torch.cuda.synchronize()
        self.c.vq_free_buckets_cuda(buckets)

    def top_k(self, scores: Any, words: Any, m: int, k: int, v: int, buckets: Any) -> tuple[Callable[[], None], Any]:
        """The launch of one VQTopK, and its outputs."""
        torch, rows = self.torch, scores.shape[0]
        values = torch.empty(rows, BEST, device="cuda")
        ids = torch.empty(rows, BEST, dtype=torch.int64, device="cuda")
        logsumexp = torch.empty(rows, device="cuda")
        size = self.c.vq_top_k_workspace_cuda(rows, m, k, v, BEST)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        held = (scores, words, None, values, ids, logsumexp, workspace)
        run = self._launch(self.c.vq_top_k_cuda, held, (rows, m, k, v, BEST, 8 if k <= 256 else 16, 1, buckets))
        return run, (values, ids, logsumexp)

    def sample(self, scores: Any, words: Any, m: int, k: int, v: int, buckets: Any) -> Callable[[], None]:
        """The launch of one VQSample."""
        torch, rows = self.torch, scores.shape[0]
        ids = torch.empty(rows, dtype=torch.int64, device="cuda")
        uniform, logprob = torch.rand(rows, device="cuda"), torch.empty(rows, device="cuda")
        workspace = torch.empty(self.c.vq_sample_workspace_cuda(rows, m, k, v), dtype=torch.uint8, device="cuda")
        held = (scores, words, None, torch.ones(1, device="cuda"), uniform, ids, logprob, workspace)
        return self._launch(self.c.vq_sample_cuda, held, (rows, m, k, v, 8 if k <= 256 else 16, 1, buckets))

    def _launch(self, function: Any, held: tuple[Any, ...], numbers: tuple[Any, ...]) -> Callable[[], None]:
        def run() -> None:
            pointers = [None if tensor is None else tensor.data_ptr() for tensor in held]
            _succeeded(function(*pointers, *numbers, self.torch.cuda.current_stream().cuda_stream))

        return run


def _succeeded(status: int) -> None:
    if status != 0:
        raise SystemExit(f"bench_gpu: a call of libvq.so failed, cudaError_t {status}")
