"""Depthwise convolutions: forward and both gradients, at the shapes of shapes/depthwise.txt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import layers
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "depthwise convolutions, forward and both gradients, at real layer shapes"
FAMILIES = ("depthwise", "depthwise_input_grad", "depthwise_weight_grad")
LIBRARIES = ("tinynn", "torch", "onnxruntime", "openvino")


def cases(quick: bool) -> list[Case]:
    """Each layer in each direction."""
    return layers.cases("depthwise", layers.directions, quick)


def contestants(case: Case) -> Sequence[str]:
    """Runtimes have the forward pass only."""
    return LIBRARIES if case.family == "depthwise" else LIBRARIES[:2]


def work(case: Case) -> Work:
    """Multiply-adds of taps inside the image; each array moved once."""
    g = layers.Geometry.of(case)
    batch, height, width, channels = case.shape("x")
    features = channels * case.shape("w")[3]
    out = (batch, *g.output(height, width), features)
    return Work(
        flops=2 * batch * g.taps(height, width) * features,
        bytes=layers.floats(case.shape("x")) + layers.floats(case.shape("w")) + layers.floats(out),
    )


def build(library: str, case: Case) -> Built:
    """One direction of one layer; the forward pass with its bias."""
    x, w = case.shape("x"), case.shape("w")
    g = layers.Geometry.of(case)
    features = w[2] * w[3]
    grad = (x[0], *g.output(*x[1:3]), features)
    arrays = layers.numbers(x, w, (features,), grad)
    return {
        "tinynn": _tinynn,
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }[library](case, g, *arrays)


def _tinynn(case: Case, g: layers.Geometry, *arrays: Any) -> Built:
    from kernels import depthwise

    x, w, bias, grad = layers.pooled(*arrays)
    win = g.window()
    if case.family == "depthwise":
        return lambda: depthwise.depthwise2d(x, w, bias, win, False)
    if case.family == "depthwise_input_grad":
        return lambda: depthwise.depthwise2d_input_grad(grad, w, x.shape, win)
    return lambda: depthwise.depthwise2d_weight_grad(grad, x, win)


def _torch(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    # Result c R + r has kernel w[:, :, c, r]: (C R, KH, KW, 1), which `image` turns around.
    kernels = w.reshape(*w.shape[:2], -1, 1).transpose(2, 0, 1, 3)
    return layers.torch_convolution(case, "depthwise", g, x, kernels, bias, grad, x.shape[3])


def _onnxruntime(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    return layers.onnxruntime_call(
        case.threads,
        "Conv",
        x.transpose(0, 3, 1, 2),
        [w.reshape(*w.shape[:2], 1, -1).transpose(3, 2, 0, 1), bias],
        {"strides": g.stride, "pads": g.padding * 2, "group": x.shape[3]},
    )


def _openvino(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    def graph(ops: Any, image: Any) -> Any:
        # (groups C, results R, 1, KH, KW)
        kernels = ops.constant(w.transpose(2, 3, 0, 1)[:, :, None].copy())
        y = ops.group_convolution(image, kernels, g.stride, g.padding, g.padding, [1, 1])
        return ops.add(y, ops.constant(bias.reshape(1, -1, 1, 1)))

    return layers.openvino_call(case.threads, x.transpose(0, 3, 1, 2), graph)
