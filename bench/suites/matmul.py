"""Matrix products as training needs them: x w, g w^T, x^T g, at the shapes of shapes/matmul.txt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import layers
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "dense and pointwise layers, forward and both gradients, at real layer shapes"
FAMILIES = ("matmul", "matmul_input_grad", "matmul_weight_grad")
LIBRARIES = ("tinynn", "numpy", "torch", "onnxruntime", "openvino")


def cases(quick: bool) -> list[Case]:
    """Each layer in each direction."""
    return layers.cases("matmul", layers.directions, quick)


def contestants(case: Case) -> Sequence[str]:
    """Runtimes have the forward pass only."""
    return LIBRARIES if case.family == "matmul" else LIBRARIES[:3]


def work(case: Case) -> Work:
    """2 M K N operations in every direction; each matrix moved once."""
    (m, k), (_, n) = case.shape("x"), case.shape("w")
    return Work(flops=2 * m * k * n, bytes=4 * (m * k + k * n + m * n))


def build(library: str, case: Case) -> Built:
    """x (M, K) w (K, N), or grad (M, N) w^T, or x^T grad; nothing fused."""
    x, w = case.shape("x"), case.shape("w")
    if x[1] != w[0]:
        raise ValueError(f"x {x} and w {w} do not fit")
    arrays = layers.numbers(x, w, (x[0], w[1]))
    return {
        "tinynn": _tinynn,
        "numpy": _numpy,
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }[library](case, *arrays)


def _tinynn(case: Case, *arrays: Any) -> Built:
    from kernels import pointwise

    x, w, grad = layers.pooled(*arrays)
    if case.family == "matmul":
        return lambda: pointwise.matmul(x, w)
    if case.family == "matmul_input_grad":
        return lambda: pointwise.matmul_nt(grad, w)
    return lambda: pointwise.matmul_tn(x, grad)


def _operands(case: Case, x: Any, w: Any, grad: Any) -> tuple[Any, Any]:
    if case.family == "matmul":
        return x, w
    return (grad, w.T) if case.family == "matmul_input_grad" else (x.T, grad)


def _numpy(case: Case, *arrays: Any) -> Built:
    import numpy as np

    a, b = _operands(case, *arrays)
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    return {"new result": lambda: a @ b, "given result": lambda: np.matmul(a, b, out=out)}


def _torch(case: Case, *arrays: Any) -> Built:
    import torch

    a, b = _operands(case, *(torch.from_numpy(array).clone() for array in arrays))
    out = torch.empty((a.shape[0], b.shape[1]))
    return {"new result": lambda: torch.mm(a, b), "given result": lambda: torch.mm(a, b, out=out)}


def _onnxruntime(case: Case, x: Any, w: Any, grad: Any) -> Built:
    return layers.onnxruntime_call(case.threads, "MatMul", x, [w], {})


def _openvino(case: Case, x: Any, w: Any, grad: Any) -> Built:
    def graph(ops: Any, rows: Any) -> Any:
        return ops.matmul(rows, ops.constant(w), False, False)

    return layers.openvino_call(case.threads, x, graph)
