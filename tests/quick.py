"""What takes seconds and is seldom what a test looks at: the tracing of a model, and timing.

Tracing gives the same graph for the same backbone. The first test that exports a tiny model traces it; the others, and
processes that they start, read what it made. The key is all that a trace depends on, the values of the weights among it.
The head is not: a placeholder stands for it in a trace.

`python -m quick ARGS` is `export-vq ARGS`, quick.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from filelock import FileLock

from export_vq import bench, contract, graph
from export_vq.head import VQHead
from export_vq.resume import fingerprint

FOLDER = "EXPORT_VQ_TEST_TRACES"
"""The environment variable that says where traces are kept; tests/conftest.py sets it for one run."""
_MOST_BYTES = 1 << 20
"""Of weights. Larger models are there to see how they are exported, not what comes out."""


def kept(trace: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
    """`graph._trace`, with its results kept on disk; whoever asks for one that is being made waits for it."""

    @functools.wraps(trace)
    def traced(model: Any, head: VQHead, *args: Any) -> ir.Model:
        weights = {n: w for n, w in model.state_dict().items() if not n.startswith(contract.HEAD_PREFIX)}
        if sum(weight.nbytes for weight in weights.values()) > _MOST_BYTES:
            return trace(model, head, *args)
        # A model made of another one has a list of class names in its config, which nothing reads.
        config = {**model.config.to_dict(), "architectures": None}, model.config._attn_implementation
        layers = type(model).__name__, type(model.get_input_embeddings()).__name__
        key = (config, layers, head.spec.hidden_size, head.spec.vocab_size, fingerprint(weights), args)
        path = Path(os.environ[FOLDER], hashlib.sha256(repr(key).encode()).hexdigest())
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                made = path.with_suffix(".made")  # renamed when whole: processes of tests are killed
                ir.save(trace(model, head, *args), made, format="protobuf")
                made.rename(path)
            return ir.load(path, format="protobuf")

    return traced


def install() -> None:
    """Keep the traces of this process, and let its benchmarks take no longer than they must."""
    graph._trace = kept(graph._trace)
    bench.run_benchmark.__kwdefaults__.update(seconds=0.0, min_rounds=2)
    bench.WARM_LOOP_SECONDS = 0.0
    bench._last_level_cache_bytes = lambda: 1 << 20


if __name__ == "__main__":
    from export_vq import cli

    install()
    sys.argv[0] = "export-vq"
    cli.main()
