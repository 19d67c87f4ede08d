"""Inference in 8-bit integers: the arithmetic, and what is done element by element.

A number r is stored as a byte q, r = scale (q - zero). Activations are uint8 with one scale and one
zero point in 0 ... 255 for a whole array; weights are int8 with zero point 0 and one scale for each
output channel; biases are int32 in units of x_scale w_scale[n] (Jacob et al., Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, section 2).

Every layer makes an exact int32 sum first,

    s[n] = bias[n] + sum_k (x[k] - x_zero) w[k, n]

and then a result of it, in float32, each step rounded to nearest, ties to even:

    f = float32(s) * multiplier[n]                  two roundings
    uint8:    y = round(min(max(f, low), high)) + zero
    float32:  y = min(max(f, low), high)

with multiplier[n] = float32(x_scale w_scale[n] / y_scale), taken in float64; low = -zero, or 0 with
ReLU; high = 255 - zero, or less. A tap in the padding is x_zero, that is the number 0. So results
are saturated in one place, by rule, and nothing else can overflow: what packs weights refuses those
whose sum could leave int32 for any image. Sums inside may wrap around, which changes nothing.

No step leaves anything to the processor: every level, and any number of threads, gives the same
bits, those of `kernels.quantized_reference`. The operators of ONNX that work on quantised data
differ by one step at the most.

The kernels themselves, which other jitted code may call, take flat arrays and numbers, and a range
of tasks: `kernel(..., first, last)` does the tasks first <= task < last, in any order and on any
thread, with the same result.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import memory, simd, simd_int, simd_int16
from kernels._jit import Variants, jit
from kernels.product import _aligned

LARGEST = 2**31 - 1
_CHUNK = 4 * 1024  # elements that one task covers
_SMALL = 2.0**30
_FACTOR_BITS = 21  # of `add`: 2 * 255 * 2^21 < 2^31


class Scaling(NamedTuple):
    """How sums become results, see above; `dtype` uint8 or float32."""

    multiplier: np.ndarray  # (N,) float32
    low: np.float32
    high: np.float32 | int  # an int where no sum times its multiplier leaves int32: `fitted`
    zero: int
    dtype: Any


def requantized(
    x_scale: float,
    w_scale: Any,
    y_scale: float,
    y_zero: int,
    *,
    relu: bool = False,
    top: int = 255,
) -> Scaling:
    """To bytes 0 ... `top` of this scale and zero point, through ReLU if asked.

    w_scale (N,) or one number. Raises ValueError for scales that are not positive and finite
    (w_scale may be 0), or a zero point outside 0 ... top.
    """
    check_zero("requantized", y_zero)
    check_scale("requantized", x_scale, y_scale)
    multiplier = np.atleast_1d(np.asarray(w_scale, np.float64)) * float(x_scale) / float(y_scale)
    if not y_zero <= top <= 255:
        raise ValueError(f"requantized: expected {y_zero} <= top <= 255, got {top}")
    return _scaling(multiplier, 0 if relu else -y_zero, top - y_zero, y_zero, np.uint8)


def dequantized(x_scale: float, w_scale: Any, *, relu: bool = False) -> Scaling:
    """To float32, through ReLU if asked; w_scale (N,) or one number."""
    check_scale("dequantized", x_scale)
    multiplier = np.atleast_1d(np.asarray(w_scale, np.float64)) * float(x_scale)
    return _scaling(multiplier, 0 if relu else -math.inf, math.inf, 0, np.float32)


def _scaling(multiplier: np.ndarray, low: float, high: float, zero: int, dtype: Any) -> Scaling:
    with np.errstate(over="ignore"):
        rounded = multiplier.astype(np.float32)
    if rounded.ndim != 1 or not (np.isfinite(rounded) & (rounded >= 0)).all():
        raise ValueError(f"int8: expected multipliers (N,), finite and >= 0, got {multiplier}")
    return Scaling(rounded, np.float32(low), np.float32(high), int(zero), np.dtype(dtype))


# --- checks and buffers ---------------------------------------------------------------------------


def check_zero(name: str, *zeros: int) -> None:
    """Raises ValueError unless all are zero points of uint8."""
    if not all(0 <= z <= 255 for z in zeros):
        raise ValueError(f"{name}: expected zero points in 0 ... 255, got {zeros}")


def check_scale(name: str, *scales: float) -> None:
    """Raises ValueError unless all are positive and finite."""
    if not all(0 < s < math.inf for s in scales):
        raise ValueError(f"{name}: expected scales that are positive and finite, got {scales}")


def operand(name: str, x: np.ndarray, dtype: Any = np.uint8) -> np.ndarray:
    """x as kernels take it: C-contiguous and of this dtype. Raises TypeError for another."""
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected an array of {np.dtype(dtype)}, got {x.dtype}")
    return x if x.flags.carray else np.array(x, order="C")


def result(name: str, shape: tuple[int, ...], dtype: Any, out: np.ndarray | None) -> np.ndarray:
    """`out`, or a new array if it is None. Raises ValueError unless it can take the result."""
    if out is None:
        return memory.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.carray:
        raise ValueError(
            f"{name}: expected out {shape} of {np.dtype(dtype)}, C-contiguous and writable, "
            f"got {out.shape} of {out.dtype}"
        )
    return out


def widened(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The last axis filled up with zeros to whole vectors, aligned."""
    lanes = simd.LANES
    wide = _aligned((*values.shape[:-1], -(-values.shape[-1] // lanes) * lanes), np.dtype(dtype))
    wide[...] = 0
    wide[..., : values.shape[-1]] = values
    return wide


def fitted(name: str, scaling: Scaling, most: np.ndarray) -> Scaling:
    """With a multiplier for each channel, and `high` as sums of at most `most` (N,) allow.

    Raises ValueError for another number of multipliers.
    """
    if len(scaling.multiplier) not in (1, len(most)):
        raise ValueError(
            f"{name}: expected 1 or {len(most)} multipliers, got {len(scaling.multiplier)}"
        )
    every = np.broadcast_to(scaling.multiplier, len(most))
    small = scaling.dtype == np.uint8 and (every * most.astype(np.float64) < _SMALL).all()
    return scaling._replace(multiplier=every, high=int(scaling.high) if small else scaling.high)


def checked_sums(
    name: str, w: np.ndarray, bias: np.ndarray | None, x_zero: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums of each tap w[t, :, n], (T, N), the bias (N,), int64, for w (T, K, N) int8.

    And the largest result of each channel, |bias[n]| + max(x_zero, 255 - x_zero) sum |w[k, n]|.
    Raises TypeError for other dtypes, ValueError for shapes, OverflowError where that leaves int32.
    """
    check_zero(name, x_zero)
    if w.dtype != np.int8 or (bias is not None and bias.dtype != np.int32):
        found = None if bias is None else bias.dtype
        raise TypeError(f"{name}: expected w int8 and bias int32, got {w.dtype} and {found}")
    channels = w.shape[-1]
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{name}: expected bias ({channels},), got {bias.shape}")
    added = np.zeros(channels, np.int64) if bias is None else bias.astype(np.int64)
    most = max(x_zero, 255 - x_zero) * np.abs(w.astype(np.int64)).sum((0, 1)) + abs(added)
    if most.size and most.max() > LARGEST:
        raise OverflowError(
            f"{name}: w {w.shape}, x_zero {x_zero}: sums of channel {most.argmax()} can reach "
            f"{most.max()}, expected at most {LARGEST}"
        )
    return w.sum(1, dtype=np.int64), added, most


# --- moving bytes ---------------------------------------------------------------------------------


@jit(inline=True)
def copy_bytes(X, ix, Y, iy, count):
    """Y[iy + i] = X[ix + i], i < count; X, Y flat."""
    W = 4 * simd_int.byte_lanes()
    for i in range(0, count, W):
        if i + W <= count:
            simd_int.store_bytes(simd_int.bytes_at(X, ix + i, 0), Y, iy + i, 0)
        else:
            simd_int.store_bytes(simd_int.bytes_at(X, ix + i, count - i), Y, iy + i, count - i)


@jit(inline=True)
def fill_bytes(value, Y, iy, count):
    """Y[iy + i] = value, i < count; Y flat."""
    W = 4 * simd_int.byte_lanes()
    x = simd_int.of_int(value * 0x01010101)
    for i in range(0, count, W):
        if i + W <= count:
            simd_int.store_bytes(x, Y, iy + i, 0)
        else:
            simd_int.store_bytes(x, Y, iy + i, count - i)


@jit
def widen_bytes(X, ix, A, ia, count):
    """A[ia + i] = X[ix + i], i < count; X uint8, A int16, flat."""
    W = 2 * simd_int.byte_lanes()
    whole = count - count % W
    for i in range(0, whole, W):
        simd_int16.store_widened(X, ix + i, A, ia + i)
    for i in range(whole, count):
        A[ia + i] = X[ix + i]


@jit(inline=True)
def fill_widened(value, A, ia, count):
    """A[ia + i] = value, i < count; A int16, flat."""
    for i in range(count):
        A[ia + i] = value


# --- element by element ---------------------------------------------------------------------------


def _quantize_loop(X, Y, scale, low, high, zero, first, last):
    # Y[i] = round(min(max(X[i] / scale, low), high)) + zero;  X float32, Y uint8, both (n,)
    # tasks are chunks
    W = 4 * simd.lanes(X)
    for task in prange(first, last):
        end = min(len(X), (task + 1) * _CHUNK)
        for i in range(task * _CHUNK, end, W):
            one = simd_int.of_float(1)
            if i + W <= end:
                x = simd_int.div(simd.load(1, 4, X, i, 0), simd_int.of_float(scale))
                simd_int.store_scaled(x, one, low, high, zero, Y, i, 0)
            else:
                x = simd.load_part(1, 4, X, i, 0, 0, 1, end - i)
                x = simd_int.div(x, simd_int.of_float(scale))
                simd_int.store_scaled_part(x, one, low, high, zero, Y, i, 0, 0, 1, end - i)


def _dequantize_loop(X, Y, scale, zero, first, last):
    # Y[i] = (X[i] - zero) scale;  X uint8, Y float32, both (n,)
    W = 4 * simd.lanes(Y)
    for task in prange(first, last):
        end = min(len(X), (task + 1) * _CHUNK)
        for i in range(task * _CHUNK, end, W):
            by = simd_int.of_float(scale)
            if i + W <= end:
                x = simd.sub(simd_int.load_bytes(1, 4, X, i, 0), simd_int.of_int(zero))
                simd_int.store_scaled(x, by, -np.inf, np.inf, 0, Y, i, 0)
            else:
                x = simd_int.load_bytes_part(1, 4, X, i, 0, end - i)
                x = simd.sub(x, simd_int.of_int(zero))
                simd_int.store_scaled_part(x, by, -np.inf, np.inf, 0, Y, i, 0, 0, 1, end - i)


def _add_loop(A, a_zero, a_factor, B, b_zero, b_factor, scale, low, high, zero, Y, first, last):
    # Y[i] = result of (A[i] - a_zero) a_factor + (B[i] - b_zero) b_factor;  A, B uint8, Y, (n,)
    W = 4 * simd_int.byte_lanes()
    for task in prange(first, last):
        end = min(len(Y), (task + 1) * _CHUNK)
        fa, fb = simd_int.of_int(a_factor), simd_int.of_int(b_factor)
        start = simd_int.of_int(-a_zero * a_factor - b_zero * b_factor)
        by = simd_int.of_float(scale)
        for i in range(task * _CHUNK, end, W):
            s = simd.add(simd_int.zeros(1, 4), start)
            if i + W <= end:
                s = simd.fma(s, simd_int.load_bytes(1, 4, A, i, 0), fa)
                s = simd.fma(s, simd_int.load_bytes(1, 4, B, i, 0), fb)
                simd_int.store_scaled(s, by, low, high, zero, Y, i, 0)
            else:
                n = end - i
                s = simd.fma(s, simd_int.load_bytes_part(1, 4, A, i, 0, n), fa)
                s = simd.fma(s, simd_int.load_bytes_part(1, 4, B, i, 0, n), fb)
                simd_int.store_scaled_part(s, by, low, high, zero, Y, i, 0, 0, 1, n)


#: X (n,) float32, Y (n,) uint8, scale, low, high (float32), zero, first, last.
QUANTIZE = Variants(_quantize_loop)
#: X (n,) uint8, Y (n,) float32, scale, zero, first, last.
DEQUANTIZE = Variants(_dequantize_loop)
#: A (n,), zero, factor, B (n,), zero, factor, scale, low, high, zero, Y (n,), first, last.
ADD = Variants(_add_loop)


def chunks(size: int) -> int:
    """The number of tasks of these kernels for arrays of this size."""
    return -(-size // _CHUNK)


def quantize(
    x: np.ndarray, scale: float, zero: int, *, out: np.ndarray | None = None
) -> np.ndarray:
    """round(min(max(x / scale, -zero), 255 - zero)) + zero of x float32, as uint8; NaN gives 0.

    The division is one of float32 numbers, rounding is to even: QuantizeLinear of ONNX.
    """
    check_zero("quantize", zero)
    check_scale("quantize", float(np.float32(scale)))
    x = operand("quantize", x, np.float32)
    y = result("quantize", x.shape, np.uint8, out)
    low, high = np.float32(-zero), np.float32(255 - zero)
    numbers = (np.float32(scale), low, high, zero)
    QUANTIZE.choose(x.nbytes)(x.reshape(-1), y.reshape(-1), *numbers, 0, chunks(x.size))
    return y


def dequantize(
    x: np.ndarray, scale: float, zero: int, *, out: np.ndarray | None = None
) -> np.ndarray:
    """(x - zero) scale of x uint8, as float32."""
    check_zero("dequantize", zero)
    check_scale("dequantize", float(np.float32(scale)))
    x = operand("dequantize", x)
    y = result("dequantize", x.shape, np.float32, out)
    numbers = (np.float32(scale), zero)
    DEQUANTIZE.choose(y.nbytes)(x.reshape(-1), y.reshape(-1), *numbers, 0, chunks(x.size))
    return y


class Addition(NamedTuple):
    """The numbers of a sum of two arrays: what `addition` gives."""

    a_zero: int
    a_factor: int
    b_zero: int
    b_factor: int
    scale: np.float32
    low: np.float32
    high: np.float32 | int  # as of `Scaling`
    zero: int
    dtype: Any


def addition(
    a_scale: float,
    a_zero: int,
    b_scale: float,
    b_zero: int,
    y_scale: float,
    y_zero: int,
    *,
    relu: bool = False,
    top: int = 255,
) -> Addition:
    """Of arrays with these scales and zero points, to bytes 0 ... `top`.

    The sum is s = (a - a_zero) a_factor + (b - b_zero) b_factor, its multiplier 2^-e, where
    a_factor = round(2^e a_scale / y_scale), b_factor likewise, the larger of them in 2^20 ... 2^21.
    """
    check_zero("addition", a_zero, b_zero, y_zero)
    if not y_zero <= top <= 255:
        raise ValueError(f"addition: expected {y_zero} <= top <= 255, got {top}")
    check_scale("addition", a_scale, b_scale, y_scale)
    ratios = float(a_scale) / float(y_scale), float(b_scale) / float(y_scale)
    exponent = _FACTOR_BITS - math.frexp(max(ratios))[1]
    if not -100 < exponent < 120:
        raise ValueError(f"addition: scales {a_scale}, {b_scale}, {y_scale} are too far apart")
    factors = [round(math.ldexp(r, exponent)) for r in ratios]
    way = _scaling(
        np.array([2.0**-exponent]), 0 if relu else -y_zero, top - y_zero, y_zero, np.uint8
    )
    way = fitted("addition", way, np.array([255 * sum(factors)]))
    return Addition(a_zero, factors[0], b_zero, factors[1], way.multiplier[0], *way[1:])


def add(
    a: np.ndarray, b: np.ndarray, how: Addition, *, out: np.ndarray | None = None
) -> np.ndarray:
    """The sum of two uint8 arrays of one shape; `out` may be one of them."""
    if a.shape != b.shape:
        raise ValueError(f"add: expected two arrays of one shape, got {a.shape} and {b.shape}")
    a, b = operand("add", a), operand("add", b)
    y = result("add", a.shape, how.dtype, out)
    flat = [v.reshape(-1) for v in (a, b, y)]
    kernel = ADD.choose(3 * a.nbytes)
    kernel(flat[0], *how[:2], flat[1], *how[2:8], flat[2], 0, chunks(a.size))
    return y
