"""A mean is traced as a sum and a product with one over the count; ONNX has it as one operator."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from tinynn.graph import Graph, Node, Value
from tinynn.onnx.writer import IMAGE_AXIS, Writer
from tinynn.ops.elementwise import Mul
from tinynn.ops.reduce import Sum


class Mean(NamedTuple):
    """The two nodes of a mean, and the constant factor of the second."""

    total: Node
    product: Node
    factor: Value


def means(graph: Graph) -> dict[int, Mean]:
    """The means of a graph, by the position of their product among the nodes."""
    makers = {n.output.index: n for n in graph.nodes}
    uses = Counter(v.index for n in graph.nodes for v in n.inputs)
    found = {}
    for i, node in enumerate(graph.nodes):
        if not isinstance(node.op, Mul):
            continue
        source, factor = node.inputs
        total = makers.get(source.index)
        if total is None or not isinstance(total.op, Sum) or factor.kind != "constant":
            continue
        count = math.prod(total.inputs[0].shape[a] for a in total.op.axes)
        alone = uses[source.index] == 1 and source.index != graph.output.index
        if (
            alone
            and not factor.shape
            and count
            and graph.arrays[factor.index] == factor.dtype.type(1 / count)
        ):
            found[i] = Mean(total, node, factor)
    return found


def emit_mean(w: Writer, mean: Mean) -> None:
    """GlobalAveragePool where it is one, ReduceMean otherwise."""
    op, (x,), node = mean.total.op, mean.total.inputs, mean.product
    assert isinstance(op, Sum)
    if len(x.shape) == 4 and op.axes == (1, 2) and w.layout(x) == "image":
        pooled = w.emit(node, "GlobalAveragePool", [w.image(x)])
        if op.keepdims:
            w.put(node, pooled, "image")
        else:
            w.put(node, w.emit(node, "Flatten", [pooled], axis=1), "plain")
    else:
        reduce(w, node, x, "ReduceMean", op.axes, op.keepdims)


def reduce(
    w: Writer, node: Node, x: Value, kind: str, axes: tuple[int, ...], keepdims: bool
) -> None:
    """Write a reduction of x over `axes` as tinynn counts them."""
    if not axes:  # ONNX would take no axes for all of them
        return w.put(node, w.emit(node, "Identity", [w.plain(x)]), "plain")
    image = w.layout(x) == "image"
    if image and not keepdims:  # what is left must come in the same order
        left = [IMAGE_AXIS[a] for a in range(4) if a not in axes]
        image = left == sorted(left)
    name = w.image(x) if image else w.plain(x)
    where = [IMAGE_AXIS[a] for a in axes] if image else list(axes)
    if kind == "ReduceSum":
        inputs, extra = [name, w.constant(f"{node.path or 'model'}/axes", where, "int64")], {}
    else:
        inputs, extra = [name], {"axes": where}
    result = w.emit(node, kind, inputs, keepdims=int(keepdims), **extra)
    return w.put(node, result, "image" if image and keepdims else "plain")
