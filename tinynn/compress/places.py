"""Where the grids of a model of fixed ranges lie: which values need one, and which modules give it.

What integer kernels read must lie on a grid. Going back from there through ops that only move
numbers one comes to the op that made them; the module that ran it rounds its result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from tinynn.compress.exchange import require_weights
from tinynn.compress.integers import keeps_grid
from tinynn.errors import ConfigError
from tinynn.graph import Graph, Node, Value
from tinynn.nn.module import Module

#: ops with weights that integer kernels run
_WEIGHTED = ("conv2d", "depthwise_conv2d", "conv_transpose2d", "linear", "scale_shift")
#: ops without weights that integer kernels run
_JOINING = ("add", "avg_pool2d", "concat")
#: ops with weights whose layers stay floating: no integer kernel runs them
_FLOATING = ("additive", "additive_conv2d")


@dataclass
class Place:
    """One grid: whose range it has and where it stands."""

    values: list[Value] = field(default_factory=list)  #: whose numbers it has to cover
    outputs: list[str] = field(default_factory=list)  #: paths of modules that round their result
    inputs: list[str] = field(default_factory=list)  #: paths of layers that round their input
    layers: list[str] = field(default_factory=list)  #: paths of layers that read it
    is_input: bool = False  #: whether it is that of the model's input


def weighted(graph: Graph, model: Module) -> dict[str, Node]:
    """The first op of each layer with weights, by the layer's path, as the network computes them.

    Layers of the ef-operator are left out. Raises ConfigError naming an op whose weights no layer
    with `using` holds, or hashed layers, or if there are no layers.
    """
    require_weights(model, "quantize")
    modules = dict(model.named_modules())
    floating = _floating(graph)
    found: dict[str, Node] = {}
    for node in graph.nodes:
        has_weights = len(node.inputs) > 1 and not node.inputs[1].is_data
        rounded = node.op.channels == "mix" or node.op.name in _WEIGHTED
        if not has_weights or not rounded or node.output.index in floating:
            continue
        own = f"{node.path}.weight" if node.path else "weight"
        if not hasattr(modules.get(node.path), "using") or node.inputs[1].name != own:
            raise ConfigError(
                f"quantize: {node.path or 'the model'!r} ({node.module}) runs {node.op.name} with "
                f"{node.inputs[1].name or 'an array'!r} as weights: required those of a layer that "
                "runs with others, too (one with `using`), such as nn.Linear or nn.Conv2d. Hold "
                "them in such a layer, or quantise the model around it alone"
            )
        found.setdefault(node.path, node)
    if not found:
        raise ConfigError(
            "quantize: required a model with weights that are multiplied; came "
            + ("layers of the ef-operator only, which stay floating" if floating else "one without")
        )
    return found


def _floating(graph: Graph) -> set[int]:
    """The values made by layers that stay floating: their ops, and the scales right behind."""
    found: dict[int, str] = {}
    for node in graph.nodes:
        behind = node.op.name == "scale_shift" and found.get(node.inputs[0].index) == node.path
        if node.op.name in _FLOATING or behind:
            found[node.output.index] = node.path
    return set(found)


def places(graph: Graph, model: Module) -> list[Place]:
    """The grids that a model needs, in the order in which it computes their values.

    Values that are concatenated share one, and so do those that one module makes.
    """
    return _Places(graph, model).find()


class _Places:
    def __init__(self, graph: Graph, model: Module) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.layers, self.floating = weighted(graph, model), _floating(graph)
        self.made_by = {n.output.index: n for n in graph.nodes}
        self.readers: dict[int, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for v in node.inputs:
                self.readers[v.index].append(node)
        self.parent: dict[int, int] = {}

    def find(self) -> list[Place]:
        needed: dict[int, Value] = {}
        read_by: dict[int, list[str]] = defaultdict(list)
        for node in self.graph.nodes:
            if not _is_integer(node) or node.output.index in self.floating:
                continue
            for v in node.inputs[:1] if node.path in self.layers else node.inputs:
                if v.is_data:
                    made = source(v, self.made_by)
                    needed[made.index] = made
                    if node.path in self.layers:
                        read_by[made.index].append(node.path)
        for node in self.graph.nodes:
            if node.op.name == "concat":
                for v in node.inputs:
                    self._tie(node.output.index, source(v, self.made_by).index)
        slots = {i: self._slots(v, read_by[i]) for i, v in needed.items()}
        first: dict[tuple[str, str], int] = {}
        for i, (outputs, inputs) in slots.items():
            for key in (*(("output", p) for p in outputs), *(("input", p) for p in inputs)):
                self._tie(first.setdefault(key, i), i)
        found: dict[int, Place] = defaultdict(Place)
        for i in sorted(needed):
            outputs, inputs = slots[i]
            is_input = i == self.graph.input.index
            if not (outputs or inputs or is_input):
                continue
            place = found[self._root(i)]
            place.values.append(self._rectified(needed[i]))
            _extend(place.outputs, outputs)
            _extend(place.inputs, inputs)
            _extend(place.layers, read_by[i])
            place.is_input |= is_input
        return list(found.values())

    def _slots(self, value: Value, read_by: list[str]) -> tuple[list[str], list[str]]:
        """The paths of the module that rounds it as its result, or of those that do as input."""
        node = self.made_by.get(value.index)
        if node is None:
            return [], []  # the model's input
        readers = self.readers[value.index]
        inside = bool(readers) and all(n.path == node.path for n in readers)
        module = self.modules.get(node.path)
        # what a module of another's own returns is not known: perhaps it goes on computing
        ours = module is not None and "." not in type(module).kind()
        if inside and ours:
            return [], []  # a sum of three: the first two
        return ([node.path], []) if ours or hasattr(module, "using") else ([], read_by)

    def _rectified(self, value: Value) -> Value:
        """What of it is rounded: its ReLU where nothing else reads it."""
        readers = self.readers[value.index]
        only = readers[0] if len(readers) == 1 else None
        return only.output if only is not None and only.op.name == "relu" else value

    def _root(self, i: int) -> int:
        while i in self.parent:
            i = self.parent[i]
        return i

    def _tie(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)


def source(value: Value, made_by: Mapping[int, Node]) -> Value:
    """The value whose numbers this one consists of: back through ops that only move them."""
    while (node := made_by.get(value.index)) is not None and keeps_grid(node):
        if node.op.name == "concat":
            break
        value = node.inputs[0]
    return value


def _is_integer(node: Node) -> bool:
    whole = node.op.name == "sum" and node.module == "GlobalAvgPool2d"
    return whole or node.op.name in (*_WEIGHTED, *_JOINING)


def _extend(paths: list[str], more: list[str]) -> None:
    paths.extend(p for p in more if p not in paths)
