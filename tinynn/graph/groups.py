"""Which channels live and die together.

Every value's channels (its last axis) have numbers. An op carries the numbers of its operands over
to its result by its channel rule: `mix` makes new ones, `same` keeps them, `tie` makes those of its
operands one, `stack` puts them side by side, `spread` repeats them. Whatever axis of a parameter or
buffer the op applies to a value's channels has the same numbers. What bears one number is removed
together, or not at all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tinynn.graph.parts import Node, Value
from tinynn.op import Array, Op
from tinynn.ops.shape import Pad, Scatter


@dataclass(frozen=True)
class Member:
    """One axis of one parameter or buffer with channels of a group along it."""

    name: str  #: dotted path of the parameter or buffer
    axis: int
    #: for each position of the axis the number of the group's channel there, or -1 for none
    index: Array = field(compare=False, repr=False)


@dataclass(frozen=True)
class Reader:
    """A `mix` op that takes the channels in: its weights' axis, what it reads, and its bias."""

    weight: Member
    value: Value
    bias: str | None
    node: Node


@dataclass
class Group:
    """Channels that occur in the same values and parameters, each removable on its own.

    `writers` make the channels or follow them (biases, batch normalisation, depthwise weights),
    `readers` consume them; `places` says for each value, by its index, which channel of the group
    lies at each position of its last axis (-1: none of the group). `fixed` says why the group
    cannot be pruned, or is empty.
    """

    size: int
    values: list[Value] = field(default_factory=list)
    writers: list[Member] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    places: dict[int, Array] = field(default_factory=dict)
    fixed: str = ""

    @property
    def name(self) -> str:
        """The path of the layer that makes the channels, or of a parameter outside any layer.

        Where that layer's channels lie in several groups, with the first of its channels.
        """
        if not self.writers:
            return "input" if self.values[0].kind == "input" else f"value {self.values[0].index}"
        first = self.writers[0]
        path = first.name.rpartition(".")[0] or first.name
        whole = (first.index >= 0).all()
        return path if whole else f"{path}[{int(np.argmax(first.index >= 0))}:]"

    @property
    def members(self) -> list[Member]:
        """Every axis of a parameter or buffer that the channels index."""
        return [*self.writers, *(r.weight for r in self.readers)]


def find_groups(nodes: Sequence[Node], source: Value, result: Value) -> list[Group]:
    """The channel groups of these nodes in the order in which the network computes them.

    A group is marked `fixed` with the reason if it touches the model's input or output, an op
    without a rule, an array that is neither parameter nor buffer, or one of those that is used more
    than once (then other channels may depend on it), channels that a module pads with widths of
    its own, or if nothing reads it.
    """
    return _Grouping(nodes, source, result).groups()


def moved(op: Op, channels: Sequence[Array], shapes: Sequence[tuple[int, ...]]) -> Array | None:
    """Where an op that only moves elements puts channels, or None if not along the last axis.

    `channels` are numbers >= 0 for each operand's last axis; the result has the numbers of the
    operation's result, -1 where the channel is new (padded).
    """
    if isinstance(op, Pad | Scatter):
        op = replace(op, value=-1.0)
    full = [  # as floats, which every kernel takes; they hold whole numbers exactly
        np.ascontiguousarray(np.broadcast_to(n, shape), np.float64)
        for n, shape in zip(channels, shapes, strict=True)
    ]
    out = op.forward(*full)[0].astype(np.int64)
    if not out.ndim:
        return None
    rows = out.reshape(-1, out.shape[-1])
    top = rows.max(axis=0)
    return top if ((rows == top) | (rows == -1)).all() else None


