"""Make a module from an ONNX file."""

from __future__ import annotations

from typing import Any

from tinynn.errors import FileFormatError, TinynnError, UnsupportedError
from tinynn.onnx.builder import Builder, Call
from tinynn.onnx.library import library
from tinynn.onnx.network import Network
from tinynn.onnx.operators import OPERATORS
from tinynn.onnx.source import check, read, to_array
from tinynn.storage import PathLike

_FLOATS = {1, 11}  #: TensorProto's float and double
_OWN = (
    " (of what tinynn exports, models of quantize.dynamic and of the ef-operator are for other "
    "runtimes only: keep them with tn.save)"
)
_DOMAINS = ("", "ai.onnx")


def load(path: PathLike) -> Network:
    """The module, in eval mode, that computes what the graph of an ONNX file computes.

    Inputs and outputs have the axes that the file gives them; inside, images are NHWC. Weights and
    vectors from initialisers are Parameters; single numbers and Constant nodes are not trained.

    QuantizeLinear and DequantizeLinear become `Quantized` modules, of activations and of weights in
    int8, as `quantize.int8` has them: what it made is exported, loaded and compiled again. What
    `quantize.dynamic` made, and layers of the ef-operator, are exported for other runtimes only;
    keep those models with `tn.save`.

    Raises UnsupportedError, which names the operator, its node and the attribute, for what tinynn
    has no counterpart for; FileFormatError for a file that is broken or keeps data elsewhere;
    MissingPackageError without the onnx package.
    """
    onnx = library("onnx.load")
    model, version = read(onnx, path)
    own = _OWN if model.producer_name == "tinynn" else ""
    for node in model.graph.node:
        if node.domain not in _DOMAINS or node.op_type not in OPERATORS:
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise UnsupportedError(f"onnx.load: operator {kind} of node {_name(node)!r}{own}")
    check(onnx, model, path)
    try:
        return _build(onnx, model, version).eval()
    except (UnsupportedError, FileFormatError):
        raise
    except (TinynnError, LookupError, ValueError, TypeError, OverflowError) as error:
        raise FileFormatError(f"{path}: its graph cannot be built: {error}") from error


def _build(onnx: Any, model: Any, version: int) -> Network:
    graph = model.graph
    if graph.sparse_initializer:
        raise UnsupportedError("onnx.load: sparse initializers")
    builder = Builder(onnx, model, version)
    for tensor in graph.initializer:
        builder.constants[tensor.name] = to_array(onnx, tensor)
        builder.trained.add(tensor.name)
    for value in graph.input:
        if value.name not in builder.constants:
            kind = value.type.tensor_type.elem_type
            if kind not in _FLOATS:
                named = onnx.TensorProto.DataType.Name(kind) if kind else "no tensor"
                raise UnsupportedError(f"onnx.load: input {value.name!r} is of {named}")
            builder.add_input(value.name)
    for node in graph.node:
        call = Call(builder, node, _name(node))
        OPERATORS[node.op_type](call)
        call.close()
    outputs = [builder.plain(builder.data(value.name)).number for value in graph.output]
    return Network(builder.parts, builder.steps, inputs=builder.inputs, outputs=outputs)


def _name(node: Any) -> str:
    return node.name or next(iter(node.output), "")
