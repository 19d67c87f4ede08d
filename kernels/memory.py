"""Result arrays from a pool of blocks.

A fresh array of 4 MB costs more in page faults than the arithmetic that fills it. The pool keeps
its blocks and lends views of them. NumPy lets every view of a view refer to the block itself, so
a block is free again when its reference count is back at what it was before lending.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any, NamedTuple

import numpy as np

ALIGNMENT = 64
POOL_FROM = 64 * 1024  # smaller arrays come from NumPy
LIMIT = 1 << 30

_PAGE = 4096
# Blocks start at different offsets within 4 KiB: arrays that share all low address bits evict
# each other from the first-level cache and stall loads behind stores. Odd number of lines.
_COLOUR_STEP = 13 * ALIGNMENT


class _Block(NamedTuple):
    bytes: np.ndarray
    start: int  # where the array begins: aligned, and off the starts of other blocks


def _references(blocks: list[_Block], index: int) -> int:
    return sys.getrefcount(blocks[index].bytes)


# How many references an unlent block shows differs between Python versions: measured.
_UNLENT = min(_references([_Block(np.empty(1, np.uint8), 0)], 0) for _ in range(64))

# Without the global lock a reference count read by another thread may be too low for a moment.
_COUNTS_ARE_EXACT = getattr(sys, "_is_gil_enabled", lambda: True)()


def _capacity(nbytes: int) -> int:
    """`nbytes` rounded up to a size class, at most an eighth more."""
    step = max(_PAGE, 1 << max(nbytes.bit_length() - 4, 0))
    return -(-nbytes // step) * step


def _new_block(capacity: int, number: int) -> _Block:
    block = np.empty(capacity + _PAGE + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT + number * _COLOUR_STEP % _PAGE
    return _Block(block, start)


class Pool:
    """Lends arrays of at least `POOL_FROM` bytes; holds at most `limit` bytes."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._blocks: dict[int, list[_Block]] = {}  # by capacity
        self._held = 0
        self._made = 0
        self._lock = threading.Lock()

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """An uninitialised C-contiguous array; 64-byte aligned from `POOL_FROM` bytes on."""
        dtype = np.dtype(dtype)
        nbytes = (math.prod(shape) if isinstance(shape, tuple) else int(shape)) * dtype.itemsize
        if nbytes < POOL_FROM or dtype.hasobject:
            return np.empty(shape, dtype)
        capacity = _capacity(nbytes)
        # Never wait: the lock may be held by this very thread, which runs a finaliser here.
        if not _COUNTS_ARE_EXACT or not self._lock.acquire(blocking=False):
            block = _new_block(capacity, 0)
            return np.ndarray(shape, dtype, block.bytes, block.start)
        try:
            block = self._take(capacity)
            return np.ndarray(shape, dtype, block.bytes, block.start)
        finally:
            self._lock.release()

    def _take(self, capacity: int) -> _Block:
        blocks = self._blocks.setdefault(capacity, [])
        # The block lent last is the likeliest to be in the cache still.
        for i in range(len(blocks) - 1, -1, -1):
            if _references(blocks, i) == _UNLENT:
                blocks.append(blocks.pop(i))
                return blocks[-1]
        self._made += 1
        block = _new_block(capacity, self._made)
        if self._held + block.bytes.nbytes > self.limit:
            self._drop_free()
        if self._held + block.bytes.nbytes <= self.limit:
            self._blocks.setdefault(capacity, []).append(block)
            self._held += block.bytes.nbytes
        return block

    def _drop_free(self) -> None:
        for capacity, blocks in list(self._blocks.items()):
            for i in range(len(blocks) - 1, -1, -1):
                if _references(blocks, i) == _UNLENT:
                    self._held -= blocks[i].bytes.nbytes
                    del blocks[i]
            if not blocks:
                del self._blocks[capacity]

    def clear(self) -> None:
        """Give all free blocks back to the system; lent ones stay valid."""
        with self._lock:
            self._drop_free()

    def stats(self) -> dict[str, int]:
        """Bytes `held` by the pool, of these `free`, and the number of `blocks`."""
        with self._lock:
            free = count = 0
            for blocks in self._blocks.values():
                count += len(blocks)
                for i in range(len(blocks)):
                    if _references(blocks, i) == _UNLENT:
                        free += blocks[i].bytes.nbytes
            return {"held": self._held, "free": free, "blocks": count}


_pool = Pool()
empty = _pool.empty
clear = _pool.clear
stats = _pool.stats
