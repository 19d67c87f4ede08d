"""Which kernel runs each layer: by the caller's word, or by measuring on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kernels import program as programs
from kernels.prepack import Packed
from kernels.program import ARENA, NOWHERE, Program, Slot
from tinynn.deploy.kernels import KERNELS, rounded
from tinynn.deploy.layout import Network
from tinynn.deploy.steps import Layer, Site
from tinynn.errors import ConfigError

MEASURE = "measure"
_SECONDS = 0.002  # spent on a candidate, at least
_RUNS = 5


def choose_kernels(network: Network, choice: str | Mapping[str, str], images: int) -> Network:
    """The network with a kernel for each layer.

    `choice`: "measure" takes the fastest of those that give the same but for rounding, for so many
    images at once; the name of a kernel takes it wherever it can run a layer; a mapping names one
    for the layers of some paths, and the others are dense. "float16" rounds weights to its format.

    Raises ConfigError for unknown names and paths, and where a named kernel can run no such layer.
    """
    if choice == MEASURE:
        return _replaced(network, [_fastest(network, layer, images) for layer in network.layers])
    if isinstance(choice, str):
        layers = [_forced(layer, choice) for layer in network.layers]
        if choice != "dense" and all(layer.kernel != choice for layer in layers):
            raise ConfigError(f"compile: kernel {choice!r} can run no layer of this network")
        return _replaced(network, layers)
    unknown = choice.keys() - {layer.path for layer in network.layers}
    if unknown:
        raise ConfigError(f"compile: no layer has the path {sorted(unknown)}")
    return _replaced(network, [_named(layer, choice) for layer in network.layers])


def _replaced(network: Network, layers: list[Layer]) -> Network:
    return Network(network.shapes, tuple(layers), network.output)


def _forced(layer: Layer, name: str) -> Layer:
    """The layer with this kernel if that can run it, else as it is."""
    if name not in KERNELS:
        raise ConfigError(f"compile: required a kernel of {sorted(KERNELS)}; came {name!r}")
    if name == "float16" and "weight" in layer.arrays and not layer.step.dtypes:
        arrays = {**layer.arrays, "weight": rounded(layer.arrays["weight"])}
        layer = replace(layer, arrays=arrays)
    return replace(layer, kernel=name) if KERNELS[name].applies(layer) else layer


def _named(layer: Layer, choice: Mapping[str, str]) -> Layer:
    name = choice.get(layer.path, "dense")
    out = _forced(layer, name)
    if out.kernel != name and layer.arrays:
        raise ConfigError(f"compile: kernel {name!r} cannot run {layer.path}: {layer.step}")
    return out


def _fastest(network: Network, layer: Layer, images: int) -> Layer:
    able = [replace(layer, kernel=k) for k, kernel in KERNELS.items() if kernel.applies(layer)]
    if len(able) == 1:
        return able[0]
    return min(able, key=lambda candidate: _seconds(network, candidate, images))


def _seconds(network: Network, layer: Layer, images: int) -> float:
    """The median time of the layer alone on random numbers, on one thread."""
    kernel, program, end = KERNELS[layer.kernel], Program(), 0
    slots = []
    for v in (*layer.inputs, layer.output):
        slots.append(Slot(ARENA, end, (images, *network.shapes[v]), network.dtypes[v]))
        end += -(-slots[-1].nbytes // programs.ALIGNMENT) * programs.ALIGNMENT
    site = Site(program, Packed(), layer.arrays, slots[:-1], slots[-1], None)
    size = kernel.scratch(layer, site)
    if size:
        site = site._replace(scratch=Slot(ARENA, end, (size,), np.dtype(np.uint8)))
    kernel.emit(layer, site)
    arena = programs.aligned(1, end + size)
    numbers = arena[0, : end // 4 * 4].view(np.float32)
    numbers[:] = np.random.default_rng(0).random(numbers.size, dtype=np.float32)
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
