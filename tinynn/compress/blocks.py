"""Residual blocks: which of them matter, a model without the others, branches made thinner alone.

A block here is an `nn.Add` of one `nn.Shortcut` and other parts, whatever its kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinynn.compress.exchange import exchange
from tinynn.compress.importance import Importance
from tinynn.compress.prune import Decision, decide, rebuilt
from tinynn.compress.select import Selection
from tinynn.errors import ConfigError, PruneError
from tinynn.graph import Graph, Group, Member, Node, Value
from tinynn.nn.blocks import Add, Scatter, Shortcut
from tinynn.nn.module import Module, Sequential
from tinynn.observe import Observer
from tinynn.ops import shape as moving
from tinynn.train import Loss, evaluate

# --- whole blocks ---------------------------------------------------------------------------------


def residual(model: Module) -> list[str]:
    """The dotted paths of the model's residual blocks, in the order of its parts."""
    return [path for path, m in model.named_modules() if path and _shortcut(m) is not None]


def drop(model: Module, paths: Collection[str]) -> Module:
    """A new model in which the shortcuts of these blocks stand alone.

    Where a block reduces the image or makes channels, its shortcut still does. Raises ConfigError
    for paths at which there is no residual block.
    """
    blocks = dict(model.named_modules())
    if wrong := sorted(set(paths) - set(residual(model))):
        raise ConfigError(f"blocks.drop: no residual blocks {wrong}; there are {residual(model)}")
    shortcuts = {path: _shortcut(blocks[path]) for path in paths}
    return exchange(model, {path: s.copy() for path, s in shortcuts.items() if s is not None})


def losses(model: Module, data: Iterable[Any], loss: Loss) -> dict[str, float]:
    """By how much the mean loss over `data` rises if a block alone is dropped, by its path.

    The lesions of Veit et al. 2016, "Residual networks behave like ensembles of relatively shallow
    networks", section 4.1. `data` are (x, y) batches.
    """
    batches = list(data)
    whole = evaluate(model, batches, loss)
    return {path: evaluate(drop(model, [path]), batches, loss) - whole for path in residual(model)}


def weakest(model: Module, data: Iterable[Any], loss: Loss, number: int) -> list[str]:
    """The paths of this many blocks, each the one that the model misses least without those before.

    Raises ConfigError if the model has fewer blocks.
    """
    found = residual(model)
    if not 0 <= number <= len(found):
        raise ConfigError(f"blocks.weakest: required 0 to {len(found)} blocks; came {number}")
    batches, paths = list(data), []
    for _ in range(number):
        rises = losses(model, batches, loss)
        paths.append(min(rises, key=lambda path: rises[path]))
        model = drop(model, paths[-1:])
    return paths


def _shortcut(module: Module) -> Shortcut | None:
    """The shortcut of a residual block; None for any other module."""
    if not isinstance(module, Add) or type(module).forward is not Add.forward:
        return None
    parts = [part for _, part in module.named_children()]
    found = [part for part in parts if type(part) is Shortcut]
    return found[0] if len(found) == 1 and len(parts) > 1 else None


# --- thinner branches -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tail:
    """The end of a branch: the layer that makes its channels, and what follows up to the sum."""

    block: str  #: the path of the Add
    part: str  #: the branch's name in it
    group: Group  #: the channels that the branch computes
    places: Sequence[int]  #: where they lie among the block's
    width: int  #: how many channels the block has


