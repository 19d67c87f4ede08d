"""A plan: a network that runs without Tensors and Modules, in one call."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels import program
from kernels._jit import get_threads, max_threads, set_threads
from kernels.prepack import Packed
from tinynn import storage
from tinynn.deploy import file
from tinynn.deploy.kernels import KERNELS
from tinynn.deploy.layout import Laid, Network, arena_bytes, lay_out
from tinynn.errors import ConfigError, DTypeError, ShapeError
from tinynn.op import Array, Shape
from tinynn.tensor import Tensor

_CACHE_BYTES = 512 * 1024  # of values: what the images of one chunk may take
_ROWS = 16  # images of a chunk that are enough for a product to be fast
_TASKS = 16  # the most threads that a chunk of more images could leave without work
_WORTH_CUTTING = 256 * 1024  # multiply-adds of a batch
_KEPT = 16  # layouts


class Plan:
    """What `compile` makes. Call it on a batch (B, ...) of float32 of any size: an array (B, ...).

    It keeps nothing of the model. Images pass through the network in chunks whose values stay in
    the cache; chunks are shared among threads. Of a single chunk threads share each layer, or its
    kernels use threads inside. The result has the same bits for every number of threads.

    It can be called from several threads, pickled and copied. A process that was forked runs it on
    one thread, since the others are not there; one that was spawned runs it on all.
    """

    def __init__(self, network: Network, threads: int | None = None) -> None:
        whole = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
        if threads is not None and not (whole and 1 <= threads <= max_threads()):
            raise ConfigError(
                f"Plan: required threads from 1 to {max_threads()}, a whole number; came "
                f"{threads!r}"
            )
        self.network = network
        self.threads = threads
        self._packed = [Packed() for _ in network.layers]
        self._schedules: dict[tuple[int, int], _Schedule] = {}
        self._laid: dict[tuple[int, int], Laid] = {}
        self._arenas = program.aligned(1, 1)
        self._bases = np.zeros((1, 8), np.int64)
        self._lock = threading.Lock()

    @property
    def input_shape(self) -> Shape:
        """The shape of one image."""
        return self.network.shapes[0]

    @property
    def output_shape(self) -> Shape:
        """The shape of the result for one image."""
        return self.network.shapes[self.network.output]

    def __call__(self, x: npt.ArrayLike | Tensor) -> Array:
        """The network's result for a batch. Raises ShapeError or DTypeError if x does not fit.

        Where x is rounded to a fixed range (`quantize.int8`), NaN becomes some number of the range.
        """
        x = self._batch(x)
        y = np.empty((len(x), *self.output_shape), np.float32)
        if not len(x):
            return y
        with self._lock, _threads(self.threads) as threads:
            schedule = self._schedule(len(x), threads)
            arenas, bases = self._memory(schedule.workers, schedule.arena)
            if schedule.team is None:
                program.run(schedule.chunks, self._image_bytes, x, y, arenas, bases)
            else:
                program.run_team(*schedule.team, x, y, arenas[0], bases)
        return y

    def _memory(self, workers: int, nbytes: int) -> tuple[Array, Array]:
        """An arena and scratch for each worker, kept from call to call."""
        rows, columns = self._arenas.shape
        if rows < workers or columns < nbytes:
            self._arenas = program.aligned(max(rows, workers), max(columns, nbytes))
            self._bases = np.zeros((max(rows, workers), 8), np.int64)
        return self._arenas[:workers], self._bases[:workers]

    def _batch(self, x: npt.ArrayLike | Tensor) -> Array:
        array = x._data if isinstance(x, Tensor) else np.asarray(x)
        if array.dtype != np.float32:
            raise DTypeError(f"Plan: required float32; came {array.dtype}")
        if array.shape[1:] != self.input_shape or not array.ndim:
            raise ShapeError(f"Plan: required (B, *{self.input_shape}); came {array.shape}")
        return array if array.flags.carray else np.array(array, order="C")

    @cached_property
    def _image_bytes(self) -> tuple[int, int]:
        return 4 * math.prod(self.input_shape), 4 * math.prod(self.output_shape)

    @cached_property
    def _image_arena(self) -> int:
        return max(1, arena_bytes(self.network, self._packed, 1))

    # --- chunks -----------------------------------------------------------------------------------

    def _chunks(self, batch: int) -> int:
        """Into how many chunks a batch is cut: never a matter of threads, so that bits are not."""
        fit = max(1, _CACHE_BYTES // self._image_arena)
        count = -(-batch // min(fit, max(_ROWS, -(-batch // _TASKS))))
        if batch > 1 and batch * self.macs >= _WORTH_CUTTING:
            count = max(count, 2)
        return min(batch, count + count % 2 * (count > 1))

    def images_at_once(self, batch: int) -> int:
        """How many images of such a batch pass through the network together, at most."""
        return -(-batch // self._chunks(batch))

    def _schedule(self, batch: int, threads: int) -> _Schedule:
        key = batch, threads
        if key not in self._schedules:
            if len(self._schedules) >= _KEPT:
                self._schedules.clear()
                self._laid.clear()
            count = self._chunks(batch)
            ends = [batch * (i + 1) // count for i in range(count)]
            starts = [0, *ends[:-1]]
            inside = threads if count == 1 else 1
            laid = [self._layout(e - s, inside) for s, e in zip(starts, ends, strict=True)]
            rows = [(a.words.ctypes.data, s) for a, s in zip(laid, starts, strict=True)]
            arena, team = max(a.arena for a in laid), None
            if laid[0].team > 1:
                team = laid[0].words, np.zeros(2 * laid[0].words[0], np.int64)
            workers = min(threads, count) if team is None else threads
            self._schedules[key] = _Schedule(np.array(rows, np.int64), workers, arena, laid, team)
        return self._schedules[key]

    def _layout(self, images: int, threads: int) -> Laid:
        key = images, threads
        if key not in self._laid:
            self._laid[key] = lay_out(self.network, self._packed, images, threads)
        return self._laid[key]

    # --- what it costs ----------------------------------------------------------------------------

    @cached_property
    def macs(self) -> int:
        """Multiply-adds for one image (1 MAC = 2 FLOPs), of convolutions and products."""
        return sum(self.network.macs)

    @cached_property
    def nbytes(self) -> int:
        """The bytes of the file that `save` writes: the honest size of the network."""
        return len(storage.tensor_bytes(*file.to_file(self.network)))

    @cached_property
    def deflated_nbytes(self) -> int:
        """The bytes of the file that `save` writes with `deflate`: for storage and downloads."""
        return len(storage.tensor_bytes(*file.to_file(self.network, deflated=True)))

    @property
    def resident_nbytes(self) -> int:
        """The bytes of weights and biases that stay in memory.

        Code books and float16 stay as narrow as they are where their kernels run. Others are there
        twice: as arrays, and as what kernels were given of them so far, for one image at least.
        """
        with self._lock:
            self._layout(1, 1)
        sizes: dict[int, int] = {}
        for layer, packed in zip(self.network.layers, self._packed, strict=True):
            for a in (*layer.arrays.values(), *packed.arrays):
                place = a.ctypes.data if isinstance(a, np.ndarray) else id(a)
                sizes[place] = max(a.nbytes, sizes.get(place, 0))
        return sum(sizes.values())

    def profile(self, x: npt.ArrayLike | Tensor, rounds: int = 20) -> Profile:
        """Time each layer on a batch: medians over `rounds` runs of the first chunk of images.

        Seconds are scaled to the whole batch; chunks on other threads are not counted twice.
        Layers that threads share are timed on one. Multiply-adds are those that the layer's kernel
        carries out, bytes those that it reads: zeros that are not stored are not counted.
        """
        x = self._batch(x)
        if not len(x) or rounds < 1:
            raise ShapeError(f"profile: required a batch and rounds >= 1; came {x.shape}, {rounds}")
        with self._lock, _threads(self.threads) as threads:
            laid = self._schedule(len(x), threads).laid[0]
            seconds = self._time(x, laid, rounds)
        chunks = self._chunks(len(x))
        scale = len(x) / (len(x) // chunks)
        rows = []
        for layer, macs, s in zip(self.network.layers, self.network.macs, seconds, strict=True):
            shapes = [*self.network.inputs(layer), self.network.shapes[layer.output]]
            sizes = [self.network.dtypes[v].itemsize for v in (*layer.inputs, layer.output)]
            moved = len(x) * sum(n * math.prod(s) for n, s in zip(sizes, shapes, strict=True))
            moved += sum(a.nbytes for key, a in layer.arrays.items() if key != "weight")
            if "weight" in layer.arrays:
                stored = KERNELS[layer.kernel].stored(layer)
                macs, moved = round(macs * stored.share), moved + round(stored.nbytes)
            out = shapes[-1]
            name = layer.path or "-"
            kind = layer.step.kind
            rows.append(LayerTime(name, kind, layer.kernel, out, s * scale, macs * len(x), moved))
        return Profile(tuple(rows), len(x), chunks)

    def _time(self, x: Array, laid: Laid, rounds: int) -> Array:
        """Median seconds of each layer, without the call from Python around it."""
        y = np.empty((len(x), *self.output_shape), np.float32)
        arena = program.aligned(1, laid.arena)
        bases = np.array([0, arena.ctypes.data, x.ctypes.data, y.ctypes.data], np.int64)
        taken = np.zeros((rounds + 1, len(laid.places) + 1))
        clock = time.perf_counter
        for row in taken:  # the first warms up
            for i, (at, calls) in enumerate((*laid.places, (1, 0))):
                start = clock()
                program.execute(laid.words, at, calls, bases)
                row[i] = clock() - start
        medians = np.median(taken[1:], axis=0)
        return np.maximum(medians[:-1] - medians[-1], 0)

    # --- files ------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or a plan that was pickled, is read from what `save` would write."""
        return _read, (*file.to_file(self.network), self.threads)

    def save(self, path: storage.PathLike, *, deflate: bool = False) -> None:
        """Write the plan as one file, atomically: weights as they are run, or as they are packed
        from when it is loaded; a list of layers; a SHA-256 of everything.

        `deflate` codes each stream of numbers by its entropy, too; what is loaded is the same.
        """
        storage.write_tensors(path, *file.to_file(self.network, deflate))

    @classmethod
    def load(cls, path: storage.PathLike, *, threads: int | None = None) -> Plan:
        """Read what `save` wrote; nothing in it is executed.

        Raises FileNotFoundError, or FileFormatError if anything in the file does not fit.
        """
        return cls(file.from_file(*storage.read_tensors(path), str(path)), threads)

    def __str__(self) -> str:
        rows = [["layer", "kind", "kernel", "result"]]
        for layer in self.network.layers:
            out = "x".join(map(str, self.network.shapes[layer.output]))
            rows.append([layer.path or "-", str(layer.step), layer.kernel, out])
        return _table(rows, 4)


