"""VQGatherScatter of libvq.so on this processor: V logits of single rows, for Python's own use."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
from numpy.typing import NDArray

from export_vq.errors import UserError
from export_vq.plugins.library import Library, build_command

_FLOAT32, _BEST_ISA, _ROWS = 0, -1, 1


class HostKernel:
    """The kernel over one head's constants, which it holds packed."""

    def __init__(self, library: Library, codes: NDArray[np.int32], bias: NDArray[np.float32] | None) -> None:
        """Args: libvq.so, current; codes int32 [V, M]; bias float32 [V] or None.

        Raises:
            UserError: the library cannot be loaded.
            ValueError: a code id is not one of 0 to 65535.
        """
        self._functions = _functions(library)
        self._vocab_size, self._num_codebooks = codes.shape
        codes = np.ascontiguousarray(codes, np.int32)
        bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        constants = codes.ctypes.data, None if bias is None else bias.ctypes.data
        self._head = ctypes.c_void_p()
        _check(
            self._functions.vq_make_gather_scatter_cpu(
                *constants, self._num_codebooks, self._vocab_size, _BEST_ISA, ctypes.byref(self._head)
            )
        )
        weakref.finalize(self, self._functions.vq_free_gather_scatter_cpu, self._head)

    def logits(self, code_logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Code logits [M*K] -> logits float32 [V], on the caller's thread.

        Raises:
            ValueError: K is not above every code id.
        """
        num_codes, rest = divmod(code_logits.size, self._num_codebooks)
        if rest:
            raise ValueError(f"{code_logits.size} code logits; expected a multiple of {self._num_codebooks}")
        row = np.ascontiguousarray(code_logits, np.float32)
        out = np.empty(self._vocab_size, np.float32)
        pointers = row.ctypes.data, out.ctypes.data
        _check(self._functions.vq_gather_scatter_cpu(self._head, *pointers, _ROWS, num_codes, _FLOAT32))
        return out


def _functions(library: Library) -> ctypes.CDLL:
    """plugins/capi/capi.h."""
    try:
        functions = ctypes.CDLL(str(library.path))
    except OSError as error:
        raise UserError(
            f"{library.path}: cannot be loaded ({error}); build it again with: {build_command()}"
        ) from error
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    functions.vq_make_gather_scatter_cpu.argtypes = [pointer, pointer, size, size, number, pointer]
    functions.vq_gather_scatter_cpu.argtypes = [pointer, pointer, pointer, size, size, number]
    functions.vq_free_gather_scatter_cpu.argtypes = [pointer]
    functions.vq_free_gather_scatter_cpu.restype = None
    for function in (functions.vq_make_gather_scatter_cpu, functions.vq_gather_scatter_cpu):
        function.restype = ctypes.c_char_p
    return functions


def _check(error: bytes | None) -> None:
    if error is not None:
        raise ValueError(error.decode())
