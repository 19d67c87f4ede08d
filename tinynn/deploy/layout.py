"""Where values lie: one arena, in which a value takes memory from the layer that makes it to the
last that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kernels.prepack import Packed
from kernels.program import ALIGNMENT, ARENA, INPUT, OUTPUT, Program, Slot
from tinynn.deploy import share
from tinynn.deploy.kernels import KERNELS
from tinynn.deploy.steps import BYTE, FLOAT, Concat, Layer, Pad, Reshape, Site
from tinynn.errors import ShapeError
from tinynn.op import Shape

_WORTH_SHARING = 256 * 1024  # multiply-adds
_LARGE = 4 << 20  # multiply-adds of a layer whose kernel can use threads of its own
_FEW_THREADS = 4  # among which rows of an image can be shared evenly


@dataclass(frozen=True)
class Network:
    """Layers in the order in which they run; value 0 is the input. Shapes leave out the batch."""

    shapes: tuple[Shape, ...]
    layers: tuple[Layer, ...]
    output: int

    @cached_property
    def dtypes(self) -> tuple[Any, ...]:
        """What each value consists of. Raises ShapeError where a layer cannot read its operands."""
        found: list[Any] = [FLOAT] * len(self.shapes)
        for layer in self.layers:
            found[layer.output] = layer.step.dtype([found[i] for i in layer.inputs])
        return tuple(found)

    @cached_property
    def macs(self) -> tuple[int, ...]:
        """Multiply-adds of each layer for one image."""
        return tuple(
            layer.step.macs(self.inputs(layer), layer.arrays, self.shapes[layer.output])
            for layer in self.layers
        )

    def shared(self, images: int, threads: int) -> bool:
        """Whether threads share each layer among them; else kernels use threads of their own."""
        if images * sum(self.macs) < _WORTH_SHARING:
            return False
        large = [a for a, n in zip(self.layers, self.macs, strict=True) if n >= _LARGE]
        few = images == 1 and threads <= _FEW_THREADS
        tasks = BYTE in self.dtypes or any(a.step.in_tasks for a in self.layers)
        return tasks or (few and all(share.can_share(a, self.inputs(a)) for a in large))

    def inputs(self, layer: Layer) -> list[Shape]:
        """The shapes of a layer's operands."""
        return [self.shapes[i] for i in layer.inputs]


