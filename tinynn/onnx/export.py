"""Write a model as an ONNX file.

The model is traced in eval mode on two batches: axes whose sizes differ depend on the batch's, and
a model whose ops or constants differ otherwise has no ONNX graph for all inputs.
"""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from tinynn.errors import ConfigError, FileFormatError, TinynnError, UnsupportedError
from tinynn.graph import Graph, Node, trace
from tinynn.nn.module import Module
from tinynn.onnx.emitters import EMITTERS
from tinynn.onnx.library import library
from tinynn.onnx.means import Mean, emit_mean, means
from tinynn.onnx.writer import INPUT, OUTPUT, Writer
from tinynn.op import Shape
from tinynn.ops.quantize import FakeQuantize
from tinynn.ops.shape import Reshape
from tinynn.storage import PathLike, write_bytes
from tinynn.tensor import Tensor

OPSET = 17
_IR_VERSION = 8  #: the file format that came with opset 15 to 18
_LARGEST = 2**31 - 1  #: bytes of one protobuf message
_BATCH = "batch"


def export(model: Module, example: npt.ArrayLike | Tensor, path: PathLike) -> None:
    """Write `model` in eval mode to `path` as an ONNX file of opset 17, atomically.

    `example` is a batch of inputs; its values do not matter. The input and the output keep their
    axes (images are NHWC; inside they are NCHW), the batch axis is symbolic, weights have the names
    of their parameters, nodes those of their modules. Weights on a grid are written as int8 with a
    DequantizeLinear, activations on one through QuantizeLinear and DequantizeLinear: `onnx.load`
    reads them. Where ranges are found at run time, sums are ConvInteger and MatMulInteger, see
    `tinynn.onnx.dynamic`; those files, and those of the ef-operator, are for other runtimes only.

    Other runtimes saturate sums of products of bytes on x86 processors without VNNI, and give other
    answers than the model there. Weights of 7 bits leave these sums room: quantise by
    `quantize.Scheme(bits=7, first_last=7)` what is to run so.

    Raises UnsupportedError, which names the op, for what ONNX cannot say or a model whose ops
    depend on the batch's size or values, and MissingPackageError without the onnx package.
    """
    onnx = library("onnx.export")
    batch = example._data if isinstance(example, Tensor) else np.asarray(example)
    if not batch.ndim or not len(batch) or batch.dtype.kind != "f":
        raise ConfigError(
            "onnx.export: required an example with a batch axis, not empty, of floats; came "
            f"{batch.dtype} of shape {batch.shape}"
        )
    small = trace(model, batch)
    shapes, folded = _larger(model, small, batch)
    writer = Writer(onnx, small)
    wanted = _needed(small) - {m.total.output.index for m in folded.values()}
    for i, node in enumerate(small.nodes):
        if node.output.index not in wanted or writer.fold(node):
            continue
        if i in folded:
            emit_mean(writer, folded[i])
        elif node.op.name in EMITTERS:
            EMITTERS[node.op.name](writer, node, shapes)
        else:
            raise UnsupportedError(
                f"onnx.export: op {node.op} in {node.path!r} has no counterpart in ONNX here"
            )
    content = _message(onnx, writer, small, shapes)
    write_bytes(path, content)


def _larger(
    model: Module, small: Graph, batch: npt.NDArray[np.floating]
) -> tuple[dict[int, Shape], dict[int, Mean]]:
    """Shapes of all values when the batch is larger by one, and the means among the nodes."""
    # other values, too: what the model computes outside its ops must not depend on them
    other = (np.concatenate([batch, batch[:1]]) * 0.5 + 0.25).astype(batch.dtype)
    try:
        large = trace(model, other)
    except (TinynnError, ValueError, IndexError) as error:
        raise UnsupportedError(
            f"onnx.export: the model does not run with a batch of {len(batch) + 1}: {error}"
        ) from error
    folded = means(small)
    exempt = {
        v.index
        for n in small.nodes
        for v in n.inputs[1:]
        if isinstance(n.op, FakeQuantize) and n.op.dynamic
    }
    if folded.keys() == means(large).keys():
        exempt |= {m.factor.index for m in folded.values()}
    for a, b in zip_longest(small.nodes, large.nodes):
        if a is None or b is None or not _alike(a, b):
            node = a or b
            raise UnsupportedError(
                f"onnx.export: {node.op.name} in {node.path!r} depends on the size of the batch"
            )
        for u in a.inputs:
            if u.is_data or u.index in exempt:
                continue
            if not np.array_equal(small.arrays[u.index], large.arrays[u.index], equal_nan=True):
                raise UnsupportedError(
                    f"onnx.export: a constant of {a.op.name} in {a.path!r} depends on the batch"
                )
    shapes = {v.index: v.shape for n in large.nodes for v in (*n.inputs, n.output)}
    return shapes | {large.input.index: large.input.shape}, folded


def _alike(a: Node, b: Node) -> bool:
    """Whether two nodes are one but for the size of the batch."""
    same = a.op == b.op or (isinstance(a.op, Reshape) and isinstance(b.op, Reshape))
    wires = [v.index for v in (*a.inputs, a.output)] == [v.index for v in (*b.inputs, b.output)]
    return same and wires and a.path == b.path


def _needed(graph: Graph) -> set[int]:
    """The values on which the result depends, by index."""
    needed = {graph.output.index}
    for node in reversed(graph.nodes):
        if node.output.index in needed:
            needed |= {v.index for v in node.inputs}
    return needed


def _message(onnx: object, writer: Writer, graph: Graph, shapes: dict[int, Shape]) -> bytes:
    """The checked file's content."""
    lib = writer.library
    helper = lib.helper
    nodes, initializers = writer.finish()

    def info(name: str, value: object) -> object:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)  # type: ignore[attr-defined]
        pairs = zip(value.shape, shapes[value.index], strict=True)  # type: ignore[attr-defined]
        first = graph.input.shape[0]
        sizes = [a if a == b else _BATCH if a == first else None for a, b in pairs]
        return helper.make_tensor_value_info(name, kind, sizes)

    proto = helper.make_graph(
        nodes, "tinynn", [info(INPUT, graph.input)], [info(OUTPUT, graph.output)], initializers
    )
    message = helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="tinynn",
    )
    if (size := message.ByteSize()) > _LARGEST:
        raise UnsupportedError(
            f"onnx.export: required at most {_LARGEST} bytes in one file; came {size}"
        )
    try:
        lib.checker.check_model(message, full_check=True)
    except (lib.checker.ValidationError, lib.shape_inference.InferenceError) as error:
        raise FileFormatError(
            f"onnx.export: the ONNX checker refuses the graph: {error}"
        ) from error
    return message.SerializeToString()
