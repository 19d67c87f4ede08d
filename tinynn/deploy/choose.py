"""Which kernel runs each layer, and which layers run together.

By the caller's word, or by measuring on this machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kernels import program as programs
from kernels.prepack import Packed
from kernels.program import ARENA, NOWHERE, Program, Slot
from tinynn.deploy.join import join
from tinynn.deploy.kernels import KERNELS, expanded, rounded
from tinynn.deploy.layout import Network
from tinynn.deploy.separable import Separable
from tinynn.deploy.steps import Layer, Site
from tinynn.errors import ConfigError

MEASURE = "measure"
SEPARABLE = Separable.kind
_SECONDS = 0.002  # spent on a candidate, at least
_RUNS = 5
_LARGE = 1 << 20  # bytes between two layers from which on they may be faster as one
_WORTH = 0.95  # of the time of two layers: what one in their place may take


def choose_kernels(network: Network, choice: str | Mapping[str, str], images: int = 1) -> Network:
    """The network with a kernel for each layer.

    `choice`: "measure" takes the fastest of those that give the same but for rounding, for so many
    images at once; the name of a kernel takes it wherever it can run a layer; a mapping names one
    for the layers of some paths, and the others are dense. "float16" rounds weights to its format.
    "separable", of a pointwise layer, joins it with the depthwise one before it, see `join`.

    Raises ConfigError for unknown names and paths, and where a named kernel can run no such layer.
    """
    if not isinstance(choice, str | Mapping):
        raise ConfigError(f"compile: required {MEASURE!r}, a kernel or a mapping; came {choice!r}")
    if choice == MEASURE:
        fastest = _replaced(network, [_fastest(network, layer, images) for layer in network.layers])
        return join(fastest, lambda a, b, both: _together(network, a, b, both, images))
    if choice == SEPARABLE:
        joined = join(network, lambda *_: True)
        if len(joined.layers) == len(network.layers):
            raise ConfigError(f"compile: no layers of this network are {SEPARABLE}")
        return joined
    if isinstance(choice, str):
        layers = [_forced(layer, choice) for layer in network.layers]
        if choice != "dense" and all(layer.kernel != choice for layer in layers):
            raise ConfigError(
                f"compile: kernel {choice!r} can run no layer of this network; it needs "
                f"{KERNELS[choice].needs}"
            )
        return _replaced(network, layers)
    unknown = choice.keys() - {layer.path for layer in network.layers}
    if unknown:
        raise ConfigError(f"compile: no layer has the path {sorted(unknown)}")
    paths = {path for path, name in choice.items() if name == SEPARABLE}
    others = {path: name for path, name in choice.items() if name != SEPARABLE}
    named = _replaced(network, [_named(layer, others) for layer in network.layers])
    joined = join(named, lambda _, pointwise, __: pointwise.path in paths)
    missed = paths - {a.path for a in joined.layers if isinstance(a.step, Separable)}
    if missed:
        raise ConfigError(f"compile: {sorted(missed)} cannot be {SEPARABLE}")
    return joined


def _replaced(network: Network, layers: list[Layer]) -> Network:
    return Network(network.shapes, tuple(layers), network.output)


def _forced(layer: Layer, name: str) -> Layer:
    """The layer with this kernel if that can run it, else as it is."""
    if name not in KERNELS:
        known = sorted([*KERNELS, SEPARABLE])
        raise ConfigError(f"compile: required a kernel of {known}; came {name!r}")
    if name == "float16" and "weight" in layer.arrays and not layer.step.dtypes:
        layer = expanded(layer)
        arrays = {**layer.arrays, "weight": rounded(layer.arrays["weight"])}
        layer = replace(layer, arrays=arrays)
    return KERNELS[name].take(layer) or layer


def _named(layer: Layer, choice: Mapping[str, str]) -> Layer:
    name = choice.get(layer.path, "dense")
    out = _forced(layer, name)
    if out.kernel != name and layer.arrays:
        raise ConfigError(
            f"compile: kernel {name!r} cannot run {layer.path}: {layer.step}; it needs "
            f"{KERNELS[name].needs}"
        )
    return out


def _fastest(network: Network, layer: Layer, images: int) -> Layer:
    taken = (kernel.take(layer) for kernel in KERNELS.values())
    able = [candidate for candidate in taken if candidate is not None]
    if len(able) == 1:
        return able[0]
    return min(able, key=lambda candidate: _seconds(network, [candidate], images))


def _together(network: Network, first: Layer, second: Layer, both: Layer, images: int) -> bool:
    """Whether one layer in the place of two is clearly faster."""
    if 4 * math.prod(network.shapes[first.output]) < _LARGE:
        return False
    apart = _seconds(network, [first, second], images)
    return _seconds(network, [both], images) < _WORTH * apart


def _seconds(network: Network, layers: Sequence[Layer], images: int) -> float:
    """The median time of these layers alone on random numbers, on one thread."""
    program, end = Program(), 0
    slots: dict[int, Slot] = {}

    def room(nbytes: int) -> int:
        nonlocal end
        start, end = end, end + -(-nbytes // programs.ALIGNMENT) * programs.ALIGNMENT
        return start

    for v in {v for layer in layers for v in (*layer.inputs, layer.output)}:
        slot = Slot(ARENA, 0, (images, *network.shapes[v]), network.dtypes[v])
        slots[v] = slot._replace(offset=room(slot.nbytes))
    numbers = end // 4
    for layer in layers:
        kernel, inputs = KERNELS[layer.kernel], [slots[v] for v in layer.inputs]
        site = Site(program, Packed(), layer.arrays, inputs, slots[layer.output], None)
        size = kernel.scratch(layer, site)
        if size:
            scratch = Slot(ARENA, room(size), (size,), np.dtype(np.uint8))
            site = site._replace(scratch=scratch)
        kernel.emit(layer, site)
    arena = programs.aligned(1, end)
    random = np.random.default_rng(0).random(numbers, dtype=np.float32)
    arena[0, : 4 * numbers].view(np.float32)[:] = random
    bases = np.zeros(8, np.int64)
    bases[NOWHERE], bases[ARENA] = 0, arena.ctypes.data
    words = program.words()
    times: list[float] = []
    programs.execute(words, 1, program.calls, bases)
    begin = time.perf_counter()
    while len(times) < _RUNS or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        programs.execute(words, 1, program.calls, bases)
        times.append(time.perf_counter() - start)
    return float(np.median(times))
