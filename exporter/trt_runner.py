"""TensorRT on a plan, in the shape of the other runners: a context manager with `infer(feeds) -> {name: array}`.

Tensors live on the GPU and are bound by address. `run` takes and returns CUDA tensors and copies nothing to or from the
host; `infer` takes and returns numpy arrays, bfloat16 as float32, for checks and token loops.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export_vq.errors import UserError
from export_vq.feeds import Array, Closing, Feeds, HeadTables, Signature
from export_vq.plan import LoadedEngine, load_engine
from export_vq.profiles import choose_profile
from export_vq.records import EngineArtifact
from export_vq.trt import last_errors

TORCH_DTYPES = {
    "float": torch.float32,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
}
"""TensorRT's type names, lower case -> torch's."""

_Key = tuple[tuple[str, int, tuple[int, ...]], ...]


def signature_of_engine(artifact: EngineArtifact) -> Signature:
    """The signature of a decoder engine; of a head alone the empty one."""
    cache_dtype = np.float16 if artifact.dtype == "fp16" else np.float32
    return Signature(
        artifact.cache_shapes,
        "position_ids" in artifact.input_names,
        cache_dtype,
        artifact.output,
        artifact.top_k,
        artifact.last_token,
    )


class TrtRunner(Closing):
    """One engine, one stream, one execution context per profile. Not for several threads at once."""

    def __init__(
        self, sidecar: Path, *, plugin: Path | None = None, cuda_graph: bool = False, head: HeadTables | None = None
    ) -> None:
        """Args: <kind>.json beside the plan; the plugin library (None: the one built here); whether to capture CUDA graphs;
        the constants of its VQ head, which a plan does not show.

        A graph is captured when the same tensors are run a second time, as a benchmark of one decode step does; its
        outputs are then the same tensors every time.

        Raises:
            UserError: there is no usable GPU here, or the plan is not for this machine.
        """
        loaded = load_engine(sidecar, plugin=plugin)
        if not torch.cuda.is_available():
            raise UserError(
                f"PyTorch {torch.__version__} sees no CUDA device, and engines run on its CUDA tensors; install PyTorch for CUDA"
            )
        self.artifact = loaded.artifact
        self.name = f"{loaded.artifact.kind} in {loaded.here}"
        self.signature = signature_of_engine(loaded.artifact)
        self.head = head
        self._loaded: LoadedEngine | None = loaded
        self._dtypes = {
            name: TORCH_DTYPES[loaded.engine.get_tensor_dtype(name).name.lower()]
            for name in (*self.artifact.input_names, *self.artifact.output_names)
        }
        cached = [dtype for name, dtype in self._dtypes.items() if name.startswith("past_key_values.")]
        self.cache_dtype = cached[0] if cached else torch.float32
        self.cache_device = torch.device("cuda")
        self._stream = torch.cuda.Stream()
        self._contexts: dict[int, Any] = {}
        # An empty tensor has no memory of its own, and TensorRT takes no null address.
        self._nowhere = torch.empty(256, dtype=torch.uint8, device="cuda")
        self._cuda_graph = cuda_graph
        self._last: _Key | None = None
        self._captured: tuple[_Key, torch.cuda.CUDAGraph, dict[str, Tensor], dict[str, Tensor]] | None = None

    def infer(self, feeds: Feeds) -> Feeds:
        """Named numpy arrays in, named numpy arrays out."""
        outputs = self.run(self.to_device(feeds))
        self.synchronize()
        return {name: _to_host(value) for name, value in outputs.items()}

    def infer_with(self, feeds: Feeds, past: dict[str, Tensor], present: dict[str, Tensor]) -> Feeds:
        """One call with the cache in the caller's memory on the GPU: `past` is read and `present` written there.

        Returns:
            the other outputs, on the host.
        """
        outputs = self.run(self._put(feeds) | past, into=present)
        self.synchronize()
        return {name: _to_host(value) for name, value in outputs.items() if name not in present}

    def to_device(self, feeds: Feeds) -> dict[str, Tensor]:
        """The feeds as CUDA tensors of the types that the engine takes."""
        self._check_names(feeds)
        return self._put(feeds)

    def run(self, tensors: dict[str, Tensor], into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Enqueue the engine after what the current stream holds, and let the current stream wait for it.

        Args:
            tensors: every input, contiguous on the GPU, of the engine's types.
            into: outputs by name to write where the caller wants them, of their shapes and types; the others are new.

        Returns:
            every output, on the GPU; the host does not wait, see `synchronize`.

        Raises:
            UserError: no profile serves these shapes, or TensorRT refuses.
        """
        self._check_names(tensors)
        for name, tensor in tensors.items():
            if not (tensor.is_cuda and tensor.is_contiguous() and tensor.dtype == self._dtypes[name]):
                raise UserError(
                    f"input {name} is {tensor.dtype} on {tensor.device}, expected contiguous {self._dtypes[name]} on the GPU; "
                    "pass it through to_device"
                )
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = (None if into else self._replay(tensors)) or self._enqueue(tensors, into or {})
        current.wait_stream(self._stream)
        for tensor in tensors.values():
            tensor.record_stream(self._stream)  # the caller may free it while it is read
        for tensor in outputs.values():
            tensor.record_stream(current)
        return outputs

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done."""
        self._stream.synchronize()

    def close(self) -> None:
        """Free the engine and its memory; it cannot run after."""
        if self._loaded is not None:
            self.synchronize()
        self._captured = self._last = None
        self._contexts.clear()
        self._loaded = None

    def _put(self, feeds: Feeds) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(np.ascontiguousarray(array)).to("cuda", self._dtypes[name])
            for name, array in feeds.items()
        }

    def _enqueue(self, tensors: dict[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
        context = self._context(choose_profile(self.artifact.profiles, {n: t.shape for n, t in tensors.items()}))
        for name, tensor in tensors.items():
            self._demand(context.set_input_shape(name, tuple(tensor.shape)))
            self._demand(context.set_tensor_address(name, self._address(tensor)))
        outputs = {}
        for name in self.artifact.output_names:
            shape = tuple(context.get_tensor_shape(name))
            outputs[name] = into[name] if name in into else torch.empty(shape, dtype=self._dtypes[name], device="cuda")
            assert outputs[name].shape == shape, f"{name} is {shape}, its memory {tuple(outputs[name].shape)}"
            self._demand(context.set_tensor_address(name, self._address(outputs[name])))
        self._demand(context.execute_async_v3(self._stream.cuda_stream))
        return outputs

    def _replay(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Replay the graph of these tensors, capturing it first when they come a second time; None when they are new."""
        if not self._cuda_graph:
            return None
        key = tuple((name, tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))
        if self._captured is None or self._captured[0] != key:
            # TensorRT settles its shapes in the first enqueue, which cannot be captured; what follows can.
            if self._last != key:
                self._last = key
                return None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                outputs = self._enqueue(tensors, {})
            self._captured = key, graph, dict(tensors), outputs  # the graph reads these inputs: they must live on
        self._captured[1].replay()
        return self._captured[3]

    def _context(self, profile: int) -> Any:
        """The execution context of a profile: switching one between profiles would stall the stream and undo a captured graph."""
        assert self._loaded is not None, "the runner is closed"
        if profile not in self._contexts:
            context = self._loaded.engine.create_execution_context()
            self._demand(context is not None)
            self._demand(context.set_optimization_profile_async(profile, self._stream.cuda_stream))
            self._contexts[profile] = context
        return self._contexts[profile]

    def _address(self, tensor: Tensor) -> int:
        return tensor.data_ptr() if tensor.numel() else self._nowhere.data_ptr()

    def _check_names(self, feeds: Any) -> None:
        missing = [name for name in self.artifact.input_names if name not in feeds]
        surplus = [name for name in feeds if name not in self.artifact.input_names]
        if missing or surplus:
            raise UserError(
                f"{self.name}: inputs {', '.join(missing) or 'none'} missing and {', '.join(surplus) or 'none'} not known; "
                f"expected {', '.join(self.artifact.input_names)}"
            )

    def _demand(self, succeeded: bool) -> None:
        if not succeeded:
            assert self._loaded is not None
            raise UserError(f"{self.name}: TensorRT refuses to run: {last_errors(self._loaded.here)}")


def _to_host(tensor: Tensor) -> Array:
    """As a numpy array, bfloat16 as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
