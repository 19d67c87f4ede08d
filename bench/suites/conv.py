"""Convolutions: forward and both gradients, at the layer shapes of bench/shapes/conv.txt."""

from __future__ import annotations

from typing import Any

from bench import convolutions, layers
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "convolutions, forward and both gradients, at real layer shapes"
FAMILIES = convolutions.families("conv")
LIBRARIES = convolutions.LIBRARIES
contestants = convolutions.contestants


def cases(quick: bool) -> list[Case]:
    """Each layer in each direction; no gradient by the image itself."""
    return layers.cases("conv", layers.directions, quick)


def work(case: Case) -> Work:
    """Multiply-adds of taps inside the image; each array moved once."""
    batch, height, width, channels = case.shape("x")
    result = _result(case)
    macs = batch * layers.Geometry.of(case).taps(height, width) * channels * result[3]
    return Work(flops=2 * macs, bytes=convolutions.moved_bytes(case, result))


def build(library: str, case: Case) -> Built:
    """One direction of one layer; the forward pass with its bias."""
    builders = {
        "tinynn": _tinynn,
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }
    return convolutions.build(library, case, layers.Geometry.of(case), _result(case), builders)


def _result(case: Case) -> tuple[int, ...]:
    x = case.shape("x")
    return x[0], *layers.Geometry.of(case).output(x[1], x[2]), case.shape("w")[3]


def _tinynn(case: Case, g: layers.Geometry, *arrays: Any) -> Built:
    from kernels import conv

    x, w, bias, grad = layers.pooled(*arrays)
    win = g.window()
    return convolutions.direction(
        case,
        lambda: conv.conv2d(x, w, bias, win, False),
        lambda: conv.conv2d_input_grad(grad, w, x.shape, win),
        lambda: conv.conv2d_weight_grad(grad, x, win),
    )


def _torch(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    kernels = w.transpose(3, 0, 1, 2)  # (N, KH, KW, C), which `image` turns into (N, C, KH, KW)
    return layers.torch_convolution(case, "conv", g, x, kernels, bias, grad)


def _onnxruntime(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    return convolutions.onnxruntime("Conv", case, g, x, w.transpose(3, 2, 0, 1), bias)


def _openvino(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    def product(ops: Any, image: Any) -> Any:
        kernels = ops.constant(w.transpose(3, 2, 0, 1).copy())
        return ops.convolution(image, kernels, g.stride, g.padding, g.padding, [1, 1])

    return convolutions.openvino(case, x, bias, product)
