"""Surgery: remove channels from a model, wherever they are written or read.

What comes back is a new, smaller model; the one given is never touched. An optimiser belongs to the
parameters it was made from: make a new one for the smaller model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from tinynn.compress.fold import Fold, shifts
from tinynn.compress.importance import Importance
from tinynn.compress.select import Selection
from tinynn.compress.union import members
from tinynn.errors import ConfigError, PruneError, TinynnError
from tinynn.graph import Graph, Group, Node, moved, trace
from tinynn.nn.module import Module, Parameter
from tinynn.observe import Observer
from tinynn.op import Array
from tinynn.ops.shape import Scatter


@dataclass(frozen=True)
class Decision:
    """What was decided of one group of channels, one entry a channel."""

    group: Group
    scores: Array
    keep: Array
    guarded: Array  #: which of those that stay only `least` has kept


def channels(
    model: Module,
    seen: Observer,
    importance: Importance,
    select: Selection,
    *,
    fold: Fold = "constant",
    least: int = 0,
    union: bool = False,
    only: Callable[[Group], bool] | None = None,
    report: Callable[[Decision], None] | None = None,
) -> Module:
    """A new model without the channels that `select` drops from the scores of `importance`.

    `seen` is what `observe` collected from this model. With `fold="constant"` a removed channel
    that never varied leaves its value in the biases of its readers, so that the function on the
    observed data stays exactly the same; with "mean" every removed channel leaves its mean, an
    approximation; with "none" nothing is left.

    Each group keeps `least` channels: where `select` leaves fewer, the highest scores stay, too.
    With `union` the layers that additions tie into one group are scored and selected each alone,
    and the group keeps what any of them keeps: see `union.members`. `only` says of each group that
    can be pruned whether it shall be. `report` is called with the Decision on each group.

    Raises PruneError if `seen` was observed on another model or before this one changed, if no
    group can be pruned, if scores are NaN or not one a channel, if a layer would lose all its
    channels, if a constant other than zero has no bias to go to or cannot be folded exactly (it
    enters a convolution with padding), or if a module has sizes of its own that do not follow.
    """
    if fold not in ("constant", "mean", "none") or least < 0:
        raise ConfigError(
            "prune.channels: fold is 'constant', 'mean' or 'none', least >= 0; came "
            f"{fold!r} and {least}"
        )
    seen.require(model, "prune.channels")
    arrays = model.state_dict()
    groups = seen.graph.groups()
    prunable = [g for g in groups if not g.fixed and (only is None or only(g))]
    if not prunable:
        reasons = "; ".join(f"{g.name}: {g.fixed or 'left out by `only`'}" for g in groups)
        raise PruneError(f"prune.channels: no group of channels can be pruned ({reasons})")
    decisions = []
    for group in prunable:
        judged = (members(group, seen.graph) if union else []) or [group]
        rulings = [_ruling(g, importance, select, seen, arrays) for g in judged]
        decisions.append(_decide(group, rulings, least))
    for decision in decisions:
        if report:
            report(decision)
    return remove(model, seen, decisions, fold=fold)


def decide(
    group: Group,
    importance: Importance,
    select: Selection,
    seen: Observer,
    arrays: Mapping[str, Array],
    *,
    least: int = 0,
) -> Decision:
    """What one group alone keeps; `arrays` are the model's parameters and buffers by path."""
    return _decide(group, [_ruling(group, importance, select, seen, arrays)], least)


def remove(
    model: Module, seen: Observer, decisions: Sequence[Decision], *, fold: Fold = "constant"
) -> Module:
    """A new model without the channels that these decisions do not keep: see `channels`."""
    arrays = model.state_dict()
    masks, kept = _masks(decisions, arrays)
    for name, shift in shifts(seen, kept, arrays, fold).items():
        arrays[name] = (arrays[name] + shift).astype(arrays[name].dtype)
    for (name, axis), mask in masks.items():
        arrays[name] = np.compress(mask, arrays[name], axis=axis)
    out = rebuilt(model, {k: np.ascontiguousarray(a) for k, a in arrays.items()})
    modules = dict(out.named_modules())
    for node in seen.graph.nodes:
        if node.resizes and node.output.index in kept:
            _resize(modules[node.path], node, kept[node.output.index])
    _confirm(out, seen, kept)
    return out


def rebuilt(model: Module, arrays: Mapping[str, Array]) -> Module:
    """A copy of `model` whose parameters, by dotted path, are these arrays of whatever size.

    Buffers that `arrays` names change likewise. Parameters that are not trained stay so, and zeros
    of masked ones stay masked, equal values of those with codes share them.
    """
    out = model.copy()
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    new: dict[int, Parameter] = {}
    for name, old in out.named_parameters():
        new[id(old)] = Parameter(arrays[name], copy=False)
        new[id(old)].requires_grad = trained[name]
        if old.mask is not None:
            new[id(old)].mask = arrays[name] != 0
        if old.codes is not None:
            equal = np.unique(arrays[name], return_inverse=True)[1]
            new[id(old)].codes = equal.reshape(arrays[name].shape)
    for path, module in out.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Parameter):
                setattr(module, name, new[id(value)])
            elif isinstance(value, np.ndarray):
                setattr(module, name, arrays.get(f"{path}.{name}" if path else name, value))
    return out


def _ruling(
    group: Group,
    importance: Importance,
    select: Selection,
    seen: Observer,
    arrays: Mapping[str, Array],
) -> tuple[Array, Array]:
    """The channels' scores, and which of them stay."""
    scores = np.asarray(importance(group, seen, arrays))
    if scores.shape != (group.size,) or np.isnan(scores).any():
        raise PruneError(
            f"prune.channels: required {group.size} scores for the channels of {group.name}, "
            f"none of them NaN; came {scores}"
        )
    keep = np.array(select(scores), bool)
    if keep.shape != scores.shape:
        raise PruneError(
            f"prune.channels: required one decision for each of {group.size} channels of "
            f"{group.name}; came shape {keep.shape}"
        )
    return scores, keep


