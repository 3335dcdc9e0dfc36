"""The KV cache of a token loop, on the device that runs the graph, in memory taken once.

A graph gives each layer's cache back whole: `present = Concat(past, new)`, [B, heads, past + S, head_dim]. Rows lie apart
by the length of the sequence, so `present` cannot share the memory of `past`: two halves take turns, each as large as the
longest sequence will be. A call reads one and the runtime's Concat writes the other, where they are.

What remains is that one copy of the cache a step, inside the graph, from half to half. It would take a graph with a cache
of fixed length to be rid of it, which standard ONNX attention, and so every stock runtime, does not read in place. Nothing
else is copied: not between host and device, not by the host, and nothing is allocated after the start. Rows that finish
are taken out by one more copy, of the rows that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from export_vq import feeds as fd
from export_vq.errors import UserError
from export_vq.feeds import Feeds, Runner


@runtime_checkable
class CacheRunner(Protocol):
    """A runner that reads and writes the cache where it is told to.

    Attributes:
        cache_dtype, cache_device: of the tensors that it takes.
    """

    cache_dtype: torch.dtype
    cache_device: torch.device

    def infer_with(self, feeds: Feeds, past: dict[str, Tensor], present: dict[str, Tensor]) -> Feeds:
        """One call.

        Args:
            feeds: the other inputs.
            past: past_key_values.{i}.key and .value, contiguous on the device.
            present: present.{i}.key and .value, to be written.

        Returns:
            the other outputs, on the host.
        """
        ...


class Cache(Protocol):
    """The cache of a batch and the model that fills it."""

    def infer(self, feeds: Feeds) -> Feeds:
        """One call: inputs without the cache -> outputs without it; its tokens are in the cache afterwards."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only, in this order."""
        ...


def open_cache(runner: Runner, batch: int, positions: int) -> Cache:
    """An empty cache for a batch of sequences of at most so many positions."""
    if isinstance(runner, CacheRunner):
        return BoundCache(runner, runner.signature.cache_shapes, batch, positions)
    return HandedCache(runner, batch)


class BoundCache:
    """Two halves on the runner's device, as the docstring of the module says."""

    def __init__(self, runner: CacheRunner, shapes: Sequence[tuple[int, int]], batch: int, positions: int) -> None:
        """Args: the runner; (KV heads, head_dim) of each layer; rows; the longest sequence.

        Raises:
            UserError: the device has no memory for so many positions.
        """
        self._runner, self._batch, self._positions, self._filled = runner, batch, positions, 0
        self._shapes = {f"{i}.{part}": shape for i, shape in enumerate(shapes) for part in ("key", "value")}
        sizes = {name: batch * heads * positions * dim for name, (heads, dim) in self._shapes.items()}
        dtype, device = runner.cache_dtype, runner.cache_device
        try:
            self._halves = [
                {n: torch.empty(size, dtype=dtype, device=device) for n, size in sizes.items()} for _ in range(2)
            ]
        except RuntimeError as error:  # what torch raises where memory ends, on any device
            need = 2 * sum(sizes.values()) * dtype.itemsize
            raise UserError(
                f"the cache of {batch} x {positions} positions needs {need >> 20} MiB, more than {device} has free; "
                "ask for fewer new tokens with --max-new-tokens, or for fewer prompts at a time"
            ) from error

    def infer(self, feeds: Feeds) -> Feeds:
        end = self._filled + feeds["input_ids"].shape[1]
        assert end <= self._positions, f"the cache is for {self._positions} positions, {end} were to be held"
        past = {f"past_key_values.{n}": t for n, t in self._views(0, self._batch, self._filled).items()}
        present = {f"present.{n}": t for n, t in self._views(1, self._batch, end).items()}
        outputs = self._runner.infer_with(feeds, past, present)
        self._filled = end
        self._halves.reverse()
        return outputs

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(list(rows), device=self._runner.cache_device)
        old = self._views(0, self._batch, self._filled)
        new = self._views(1, len(rows), self._filled)
        for name, tensor in old.items():
            torch.index_select(tensor, 0, index, out=new[name])
        if index.is_cuda:
            torch.cuda.current_stream().synchronize()  # the runtime reads on a stream of its own
        self._batch = len(rows)
        self._halves.reverse()

    def _views(self, half: int, batch: int, length: int) -> dict[str, Tensor]:
        """The begin of each tensor's memory as [batch, heads, length, head_dim]."""
        return {
            name: self._halves[half][name][: batch * heads * length * dim].view(batch, heads, length, dim)
            for name, (heads, dim) in self._shapes.items()
        }


class HandedCache:
    """For a runner that takes and returns everything as arrays, PyTorch's for one: the last call's arrays are kept."""

    def __init__(self, runner: Runner, batch: int) -> None:
        self._runner = runner
        self._past = fd.empty_past(runner.signature, batch)

    def infer(self, feeds: Feeds) -> Feeds:
        outputs = self._runner.infer(feeds | self._past)
        self._past = fd.past_of(outputs)
        return {name: array for name, array in outputs.items() if not name.startswith("present.")}

    def keep(self, rows: Sequence[int]) -> None:
        self._past = {name: array[list(rows)] for name, array in self._past.items()}
