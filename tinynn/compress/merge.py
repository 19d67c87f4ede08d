"""Replace nodes that do the work of fewer: the affine merge, and the merge of duplicates.

A channel that is another one's multiple wherever it is read is removed, and its readers' weights,
times the factor, go to that other channel's: see `duplicates`.

The affine merge: a ReLU node that was on for every sample has not been a nonlinearity on these
data. Together, all such nodes of a layer compute an affine function of the layer's input, x @ M + c
with M = W1[:, on] @ W2[on] and c = b1[on] @ W2[on], whose rank is at most min(m_in, m_out): that
many nodes can say the same. It is the other end of the activation count, whose lower end is pruned.

Layers are treated from the last to the first: a merge needs the statistics of the layer's input and
its own columns as they were observed, and changes neither those of the layers before it nor, on the
data, what the layers after it see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels import pointwise
from tinynn.compress.exchange import require_floating
from tinynn.compress.prune import Decision, rebuilt, remove
from tinynn.errors import ConfigError
from tinynn.graph import Group, Node, Value
from tinynn.nn.module import Module
from tinynn.observe import Observer, observe_by
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
    ConfigError for a margin or tolerance out of range, or for quantised layers.
    """
    if not 0 < margin < math.inf or not 0 <= tolerance < math.inf:
        raise ConfigError(
            "merge.affine: required a finite margin > 0 and a finite tolerance >= 0; came "
            f"{margin} and {tolerance}"
        )
    seen.require(model, "merge.affine")
    require_floating(model, "merge.affine")
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


# --- duplicates -----------------------------------------------------------------------------------

#: ops whose result is not linear in what they read
_NOT_LINEAR = ("additive", "additive_conv2d")


@dataclass(frozen=True)
class Duplicate:
    """A channel that was removed, and the one that stands for it."""

    group: Group
    removed: int
    kept: int
    residual: float  #: the largest share of its squares, over its readers, that is not the other's


def duplicates(
    model: Module,
    data: Iterable[Any],
    *,
    similarity: float = 0.99,
    report: Callable[[Duplicate], None] | None = None,
) -> Module:
    """A new model in which one channel stands for all that are nearly its multiples on `data`.

    x_j is a duplicate of x_i if |cos(x_i, x_j)|, over all rows and positions, is at least
    `similarity` in everything that layers read of the two. Then x_j goes, and each of its readers'
    weights w_j is added, times the least-squares factor <x_i, x_j> / <x_i, x_i>, to w_i. The
    strongest channels stay; channels that are zero on all of `data` go. `data` are batches:
    arrays, or tuples whose first is the input. Weights under a mask may come to life by this.
    Channels that a layer of the ef-operator reads stay, as it is not linear.

    Srinivas & Babu 2015, "Data-free parameter pruning", section 3.1, judged by the activations
    instead of the weights. Raises ConfigError for a similarity that is not in (0, 1] or quantised
    layers, and what `observe` and `prune.remove` raise.
    """
    if not 0 < similarity <= 1:
        raise ConfigError(f"merge.duplicates: required 0 < similarity <= 1; came {similarity}")
    require_floating(model, "merge.duplicates")
    seen = observe_by(_Products, model, data)
    arrays = model.state_dict()
    decisions = []
    for group, products in seen.products:
        keep, scores = np.ones(group.size, bool), np.ones(group.size)
        for removed, kept, residual in _pairs(list(products.values()), 1 - similarity**2):
            keep[removed], scores[removed] = False, residual
            for reader in group.readers:
                product = products[reader.value.index]
                power = product[kept, kept]
                factor = product[kept, removed] / power if power else 0.0
                index = reader.weight.index
                rows = np.moveaxis(arrays[reader.weight.name], reader.weight.axis, 0)
                rows[index == kept] += (factor * rows[index == removed]).astype(rows.dtype)
            if report:
                report(Duplicate(group, removed, kept, residual))
        decisions.append(Decision(group, scores, keep, np.zeros(group.size, bool)))
    return remove(rebuilt(model, arrays), seen, decisions, fold="none")


class _Products(Observer):
    """Also sums the products of channels: x_i x_j over all rows and positions, float64."""

    def __init__(self, model: Module, example: Array) -> None:
        super().__init__(model, example)
        #: groups that can be merged, and for each value that is read of it (channels, channels)
        self.products: list[tuple[Group, dict[int, Array]]] = [
            (g, {r.value.index: np.zeros((g.size, g.size)) for r in g.readers})
            for g in self.graph.groups()
            if not g.fixed and not any(r.node.op.name in _NOT_LINEAR for r in g.readers)
        ]

    def _add(self, value: Value, activation: Array, what: str) -> None:
        super()._add(value, activation, what)
        for group, products in self.products:
            if value.index not in products:
                continue
            places = group.places[value.index]
            columns = np.flatnonzero(places >= 0)
            order = columns[np.argsort(places[columns], kind="stable")].reshape(group.size, -1)
            x = activation.reshape(-1, activation.shape[-1])[:, order]  # (rows, channels, times)
            rows = np.ascontiguousarray(x.transpose(1, 0, 2).reshape(group.size, -1), np.float64)
            # not NumPy's product, whose sums depend on the number of threads
            products[value.index] += pointwise.matmul(rows, np.ascontiguousarray(rows.T))


def _pairs(products: list[Array], tolerance: float) -> list[tuple[int, int, float]]:
    """(removed, kept, residual) of channels whose residual in all products is within tolerance."""
    powers = np.stack([np.diagonal(p) for p in products])
    residual = np.zeros(products[0].shape)  # of column j where row i stands for it
    for product, power in zip(products, powers, strict=True):
        both = np.outer(power, power)
        share = np.divide(product**2, both, out=np.zeros_like(both), where=both > 0)
        residual = np.maximum(residual, np.where(power == 0, 0.0, 1 - share))
    kept: list[int] = []
    found = []
    total = powers.sum(axis=1, keepdims=True)
    strength = (powers / np.where(total > 0, total, 1)).sum(axis=0)
    for j in np.argsort(-strength, kind="stable").tolist():
        best = min(kept, key=lambda i: residual[i, j], default=j)
        if best != j and residual[best, j] <= tolerance:
            found.append((j, best, max(0.0, float(residual[best, j]))))
        else:
            kept.append(j)
    return found
