"""Everything that can run a model, in one shape: a context manager with `infer(feeds) -> {name: array}`.

Arrays are numpy; bfloat16 travels as float32, which holds every bfloat16 number exactly.
"""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from export_vq import codespace
from export_vq.contract import HEAD_PREFIX
from export_vq.errors import CheckFailed, UserError
from export_vq.feeds import Closing, Feeds, HeadTables, Signature
from export_vq.head import VQHead, gather_scatter
from export_vq.load import LoadedModel, convert
from export_vq.manifest import bundled_library
from export_vq.outputs import OPS
from export_vq.plugins.library import Library, find_current
from export_vq.records import OnnxArtifact
from export_vq.require import require

_NUMPY: dict[torch.dtype, type[np.floating[Any]]] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.float32,
}


_NODE_EVENT = "_kernel_time"
"""What the runtime's profile puts behind the name of a node that ran."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class TorchRunner(Closing):
    """The PyTorch model: the reference. In float64 it is the oracle of the half-precision checks.

    Norms that an architecture always computes in float32 stay so in the oracle: its error is that of float32 at most,
    four orders below what half precision leaves.
    """

    def __init__(self, loaded: LoadedModel, signature: Signature, dtype: torch.dtype = torch.float32) -> None:
        """Args: the model; the signature of its graph; the type to compute in (other than the model's: a copy)."""
        held = next(loaded.model.parameters()).dtype
        self.name = f"PyTorch {str(dtype).removeprefix('torch.')}"
        self.signature = replace(signature, cache_dtype=_NUMPY[dtype])
        self._dtype = dtype
        self._model: nn.Module | None = loaded.model if held == dtype else convert(copy.deepcopy(loaded.model), dtype)
        if dtype == torch.float64:
            # Eager attention takes its softmax in float32, where a float64 mask overflows to -inf and padding to NaN.
            self._model.set_attn_implementation("sdpa")  # type: ignore[operator]

    @property
    def head(self) -> HeadTables | None:
        """The tables of the model's VQ head; None where it has none."""
        assert self._model is not None, "the runner is closed"
        layer = self._model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(layer, VQHead):
            return None
        bias = None if layer.bias is None else layer.bias.detach().float().numpy()
        return HeadTables(layer.codes.numpy(), bias)

    def infer(self, feeds: Feeds) -> Feeds:
        from transformers import DynamicCache

        assert self._model is not None, "the runner is closed"
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
        layers = range(len(self.signature.cache_shapes))
        pairs = [[tensors.pop(f"past_key_values.{i}.{p}").to(self._dtype) for p in ("key", "value")] for i in layers]
        draw: dict[str, Tensor] = {name: tensors.pop(name) for name in ("temperature", "uniform") if name in tensors}
        with torch.inference_mode(), self._tapped_head() as head_inputs:
            out = self._model(**tensors, past_key_values=DynamicCache(ddp_cache_data=pairs), use_cache=True)
            chosen = self._selected(head_inputs[0], draw) if self.signature.output != "logits" else {}
        presents = {
            f"present.{i}.{part}": getattr(layer, f"{part}s")
            for i, layer in enumerate(out.past_key_values.layers)
            for part in ("key", "value")
        }
        wanted = torch.float32 if self._dtype == torch.bfloat16 else self._dtype
        computed = presents if chosen else {"logits": out.logits, **presents}
        outputs = {name: value.to(wanted) for name, value in computed.items()}
        # What is chosen comes in the types of the op, not in the model's.
        outputs |= {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in chosen.items()}
        return {name: value.numpy() for name, value in outputs.items()}

    @contextlib.contextmanager
    def _tapped_head(self) -> Iterator[list[Tensor]]:
        """Keeps what enters the output layer; where no V logits are asked for, the layer itself gets no positions."""
        seen: list[Tensor] = []

        def tap(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            hidden = inputs[0][:, -1:] if self.signature.last_token else inputs[0]
            seen.append(hidden)
            return (hidden if self.signature.output == "logits" else hidden[:, :0],)

        handle = self._model.get_output_embeddings().register_forward_pre_hook(tap)  # type: ignore[union-attr,operator]
        try:
            yield seen
        finally:
            handle.remove()

    def _selected(self, hidden: Tensor, draw: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a 'topk' or 'sample' graph gives of hidden states [B, S, D], and the `logits` that it was chosen from."""
        head = self._model.get_output_embeddings()  # type: ignore[union-attr,operator]
        code_logits = head.code_logits(hidden)
        wide = code_logits if code_logits.dtype == torch.float64 else code_logits.float()
        logits = gather_scatter(wide, head.codes, head.bias)  # summed in float32 and, as in the op, not rounded after
        if self.signature.output == "topk":
            best = codespace.top_k(code_logits, head.codes, head.bias, self.signature.top_k)
            chosen = {"values": best.values, "ids": best.ids, "logsumexp": best.logsumexp, "code_logits": code_logits}
        else:
            temperature = float(draw["temperature"])
            ids, logprob = codespace.sample(code_logits, head.codes, head.bias, draw["uniform"], temperature)
            chosen = {"ids": ids, "logprob": logprob}
        return {**chosen, "logits": logits}

    def close(self) -> None:
        self._model = None


class OrtRunner(Closing):
    """ONNX Runtime on a file. Our native kernels take the head over where they are built; without them stock ops run it.

    Attributes:
        native_nodes: how many nodes ran on our kernels, read from the runtime's own profile of the first run; None before.
    """

    def __init__(
        self,
        path: Path,
        signature: Signature,
        *,
        threads: int = 0,
        provider: str = CPU,
        native: bool = True,
        bundle: Path | None = None,
        edited: ir.Model | None = None,
        fuse_quantised: bool = True,
        profiled: bool = False,
    ) -> None:
        """Open a session.

        Args:
            path: an .onnx file.
            signature: of its graph.
            threads: intra-op threads (0: the runtime's choice).
            provider: the execution provider, CPU or CUDA.
            native: whether to register the native kernels where they are built, or brought along by `bundle`.
            bundle: the output folder that the file lies in, where it is one.
            edited: the graph of that file, changed since; its head's constants and large weights are the file's.
            fuse_quantised: whether products of quantised numbers may be fused. The runtime (1.31) also fuses where its
                kernels compute something else: it refuses FP8 then, and rounds the input of a product whose weight alone
                is int8. Without fusion each number is rounded as the graph says, and multiplied in its type.
            profiled: whether the runtime keeps the time of every node, for `node_times`; that takes time itself.

        Raises:
            UserError: ONNX Runtime is not installed, or cannot run this file on this provider; or the bundle's library is
                not the one that its manifest lists.
        """
        ort = require("onnxruntime", extra="cpu")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Two models, or PyTorch and a model, take turns in one process: threads that spin while idle would slow the other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not fuse_quantised:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.name = f"{path.name} in ONNX Runtime {ort.__version__}"
        if provider != CPU:
            self.name += f" on {provider.removesuffix('ExecutionProvider')}"
        self.signature = signature
        self.cache_dtype = torch.float16 if signature.cache_dtype == np.float16 else torch.float32
        self.cache_device = torch.device("cpu" if provider == CPU else "cuda")
        self._path = path
        self.native_nodes: int | None = 0
        self._profiles: tempfile.TemporaryDirectory[str] | None = None
        library = native_library(bundle) if native else None
        self._profiled = profiled
        if library is not None:
            options.register_custom_ops_library(str(library.path))
            self.name += " with native kernels"
            self.native_nodes = None
        if library is not None or profiled:
            self._profiles = tempfile.TemporaryDirectory()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._profiles.name, "run"))
        graph: Path | bytes = path
        try:
            if edited is not None:
                graph = ir.to_proto(edited).SerializeToString()
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(path.parent)
                )
            self._session: Any = ort.InferenceSession(graph, options, providers=[provider])
        except Exception as error:  # the runtime's exceptions share no base, nor do onnx_ir's
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{path}: ONNX Runtime cannot run it on {provider} ({reason}); export with --dtype fp32 or fp16, or use a GPU"
            ) from error
        if provider not in self._session.get_providers():  # the runtime falls back without a word
            raise UserError(
                f"{path}: ONNX Runtime {ort.__version__} has no {provider} that works here, it offers "
                f"{', '.join(self._session.get_providers())}; install onnxruntime-gpu with the CUDA version that it wants"
            )

    def infer(self, feeds: Feeds) -> Feeds:
        names = [output.name for output in self._session.get_outputs()]
        outputs = dict(zip(names, self._session.run(names, feeds), strict=True))
        self._read_profile()
        return outputs

    def infer_with(self, feeds: Feeds, past: dict[str, Tensor], present: dict[str, Tensor]) -> Feeds:
        """One call with the cache in the caller's memory on `cache_device`: `past` is read and `present` written there.

        Returns:
            the other outputs, on the host.
        """
        binding, number = self._session.io_binding(), np.float16 if self.cache_dtype == torch.float16 else np.float32
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        device, index = self.cache_device.type, self.cache_device.index or 0
        for bind, tensors in ((binding.bind_input, past), (binding.bind_output, present)):
            for name, tensor in tensors.items():
                bind(name, device, index, number, list(tensor.shape), tensor.data_ptr())
        others = [output.name for output in self._session.get_outputs() if output.name not in present]
        for name in others:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        self._read_profile()
        values = binding.get_outputs()[len(present) :]  # in the order in which they were bound
        return {name: value.numpy() for name, value in zip(others, values, strict=True)}

    @cached_property
    def head(self) -> HeadTables | None:
        """The tables of the graph's VQ head, read from its initializers; None where it has none, as the dense twin."""
        return read_head(self._path)

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        """A run of these feeds over and over, into the same memory: what a decoding loop does, and what is timed."""
        self.infer(feeds)
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for output in self._session.get_outputs():
            binding.bind_output(output.name)
        self._session.run_with_iobinding(binding)
        for output, value in zip(self._session.get_outputs(), binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(output.name, value)
        return lambda: self._session.run_with_iobinding(binding)

    def demand_native(self) -> None:
        """After the first run: raise CheckFailed unless the runtime's profile shows our kernels."""
        if not self.native_nodes:
            raise CheckFailed(
                f"{self.name}: the native kernels are registered, but the runtime's profile shows none of them; "
                "this version of ONNX Runtime prefers the function body"
            )

    def node_times(self) -> dict[str, float]:
        """Median milliseconds of each node over all runs so far, by name, after the runtime's own changes to the graph. Only
        of a runner that was opened `profiled`, and once: from here on nothing is.
        """
        times: dict[str, list[float]] = {}
        for event in self._end_profile():
            if event.get("cat") == "Node" and event["name"].endswith(_NODE_EVENT):
                times.setdefault(event["name"].removesuffix(_NODE_EVENT), []).append(event["dur"] / 1000)
        return {name: statistics.median(found) for name, found in times.items()}

    def _read_profile(self) -> None:
        """The first run was profiled; from here on nothing is, unless all runs shall be."""
        if self._profiles is not None and not self._profiled:
            ran = {
                e["name"] for e in self._end_profile() if e.get("args", {}).get("op_name") == OPS[self.signature.output]
            }
            self.native_nodes = len(ran)

    def _end_profile(self) -> list[dict[str, Any]]:
        assert self._profiles is not None
        events: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self._profiles.cleanup()
        self._profiles = None
        return events

    def close(self) -> None:
        self._session = None
        if self._profiles is not None:
            self._profiles.cleanup()


def read_head(path: Path) -> HeadTables | None:
    """The tables of an .onnx file's VQ head, read from its initializers; None where it has none."""
    weights = ir.load(path).graph.initializers
    codes, bias = (weights.get(f"{HEAD_PREFIX}{name}") for name in ("codes", "bias"))
    if codes is None or codes.const_value is None:
        return None
    table = None if bias is None or bias.const_value is None else bias.const_value.numpy().astype(np.float32)
    return HeadTables(np.array(codes.const_value.numpy()), table)  # its own memory, not the file's


def native_library(bundle: Path | None = None) -> Library | None:
    """The ONNX Runtime library with our kernels: the one built from the sources of this version; else the one in the
    output folder `bundle`; None where there is none.

    Raises:
        UserError: the bundle's library is not the one that its manifest lists.
    """
    return find_current("vq_ort") or (bundled_library(bundle, "vq_ort") if bundle is not None else None)


def signature_of(artifact: OnnxArtifact) -> Signature:
    """The signature of an exported decoder graph."""
    cache_dtype = np.float16 if artifact.dtype == "fp16" else np.float32
    return Signature(
        artifact.cache_shapes,
        "position_ids" in artifact.input_names,
        cache_dtype,
        artifact.output,
        artifact.top_k,
        artifact.last_token,
    )
