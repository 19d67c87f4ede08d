"""Arrays between borders that no kernel may touch."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

PAGE = mmap.PAGESIZE


def bordered(values):
    """A copy, and the bytes before it, all 255, which is NaN in any floating point format.

    On Linux it ends where a page begins that nobody may read or write.
    """
    values = np.ascontiguousarray(values)
    pages = -(-values.nbytes // PAGE) + 1
    raw = np.frombuffer(mmap.mmap(-1, (pages + 1) * PAGE), np.uint8)
    end = pages * PAGE
    raw[:end] = 255
    if sys.platform == "linux":
        behind = ctypes.c_void_p(raw.ctypes.data + end)
        assert ctypes.CDLL(None).mprotect(behind, ctypes.c_size_t(PAGE), 0) == 0
    array = raw[end - values.nbytes : end].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array, raw[: end - values.nbytes]