def _read(arrays: file.Stored, metadata: dict[str, str], threads: int | None) -> Plan:
    return Plan(file.from_file(arrays, metadata, "a pickled plan"), threads)


class _Schedule(NamedTuple):
    chunks: Array  # (n, 2): the address of the words of a program, its first image
    workers: int
    arena: int
    laid: list[Laid]  # which keeps the words alive
    team: tuple[Array, Array] | None  # what several threads run together: words, marks


_forked = False  # whether this process is one


def _fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork)


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """The number of threads to use, which kernels inside see."""
    # asking and setting take longer than a small layer; GNU OpenMP ends a forked process that asks
    if wanted == 1 or max_threads() == 1 or _forked:
        yield 1
        return
    before = get_threads()
    if wanted is None or wanted == before:
        yield before
        return
    set_threads(wanted)
    try:
        yield wanted
    finally:
        set_threads(before)


# --- profiles -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerTime:
    """What one layer took for a whole batch."""

    path: str
    kind: str
    kernel: str
    output: Shape  #: without the batch
    seconds: float
    macs: int  #: multiply-adds that are carried out
    nbytes: int  #: of operands, result and weights, as they are stored

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations a second: two for each multiply-add."""
        return 2e-9 * self.macs / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Profile:
    """The times of all layers; `print` shows them as a table."""

    layers: tuple[LayerTime, ...]
    batch: int
    chunks: int  #: in which the batch was computed

    @property
    def seconds(self) -> float:
        """The sum over the layers."""
        return sum(layer.seconds for layer in self.layers)

    def __str__(self) -> str:
        total = self.seconds or 1.0
        rows = [
            [
                "layer",
                "kind",
                "kernel",
                "result",
                "us",
                "share",
                "multiply-adds",
                "bytes",
                "GFLOP/s",
            ]
        ]
        rows += [
            [
                r.path, r.kind, r.kernel, "x".join(map(str, r.output)), f"{r.seconds * 1e6:.1f}",
                f"{r.seconds / total:.0%}", f"{r.macs:,}", f"{r.nbytes:,}", f"{r.gflops:.1f}",
            ]
            for r in self.layers
        ]  # fmt: skip
        note = f"{self.seconds * 1e6:.1f} us for {self.batch} images in {self.chunks} chunks"
        return f"{_table(rows, 4)}\n{note}"


def _table(rows: list[list[str]], left: int) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines: list[Any] = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        pairs = enumerate(cells)
        lines.append("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in pairs))
    return "\n".join(line.rstrip() for line in lines)
