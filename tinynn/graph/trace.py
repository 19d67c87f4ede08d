"""Record the ops of one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy.typing as npt

from tinynn.errors import GraphError
from tinynn.graph.groups import Group, find_groups
from tinynn.graph.parts import Kind, Node, Value
from tinynn.graph.picture import draw
from tinynn.nn.module import Module, mode, running_module
from tinynn.op import Array, Op
from tinynn.tensor import Tensor, no_grad, recording


@dataclass(frozen=True)
class Graph:
    """The ops of one forward pass in order, and the values that enter and leave."""

    nodes: tuple[Node, ...]
    input: Value
    output: Value
    #: the arrays of parameters, buffers and constants by the index of their value: the model's own
    arrays: Mapping[int, Array] = field(default_factory=dict, repr=False, compare=False)

    def groups(self) -> list[Group]:
        """The channel groups in the order in which the network computes them: see `find_groups`."""
        return find_groups(self.nodes, self.input, self.output)

    def draw(self, path: str | Path) -> None:
        """Write a picture of the graph to `path`, SVG or PNG by its ending: see `picture.draw`."""
        draw(self.nodes, self.input, path)


def trace(model: Module, example: npt.ArrayLike | Tensor) -> Graph:
    """Run `model` in eval mode on `example` (a batch) and record its ops.

    Raises GraphError if the result is not one Tensor made from the example.
    """
    x = example if isinstance(example, Tensor) else Tensor(example)
    paths = {id(m): path for path, m in model.named_modules()}
    # By array, not by Tensor: `detach()` makes another Tensor of the same array.
    names: dict[int, tuple[Kind, str]] = {id(b): ("buffer", k) for k, b in model.named_buffers()}
    names |= {id(p._data): ("parameter", name) for name, p in model.named_parameters()}
    values: dict[int, Value] = {id(x._data): Value(0, "input", x.shape, x.dtype)}
    alive: list[Tensor] = [x]  # ids are only unique among living objects
    nodes: list[Node] = []

    def value(t: Tensor, kind: Kind) -> Value:
        key = id(t._data)
        if key not in values:
            alive.append(t)
            known, name = names.get(key, (kind, ""))
            values[key] = Value(len(values), known, t.shape, t.dtype, name)
        return values[key]

    def record(op: Op, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        operands = tuple(value(t, "constant") for t in inputs)
        module = running_module()
        path = paths.get(id(module), "")
        kind = type(module).kind() if module is not None else ""
        pads = module is not None and op.name in ("pad", "scatter")
        resizes = module.channel_padding if pads and module is not None else ()
        nodes.append(Node(op, operands, value(output, "result"), path, kind, resizes))

    with mode(model, training=False), no_grad(), recording(record):
        out = model(x)
    if not isinstance(out, Tensor) or id(out._data) not in values:
        raise GraphError(f"trace: required one Tensor made from the example; came {type(out)}")
    arrays = {values[id(t._data)].index: t._data for t in alive if not values[id(t._data)].is_data}
    return Graph(tuple(nodes), values[id(x._data)], values[id(out._data)], arrays)
