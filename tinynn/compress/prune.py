"""Surgery: remove channels from a model, wherever they are written or read.

What comes back is a new, smaller model; the one given is never touched. An optimiser belongs to the
parameters it was made from: make a new one for the smaller model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from tinynn.compress.importance import Importance
from tinynn.compress.select import Selection
from tinynn.errors import ConfigError, PruneError
from tinynn.graph import Group, Value
from tinynn.nn.module import Module, Parameter
from tinynn.observe import Observer
from tinynn.op import Array

Fold = Literal["constant", "mean", "none"]


def channels(
    model: Module,
    seen: Observer,
    importance: Importance,
    select: Selection,
    *,
    fold: Fold = "constant",
) -> Module:
    """A new model without the channels that `select` drops from the scores of `importance`.

    `seen` is what `observe` collected from this model. With `fold="constant"` a removed channel
    that never varied leaves its value in the biases of its readers, so that the function on the
    observed data stays exactly the same; with "mean" every removed channel leaves its mean, an
    approximation; with "none" nothing is left.

    Raises PruneError if `seen` was observed on another model or before this one changed, if no
    group can be pruned, if scores are NaN or not one a channel, if a layer would lose all its
    channels, or if a constant other than zero has no bias to go to.
    """
    if fold not in ("constant", "mean", "none"):
        raise ConfigError(f"prune.channels: fold is 'constant', 'mean' or 'none'; came {fold!r}")
    seen.require(model, "prune.channels")
    parameters = {name: np.array(p.data) for name, p in model.named_parameters()}
    groups = seen.graph.groups()
    prunable = [g for g in groups if not g.fixed]
    if not prunable:
        reasons = "; ".join(f"{g.name}: {g.fixed}" for g in groups)
        raise PruneError(f"prune.channels: no group of channels can be pruned ({reasons})")
    for group in prunable:
        scores = np.asarray(importance(group, seen, parameters))
        if scores.shape != (group.size,) or np.isnan(scores).any():
            raise PruneError(
                f"prune.channels: required {group.size} scores for the channels of {group.name}, "
                f"none of them NaN; came {scores}"
            )
        keep = np.asarray(select(scores), bool)
        if keep.shape != scores.shape:
            raise PruneError(
                f"prune.channels: required one decision for each of {group.size} channels of "
                f"{group.name}; came shape {keep.shape}"
            )
        if not keep.any():
            raise PruneError(
                f"prune.channels: all {group.size} channels of {group.name} would go (scores from "
                f"{np.min(scores):.6g} to {np.max(scores):.6g}); a layer keeps at least one"
            )
        if not keep.all():
            _remove(group, keep, seen, parameters, fold)
    return rebuilt(model, parameters)


def rebuilt(model: Module, arrays: Mapping[str, Array]) -> Module:
    """A copy of `model` whose parameters, by dotted path, are these arrays of whatever size.

    Parameters that are not trained stay so.
    """
    out = model.copy()
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    new: dict[int, Parameter] = {}
    for name, old in out.named_parameters():
        new[id(old)] = Parameter(arrays[name], copy=False)
        new[id(old)].requires_grad = trained[name]
    for _, module in out.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Parameter):
                setattr(module, name, new[id(value)])
    return out


def _remove(
    group: Group, keep: Array, seen: Observer, parameters: dict[str, Array], fold: Fold
) -> None:
    """Shrink every array of the group in `parameters`, after folding what removed nodes leave."""
    for reader in group.readers:
        left = _left_behind(seen, reader.value, keep, fold)
        weight = np.moveaxis(parameters[reader.weight.name], reader.weight.axis, 0)
        if left.any():
            if reader.bias is None:
                raise PruneError(
                    f"prune.channels: {group.name} has a constant channel other than zero, and "
                    f"{reader.weight.name} has no bias to fold it into"
                )
            bias = parameters[reader.bias]
            shift = np.tensordot(left, weight.astype(np.float64), axes=1)
            parameters[reader.bias] = (bias + shift).astype(bias.dtype)
    for member in group.members:
        shorter = np.compress(keep, parameters[member.name], axis=member.axis)
        parameters[member.name] = np.ascontiguousarray(shorter)


def _left_behind(seen: Observer, value: Value, keep: Array, fold: Fold) -> Array:
    """What each removed channel adds to its readers for ever; zero for those that stay."""
    statistics = seen[value]
    if fold == "none":
        return np.zeros(len(keep))
    gone = ~keep if fold == "mean" else ~keep & statistics.constant
    return np.where(gone, np.where(statistics.constant, statistics.low, statistics.mean), 0.0)
