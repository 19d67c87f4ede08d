"""Kernels on weights that are packed ahead: each function appends its calls to a `Program`.

The arithmetic is that of the kernels of the same names; only what depends on shapes and weights is
done once. `Packed` keeps the packed weights of one layer, which serve every batch size.

`onto`: add what y holds before, which a residual connection has put there. `x` and `y` are slots of
float32, weights and biases (bias None: zeros) C-contiguous arrays of it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from numba import prange

from kernels import batchnorm, conv, depthwise, elementwise, pool, product, simd
from kernels._jit import Variants
from kernels.geometry import Window
from kernels.program import ALIGNMENT, Program, Slot

_FLOAT = np.dtype(np.float32)
_CHUNK = 4096  # elements of a task
_EXACT = (2, 4, 8, 16)  # values whose mean is the sum of their shares to the bit


class Packed:
    """What was made of one layer's weights, by how it was made."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def arrays(self) -> list[np.ndarray]:
        """All arrays made."""
        return list(_arrays(tuple(self._made.values())))


def _arrays(made: Any) -> Iterator[np.ndarray]:
    if isinstance(made, np.ndarray):
        yield made
    elif isinstance(made, tuple | list):
        for part in made:
            yield from _arrays(part)
    elif is_dataclass(made):
        yield from _arrays(tuple(vars(made).values()))


