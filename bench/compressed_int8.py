"""Single layers in 8-bit integers, bytes in and bytes out, beside the float32 layer.

Every contestant has the same problem: x as uint8 with a scale and a zero point, weights as int8
with a scale for each output channel, results as uint8. Runtimes get it as an ONNX graph of
QuantizeLinear and DequantizeLinear, which they fuse. The float32 layer computes with the numbers
that the bytes stand for. There is no bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import layers
from bench.case import Case
from bench.suites import Built

_ENGINES = ("x86", "onednn", "fbgemm")  # of torch
_X_SCALE, _X_ZERO = 1 / 32, 110


@dataclass(frozen=True)
class Problem:
    """A layer on bytes; `y_scale` and `y_zero` cover what its results reach."""

    x: Any  # uint8
    w: Any  # int8 (..., N)
    w_scale: Any  # float32 (N,)
    y_scale: float
    y_zero: int

    @property
    def real_x(self) -> Any:
        """The numbers that x stands for, float32."""
        return (self.x.astype("float32") - _X_ZERO) * _X_SCALE

    @property
    def real_w(self) -> Any:
        """The numbers that w stands for, float32."""
        return self.w * self.w_scale

    def real_y(self, y: Any) -> Any:
        """The numbers that a result stands for."""
        return (y.astype("float32") - self.y_zero) * self.y_scale


@dataclass(frozen=True)
class _Bytes:
    """A result as the harness compares it with others: see `bench.worker`."""

    problem: Problem
    y: Any

    def detach(self) -> Any:
        return self.problem.real_y(self.y)


def problem(case: Case, x: Any, w: Any) -> Problem:
    """The bytes nearest to normal numbers x and w."""
    import numpy as np

    bytes_x = np.clip(np.rint(x / _X_SCALE) + _X_ZERO, 0, 255).astype(np.uint8)
    w_scale = (np.abs(w).reshape(-1, w.shape[-1]).max(0) / 127).astype(np.float32)
    bytes_w = np.rint(w / w_scale).astype(np.int8)
    inputs = w[..., 0].size
    # sums of so many products of normal numbers hardly pass six deviations
    reach = 6.5 * float(np.sqrt(inputs)) * float(x.std() * w.std())
    return Problem(bytes_x, bytes_w, w_scale, 2 * reach / 255, 128)


def ours(case: Case, p: Problem) -> layers.Call:
    """Our kernels, with packed weights."""
    from kernels import int8, int8_conv, int8_product

    scaling = int8.requantized(_X_SCALE, p.w_scale, p.y_scale, p.y_zero)
    (x,) = layers.pooled(p.x)
    if p.w.ndim == 2:
        linear = int8_product.pack_linear(p.w, None, _X_ZERO, scaling)
        return lambda: _Bytes(p, int8_product.linear(x, linear))
    win = layers.Geometry.of(case).window()
    convolution = int8_conv.pack_conv2d(p.w, None, _X_ZERO, scaling, win)
    return lambda: _Bytes(p, int8_conv.conv2d(x, convolution))


def torch_int8(case: Case, p: Problem) -> dict[str, layers.Call]:
    """With each of its engines that there is."""
    import torch

    known = torch.backends.quantized.supported_engines
    return {name: _torch_engine(case, p, name) for name in _ENGINES if name in known}


def _torch_engine(case: Case, p: Problem, engine: str) -> layers.Call:
    import torch

    torch.backends.quantized.engine = engine
    ops: Any = torch.ops.quantized
    axes = (1, 0) if p.w.ndim == 2 else (3, 2, 0, 1)
    x = torch.from_numpy(p.x if p.w.ndim == 2 else p.x.transpose(0, 3, 1, 2))
    X = torch._make_per_tensor_quantized_tensor(x, _X_SCALE, _X_ZERO)
    scales, zeros = torch.from_numpy(p.w_scale), torch.zeros(len(p.w_scale), dtype=torch.long)
    W = torch._make_per_channel_quantized_tensor(
        torch.from_numpy(p.w.transpose(axes).copy()), scales.double(), zeros, 0
    )
    if p.w.ndim == 2:
        packed, run = ops.linear_prepack(W, None), ops.linear
    else:
        g = layers.Geometry.of(case)
        packed = ops.conv2d_prepack(W, None, g.stride, g.padding, [1, 1], 1)
        run = ops.conv2d
        X = X.contiguous(memory_format=torch.channels_last)

    class Answer:
        def __init__(self, y: Any) -> None:
            self.y = y

        def detach(self) -> Any:
            return self.y.dequantize()

    def call() -> object:
        torch.backends.quantized.engine = engine
        with torch.no_grad():
            return Answer(run(X, packed, p.y_scale, p.y_zero))

    return call


def onnxruntime_int8(case: Case, p: Problem) -> layers.Call:
    """The graph of integers and grids, which it fuses."""
    return _runtime(layers.onnxruntime_network, case, p)


def openvino_int8(case: Case, p: Problem) -> layers.Call:
    """The same graph."""
    return _runtime(layers.openvino_network, case, p)


def _runtime(network: Any, case: Case, p: Problem) -> layers.Call:
    x = p.x if p.w.ndim == 2 else p.x.transpose(0, 3, 1, 2).copy()
    call = network(case.threads, graph(case, p, x.shape), x)
    return lambda: _Bytes(p, call())


def graph(case: Case, p: Problem, shape: Sequence[int]) -> bytes:
    """The layer as ONNX, images in NCHW, for an input of this shape."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    product = p.w.ndim == 2
    w = p.w if product else p.w.transpose(3, 2, 0, 1)
    constants = {
        "w": np.ascontiguousarray(w),
        "w_scale": p.w_scale,
        "w_zero": np.zeros(len(p.w_scale), np.int8),
        "x_scale": np.float32(_X_SCALE),
        "x_zero": np.uint8(_X_ZERO),
        "y_scale": np.float32(p.y_scale),
        "y_zero": np.uint8(p.y_zero),
    }
    attributes: dict[str, Any] = {}
    if not product:
        g = layers.Geometry.of(case)
        attributes = {"strides": g.stride, "pads": [*g.padding, *g.behind]}
    node = helper.make_node
    nodes = [
        node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["a"]),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["b"], axis=1 if product else 0),
        node("MatMul" if product else "Conv", ["a", "b"], ["c"], **attributes),
        node("QuantizeLinear", ["c", "y_scale", "y_zero"], ["y"]),
    ]
    whole = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [None] * len(shape))],
        [numpy_helper.from_array(np.asarray(c), name) for name, c in constants.items()],
    )
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


#: Build the layer by one library.
PEERS: dict[str, Callable[[Case, Problem], Built]] = {
    "torch_int8": torch_int8,
    "onnxruntime_int8": onnxruntime_int8,
    "openvino_int8": openvino_int8,
}
