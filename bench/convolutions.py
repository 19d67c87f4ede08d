"""What the suites of convolutions share: three directions, the same contestants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import layers
from bench.case import Case
from bench.suites import Built

LIBRARIES = ("tinynn", "torch", "onnxruntime", "openvino")


def families(name: str) -> tuple[str, str, str]:
    """The forward pass and its two gradients."""
    return name, f"{name}_input_grad", f"{name}_weight_grad"


def contestants(case: Case) -> Sequence[str]:
    """Runtimes have the forward pass only."""
    return LIBRARIES[:2] if case.family.endswith("_grad") else LIBRARIES


def build(
    library: str,
    case: Case,
    g: layers.Geometry,
    result: Sequence[int],
    builders: Mapping[str, Callable[..., Built]],
) -> Built:
    """builders[library](case, g, x, w, bias, grad): the result, of this shape, has w's features."""
    arrays = layers.numbers(case.shape("x"), case.shape("w"), (result[3],), result)
    return builders[library](case, g, *arrays)


def moved_bytes(case: Case, result: Sequence[int]) -> int:
    """Image, weights and result, each moved once."""
    return sum(map(layers.floats, (case.shape("x"), case.shape("w"), result)))


def direction(
    case: Case, forward: layers.Call, input_grad: layers.Call, weight_grad: layers.Call
) -> layers.Call:
    """The one of the three that the case's family names."""
    if case.family.endswith("_input_grad"):
        return input_grad
    return weight_grad if case.family.endswith("_weight_grad") else forward


def onnxruntime(
    op: str, case: Case, g: layers.Geometry, x: Any, kernels: Any, bias: Any, **attributes: Any
) -> Built:
    """`op` of ONNX with kernels in its layout, on NCHW images, the only ones it knows."""
    return layers.onnxruntime_call(
        case.threads,
        op,
        x.transpose(0, 3, 1, 2),
        [kernels, bias],
        {"strides": g.stride, "pads": [*g.padding, *g.behind], **attributes},
    )


def openvino(case: Case, x: Any, bias: Any, product: Callable[[Any, Any], Any]) -> Built:
    """product(opset, images) and the bias, on NCHW images, the only ones it knows."""

    def graph(ops: Any, image: Any) -> Any:
        return ops.add(product(ops, image), ops.constant(bias.reshape(1, -1, 1, 1)))

    return layers.openvino_call(case.threads, x.transpose(0, 3, 1, 2), graph)