def _low(relu: bool) -> np.float32:
    return np.float32(0 if relu else -np.inf)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Not from the pool: it lives as long as the layer."""
    size = math.prod(shape) * _FLOAT.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    return np.ndarray(shape, _FLOAT, raw, -raw.ctypes.data % ALIGNMENT)


def _bias(packed: Packed, bias: np.ndarray | None, count: int) -> np.ndarray:
    if bias is not None:
        return bias
    return packed.get("bias", lambda: np.zeros(count, _FLOAT))


# --- products and convolutions --------------------------------------------------------------------


def linear(
    program: Program,
    packed: Packed,
    x: Slot,
    w: np.ndarray,
    bias: np.ndarray | None,
    y: Slot,
    relu: bool = False,
    onto: bool = False,
) -> None:
    """y (M, N) = x (M, K) @ w (K, N) + bias (N,)."""
    (M, K), N = x.shape, w.shape[1]
    added = _bias(packed, bias, N)
    for part in product._plan(M, K, N, 4, True, 0)[1]:
        most = simd.ROWS[part.nr]
        mr = most if most <= M else 1 << (M.bit_length() - 1)

        def pack(part: Any = part) -> np.ndarray:
            panel = _empty((part.panels, K, part.width))
            product._pack_kernel(0).choose(2 * panel.nbytes)(w, part.first, part.cols, panel)
            return panel

        panel = packed.get(("linear", part.first, part.cols, part.width), pack)
        macs = M * K * part.cols
        groups = max(1, min(part.panels, product._TASKS // -(-M // part.block)))
        program.add(
            product._panel_kernel(part.nr, mr), macs,
            x, M, K, 1, panel, 0, K * part.width, part.width, added, _low(relu),
            y.reshape(1, M, N), K, part.first, part.cols, part.block, groups, onto,
        )  # fmt: skip


def conv2d(
    program: Program,
    packed: Packed,
    x: Slot,
    w: np.ndarray,
    bias: np.ndarray | None,
    y: Slot,
    win: Window,
    relu: bool = False,
    onto: bool = False,
    transposed: bool = False,
) -> None:
    """y (B, OH, OW, N) = the convolution of x (B, H, W, C) with w (KH, KW, C, N), or its transpose.

    Transposed, `win` slides over y, and x are its windows.
    """
    C, N = w.shape[2:]
    if conv.is_pointwise(win):
        rows = x.reshape(-1, C), y.reshape(-1, N)
        return linear(program, packed, rows[0], w[0, 0], bias, rows[1], relu, onto)
    added = _bias(packed, bias, N)
    lanes = simd.LANES
    for call in conv._calls(x.shape, y.shape, win, not transposed, False, lanes):

        def pack(call: Any = call) -> np.ndarray:
            panels = _empty(call.packed(C))
            call.fill(w, panels)
            return panels

        part, (ky, kx) = call.part, call.taps
        key = ("conv", part.first, part.cols, part.width, tuple(ky), tuple(kx))
        panels = packed.get(key, pack)
        program.add(call.kernel, call.macs, *call.arguments(x, panels, added, _low(relu), y, onto))
    return None


def depthwise2d(
    program: Program,
    packed: Packed,
    x: Slot,
    w: np.ndarray | Slot,
    bias: np.ndarray | None,
    y: Slot,
    win: Window,
    relu: bool = False,
) -> None:
    """y (B, OH, OW, C) = each channel of x (B, H, W, C) with its own kernel w (KH, KW, C).

    w may be a slot for 16 channels or more, which fill a vector on every level.
    """
    B, H, W, C = x.shape
    narrow = simd.LANES > C

    def flat() -> np.ndarray:
        rows: Any = w.reshape(-1, C)
        return depthwise._widened(rows, simd.LANES) if narrow else rows

    def wide() -> np.ndarray:
        vector = np.zeros(C, _FLOAT) if bias is None else bias
        return depthwise._widened(vector, simd.LANES) if narrow else vector

    plan = depthwise._forward_plan(H, W, win, depthwise._hot(_FLOAT, C))
    kernel = depthwise._correlate_kernel(plan.tile, plan.kw, plan.step, narrow)
    tasks = min(y.shape[1], max(1, depthwise._TASKS // B))
    program.add(
        kernel, x.nbytes + y.nbytes,
        x, w.reshape(-1, C) if isinstance(w, Slot) else packed.get("w", flat),
        packed.get("b", wide), _low(relu), y, plan.table,
        tasks if program.threads else 1, y.nbytes >= depthwise._STREAM_BYTES,
    )  # fmt: skip


# --- channel by channel ---------------------------------------------------------------------------


def _scaled_loop(X, F, step, low, Y, V, chunks):
    # Y[i] = max(V[2, i] + V[1, i] X[i], low), i modulo F in V;  X, Y flat (M C,), V[0] = 0
    for c in prange(chunks):
        batchnorm._scaled(X, F, c, chunks, step, V, low, Y)


_scaled = Variants(_scaled_loop)


def scale_shift(
    program: Program,
    packed: Packed,
    x: Slot,
    scale: np.ndarray,
    shift: np.ndarray,
    y: Slot,
    relu: bool = False,
) -> None:
    """y (M, C) = x (M, C) scale + shift, one number a channel each; y may be x."""
    plan = batchnorm._plan(*x.shape, 4)

    def vectors() -> np.ndarray:
        out = np.zeros((3, plan.padded), _FLOAT)
        out[1], out[2] = np.resize(scale, plan.padded), np.resize(shift, plan.padded)
        return out

    table = packed.get(("scale", plan.padded), vectors)
    program.add(
        _scaled, 2 * x.nbytes,
        x.reshape(-1), plan.width, plan.step, _low(relu), y.reshape(-1), table, plan.chunks,
    )  # fmt: skip


def max_pool2d(program: Program, x: Slot, y: Slot, places: Slot, win: Window) -> None:
    """The largest value under each window; `places`: scratch of int32 and y's shape."""
    (ys, xs), _ = pool._tables(*x.shape[1:3], win, _FLOAT)
    nr = pool._vectors(x.shape[3], 4)
    program.add(
        pool._largest_kernel(nr, nr), x.nbytes + 2 * y.nbytes,
        x, ys.at, ys.source, xs.at, xs.source, _low(False), y, places, pool._parts(y.shape),
        pool._below(x, win),
    )  # fmt: skip


def avg_pool2d(program: Program, x: Slot, y: Slot, win: Window) -> None:
    """The mean of the values under each window."""
    count = math.prod(win.kernel)
    if count in _EXACT and not any(map(any, win.padding)):
        w = np.full((*win.kernel, x.shape[3]), 1 / count, _FLOAT)
        return depthwise2d(program, Packed(), x, w, None, y, win)
    axes, _ = pool._tables(*x.shape[1:3], win, _FLOAT)
    return _weighted(program, x, y, axes, pool._below(x, win))


