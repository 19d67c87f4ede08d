"""The graph of a model: run it once, record every op, and see which channels belong together.

Whatever must see a whole model reads this: observing, pruning, and later counting, drawing,
the inference plan and export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy.typing as npt

from tinynn.errors import GraphError
from tinynn.nn.module import Module, running_module
from tinynn.op import Op, Shape
from tinynn.tensor import Tensor, no_grad, recording

Kind = Literal["input", "parameter", "constant", "result"]


@dataclass(frozen=True)
class Value:
    """An array in the graph: where it comes from and its shape (channels are the last axis)."""

    index: int
    kind: Kind
    shape: Shape
    name: str = ""  #: dotted path of a parameter

    @property
    def channels(self) -> int:
        """The length of the last axis; 1 for a value without axes."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class Node:
    """One op application: `output = op(*inputs)`, made while the module at `path` was running."""

    op: Op
    inputs: tuple[Value, ...]
    output: Value
    path: str


@dataclass(frozen=True)
class Member:
    """One axis of one parameter whose entries are the channels of a group."""

    name: str  #: dotted path of the parameter
    axis: int


@dataclass(frozen=True)
class Reader:
    """A `mix` op that takes the channels in: its weights' axis, what it reads, and its bias."""

    weight: Member
    value: Value
    bias: str | None


@dataclass
class Group:
    """Channels that live and die together: all values and parameter axes that index them.

    `writers` make the channels, `readers` consume them; `fixed` says why the group cannot be
    pruned, or is empty.
    """

    size: int
    values: list[Value] = field(default_factory=list)
    writers: list[Member] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    fixed: str = ""

    @property
    def name(self) -> str:
        """The path of the layer that makes the channels, or of a parameter outside any layer."""
        if not self.writers:
            return "input"
        path = self.writers[0].name
        return path.rpartition(".")[0] or path

    @property
    def members(self) -> list[Member]:
        """Every parameter axis that indexes the channels."""
        return [*self.writers, *(r.weight for r in self.readers)]


@dataclass(frozen=True)
class Graph:
    """The ops of one forward pass in order, and the values that enter and leave."""

    nodes: tuple[Node, ...]
    input: Value
    output: Value

    def groups(self) -> list[Group]:
        """The channel groups in the order in which the network computes them.

        Ops join values by their channel rule: `same` and `tie` join result and operands, `mix`
        separates them. A group is marked `fixed` with the reason if it touches the model's input
        or output, an op without a rule, an array that is no parameter, or a parameter that is used
        more than once (then other channels may depend on it), or if nothing reads it.
        """
        return _Grouping(self).groups()


def trace(model: Module, example: npt.ArrayLike | Tensor) -> Graph:
    """Run `model` in eval mode on `example` (a batch) and record its ops.

    Raises GraphError if the result is not one Tensor made from the example.
    """
    x = example if isinstance(example, Tensor) else Tensor(example)
    paths = {id(m): path for path, m in model.named_modules()}
    # By array, not by Tensor: `detach()` makes another Tensor of the same array.
    names = {id(p._data): name for name, p in model.named_parameters()}
    values: dict[int, Value] = {id(x._data): Value(0, "input", x.shape)}
    alive: list[Tensor] = [x]  # ids are only unique among living objects
    nodes: list[Node] = []

    def value(t: Tensor, kind: Kind) -> Value:
        key = id(t._data)
        if key not in values:
            alive.append(t)
            name = names.get(key, "")
            values[key] = Value(len(values), "parameter" if name else kind, t.shape, name)
        return values[key]

    def record(op: Op, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        operands = tuple(value(t, "constant") for t in inputs)
        path = paths.get(id(running_module()), "")
        nodes.append(Node(op, operands, value(output, "result"), path))

    modes = [(m, m.training) for _, m in model.named_modules()]
    model.eval()
    try:
        with no_grad(), recording(record):
            out = model(x)
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(out, Tensor) or id(out._data) not in values:
        raise GraphError(f"trace: required one Tensor made from the example; came {type(out)}")
    return Graph(tuple(nodes), values[id(x._data)], values[id(out._data)])


class _Grouping:
    """Union-find over the values of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.parent: dict[int, int] = {}
        self.values: dict[int, Value] = {}
        self.fixed: dict[int, str] = {}
        self.writers: list[tuple[Value, Member]] = []
        self.readers: list[Reader] = []

    def groups(self) -> list[Group]:
        self.fix(self.graph.input, "it is the model's input")
        for node in self.graph.nodes:
            self.visit(node)
        self.fix(self.graph.output, "it is the model's output")
        found: dict[int, Group] = {}
        for index, value in self.values.items():
            root = self.find(index)
            group = found.setdefault(root, Group(value.channels))
            group.values.append(value)
            group.fixed = group.fixed or self.fixed.get(index, "")
        for value, member in self.writers:
            found[self.find(value.index)].writers.append(member)
        for reader in self.readers:
            found[self.find(reader.value.index)].readers.append(reader)
        uses = Counter(v.name for node in self.graph.nodes for v in node.inputs)
        for group in found.values():
            shared = [m.name for m in group.members if uses[m.name] > 1]
            if not group.fixed and shared:
                group.fixed = f"its parameter {shared[0]} is used more than once"
            elif not group.fixed and not group.readers:
                group.fixed = "nothing reads it"
        return list(found.values())

    def visit(self, node: Node) -> None:
        if node.op.channels == "mix":
            self.mix(node)
        elif node.op.channels in ("same", "tie"):
            for v in node.inputs:
                self.join(node, v)
        else:
            self.fix_all(node, f"op {node.op.name} has no channel rule that pruning can follow")

    def mix(self, node: Node) -> None:
        data, weight, *bias = node.inputs
        if weight.kind != "parameter" or data.kind not in ("input", "result"):
            self.fix_all(node, f"op {node.op.name} multiplies other than data with a parameter")
            return
        self.add(data)
        self.add(node.output)
        last = len(weight.shape) - 1
        named = bias[0].name if bias and bias[0].kind == "parameter" else None
        self.readers.append(Reader(Member(weight.name, last - 1), data, named))
        self.writers.append((node.output, Member(weight.name, last)))
        if named:
            self.writers.append((node.output, Member(named, 0)))
        elif bias:
            self.fix_all(node, f"op {node.op.name} adds a bias that is no parameter", bias)

    def join(self, node: Node, operand: Value) -> None:
        self.add(node.output)
        channels = node.output.channels
        if operand.kind == "parameter" and operand.shape and operand.channels == channels:
            self.writers.append((node.output, Member(operand.name, len(operand.shape) - 1)))
        elif operand.kind == "constant" and operand.channels != 1:
            self.fix(node.output, f"op {node.op.name} combines it with a constant array")
        elif operand.kind in ("input", "result"):
            self.add(operand)
            if operand.channels != channels:
                self.fix(operand, f"op {node.op.name} broadcasts its channels")
            self.parent[self.find(node.output.index)] = self.find(operand.index)

    def fix_all(self, node: Node, reason: str, operands: Iterable[Value] | None = None) -> None:
        """Fix the node's result and those of its operands (all by default) that are data."""
        for v in node.inputs if operands is None else operands:
            if v.kind in ("input", "result"):
                self.fix(v, reason)
        self.fix(node.output, reason)

    def add(self, value: Value) -> None:
        self.values.setdefault(value.index, value)
        self.parent.setdefault(value.index, value.index)

    def fix(self, value: Value, reason: str) -> None:
        self.add(value)
        self.fixed.setdefault(value.index, reason)

    def find(self, index: int) -> int:
        while self.parent[index] != index:
            index = self.parent[index]
        return index
