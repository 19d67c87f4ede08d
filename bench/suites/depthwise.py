"""Depthwise convolutions: forward and both gradients, at the shapes of shapes/depthwise.txt."""

from __future__ import annotations

from typing import Any

from bench import convolutions, layers
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "depthwise convolutions, forward and both gradients, at real layer shapes"
FAMILIES = convolutions.families("depthwise")
LIBRARIES = convolutions.LIBRARIES
contestants = convolutions.contestants


def cases(quick: bool) -> list[Case]:
    """Each layer in each direction."""
    return layers.cases("depthwise", layers.directions, quick)


def work(case: Case) -> Work:
    """Multiply-adds of taps inside the image; each array moved once."""
    batch, height, width, _ = case.shape("x")
    result = _result(case)
    macs = batch * layers.Geometry.of(case).taps(height, width) * result[3]
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
    x, w = case.shape("x"), case.shape("w")
    return x[0], *layers.Geometry.of(case).output(x[1], x[2]), w[2] * w[3]


def _tinynn(case: Case, g: layers.Geometry, *arrays: Any) -> Built:
    from kernels import depthwise

    x, w, bias, grad = layers.pooled(*arrays)
    win = g.window()
    return convolutions.direction(
        case,
        lambda: depthwise.depthwise2d(x, w, bias, win, False),
        lambda: depthwise.depthwise2d_input_grad(grad, w, x.shape, win),
        lambda: depthwise.depthwise2d_weight_grad(grad, x, win),
    )


def _torch(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    # Result c R + r has kernel w[:, :, c, r]: (C R, KH, KW, 1), which `image` turns around.
    kernels = w.reshape(*w.shape[:2], -1, 1).transpose(2, 0, 1, 3)
    return layers.torch_convolution(case, "depthwise", g, x, kernels, bias, grad, x.shape[3])


def _onnxruntime(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    kernels = w.reshape(*w.shape[:2], 1, -1).transpose(3, 2, 0, 1)
    return convolutions.onnxruntime("Conv", case, g, x, kernels, bias, group=x.shape[3])


def _openvino(case: Case, g: layers.Geometry, x: Any, w: Any, bias: Any, grad: Any) -> Built:
    def product(ops: Any, image: Any) -> Any:
        # (groups C, results R, 1, KH, KW)
        kernels = ops.constant(w.transpose(2, 3, 0, 1)[:, :, None].copy())
        return ops.group_convolution(image, kernels, g.stride, g.padding, g.padding, [1, 1])

    return convolutions.openvino(case, x, bias, product)