def global_sum(program: Program, packed: Packed, x: Slot, y: Slot, scale: float) -> None:
    """y (B, C) = `scale` times the sum of x (B, H, W, C) over rows and columns."""

    def axes() -> Any:
        sizes = x.shape[1:3]
        weights = np.float32(scale), np.float32(1)
        return [
            pool._Axis(np.array([0, n]), np.arange(n), np.ones(n, _FLOAT), np.full(1, v))
            for n, v in zip(sizes, weights, strict=True)
        ]

    _weighted(program, x, y.reshape(x.shape[0], 1, 1, x.shape[3]), packed.get("axes", axes), 0)


def _weighted(program: Program, x: Slot, y: Slot, axes: Any, below: int) -> None:
    kernel = pool._weighted_kernel(pool._vectors(x.shape[3], 4))
    parts = pool._parts(y.shape)
    program.add(kernel, x.nbytes + y.nbytes, x, *axes[0], *axes[1], y, parts, below)


# --- element by element ---------------------------------------------------------------------------


def _add_loop(A, B, low, Y):
    # Y[i] = max(A[i] + B[i], low);  A, B, Y (n,), Y may be A or B: LLVM would not vectorise that
    W = 4 * simd.lanes(Y)
    least = simd.fill(1, 1, Y, low)
    for c in prange((Y.size + _CHUNK - 1) // _CHUNK):
        end = min(Y.size, (c + 1) * _CHUNK)
        for i in range(c * _CHUNK, end, W):
            if i + W <= end:
                total = simd.add(simd.load(1, 4, A, i, 0), simd.load(1, 4, B, i, 0))
                simd.store(simd.maximum(total, least), Y, i, 0)
            else:
                a = simd.load_part(1, 4, A, i, 0, 0, 1, end - i)
                total = simd.add(a, simd.load_part(1, 4, B, i, 0, 0, 1, end - i))
                simd.store_part(simd.maximum(total, least), Y, i, 0, 0, 1, end - i)


def _tanh_loop(X, Y):
    # Y[i] = tanh X[i];  X, Y (n,)
    for c in prange((Y.size + _CHUNK - 1) // _CHUNK):
        x, y = X[c * _CHUNK : (c + 1) * _CHUNK], Y[c * _CHUNK : (c + 1) * _CHUNK]
        for i in range(y.size):
            y[i] = math.tanh(x[i])


def _sigmoid_loop(X, Y):
    # Y[i] = 1 / (1 + exp(-X[i])): exp of negative numbers only;  X, Y (n,)
    one = X.dtype.type(1)
    for c in prange((Y.size + _CHUNK - 1) // _CHUNK):
        x, y = X[c * _CHUNK : (c + 1) * _CHUNK], Y[c * _CHUNK : (c + 1) * _CHUNK]
        for i in range(y.size):
            e = math.exp(-abs(x[i]))
            y[i] = (one if x[i] >= 0 else e) / (one + e)


def _softmax_loop(X, Y):
    # Y[m, c] = exp(X[m, c] - max_c) / sum_c exp(X[m, c] - max_c);  X, Y (M, C)
    M, C = X.shape
    for m in prange(M):
        most = X[m, 0]
        for c in range(C):
            most = max(most, X[m, c])
        total = X.dtype.type(0)
        for c in range(C):
            e = math.exp(X[m, c] - most)
            Y[m, c] = e
            total += e
        for c in range(C):
            Y[m, c] /= total


def _columns_loop(X, first, Y):
    # Y[m, first + c] = X[m, c];  X (M, C), Y (M, N)
    M, C = X.shape
    for m in prange(M):
        elementwise._copy(X, m * C, Y, m * Y.shape[1] + first, C)


def _repeat_loop(X, R, Y):
    # Y[m, c R + r] = X[m, c], r < R;  X (M, C), Y (M, C R)
    M, C = X.shape
    for m in prange(M):
        for c in range(C):
            for r in range(R):
                Y[m, c * R + r] = X[m, c]


def _scatter_loop(X, P, value, Y):
    # Y[m, P[c]] = X[m, c], `value` elsewhere;  X (M, C), P (C,), Y (M, N)
    M, C = X.shape
    for m in prange(M):
        Y[m, :] = value
        for c in range(C):
            Y[m, P[c]] = X[m, c]


def _scatter_onto_loop(X, P, Y):
    # Y[m, P[c]] += X[m, c];  X (M, C), P (C,), Y (M, N)
    M, C = X.shape
    for m in prange(M):
        for c in range(C):
            Y[m, P[c]] += X[m, c]


def _columns_onto_loop(X, first, Y):
    # Y[m, first + c] += X[m, c];  X (M, C), Y (M, N)
    M, C = X.shape
    L = simd.lanes(X)
    for m in prange(M):
        for c in range(0, C, L):
            ix, iy, rest = m * C + c, m * Y.shape[1] + first + c, C - c
            if rest >= L:
                total = simd.add(simd.load(1, 1, X, ix, 0), simd.load(1, 1, Y, iy, 0))
                simd.store(total, Y, iy, 0)
            else:
                x = simd.load_part(1, 1, X, ix, 0, 0, 1, rest)
                y = simd.load_part(1, 1, Y, iy, 0, 0, 1, rest)
                simd.store_part(simd.add(x, y), Y, iy, 0, 0, 1, rest)


_add = Variants(_add_loop)
_columns = Variants(_columns_loop)
_columns_onto = Variants(_columns_onto_loop)
_repeat = Variants(_repeat_loop)
_scatter = Variants(_scatter_loop)
_scatter_onto = Variants(_scatter_onto_loop)
_softmax = Variants(_softmax_loop)
_unary = {
    "relu": elementwise._relu,
    "sigmoid": Variants(_sigmoid_loop),
    "tanh": Variants(_tanh_loop),
}


def add(program: Program, a: Slot, b: Slot, y: Slot, relu: bool = False) -> None:
    """y = a + b, all of one shape; y may be a or b."""
    flat = (s.reshape(-1) for s in (a, b))
    program.add(_add, 3 * y.nbytes, *flat, _low(relu), y.reshape(-1))


def activation(program: Program, name: str, x: Slot, y: Slot) -> None:
    """y = "relu", "tanh" or "sigmoid" of x; y may be x."""
    program.add(_unary[name], 2 * y.nbytes, x.reshape(-1), y.reshape(-1))


def softmax(program: Program, x: Slot, y: Slot) -> None:
    """y = exp(x) over its sum along the last axis; y may be x."""
    rows = (s.reshape(-1, s.shape[-1]) for s in (x, y))
    program.add(_softmax, 0, *rows)  # its sums would round differently with threads


def concat(program: Program, parts: list[Slot], y: Slot) -> None:
    """The parts side by side along the last axis."""
    first = 0
    for x in parts:
        rows = (s.reshape(-1, s.shape[-1]) for s in (x, y))
        x2, y2 = rows
        program.add(_columns, 2 * x.nbytes, x2, first, y2)
        first += x.shape[-1]


def repeat(program: Program, x: Slot, times: int, y: Slot) -> None:
    """Each channel (last axis) of x `times` times."""
    rows = [s.reshape(-1, s.shape[-1]) for s in (x, y)]
    program.add(_repeat, x.nbytes + y.nbytes, rows[0], times, rows[1])


def scatter(
    program: Program, x: Slot, places: np.ndarray, value: float, y: Slot, onto: bool = False
) -> None:
    """Channel c of x (last axis) at places[c] of y, an int32 each and all different.

    The other channels of y are `value`; `onto`: they stay, and x is added to what y holds.
    """
    x2, y2 = (s.reshape(-1, s.shape[-1]) for s in (x, y))
    work, first = x.nbytes + y.nbytes, int(places[0])
    if onto and np.array_equal(places, np.arange(first, first + len(places))):
        program.add(_columns_onto, work, x2, first, y2)
    elif onto:
        program.add(_scatter_onto, work, x2, places, y2)
    else:
        program.add(_scatter, work, x2, places, np.float32(value), y2)


def frame(
    program: Program, x: Slot, widths: tuple[tuple[int, int], ...], value: float, y: Slot
) -> bool:
    """x with elements `value` around it, widths[i] = (before, after) of axis i.

    False, with nothing appended, if more than three axes are framed and cannot be merged.
    """
    inner, around = elementwise._merged(x.shape, widths)
    if len(inner) > 3:
        return False
    outer = [n + b + a for n, (b, a) in zip(inner, around, strict=True)]
    starts = [b for b, _ in around]
    program.add(
        elementwise._framed, x.nbytes + y.nbytes,
        x.reshape(*inner), *starts, np.float32(value), y.reshape(*outer),
    )  # fmt: skip
    return True
