"""Convolutions: forward and both gradients, at the layer shapes of bench/shapes/conv.txt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import layers
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "convolutions, forward and both gradients, at real layer shapes"
FAMILIES = ("conv", "conv_input_grad", "conv_weight_grad")
LIBRARIES = ("tinynn", "torch", "onnxruntime", "openvino")


def cases(quick: bool) -> list[Case]:
    """Each layer in each direction; no gradient by the image itself."""
    return layers.cases("conv", layers.directions, quick)


def contestants(case: Case) -> Sequence[str]:
    """Runtimes have the forward pass only."""
    return LIBRARIES if case.family == "conv" else LIBRARIES[:2]


def work(case: Case) -> Work:
    """Multiply-adds of taps inside the image; each array moved once."""
    g = layers.Geometry.of(case)
    batch, height, width, channels = case.shape("x")
    features = case.shape("w")[3]
    out = (batch, *g.output(height, width), features)
    return Work(
        flops=2 * batch * g.taps(height, width) * channels * features,
        bytes=layers.floats(case.shape("x")) + layers.floats(case.shape("w")) + layers.floats(out),
    )


def build(library: str, case: Case) -> Built:
    """One direction of one layer; the forward pass with its bias."""
    x, w = case.shape("x"), case.shape("w")
    g = layers.Geometry.of(case)
    grad = (x[0], *g.output(*x[1:3]), w[3])
    arrays = layers.numbers(x, w, (w[3],), grad)
    return {
        "tinynn": _tinynn,
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }[library](case, g, *arrays)


def _tinynn(case: Case, g: layers.Geometry, *arrays: Any) -> Built:
    from kernels import conv

    x, w, bias, grad = layers.pooled(*arrays)
    win = g.window()
    if case.family == "conv":
        return lambda: conv.conv2d(x, w, bias, win, False)
    if case.family == "conv_input_grad":
        return lambda: conv.conv2d_input_grad(grad, w, x.shape, win)
    return lambda: conv.conv2d_weight_grad(grad, x, win)


def _torch(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    kernels = w.transpose(3, 0, 1, 2)  # (N, KH, KW, C), which `image` turns into (N, C, KH, KW)
    return layers.torch_convolution(case, "conv", g, x, kernels, bias, grad)


def _onnxruntime(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    return layers.onnxruntime_call(
        case.threads,
        "Conv",
        x.transpose(0, 3, 1, 2),
        [w.transpose(3, 2, 0, 1), bias],
        {"strides": g.stride, "pads": g.padding * 2},
    )


def _openvino(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    def graph(ops: Any, image: Any) -> Any:
        kernels = ops.constant(w.transpose(3, 2, 0, 1).copy())
        y = ops.convolution(image, kernels, g.stride, g.padding, g.padding, [1, 1])
        return ops.add(y, ops.constant(bias.reshape(1, -1, 1, 1)))

    return layers.openvino_call(case.threads, x.transpose(0, 3, 1, 2), graph)
