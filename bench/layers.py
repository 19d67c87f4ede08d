"""What the suites of single layers share: their shapes, their work, and contestants of one op.

Directions are families of their own, so that the summary has a line for each: `conv` is the
forward pass, `conv_input_grad` and `conv_weight_grad` are the two gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.case import Case

Call = Callable[[], object]
_SHAPES = Path(__file__).parent / "shapes"


def cases(name: str, families: Callable[[Case], Sequence[str]], quick: bool) -> list[Case]:
    """The lines of shapes/NAME.txt, each in all families that `families` says it has."""
    found = []
    for line in (_SHAPES / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        if not words or (quick and words[0] != "quick"):
            continue
        layer = Case.parse(" ".join([name, *(w for w in words if w != "quick")]))
        found += [Case(family, layer.shapes, layer.attributes) for family in families(layer)]
    return found


def directions(layer: Case) -> list[str]:
    """Forward and both gradients; none by the images themselves, which have 1 or 3 channels."""
    families = [layer.family, f"{layer.family}_input_grad", f"{layer.family}_weight_grad"]
    x = layer.shape("x")
    if layer.family == "conv" and x[3] in (1, 3):
        families.remove("conv_input_grad")
    return families


@dataclass(frozen=True)
class Geometry:
    """A window over an image: pairs (rows, columns); padding in front and behind."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    behind: list[int]

    @classmethod
    def of(cls, case: Case) -> Geometry:
        """Of a case with weights w (KH, KW, ...), a stride, and padding=half or valid."""
        kernel, stride = list(case.shape("w")[:2]), case.integer("stride")
        if case["padding"] not in ("half", "valid"):
            raise ValueError(f"padding={case['padding']}: required half or valid")
        padding = [(k - 1) // 2 if case["padding"] == "half" else 0 for k in kernel]
        return cls(kernel, [stride, stride], padding, padding)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """How often the window fits."""
        rows, columns = (self._positions(n, axis) for axis, n in enumerate((height, width)))
        return rows, columns

    def taps(self, height: int, width: int) -> int:
        """How many (position, tap) pairs lie inside the image."""
        count = 1
        for axis, size in enumerate((height, width)):
            starts = (
                o * self.stride[axis] - self.padding[axis]
                for o in range(self._positions(size, axis))
            )
            count *= sum(max(0, min(size, s + self.kernel[axis]) - max(0, s)) for s in starts)
        return count

    def window(self) -> Any:
        """The same, as our kernels take it."""
        from kernels.geometry import Window

        (top, left), (bottom, right) = self.padding, self.behind
        pair = (self.kernel[0], self.kernel[1]), (self.stride[0], self.stride[1])
        return Window(*pair, ((top, bottom), (left, right)))

    def _positions(self, size: int, axis: int) -> int:
        room = size + self.padding[axis] + self.behind[axis] - self.kernel[axis]
        if room < 0:
            raise ValueError(f"a window of {self.kernel} does not fit {size} along axis {axis}")
        return room // self.stride[axis] + 1


def floats(shape: Sequence[int]) -> int:
    """Bytes of a float32 array."""
    n = 4
    for length in shape:
        n *= length
    return n


# --- numbers: the same for all contestants, channels last -----------------------------------------


def numbers(*shapes: Sequence[int]) -> list[Any]:
    """Standard normal float32 arrays of these shapes."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def pooled(*arrays: Any) -> list[Any]:
    """Copies from our pool, aligned as results of our kernels are."""
    from kernels import memory

    copies = [memory.empty(a.shape, a.dtype) for a in arrays]
    for copy, array in zip(copies, arrays, strict=True):
        copy[...] = array
    return copies


# --- torch: both layouts, of which the harness takes the faster -----------------------------------


def torch_layouts(build: Callable[[Callable[[Any], Any]], Call]) -> dict[str, Call]:
    """build(image) for each layout; image(a) is a tensor (B, C, H, W) of an array (B, H, W, C)."""
    import torch

    def layout(name: str) -> Call:
        def image(array: Any) -> Any:
            tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
            return tensor.clone(memory_format=getattr(torch, name))

        call = build(image)

        def without_tape() -> object:
            with torch.no_grad():
                return call()

        return without_tape

    return {"contiguous": layout("contiguous_format"), "channels_last": layout("channels_last")}


def torch_convolution(
    case: Case,
    family: str,
    g: Geometry,
    x: Any,
    kernels: Any,
    bias: Any,
    grad: Any,
    groups: int = 1,
    *,
    transposed: bool = False,
) -> dict[str, Call]:
    """A direction of a convolution; of the gradients only the one that is asked for.

    kernels with their channels last: (out, KH, KW, in), or (in, KH, KW, out) if transposed.
    """
    import torch

    extra = [p - q for p, q in zip(g.padding, g.behind, strict=True)] if transposed else [0, 0]
    how = (g.stride, g.padding, [1, 1], transposed, extra, groups)
    ops: Any = torch.ops.aten

    def build(image: Callable[[Any], Any]) -> Call:
        X, W, G, b = image(x), image(kernels), image(grad), torch.from_numpy(bias)
        if case.family == family:
            return lambda: ops.convolution(X, W, b, *how)
        by_x = case.family == f"{family}_input_grad"
        mask = [by_x, not by_x, False]
        place = 0 if by_x else 1
        return lambda: ops.convolution_backward(G, X, W, None, *how, mask)[place]

    return torch_layouts(build)


# --- runtimes of whole graphs: here, of one op ----------------------------------------------------


def onnxruntime_call(
    threads: int,
    op: str,
    x: Any,
    constants: Sequence[Any],
    attributes: Mapping[str, Any],
    *,
    relu: bool = False,
) -> Call:
    """`op` of ONNX on x and constants; input and output stay bound, nothing is copied."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    names = [f"c{i}" for i in range(len(constants))]
    nodes = [helper.make_node(op, ["x", *names], ["h" if relu else "y"], **attributes)]
    if relu:
        nodes.append(helper.make_node("Relu", ["h"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * x.ndim)],
        [
            numpy_helper.from_array(np.ascontiguousarray(c), n)
            for c, n in zip(constants, names, strict=True)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return onnxruntime_network(threads, model.SerializeToString(), x)


def onnxruntime_network(threads: int, model: bytes, x: Any) -> Call:
    """An ONNX model of one input and one output; both stay bound, nothing is copied."""
    import numpy as np
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    array, name = np.ascontiguousarray(x), session.get_inputs()[0].name
    result = np.ascontiguousarray(session.run(None, {name: array})[0])
    binding = session.io_binding()
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    output = session.get_outputs()[0].name
    binding.bind_output(output, "cpu", 0, result.dtype, result.shape, result.ctypes.data)
    borrowed = array, result  # the binding does not keep them

    def call() -> object:
        session.run_with_iobinding(binding)
        return borrowed[1]

    return call


def openvino_call(threads: int, x: Any, graph: Callable[[Any, Any], Any]) -> Call:
    """graph(opset, x) in float32 arithmetic; input and output stay bound, nothing is copied.

    Constants of the graph must be `opset.constant(array)`, which copies: it may run later.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13

    array = np.ascontiguousarray(x)
    parameter = opset13.parameter(list(array.shape), np.float32)
    model = ov.Model([graph(opset13, parameter)], [parameter], "layer")
    return _openvino_compiled(threads, ov.Core(), model, array)


def openvino_network(threads: int, model: bytes, x: Any) -> Call:
    """An ONNX model of one input and one output; both stay bound, nothing is copied."""
    import numpy as np
    import openvino as ov

    array, core = np.ascontiguousarray(x), ov.Core()
    network = core.read_model(model=model)
    network.reshape(list(array.shape))
    return _openvino_compiled(threads, core, network, array)


def _openvino_compiled(threads: int, core: Any, model: Any, array: Any) -> Call:
    import numpy as np
    import openvino as ov

    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
            "ENABLE_CPU_PINNING": False,
        },
    )
    output = compiled.output(0)
    result = np.empty(tuple(output.shape), output.get_element_type().to_dtype())
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(array, shared_memory=True))
    request.set_output_tensor(ov.Tensor(result, shared_memory=True))
    borrowed = array, result  # the request does not keep them

    def call() -> object:
        request.infer(share_outputs=True)
        return borrowed[1]

    return call