class Homes:
    """Which values share memory, and until which layer each piece is needed."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.home = list(range(len(network.shapes)))
        for i, layer in enumerate(network.layers):
            operand = self._taken_over(i, layer)
            if operand is not None:
                self.home[layer.output] = self.home[operand]
        self.last = [-1] * len(self.home)
        for i, layer in enumerate(network.layers):
            for value in (*layer.inputs, layer.output):
                self.last[self.home[value]] = i
        self.last[self.home[network.output]] = len(network.layers)

    def _taken_over(self, place: int, layer: Layer) -> int | None:
        """The operand in whose memory the result will lie, if any."""
        if isinstance(layer.step, Reshape):
            return layer.inputs[0]
        if layer.step.onto_operand:
            return layer.inputs[-1]
        first = layer.inputs[0]
        mine = self.home[first]
        if not layer.step.in_place or mine == 0 or mine == self.home[self._network.output]:
            return None
        others = [v for a in self._network.layers[place + 1 :] for v in a.inputs]
        others += layer.inputs[1:]
        # Whatever shares this memory so far was made before this layer.
        return None if any(self.home[v] == mine for v in others) else first


def network(shapes: Sequence[Shape], layers: Sequence[Layer], output: int) -> Network:
    """The network, with a copy at its end if nothing would compute its output otherwise."""
    whole = Network(tuple(shapes), tuple(layers), output)
    if whole.dtypes[output] != FLOAT:
        raise ShapeError(f"required a result of {FLOAT}; came {whole.dtypes[output]}")
    for i, layer in enumerate(layers):
        _check_onto(whole, i, layer)
    if Homes(whole).home[output] != 0:
        return whole
    shape = whole.shapes[output]
    copy = Concat(len(shape) - 1) if shape else Pad(())
    last = Layer(copy, (output,), len(shapes), {})
    return Network((*whole.shapes, shape), (*whole.layers, last), len(shapes))


def _check_onto(network: Network, place: int, layer: Layer) -> None:
    """Raise ShapeError if a layer would write over what is still needed."""
    if not layer.step.onto_operand:
        return
    target = aliases(network.layers, layer.inputs[-1])
    later = {network.output}.union(*(a.inputs for a in network.layers[place + 1 :]))
    if target & {0, layer.inputs[0], *later}:
        raise ShapeError(f"{layer.step}: required an operand to add to that nothing else reads")


def aliases(layers: Sequence[Layer], value: int) -> set[int]:
    """The values that lie where `value` does: a reshape only looks at it in another way."""
    same, size = {value}, 0
    while len(same) > size:
        size = len(same)
        for layer in layers:
            if isinstance(layer.step, Reshape) and same & {layer.inputs[0], layer.output}:
                same |= {layer.inputs[0], layer.output}
    return same


@dataclass(frozen=True)
class Laid:
    """A network laid out for some images at once."""

    words: np.ndarray  #: of its program
    program: Program  #: which keeps the tables and weights that the words have the addresses of
    places: tuple[tuple[int, int], ...]  #: of each layer: the word of its first call, and how many
    arena: int  #: bytes
    team: int  #: threads that run it together


def lay_out(network: Network, packed: Sequence[Packed], images: int, threads: int) -> Laid:
    """The program of the network for so many images, to be run by so many threads."""
    team = threads if network.shared(images, threads) else 1
    program, places = Program(threads > 1 and team == 1, team), []
    sites, size = _sites(network, packed, images, program)
    for layer, site in zip(network.layers, sites, strict=True):
        at, calls = len(program), program.calls
        share.emit(layer, site)
        places.append((at, program.calls - calls))
    return Laid(program.words(), program, tuple(places), size, team)


def arena_bytes(network: Network, packed: Sequence[Packed], images: int) -> int:
    """The bytes of the arena for so many images."""
    return _sites(network, packed, images, Program())[1]


def _sites(
    network: Network, packed: Sequence[Packed], images: int, program: Program
) -> tuple[list[Site], int]:
    """Where each layer finds its operands, result and scratch; and the bytes of the arena."""
    homes = Homes(network)
    kinds = zip(network.shapes, network.dtypes, strict=True)
    slots = [Slot(ARENA, 0, (images, *shape), dtype) for shape, dtype in kinds]
    origins = {0: (INPUT, 0), homes.home[network.output]: (OUTPUT, 0)}
    space, sites = _Space(), []
    for i, layer in enumerate(network.layers):
        home = homes.home[layer.output]
        if home not in origins:
            origins[home] = (ARENA, space.take(slots[home].nbytes))
        for v in (*layer.inputs, layer.output):
            base, offset = origins[homes.home[v]]
            slots[v] = slots[v]._replace(base=base, offset=offset)
        site = Site(
            program,
            packed[i],
            layer.arrays,
            [slots[v] for v in layer.inputs],
            slots[layer.output],
            None,
        )
        count = KERNELS[layer.kernel].scratch(layer, site)
        if count:
            at = space.take(count)
            site = site._replace(scratch=Slot(ARENA, at, (count,), np.dtype(np.uint8)))
            space.free(at)
        sites.append(site)
        for v in {homes.home[v] for v in (*layer.inputs, layer.output)}:
            if homes.last[v] == i and origins[v][0] == ARENA:
                space.free(origins[v][1])
    return sites, space.size


class _Space:
    """Bytes given out first fit: the lowest gap that is large enough."""

    def __init__(self) -> None:
        self.size = 0
        self._taken: dict[int, int] = {}  # by offset, the end

    def take(self, nbytes: int) -> int:
        need = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        at = 0
        for start in sorted(self._taken):
            if start - at >= need:
                break
            at = max(at, self._taken[start])
        self._taken[at] = at + need
        self.size = max(self.size, at + need)
        return at

    def free(self, at: int) -> None:
        del self._taken[at]