def _decide(group: Group, rulings: Sequence[tuple[Array, Array]], least: int) -> Decision:
    """The largest scores, and the union of what stays by any ruling."""
    scores = np.max([scores for scores, _ in rulings], axis=0)
    keep = np.any([keep for _, keep in rulings], axis=0)
    guarded = np.zeros(group.size, bool)
    dropped = np.flatnonzero(~keep)
    best = dropped[np.argsort(-scores[dropped], kind="stable")]
    guarded[best[: max(0, least - int(keep.sum()))]] = True
    return Decision(group, scores, keep | guarded, guarded)


def _masks(
    decisions: Sequence[Decision], arrays: Mapping[str, Array]
) -> tuple[dict[tuple[str, int], Array], dict[int, Array]]:
    """What stays along each axis of parameters and buffers, and of each value's channels."""
    masks: dict[tuple[str, int], Array] = {}
    kept: dict[int, Array] = {}
    for d in decisions:
        for member in d.group.members:
            axis = (member.name, member.axis)
            mask = masks.setdefault(axis, np.ones(arrays[member.name].shape[member.axis], bool))
            mask &= (member.index < 0) | d.keep[member.index]
        for index, places in d.group.places.items():
            mask = kept.setdefault(index, np.ones(len(places), bool))
            mask &= (places < 0) | d.keep[places]
    for d in decisions:
        axes = [(m.name, m.axis) for m in d.group.members]
        values = [kept[i] for i in d.group.places]
        if not all(mask.any() for mask in [*values, *(masks[a] for a in axes)]):
            raise PruneError(
                f"prune.channels: all {d.group.size} channels of {d.group.name} would go (scores "
                f"from {np.min(d.scores):.6g} to {np.max(d.scores):.6g}); a layer keeps at least "
                "one"
            )
    return masks, kept


def _resize(module: Module, node: Node, keep: Array) -> None:
    """Set how the module makes more channels to what is left of them."""
    if isinstance(node.op, Scatter):
        after = np.cumsum(keep) - 1
        was: tuple[Any, Any] = (node.op.places, node.op.width)
        now: tuple[Any, Any] = (
            tuple(int(after[p]) for p in node.op.places if keep[p]),
            int(keep.sum()),
        )
    else:
        before, behind = was = node.op.widths[-1]  # type: ignore[attr-defined]
        now = int(keep[:before].sum()), int(keep[len(keep) - behind :].sum())
    first, last = node.resizes
    if (getattr(module, first), getattr(module, last)) != was:
        raise PruneError(
            f"prune.channels: {node.module} in {node.path!r} makes more channels by {was}, which "
            f"{first} and {last} do not say"
        )
    setattr(module, first, now[0])
    setattr(module, last, now[1])


def _confirm(model: Module, seen: Observer, kept: Mapping[int, Array]) -> None:
    """Raise PruneError unless every op of the smaller model sees the channels that it should."""
    try:
        new = trace(model, seen.example)
    except (TinynnError, ValueError, IndexError) as error:
        raise PruneError(
            f"prune.channels: the smaller model does not run; a module has sizes of its own that "
            f"pruning cannot change: {error}"
        ) from error
    labels = _labels(seen.graph)
    # a shortcut that has nothing left to pad does not
    expected = [n for n in seen.graph.nodes if not (n.resizes and _pads_nothing(n, kept))]
    for old, node in zip_longest(expected, new.nodes):
        same = old and node and (old.op.name, old.path) == (node.op.name, node.path)
        if not same or not _agree(old, node, labels, kept):
            where = f"{old.op.name} in {old.path!r}" if old else "the end"
            raise PruneError(
                f"prune.channels: {where} does not see the channels that stay; the module has "
                "sizes or positions of its own that pruning cannot change"
            )


def _pads_nothing(node: Node, kept: Mapping[int, Array]) -> bool:
    if isinstance(node.op, Scatter):
        return False
    before, after = node.op.widths[-1]  # type: ignore[attr-defined]
    keep = kept.get(node.output.index)
    return keep is not None and not keep[:before].any() and not keep[len(keep) - after :].any()


def _labels(graph: Graph) -> dict[int, Array]:
    """A number for each channel of each value, the same wherever it is the same channel."""
    labels: dict[int, Array] = {}
    first = 0
    for group in graph.groups():
        for index, places in group.places.items():
            mine = labels.setdefault(index, np.full(len(places), -1))
            mine[places >= 0] = first + places[places >= 0]
        first += group.size
    return labels


def _agree(old: Node, new: Node, labels: Mapping[int, Array], kept: Mapping[int, Array]) -> bool:
    def stay(index: int, numbers: Array) -> Array:
        return numbers[kept[index]] if index in kept else numbers

    if len(stay(old.output.index, labels[old.output.index])) != new.output.channels:
        return False
    shapes = [v.shape for v in old.inputs]
    if old.op.rule(*shapes) not in ("stack", "spread"):
        return True
    if not all(v.index in labels for v in old.inputs):
        return True  # moves what is no data; nothing there was pruned
    before = moved(old.op, [labels[v.index] for v in old.inputs], shapes)
    after = moved(
        new.op,
        [stay(v.index, labels[v.index]) for v in old.inputs],
        [v.shape for v in new.inputs],
    )
    if before is None or after is None:
        return before is None and after is None
    return np.array_equal(stay(old.output.index, before), after)
