"""Replace nodes that do the work of fewer: the affine merge.

A ReLU node that was on for every sample has not been a nonlinearity on these data. Together, all
such nodes of a layer compute an affine function of the layer's input, x @ M + c with
M = W1[:, on] @ W2[on] and c = b1[on] @ W2[on], whose rank is at most min(m_in, m_out): that many
nodes can say the same. It is the other end of the activation count, whose lower end is pruned.

Layers are treated from the last to the first: a merge needs the statistics of the layer's input and
its own columns as they were observed, and changes neither those of the layers before it nor, on the
data, what the layers after it see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tinynn.compress.prune import rebuilt
from tinynn.errors import ConfigError
from tinynn.graph import Group, Node
from tinynn.nn.module import Module
from tinynn.observe import Observer
from tinynn.op import Array


@dataclass(frozen=True)
class _Hidden:
    """A hidden layer between two linear ones: the names of its arrays, and the nodes around it."""

    group: Group
    w1: str
    b1: str
    w2: str
    b2: str
    maker: Node


def affine(
    model: Module, seen: Observer, *, margin: float = 0.1, tolerance: float = 1e-6
) -> Module:
    """A new model in which each ReLU layer's always-on nodes are replaced by as few as possible.

    The function stays the same wherever the layer's input lies within the range that `seen`
    observed, up to rounding: the new nodes have biases that keep them on there with `margin` to
    spare. Singular values below `tolerance` times the largest (or below it absolutely) are
    dropped. Weights are balanced: the norms of what goes into a new node and out of it are equal.
    Always-on nodes that are already as few as they can be are put into this form, too.

    Hidden layers without biases on both sides, with other nonlinearities than ReLU, or tied to
    other layers are left as they are.

    Raises PruneError if `seen` was observed on another model or before this one changed,
    ConfigError for a margin or tolerance out of range.
    """
    if not 0 < margin < math.inf or not 0 <= tolerance < math.inf:
        raise ConfigError(
            "merge.affine: required a finite margin > 0 and a finite tolerance >= 0; came "
            f"{margin} and {tolerance}"
        )
    seen.require(model, "merge.affine")
    arrays = {name: p.numpy() for name, p in model.named_parameters()}
    for hidden in reversed(_hidden_layers(seen)):
        on = seen[hidden.group.readers[0].value]
        always = on.count == on.samples
        if always.any():
            _replace(hidden, always, seen, arrays, margin, tolerance)
    return rebuilt(model, arrays)


def _replace(
    hidden: _Hidden,
    on: Array,
    seen: Observer,
    arrays: dict[str, Array],
    margin: float,
    tolerance: float,
) -> None:
    w1, b1, w2, b2 = (
        arrays[name].astype(np.float64) for name in (hidden.w1, hidden.b1, hidden.w2, hidden.b2)
    )
    left, values, right = np.linalg.svd(w1[:, on] @ w2[on], full_matrices=False)
    rank = int((values > tolerance * max(1.0, values[0])).sum())
    into = left[:, :rank] * np.sqrt(values[:rank])
    out = np.sqrt(values[:rank])[:, None] * right[:rank]
    sign = np.where(into.sum(axis=0) < 0, -1.0, 1.0)  # mostly positive weights need smaller biases
    into, out = into * sign, out * sign[:, None]

    x = seen[hidden.maker.inputs[0]]
    lowest = np.minimum(into * x.low[:, None], into * x.high[:, None]).sum(axis=0)
    bias = np.maximum(0.0, -lowest) + margin
    if rank == 0 and on.all():  # a layer keeps at least one node, even one that says nothing
        into, out, bias = np.zeros((len(w1), 1)), np.zeros((1, w2.shape[1])), np.array([margin])
    new = {
        hidden.w1: np.concatenate([w1[:, ~on], into], axis=1),
        hidden.b1: np.concatenate([b1[~on], bias]),
        hidden.w2: np.concatenate([w2[~on], out]),
        hidden.b2: b2 + b1[on] @ w2[on] - bias @ out,
    }
    for name, array in new.items():
        arrays[name] = np.ascontiguousarray(array.astype(arrays[name].dtype))


def _hidden_layers(seen: Observer) -> list[_Hidden]:
    """Groups of the form linear, ReLU (fused or not), linear, with nothing else attached.

    They come in the order in which the network computes them.
    """
    graph = seen.graph
    makers = {node.output.index: node for node in graph.nodes}
    found = []
    for group in graph.groups():
        names = [m.name for m in group.writers]
        whole = all(v.channels == group.size for v in group.values)
        if group.fixed or len(group.readers) != 1 or len(names) != 2 or not whole:
            continue
        reader = group.readers[0]
        node = makers[reader.value.index]
        rectified = node.op.name == "relu"
        maker = makers.get(node.inputs[0].index) if rectified else node
        if maker is None or maker.op.name != "linear" or reader.bias is None:
            continue
        if not rectified and not getattr(maker.op, "relu", False):
            continue
        if len(group.values) == (2 if rectified else 1):
            w1, b1 = names
            found.append(_Hidden(group, w1, b1, reader.weight.name, reader.bias, maker))
    return sorted(found, key=lambda hidden: hidden.maker.output.index)