def thin(
    model: Module,
    seen: Observer,
    importance: Importance,
    select: Selection,
    *,
    only: Collection[str] | None = None,
    least: int = 1,
    report: Callable[[Decision], None] | None = None,
) -> Module:
    """A new model whose residual branches compute fewer channels and add zeros in place of others.

    Each branch is pruned by itself: the last layer with weights, and the batch norm or depthwise
    convolution behind it, lose the channels that `select` drops, and an `nn.Scatter` puts the rest
    at their places, so that the sum keeps its width and no other block has to agree. `prune` left
    this undone (Çallı 2017, section 4: zeros at the pruned indices); the channels inside a branch
    are groups of their own, for `prune.channels`.

    `importance` judges each branch by its own weights and result. A dropped channel adds zero from
    then on, whatever it was on the data. `only` names the blocks, by the path of their Add; without
    it those that cannot be thinned are left alone. Each branch keeps `least` channels. A branch
    that was thinned before is thinned further.

    Raises PruneError if `seen` was observed on another model, if a block that `only` names cannot
    be thinned, or if no block can.
    """
    seen.require(model, "blocks.thin")
    known = residual(model)
    if least < 1 or (only is not None and set(only) - set(known)):
        raise ConfigError(
            f"blocks.thin: required least >= 1 and blocks of {known}; came {least} and {only}"
        )
    found = [_tail(model, path, seen.graph) for path in (known if only is None else only)]
    tails = [tail for tail in found if isinstance(tail, _Tail)]
    reasons = [reason for reason in found if isinstance(reason, str)]
    if not tails or (only is not None and reasons):
        raise PruneError(f"blocks.thin: nothing to thin: {'; '.join(reasons) or 'no blocks'}")
    arrays = model.state_dict()
    decisions = [decide(t.group, importance, select, seen, arrays, least=least) for t in tails]
    for tail, decision in zip(tails, decisions, strict=True):
        if report:
            report(decision)
        for member in tail.group.writers:
            kept = np.compress(decision.keep, arrays[member.name], axis=member.axis)
            arrays[member.name] = np.ascontiguousarray(kept)
    out = rebuilt(model, arrays)
    modules = dict(out.named_modules())
    for tail, decision in zip(tails, decisions, strict=True):
        if not decision.keep.all():
            places = np.compress(decision.keep, tail.places).tolist()
            _scatter(modules[tail.block], tail.part, places, tail.width)
    return out


def _tail(model: Module, path: str, graph: Graph) -> _Tail | str:
    """The end of the block's branch, or why it cannot be thinned."""
    block = dict(model.named_modules())[path]
    sums = [node for node in graph.nodes if node.path == path and node.op.name == "add"]
    parts = list(block.named_children())
    if len(sums) != 1 or len(parts) != 2:
        return f"{path} is not two parts, added once"
    (number,) = (i for i, (_, part) in enumerate(parts) if type(part) is not Shortcut)
    return _follow(path, parts[number][0], sums[0].inputs[number], graph)


def _follow(path: str, part: str, value: Value, graph: Graph) -> _Tail | str:
    """From what is added back to the layer that makes it."""
    makers = {node.output.index: node for node in graph.nodes}
    uses = Counter(v.index for node in graph.nodes for v in node.inputs)
    uses[graph.output.index] += 1
    width, places = value.channels, list(range(value.channels))
    node = makers.get(value.index)
    if node is not None and isinstance(node.op, moving.Scatter) and uses[value.index] == 1:
        places, value = list(node.op.places), node.inputs[0]
    writers: list[Member] = []
    values: list[Value] = []
    while True:
        node = makers.get(value.index)
        rule = node and node.op.rule(*(v.shape for v in node.inputs))
        named = node.inputs[1:] if node else ()
        alone = all(uses[v.index] == 1 and v.is_named for v in named) and uses[value.index] == 1
        whole = rule == "mix" or (node and node.inputs[0].channels == value.channels)
        if node is None or rule not in ("mix", "same") or not alone or not whole:
            said = f"{node.op.name} in {node.path!r}" if node else "its input"
            return (
                f"the branch of {path} does not end in a layer of its own: {said} is shared, "
                "or does not keep channels apart"
            )
        writers = [*_members(node, len(places)), *writers]
        values = [value, *values]
        if rule == "mix":
            break
        value = node.inputs[0]
    spots = {v.index: np.arange(len(places)) for v in values}
    group = Group(len(places), values=values, writers=writers, places=spots)
    return _Tail(path, part, group, places, width)


def _members(node: Node, size: int) -> list[Member]:
    """The op's parameters and buffers, with the axis along which its channels lie."""
    found = []
    for i, v in enumerate(node.inputs[1:]):
        axis = node.op.weight_axis if i == 0 else None
        last = len(v.shape) - 1
        found.append(Member(v.name, last if axis is None else axis, np.arange(size)))
    return found


def _scatter(block: Module, part: str, places: Sequence[int], width: int) -> None:
    """Let the branch end in a Scatter, its old one if it has one."""
    branch = dict(block.named_children())[part]
    if not isinstance(branch, Sequential) or type(branch).forward is not Sequential.forward:
        branch = Sequential(branch)
        setattr(block, part, branch)
    last = branch[len(branch) - 1]
    if isinstance(last, Scatter):
        last.places, last.width = tuple(places), width
        return
    number = len(branch)
    while hasattr(branch, str(number)):
        number += 1
    setattr(branch, str(number), Scatter(places, width).train(branch.training))
