"""Times the VQ head on a GPU: the scatter kernel against copy bandwidth, whole heads against a cuBLAS dense head.

    python scripts/bench_gpu.py [-o bench_gpu.json]

Needs torch with CUDA, and libvq.so built with CUDA (`export-vq plugins build`, or --library). Every sample is measured
with device events around work that was queued behind a long read of other memory: that read leaves none of the inputs
in the L2 cache, as a decode step's backbone does, and gives the host the time to queue what is timed. Samples that the
host queued too late are thrown away. What is compared takes turns within one run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_gpu_decode import decode, print_decode

V = 128256
"""Vocabulary: that of Llama 3."""
FLUSH_BYTES = 1 << 30
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Timing:
    """Microseconds of one thing: median, 10th and 90th percentile of `samples` samples."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    parser.add_argument("--library", type=Path, help="libvq.so; default: the one of export_vq.plugins")
    parser.add_argument("--samples", type=int, default=50, help="samples of every timing (default 50)")
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        return _cannot("torch is not installed")
    if not torch.cuda.is_available():
        return _cannot("torch finds no CUDA device")
    path = options.library or _installed_library()
    if path is None or not path.is_file():
        return _cannot(f"no library {path or 'libvq.so'}; build it with: export-vq plugins build")

    bench = Bench(path, options.samples)
    result: dict[str, Any] = {"device": bench.device(), "scatter": bench.scatter(), "heads": bench.heads()}
    result["decode"] = decode(bench, V, result["scatter"]["cases"]["copy"]["bytes_per_second"])
    print_tables(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _cannot(reason: str) -> int:
    print(f"bench_gpu: {reason}", file=sys.stderr)
    return 2


def _installed_library() -> Path | None:
    from export_vq.plugins import library

    found = library.find("vq")
    return None if found is None else found.path


class Bench:
    """Everything on the current device, in float16."""

    def __init__(self, library: Path, samples: int) -> None:
        import torch

        self.torch = torch
        self.samples = samples
        self.random = torch.Generator("cuda").manual_seed(0)
        self.flushed = torch.ones(FLUSH_BYTES // 4, device="cuda")
        self.c = ctypes.CDLL(str(library.resolve()))
        self.function = self.c.vq_gather_scatter_cuda
        self.function.restype = ctypes.c_int
        self.function.argtypes = [
            *[ctypes.c_void_p] * 4,
            *[ctypes.c_int64] * 4,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_void_p,
        ]

    def device(self) -> dict[str, Any]:
        torch = self.torch
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nothing_us": asdict(self.time({"nothing": lambda: None})["nothing"]),
        }

    def scatter(self, rows: int = 4096) -> dict[str, Any]:
        """Bytes a second of the kernel, each input read once and each logit written once, against a device copy."""
        torch = self.torch
        source, target = (torch.ones(COPY_BYTES // 4, device="cuda") for _ in range(2))
        cases: dict[str, tuple[int, Callable[[], object]]] = {"copy": (2 * COPY_BYTES, lambda: target.copy_(source))}
        for num_codebooks, num_codes in ((1, 1280), (1, 4096), (8, 256)):
            codes, words = self.codes(num_codebooks, num_codes)
            scores = self.normal(rows, num_codebooks * num_codes)
            logits = torch.full((rows, V), torch.nan, dtype=torch.float16, device="cuda")
            run = self.launcher(scores, words, logits, num_codebooks, num_codes)
            run()
            self.check(logits, scores.view(rows, num_codebooks, num_codes), codes)
            moved = sum(t.numel() * t.element_size() for t in (scores, words, logits))
            cases[f"M={num_codebooks} K={num_codes}"] = (moved, run)
        timings = self.time({name: run for name, (_, run) in cases.items()})
        rates = {name: moved / timings[name].median_us * 1e6 for name, (moved, _) in cases.items()}
        return {
            "rows": rows,
            "vocab_size": V,
            "cases": {
                name: {
                    "bytes": cases[name][0],
                    "bytes_per_second": rates[name],
                    "of_copy": rates[name] / rates["copy"],
                    **asdict(t),
                }
                for name, t in timings.items()
            },
        }

    def heads(self) -> list[dict[str, Any]]:
        """Codebook GEMM and scatter against the dense GEMM [B, D] x [D, V], for each batch, D and K."""
        torch = self.torch
        results = []
        for hidden_size in (4096, 2048):
            weight = self.normal(V, hidden_size, scale=hidden_size**-0.5)
            for num_codes in (1280, 4096):
                codebook = self.normal(num_codes, hidden_size, scale=hidden_size**-0.5)
                codes, words = self.codes(1, num_codes)
                for batch in (1, 8, 64):
                    hidden = self.normal(batch, hidden_size)
                    scores = torch.empty(batch, num_codes, dtype=torch.float16, device="cuda")
                    logits = torch.full((batch, V), torch.nan, dtype=torch.float16, device="cuda")
                    dense_logits = torch.empty_like(logits)
                    scatter = self.launcher(scores, words, logits, 1, num_codes)
                    heads = {
                        "dense": lambda h=hidden, w=weight, out=dense_logits: torch.mm(h, w.t(), out=out),
                        "vq": lambda h=hidden, c=codebook, s=scores, run=scatter: (torch.mm(h, c.t(), out=s), run()),
                        "scatter": scatter,
                    }
                    heads["vq"]()
                    self.check(logits, scores.view(batch, 1, num_codes), codes)
                    timings = self.time(heads)
                    results.append(
                        {
                            "batch": batch,
                            "hidden_size": hidden_size,
                            "num_codes": num_codes,
                            "speedup": timings["dense"].median_us / timings["vq"].median_us,
                            **{name: asdict(t) for name, t in timings.items()},
                        }
                    )
        return results

    def time(self, work: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        """Each in turn, in a new order every round, behind a read that flushes the L2 cache."""
        torch = self.torch
        for run in work.values():
            for _ in range(3):
                run()
        samples: dict[str, list[float]] = {name: [] for name in work}
        late = 0
        names = list(work)
        while min(map(len, samples.values())) < self.samples:
            names.append(names.pop(0))
            for name in names:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                self.flushed.sum()
                start.record()
                work[name]()
                end.record()
                was_late = start.query()  # the device was there before the host had queued everything
                end.synchronize()
                if was_late:
                    late += 1
                    if late > 20 * self.samples:
                        raise SystemExit("bench_gpu: the host queues work too slowly to time it; is the machine busy?")
                else:
                    samples[name].append(1000 * start.elapsed_time(end))
        return {name: _timing(values) for name, values in samples.items()}

    def launcher(self, scores: Any, words: Any, logits: Any, num_codebooks: int, num_codes: int) -> Callable[[], None]:
        bits = 8 if num_codes <= 256 else 16
        arguments = (
            scores.data_ptr(),
            words.data_ptr(),
            None,
            logits.data_ptr(),
            logits.shape[0],
            num_codebooks,
            num_codes,
            V,
            bits,
            1,
            self.torch.cuda.current_stream().cuda_stream,
        )

        def run(_keep: tuple[Any, ...] = (scores, words, logits)) -> None:
            status = self.function(*arguments)
            if status != 0:
                raise SystemExit(f"bench_gpu: the kernel was not launched, cudaError_t {status}")

        return run

    def codes(self, num_codebooks: int, num_codes: int) -> tuple[Any, Any]:
        """Random code ids: [V, M], and packed as int32 words [M, W]. V is a multiple of what 16 bytes hold."""
        torch = self.torch
        ids = torch.randint(num_codes, (num_codebooks, V), generator=self.random, device="cuda")
        return ids.t(), ids.to(torch.uint8 if num_codes <= 256 else torch.int16).view(torch.int32)

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        return (self.torch.randn(shape, generator=self.random, device="cuda") * scale).half()

    def check(self, logits: Any, scores: Any, codes: Any) -> None:
        """What is timed computes the right thing: the last row, to the rounding of float16."""
        expected = sum(scores[-1, m].double()[codes[:, m]] for m in range(codes.shape[1]))
        if not self.torch.allclose(logits[-1].double(), expected, rtol=2.0**-10, atol=2.0**-10):
            raise SystemExit("bench_gpu: the kernel's logits are wrong; see tests/plugins/test_cuda.py")


def _timing(values: list[float]) -> Timing:
    tenths = statistics.quantiles(values, n=10)
    return Timing(statistics.median(values), tenths[0], tenths[-1], len(values))


def print_tables(result: dict[str, Any]) -> None:
    device = result["device"]
    print(f"{device['name']}, torch {device['torch']}; fp16, V={V}, cold L2, medians (p10 to p90)")
    print(f"an empty interval between two events: {_spread(device['nothing_us'])}")
    print(f"\nscatter, {result['scatter']['rows']} rows")
    for name, case in result["scatter"]["cases"].items():
        print(
            f"  {name:14} {case['bytes_per_second'] / 1e9:8.0f} GB/s  {100 * case['of_copy']:5.0f} % of copy  {_spread(case)}"
        )
    print("\nhead: codebook GEMM and scatter, against the dense GEMM")
    for head in result["heads"]:
        sizes = f"D={head['hidden_size']} K={head['num_codes']} batch {head['batch']}"
        parts = "  ".join(f"{name} {_spread(head[name])}" for name in ("dense", "vq", "scatter"))
        print(f"  {sizes:24} {head['speedup']:6.1f}x  {parts}")
    print_decode(result["decode"], _spread)


def _spread(timing: dict[str, Any]) -> str:
    return f"{timing['median_us']:.1f} us ({timing['p10_us']:.1f} to {timing['p90_us']:.1f})"


if __name__ == "__main__":
    sys.exit(main())
