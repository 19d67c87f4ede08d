"""Transposed convolutions: forward and both gradients, at the shapes of bench/shapes/deconv.txt."""

from __future__ import annotations

from typing import Any

from bench import convolutions, layers
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "transposed convolutions, forward and both gradients, at real layer shapes"
FAMILIES = convolutions.families("deconv")
LIBRARIES = convolutions.LIBRARIES
contestants = convolutions.contestants


def cases(quick: bool) -> list[Case]:
    """Each layer in each direction."""
    return layers.cases("deconv", layers.directions, quick)


def work(case: Case) -> Work:
    """Multiply-adds of taps inside the result; each array moved once."""
    batch, _, _, channels = case.shape("x")
    result = _result(case)
    macs = batch * _geometry(case).taps(*result[1:3]) * channels * result[3]
    return Work(flops=2 * macs, bytes=convolutions.moved_bytes(case, result))


def build(library: str, case: Case) -> Built:
    """One direction of one layer; the forward pass with its bias."""
    builders = {
        "tinynn": _tinynn,
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }
    return convolutions.build(library, case, _geometry(case), _result(case), builders)


def _result(case: Case) -> tuple[int, ...]:
    (batch, height, width, _), stride = case.shape("x"), case.integer("stride")
    return batch, stride * height, stride * width, case.shape("w")[3]


def _geometry(case: Case) -> layers.Geometry:
    """Of the convolution that this is the input gradient of."""
    kernel, stride = case.shape("w")[:2], case.integer("stride")
    front = [(k - 1) // 2 for k in kernel]
    # (n - 1) s + k = s n + front + back: the last window ends where the padded result does
    back = [k - stride - f for k, f in zip(kernel, front, strict=True)]
    if min(back) < 0:
        raise ValueError(f"a kernel {kernel} leaves gaps at stride {stride}")
    return layers.Geometry(list(kernel), [stride, stride], front, back)


def _tinynn(case: Case, g: layers.Geometry, *arrays: Any) -> Built:
    from kernels import deconv

    x, w, bias, grad = layers.pooled(*arrays)
    win = g.window()
    return convolutions.direction(
        case,
        lambda: deconv.conv2d_transpose(x, w, bias, grad.shape, win, False),
        lambda: deconv.conv2d_transpose_input_grad(grad, w, win),
        lambda: deconv.conv2d_transpose_weight_grad(grad, x, win),
    )


def _torch(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    kernels = w.transpose(2, 0, 1, 3)  # (C, KH, KW, N), which `image` turns into (C, N, KH, KW)
    return layers.torch_convolution(case, "deconv", g, x, kernels, bias, grad, transposed=True)


def _onnxruntime(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    return convolutions.onnxruntime("ConvTranspose", case, g, x, w.transpose(2, 3, 0, 1), bias)


def _openvino(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    import numpy as np

    size = np.array(grad.shape[1:3], np.int64)

    def product(ops: Any, image: Any) -> Any:
        kernels = ops.constant(w.transpose(2, 3, 0, 1).copy())
        return ops.convolution_backprop_data(
            image, kernels, g.stride, ops.constant(size), g.padding, g.behind, [1, 1]
        )

    return convolutions.openvino(case, x, bias, product)
