"""A convolution's gradient by images of few channels: a product, whose columns are then added up.

The tiles of `kernels.conv` hold channels of the result in their vectors. Where these are few, most
lanes would be idle. Here one product makes what each pixel of the gradient gives to each tap,

    P[b, oy, ox, ky, kx, c] = sum_n grad[b, oy, ox, n] w[ky, kx, c, n]

with all taps and channels in its vectors, and P is added up where the taps lie in the image.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from kernels import memory, pointwise, simd
from kernels._jit import Variants
from kernels.geometry import Window


def _add_up_loop(P, bias, low, Y, kernel, stride, padding, dilation):
    # Y[b, oy sy + ky dy - top, ox sx + kx dx - left, c] += P[b, oy, ox, (ky KW + kx) C + c]
    # for all taps inside Y, which starts at bias[c]; at the end of it max(., low)
    # P (B, OH, OW, KH KW C), Y (B, H, W, C), bias (C,)
    B, OH, OW = P.shape[:3]
    H, W, C = Y.shape[1:]
    for b in prange(B):
        image = Y[b].reshape(H * W * C)
        for i in range(H * W):
            for c in range(C):
                image[i * C + c] = bias[c]
        for oy in range(OH):
            for ox in range(OW):
                row = P[b, oy, ox]
                x0 = ox * stride[1] - padding[1]
                for ky in range(kernel[0]):
                    y = oy * stride[0] - padding[0] + ky * dilation[0]
                    if y < 0 or y >= H:
                        continue
                    for kx in range(kernel[1]):
                        x = x0 + kx * dilation[1]
                        if 0 <= x < W:
                            to, at = (y * W + x) * C, (ky * kernel[1] + kx) * C
                            for c in range(C):
                                image[to + c] += row[at + c]
        for i in range(image.size):
            v = image[i]
            image[i] = low if v < low else v


_add_up = Variants(_add_up_loop)


_TERMS = 16  # of a sum, for each channel: below, adding up costs more than idle lanes


def pays(channels: int, terms: int, itemsize: int) -> bool:
    """Whether channels are so few, and the sums in P so long, that this beats `kernels.conv`."""
    lanes = simd.LANES * 4 // itemsize
    return 4 * channels <= lanes and terms >= _TERMS * channels


def transposed(
    grad: np.ndarray, w: np.ndarray, bias: np.ndarray, low: Any, shape: tuple[int, ...], win: Window
) -> np.ndarray:
    """max(gx + bias, low) of grad (B, OH, OW, N), w (KH, KW, C, N), bias (C,); gx of `shape`.

    Operands as `prepared` gives them; `low` a number of their dtype.
    """
    channels = grad.shape[3]
    columns = pointwise.matmul_nt(grad.reshape(-1, channels), w.reshape(-1, channels))
    y = memory.empty(shape, grad.dtype)
    before = (win.padding[0][0], win.padding[1][0])
    _add_up.choose(columns.nbytes + y.nbytes)(
        columns.reshape(*grad.shape[:3], -1),
        bias,
        low,
        y,
        win.kernel,
        win.stride,
        before,
        win.dilation,
    )
    return y
