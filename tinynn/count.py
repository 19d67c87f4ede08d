"""What a model costs: parameters, arithmetic, bytes, and the memory of its activations.

One multiply-add (MAC) is two floating-point operations (FLOPs); both are given by name. As the
literature does, only products of weights with activations are counted: not biases, additions of
branches, pools, normalisation or nonlinearities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy.typing as npt

from tinynn.graph import Graph, Node, Value, trace
from tinynn.nn.module import Module, is_weight
from tinynn.op import Shape
from tinynn.ops.hashing import Hashed
from tinynn.tensor import Tensor


@dataclass
class LayerCount:
    """The costs of one run of one module: the ops that it applied one after the other."""

    path: str
    kind: str  #: the module's class
    ops: list[str] = field(default_factory=list)
    output: Shape = ()
    #: numbers in weights (see `is_weight`), or values of hashed ones, that no layer before has used
    weights: int = 0
    parameters: int = 0  #: numbers in all parameters, likewise
    buffers: int = 0  #: numbers in buffers (running statistics), likewise
    weight_bytes: int = 0  #: of parameters and buffers
    macs: int = 0  #: multiply-adds
    activation_bytes: int = 0  #: of everything that its ops make

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.macs


@dataclass(frozen=True)
class Count:
    """The costs of a model on a batch of the example's size; `print` shows them as a table."""

    layers: tuple[LayerCount, ...]
    #: numbers in weights, or that those are made of by hashing: no biases, no batch-norm affine, no
    #: learned scales
    weights: int
    trainable: int  #: numbers in parameters that are trained
    parameters: int  #: numbers in all parameters
    buffers: int  #: numbers in buffers: the running statistics of batch normalisation
    weight_bytes: int  #: of parameters and buffers
    macs: int  #: multiply-adds
    activation_bytes: int  #: of the input and of everything that the ops make, added up
    #: the most that are alive at once, run op by op: each until its last use, no op in place,
    #: without what kernels need inside
    peak_activation_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.macs

    @property
    def with_statistics(self) -> int:
        """Numbers in parameters and running statistics together, as Keras counts."""
        return self.parameters + self.buffers

    def __str__(self) -> str:
        head = ["layer", "module", "result", "parameters", "multiply-adds", "FLOPs"]
        head += ["weight bytes", "activation bytes"]
        rows = [
            [r.path, r.kind, "x".join(map(str, r.output)), *_numbers(r), f"{r.activation_bytes:,}"]
            for r in self.layers
        ]
        total = ["total", "", "", *_numbers(self), f"{self.activation_bytes:,}"]
        notes = [
            f"{self.parameters:,} parameters ({self.weights:,} weights, the rest biases and such), "
            f"{self.trainable:,} of them trained; {self.with_statistics:,} with running statistics",
            f"{self.macs:,} multiply-adds = {self.flops:,} FLOPs",
            f"at most {self.peak_activation_bytes:,} bytes of activations are alive at once",
        ]
        return "\n".join([*_table([head, *rows, total]), *notes])


def count(model: Module, example: npt.ArrayLike | Tensor) -> Count:
    """The costs of `model` in eval mode on a batch like `example`, layer by layer and in total."""
    graph = trace(model, example)
    weights = {name for name, p in model.named_parameters() if is_weight(p)} | _hashed(graph)
    layers = _layers(graph, weights)
    parameters = model.parameters()
    buffers = list({id(b): b for _, b in model.named_buffers()}.values())
    return Count(
        tuple(layers),
        weights=sum(p.size for name, p in model.named_parameters() if name in weights),
        trainable=sum(p.size for p in parameters if p.requires_grad),
        parameters=sum(p.size for p in parameters),
        buffers=sum(b.size for b in buffers),
        weight_bytes=sum(p.data.nbytes for p in parameters) + sum(b.nbytes for b in buffers),
        macs=sum(layer.macs for layer in layers),
        activation_bytes=graph.input.nbytes + sum(layer.activation_bytes for layer in layers),
        peak_activation_bytes=peak(graph),
    )


def macs(node: Node) -> int:
    """The multiply-adds of one op of a graph."""
    return node.op.macs(*(v.shape for v in node.inputs))


def peak(graph: Graph) -> int:
    """The most bytes of activations that are alive at once: see `Count.peak_activation_bytes`."""
    memory = _storage(graph)
    last = {memory[graph.input.index]: 0}
    for step, node in enumerate(graph.nodes):
        for v in (*node.inputs, node.output):
            if v.is_data:
                last[memory[v.index]] = step
    last[memory[graph.output.index]] = len(graph.nodes)
    size = {v.index: v.nbytes for v in (graph.input, *(n.output for n in graph.nodes))}
    alive, most = {memory[graph.input.index]}, size[memory[graph.input.index]]
    for step, node in enumerate(graph.nodes):
        alive.add(memory[node.output.index])
        most = max(most, sum(size[i] for i in alive))
        alive = {i for i in alive if last[i] > step}
    return most


def _layers(graph: Graph, weights: set[str]) -> list[LayerCount]:
    memory = _storage(graph)
    seen: set[int] = set()
    layers: list[LayerCount] = []
    for node in graph.nodes:
        if not layers or layers[-1].path != node.path:
            layers.append(LayerCount(node.path, node.module))
        layer = layers[-1]
        layer.ops.append(node.op.name)
        layer.output = node.output.shape
        layer.macs += macs(node)
        if memory[node.output.index] == node.output.index:
            layer.activation_bytes += node.output.nbytes
        for v in _new(node.inputs, seen):
            layer.weight_bytes += v.nbytes
            if v.kind == "parameter":
                layer.parameters += v.size
                layer.weights += v.size if v.name in weights else 0
            else:
                layer.buffers += v.size
    return layers


def _new(values: Iterable[Value], seen: set[int]) -> list[Value]:
    """The parameters and buffers among these that were not seen before."""
    found = [v for v in values if v.is_named and v.index not in seen]
    seen.update(v.index for v in found)
    return found


def _hashed(graph: Graph) -> set[str]:
    """The names of parameters that weights are made of by hashing."""
    return {n.inputs[0].name for n in graph.nodes if isinstance(n.op, Hashed)}


def _storage(graph: Graph) -> dict[int, int]:
    """For each value the one whose memory it uses: its own, unless a reshape looks at another."""
    memory = {graph.input.index: graph.input.index}
    for node in graph.nodes:
        source = memory.get(node.inputs[0].index)
        view = node.op.name == "reshape" and source is not None
        memory[node.output.index] = source if view and source is not None else node.output.index
    return memory


def _numbers(row: LayerCount | Count) -> list[str]:
    return [f"{n:,}" for n in (row.parameters, row.macs, row.flops, row.weight_bytes)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first three columns to the left, the others to the right, a rule above the last row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