class _Grouping:
    """Numbers every channel of every value, with a union-find over the numbers."""

    def __init__(self, nodes: Sequence[Node], source: Value, result: Value) -> None:
        self.nodes = nodes
        self.parent: list[int] = []
        self.numbers: dict[int, Array] = {}  #: of each value's channels, by the value's index
        self.values: dict[int, Value] = {}
        self.fixed: dict[int, str] = {}
        self.writers: list[tuple[str, int, Array]] = []  #: name, axis, numbers along it
        self.readers: list[tuple[Node, Array]] = []
        self.padded: list[tuple[Node, Array]] = []  #: ops that pad channels, and the new ones
        self.fix(source, "it is the model's input")
        for node in nodes:
            self.visit(node)
        self.fix(result, "it is the model's output")

    def visit(self, node: Node) -> None:
        rule = node.op.rule(*(v.shape for v in node.inputs))
        if rule == "mix":
            self.mix(node)
        elif rule in ("same", "tie"):
            self.join(node)
        elif rule in ("stack", "spread"):
            self.move(node)
        else:
            self.fix_all(node, f"op {node.op.name} has no channel rule that pruning can follow")

    def mix(self, node: Node) -> None:
        data, weight, *bias = node.inputs
        fits = len(weight.shape) > 1 and weight.shape[-2] == data.channels
        if weight.kind != "parameter" or not data.is_data or not fits:
            self.fix_all(node, f"op {node.op.name} multiplies other than data with a parameter")
            return
        last = len(weight.shape) - 1
        self.readers.append((node, self.of(data)))
        made = self.of(node.output)
        self.writers.append((weight.name, last, made))
        if bias and bias[0].kind == "parameter":
            self.writers.append((bias[0].name, 0, made))
        elif bias:
            self.fix_all(node, f"op {node.op.name} adds a bias that is no parameter", bias)

    def join(self, node: Node) -> None:
        """Result and operands have the same channels, each of them several times if multiplied."""
        n, axis, tied = node.output.channels, node.op.weight_axis, None
        for v in node.inputs:
            if not v.is_data:
                continue
            own = self.of(v)
            if axis is not None and v is node.inputs[0]:
                own = np.repeat(own, n // v.channels)
            if len(own) != n:
                self.fix(v, f"op {node.op.name} broadcasts its channels")
                continue
            tied = own if tied is None else tied
            self.unite(tied, own)
        numbers = self.of(node.output, tied)
        for i, v in enumerate(node.inputs):
            if v.is_named and i == 1 and axis is not None:
                self.writers.append((v.name, axis, self.of(node.inputs[0])))
            elif v.is_named and v.shape and v.channels == n:
                self.writers.append((v.name, len(v.shape) - 1, numbers))
            elif v.kind == "constant" and v.channels != 1:
                self.fix(node.output, f"op {node.op.name} combines it with a constant array")

    def move(self, node: Node) -> None:
        if not all(v.is_data and v.shape for v in node.inputs):
            self.fix_all(node, f"op {node.op.name} moves other than data")
            return
        shapes = [v.shape for v in node.inputs]
        numbers = moved(node.op, [self.of(v) for v in node.inputs], shapes)
        if numbers is None:
            self.fix_all(node, f"op {node.op.name} moves its channels to another axis")
            return
        new = numbers == -1
        numbers[new] = self.fresh(int(new.sum()))
        self.of(node.output, numbers)
        if new.any():
            self.padded.append((node, numbers[new]))

    def groups(self) -> list[Group]:
        self.fix_shared()
        roots = {i: self.roots(numbers) for i, numbers in self.numbers.items()}
        reasons: dict[int, str] = {}
        for number, reason in self.fixed.items():
            reasons.setdefault(self.find(number), reason)
        read = {int(r) for _, numbers in self.readers for r in self.roots(numbers)}
        where: dict[int, list[tuple[int, int]]] = defaultdict(list)  # root: value, how many times
        for i in sorted(roots):
            for root, times in zip(*np.unique(roots[i], return_counts=True), strict=True):
                where[int(root)].append((i, int(times)))
        groups: list[Group] = []
        found: dict[tuple[object, ...], int] = {}
        place = np.full(len(self.parent), -1)  # of each root, the channel's number in its group
        member = np.full(len(self.parent), -1)  # and its group's number
        for root in (int(r) for i in sorted(roots) for r in roots[i]):
            if place[root] < 0:
                reason = reasons.get(root, "" if root in read else "nothing reads it")
                number = found.setdefault((*where[root], reason), len(groups))
                if number == len(groups):
                    groups.append(Group(0, fixed=reason))
                place[root], member[root] = groups[number].size, number
                groups[number].size += 1
        for i in self.values:
            for number in np.unique(member[roots[i]]):
                group = groups[int(number)]
                group.values.append(self.values[i])
                group.places[i] = _places(roots[i], place, member, int(number))
        for name, axis, numbers in self.writers:
            own = self.roots(numbers)
            for number in np.unique(member[own]):
                index = _places(own, place, member, int(number))
                groups[int(number)].writers.append(Member(name, axis, index))
        for node, numbers in self.readers:
            own = self.roots(numbers)
            data, weight, *bias = node.inputs
            named = bias[0].name if bias and bias[0].kind == "parameter" else None
            for number in np.unique(member[own]):
                index = _places(own, place, member, int(number))
                taken = Member(weight.name, len(weight.shape) - 2, index)
                groups[int(number)].readers.append(Reader(taken, data, named, node))
        return groups

    def fix_shared(self) -> None:
        """Fix what depends on a parameter or buffer that is used more than once."""
        uses = Counter(v.name for node in self.nodes for v in node.inputs if v.is_named)
        taken = [(node.inputs[1].name, numbers) for node, numbers in self.readers]
        for name, numbers in [*((n, numbers) for n, _, numbers in self.writers), *taken]:
            if uses[name] > 1:
                reason = f"its parameter {name} is used more than once"
                self.fix_numbers(numbers, reason)
        paths = Counter(node.path for node, _ in self.padded)
        for node, numbers in self.padded:
            if not node.resizes:
                reason = f"{node.module or 'the model'} pads it by widths that it does not declare"
                self.fix_numbers(numbers, reason)
            elif paths[node.path] > 1:
                self.fix_numbers(numbers, f"its padding in {node.path!r} is used more than once")

    def of(self, value: Value, numbers: Array | None = None) -> Array:
        """The numbers of a value's channels: those it has, those given, or new ones."""
        if value.index not in self.numbers:
            self.values[value.index] = value
            self.numbers[value.index] = self.fresh(value.channels) if numbers is None else numbers
        return self.numbers[value.index]

    def fresh(self, count: int) -> Array:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def unite(self, one: Array, other: Array) -> None:
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            a, b = self.find(a), self.find(b)
            self.parent[max(a, b)] = min(a, b)

    def find(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def roots(self, numbers: Array) -> Array:
        return np.array([self.find(n) for n in numbers.tolist()], np.int64)

    def fix(self, value: Value, reason: str) -> None:
        self.fix_numbers(self.of(value), reason)

    def fix_numbers(self, numbers: Array, reason: str) -> None:
        for number in numbers.tolist():
            self.fixed.setdefault(number, reason)

    def fix_all(self, node: Node, reason: str, operands: Iterable[Value] | None = None) -> None:
        """Fix the node's result and those of its operands (all by default) that are data."""
        for v in node.inputs if operands is None else operands:
            if v.is_data:
                self.fix(v, reason)
        self.fix(node.output, reason)


def _places(roots: Array, place: Array, member: Array, group: int) -> Array:
    return np.where(member[roots] == group, place[roots], -1)
