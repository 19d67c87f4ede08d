"""Maximum and average pools, and their gradients, at the shapes of bench/shapes/pool.txt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import layers
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "maximum and average pools and their gradients, at real layer shapes"
FAMILIES = ("max_pool", "max_pool_grad", "avg_pool", "avg_pool_grad")
LIBRARIES = ("tinynn", "torch", "onnxruntime", "openvino")


def cases(quick: bool) -> list[Case]:
    """Each pool and its gradient."""
    return layers.cases(
        "pool", lambda layer: [f"{layer['of']}_pool", f"{layer['of']}_pool_grad"], quick
    )


def contestants(case: Case) -> Sequence[str]:
    """Runtimes have the forward pass only, and do not say where a maximum was."""
    return LIBRARIES[:2] if case.family.endswith("_grad") else LIBRARIES


def work(case: Case) -> Work:
    """One operation for each value under a window; the image and the result moved once."""
    g, x = _geometry(case), case.shape("x")
    out = (x[0], *g.output(*x[1:3]), x[3])
    places = layers.floats(out) if case["of"] == "max" else 0
    return Work(
        flops=x[0] * g.taps(*x[1:3]) * x[3],
        bytes=layers.floats(x) + layers.floats(out) + places,
    )


def build(library: str, case: Case) -> Built:
    """The pool, without the places of maxima; or the gradient by the image."""
    g, x = _geometry(case), case.shape("x")
    arrays = layers.numbers(x, (x[0], *g.output(*x[1:3]), x[3]))
    return {
        "tinynn": _tinynn,
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }[library](case, g, *arrays)


def _geometry(case: Case) -> layers.Geometry:
    size, stride, padding = (case.integer(name) for name in ("size", "stride", "padding"))
    return layers.Geometry([size] * 2, [stride] * 2, [padding] * 2, [padding] * 2)


def _tinynn(case: Case, g: layers.Geometry, *arrays: Any) -> Built:
    from kernels import pool

    x, grad = layers.pooled(*arrays)
    win = g.window()
    if case.family == "max_pool":
        return lambda: pool.max_pool2d(x, win)[0]
    if case.family == "avg_pool":
        return lambda: pool.avg_pool2d(x, win)
    if case.family == "avg_pool_grad":
        return lambda: pool.avg_pool2d_grad(grad, x.shape, win)
    _, place = pool.max_pool2d(x, win)
    return lambda: pool.max_pool2d_grad(grad, place, x.shape, win)


def _torch(case: Case, g: layers.Geometry, x: Any, grad: Any) -> Built:
    import torch

    ops: Any = torch.ops.aten
    window = (g.kernel, g.stride, g.padding)

    def build(tensor: Any) -> layers.Call:
        image, back = tensor(x), tensor(grad)
        if case.family == "max_pool":
            return lambda: ops.max_pool2d_with_indices(image, *window)[0]
        if case.family == "avg_pool":
            return lambda: ops.avg_pool2d(image, *window, False, False)
        if case.family == "avg_pool_grad":
            return lambda: ops.avg_pool2d_backward(back, image, *window, False, False, None)
        _, places = ops.max_pool2d_with_indices(image, *window)
        return lambda: ops.max_pool2d_with_indices_backward(
            back, image, *window, [1, 1], False, places
        )

    return layers.torch_layouts(build)


def _onnxruntime(case: Case, g: layers.Geometry, x: Any, grad: Any) -> Built:
    return layers.onnxruntime_call(
        case.threads,
        "MaxPool" if case["of"] == "max" else "AveragePool",
        x.transpose(0, 3, 1, 2),
        [],
        {"kernel_shape": g.kernel, "strides": g.stride, "pads": g.padding * 2},
    )


def _openvino(case: Case, g: layers.Geometry, x: Any, grad: Any) -> Built:
    def graph(ops: Any, image: Any) -> Any:
        if case["of"] == "max":
            window = (g.stride, [1, 1], g.padding, g.padding, g.kernel)
            return ops.max_pool(image, *window).output(0)
        return ops.avg_pool(image, g.stride, g.padding, g.padding, g.kernel, True)

    return layers.openvino_call(case.threads, x.transpose(0, 3, 1, 2), graph)
