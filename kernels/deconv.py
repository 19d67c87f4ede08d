"""Transposed convolution ("deconvolution"): the gradient of a convolution by its input, as a layer.

y[b, iy, ix, n] = bias[n] + sum x[b, oy, ox, c] w[ky, kx, c, n] over all windows (oy, ox) and taps
with iy = oy stride - padding + ky dilation, ix likewise. Its gradients are a convolution and the
weight gradient of one: all three run on the kernels of `kernels.conv`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels import conv
from kernels.geometry import Window


def conv2d_transpose(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    shape: Sequence[int],
    win: Window,
    relu: bool = False,
) -> np.ndarray:
    """x (B, OH, OW, C), w (KH, KW, C, N), bias (N,) or None -> y (B, H, W, N), which is `shape`.

    max(y, 0) of it if `relu`; NaN passes. Raises ValueError for shapes that do not fit.
    """
    if w.ndim != 4:
        raise ValueError(f"conv2d_transpose: expected w (KH, KW, C, N), got {w.shape}")
    return conv.transposed("conv2d_transpose", x, w.transpose(0, 1, 3, 2), bias, shape, win, relu)


def conv2d_transpose_input_grad(grad: np.ndarray, w: np.ndarray, win: Window) -> np.ndarray:
    """grad (B, H, W, N), w (KH, KW, C, N) -> gx (B, OH, OW, C): the convolution of grad."""
    # gx[b, oy, ox, c] = sum_{ky, kx, n} grad[b, iy, ix, n] w[ky, kx, c, n]
    return conv.conv2d(grad, np.ascontiguousarray(w.transpose(0, 1, 3, 2)), None, win)


def conv2d_transpose_weight_grad(grad: np.ndarray, x: np.ndarray, win: Window) -> np.ndarray:
    """grad (B, H, W, N), x (B, OH, OW, C) -> gw (KH, KW, C, N)."""
    # gw[ky, kx, c, n] = sum_{b, oy, ox} x[b, oy, ox, c] grad[b, iy, ix, n]
    swapped = conv.conv2d_weight_grad(x, grad, win)
    return np.ascontiguousarray(swapped.transpose(0, 1, 3, 2))
