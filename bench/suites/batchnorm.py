"""Batch normalisation with ReLU: in training, its gradient, and in use; shapes/batchnorm.txt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import layers
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "batch normalisation with ReLU: training, gradients, and in use"
FAMILIES = ("batchnorm", "batchnorm_grad", "batchnorm_eval")
LIBRARIES = ("tinynn", "torch", "onnxruntime", "openvino")

EPS = 1e-5
#: For each element: operations, arrays moved once, different arrays. Statistics 3 operations,
#: normalising 4; in the gradient 7 and 8; in use 3.
_COST = {"batchnorm": (7, 3, 2), "batchnorm_grad": (15, 5, 3), "batchnorm_eval": (3, 2, 2)}


def cases(quick: bool) -> list[Case]:
    """Each layer in each direction."""
    return layers.cases("batchnorm", lambda layer: FAMILIES, quick)


def contestants(case: Case) -> Sequence[str]:
    """Runtimes know it in use only."""
    return LIBRARIES if case.family == "batchnorm_eval" else LIBRARIES[:2]


def work(case: Case) -> Work:
    """Two reads of everything and one write; in use one read and one write."""
    size = layers.floats(case.shape("x"))
    flops, moved, arrays = _COST[case.family]
    return Work(flops * size / 4, moved * size, working_set=arrays * size)


def build(library: str, case: Case) -> Built:
    """The result, or the gradient by x."""
    x = case.shape("x")
    channels = (x[3],)
    image, grad, gamma, beta, mean, spread = layers.numbers(x, x, *[channels] * 4)
    return {
        "tinynn": _tinynn,
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }[library](case, image, grad, gamma, beta, mean, spread * spread)


def _tinynn(case: Case, *arrays: Any) -> Built:
    import numpy as np

    from kernels import batchnorm

    image, grad, gamma, beta, mean, var = layers.pooled(*arrays)
    x, g = (a.reshape(-1, a.shape[-1]) for a in (image, grad))
    if case.family == "batchnorm":
        return lambda: batchnorm.batchnorm(x, gamma, beta, EPS, True)[0]
    if case.family == "batchnorm_grad":
        _, m, v = batchnorm.batchnorm(x, gamma, beta, EPS, True)
        return lambda: batchnorm.batchnorm_grad(g, x, beta, gamma, m, v, EPS)[0]
    scale = gamma / np.sqrt(var + np.float32(EPS))
    shift = beta - mean * scale
    return lambda: batchnorm.scale_shift(image, scale, shift, True)


def _torch(case: Case, *arrays: Any) -> Built:
    import torch

    image, grad = arrays[:2]
    gamma, beta, mean, var = (torch.from_numpy(a) for a in arrays[2:])
    ops: Any = torch.ops.aten

    def build(tensor: Any) -> layers.Call:
        x, g = tensor(image), tensor(grad)

        def forward() -> Any:
            y, m, inverse = ops.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
            return torch.relu_(y), m, inverse

        if case.family == "batchnorm":
            return lambda: forward()[0]
        if case.family == "batchnorm_eval":
            norm = torch.nn.functional.batch_norm
            return lambda: torch.relu_(norm(x, mean, var, gamma, beta, False, 0.1, EPS))
        y, m, inverse = forward()

        def backward() -> Any:
            gated = ops.threshold_backward(g, y, 0)
            return ops.native_batch_norm_backward(
                gated, x, gamma, None, None, m, inverse, True, EPS, [True, True, True]
            )[0]

        return backward

    return layers.torch_layouts(build)


def _onnxruntime(case: Case, image: Any, grad: Any, *vectors: Any) -> Built:
    return layers.onnxruntime_call(
        case.threads,
        "BatchNormalization",
        image.transpose(0, 3, 1, 2),
        vectors,
        {"epsilon": EPS},
        relu=True,
    )


def _openvino(case: Case, image: Any, grad: Any, *vectors: Any) -> Built:
    def graph(ops: Any, x: Any) -> Any:
        return ops.relu(ops.batch_norm_inference(x, *map(ops.constant, vectors), EPS))

    return layers.openvino_call(case.threads, image.transpose(0, 3, 1, 2), graph)
