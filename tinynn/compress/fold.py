"""What a constant channel says to its readers can be said by their biases, if exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from tinynn.errors import PruneError
from tinynn.graph import Node
from tinynn.observe import Observer
from tinynn.op import Array

Fold = Literal["constant", "mean", "none"]

_ROUNDING = 1e-9  #: relative; the sums here are in float64


def shifts(
    seen: Observer, kept: Mapping[int, Array], arrays: Mapping[str, Array], fold: Fold
) -> dict[str, Array]:
    """What to add to each bias for the channels that go: `kept` has a mask for each value's index.

    With "constant" channels that never varied leave their value, with "mean" all leave their mean.
    Raises PruneError where a reader has no bias, or where a constant reaches its output's borders
    differently than its middle (a convolution with padding), so that no bias can stand for it.
    """
    found: dict[str, Array] = {}
    if fold == "none":
        return found
    for node in seen.graph.nodes:
        if node.op.channels != "mix" or node.inputs[0].index not in kept:
            continue
        keep = kept[node.inputs[0].index]
        if keep.all():
            continue
        left = _left_behind(node, keep, seen, fold)
        weight = arrays[node.inputs[1].name].astype(np.float64)
        if not (left.any() and np.take(weight, np.flatnonzero(left), axis=-2).any()):
            continue
        bias = node.inputs[2].name if len(node.inputs) > 2 else ""
        if not bias:
            raise PruneError(
                f"prune.channels: {node.inputs[1].name} reads a constant channel other than zero "
                "that would go, and has no bias to fold it into"
            )
        found[bias] = found.get(bias, 0) + _response(node, left, weight, exact=fold == "constant")
    return found


def _left_behind(node: Node, keep: Array, seen: Observer, fold: Fold) -> Array:
    """What each removed channel says for ever; zero for those that stay."""
    statistics = seen[node.inputs[0]]
    gone = ~keep if fold == "mean" else ~keep & statistics.constant
    return np.where(gone, np.where(statistics.constant, statistics.low, statistics.mean), 0.0)


def _response(node: Node, left: Array, weight: Array, *, exact: bool) -> Array:
    """The op's result on an input that is `left` everywhere: one number an output channel."""
    op = replace(node.op, relu=False) if hasattr(node.op, "relu") else node.op  # type: ignore
    x = np.broadcast_to(left, (1, *node.inputs[0].shape[1:]))
    y = op.forward(np.ascontiguousarray(x), weight)[0].reshape(-1, weight.shape[-1])
    largest = op.forward(np.abs(x), np.abs(weight))[0].max()
    if exact and (np.ptp(y, axis=0) > _ROUNDING * largest).any():
        raise PruneError(
            f"prune.channels: {node.op.name} in {node.path!r} reads a constant channel other than "
            "zero that would go; at the borders of the image its windows see less of it, so that "
            "no bias can stand for it exactly (keep the channel, or fold='mean' or 'none')"
        )
    return y.mean(axis=0)
