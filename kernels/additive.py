"""The ef-operator: correlation of two vectors by signs and additions.

    (x (+) w)[m, n] = sum_k sign(x[m, k] w[k, n]) (|x[m, k]| + |w[k, n]|)
                    = sum_k sign(x[m, k]) w[k, n] + x[m, k] sign(w[k, n]),   sign(0) = 0

(Afrasiyabi, Yildiz, Nasir, Yarman Vural, Cetin 2017, "Energy Saving Additive Neural Network",
section 3; the same 2018 as "Non-Euclidean Vector Product for Neural Networks".) A layer scales it
for each output and adds a bias: y = a (x (+) w) + b.

The second form is one product of twice the depth, [sign(x), x] [w; sign(w)], and that is how it is
run: where a multiply-add is one instruction, this takes two for a term, while setting signs apart
from magnitudes takes four. So the operator saves energy on hardware without multipliers, and no
time here. Its gradient, where it has one (neither x nor w zero), is two products with signs:

    gx = g sign(w)^T,   gw = sign(x)^T g
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import prange

from kernels import conv, memory, pointwise
from kernels._jit import Variants, prepared
from kernels.geometry import Window
from kernels.program import Program, Slot


def _beside_loop(X, Y):
    # Y[m, c], Y[m, C + c] = sign(X[m, c]), X[m, c];  X (M, C)
    M, C = X.shape
    zero, one = X.dtype.type(0), X.dtype.type(1)
    for m in prange(M):
        for c in range(C):
            v = X[m, c]
            Y[m, c] = one if v > zero else (-one if v < zero else v)  # NaN has no sign
            Y[m, C + c] = v


_beside_variants = Variants(_beside_loop)


def beside(x: np.ndarray) -> np.ndarray:
    """[sign(x), x], joined along the last axis."""
    y = memory.empty((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    _beside_variants.choose(y.nbytes)(flat, y.reshape(len(flat), -1))
    return y


def append_beside(program: Program, x: Slot, y: Slot) -> None:
    """Append y (..., 2 C) = `beside` of x (..., C) to a program."""
    rows = [s.reshape(-1, s.shape[-1]) for s in (x, y)]
    program.add(_beside_variants, y.nbytes, *rows)


def below(w: np.ndarray) -> np.ndarray:
    """[w; sign(w)], joined along the axis before the last: what `beside(x)` is multiplied with."""
    return np.concatenate([w, np.sign(w)], axis=-2)


def linear(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x (+) w of x (M, K), w (K, N) -> (M, N). Raises ValueError and TypeError as a product."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(
            f"additive.linear: expected x (M, K) and w (K, N), got {x.shape}, {w.shape}"
        )
    x, w = prepared("additive.linear", x, w)
    return pointwise.matmul(beside(x), below(w))


def linear_grad(
    grad: np.ndarray, x: np.ndarray, w: np.ndarray, needs: tuple[bool, ...] = (True, True)
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Gradients of `linear` by x (M, K) and w (K, N) from grad (M, N), where needed."""
    gx = pointwise.matmul_nt(grad, np.sign(w)) if needs[0] else None
    gw = pointwise.matmul_tn(np.sign(x), grad) if needs[1] else None
    return gx, gw


def conv2d(x: np.ndarray, w: np.ndarray, win: Window) -> np.ndarray:
    """y[b, oy, ox, n] = sum of x[b, iy, ix] (+) w[ky, kx, :, n] over taps inside.

    x (B, H, W, C), w (KH, KW, C, N) -> (B, OH, OW, N), iy and ix as in `kernels.conv`.
    """
    if x.ndim != 4 or w.shape[:3] != (*win.kernel, x.shape[3]) or w.ndim != 4:
        raise ValueError(
            f"additive.conv2d: expected x (B, H, W, C) and w ({win.kernel[0]}, {win.kernel[1]}, C,"
            f" N), got {x.shape} and {w.shape}"
        )
    x, w = prepared("additive.conv2d", x, w)
    return conv.conv2d(beside(x), below(w), None, win)


def conv2d_grad(
    grad: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    win: Window,
    needs: Sequence[bool] = (True, True),
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Gradients of `conv2d` with respect to x and w from grad (B, OH, OW, N), where needed."""
    gx = conv.conv2d_input_grad(grad, np.sign(w), x.shape, win) if needs[0] else None
    gw = conv.conv2d_weight_grad(grad, np.sign(x), win) if needs[1] else None
    return gx, gw
