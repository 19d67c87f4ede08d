"""Quantisation: models that compute with few bits, each pass giving a new model.

    half = quantize.float16(model, example)                     # weights rounded to float16
    byte = quantize.dynamic(model, example)                     # int8 weights, ranges at run time
    byte = quantize.int8(model, data)                           # all in 8 bits
    byte = quantize.int8(model, data, ranges=calibrate.kl)
    nibble = quantize.low_bit(model, data, weights=4)           # clipping, allocation, correction
    tuned = quantize.trainable(byte, "learned"); tn.fit(tuned, ...)
    again = quantize.floating(byte)                             # the weights without their grids

`data` are batches of typical inputs, or what `observe(folded, ..., bins=2048)` saw of a model whose
batch norms are folded. The result runs, trains, saves and loads as any model, and computes in
floating point what the integer kernels compute: `tinynn.nn.quantized` says how exactly, and what a
grid is. `integers.grids`, `integers.layer` and `integers.nbytes` give grids, integer weights and
the bytes of all numbers; what a plan's file takes is often less, see there.

Where grids lie in a model of fixed ranges:
- weights of every layer: symmetric, one grid for each output channel (or one for all, but for
  scales and shifts);
- the result of whatever feeds integer arithmetic (convolutions, linear layers, additions, pools
  but the maximum's, concatenations): one affine grid; a ReLU right behind comes first. What only
  moves numbers (`integers.MOVES`) keeps the grid; what is concatenated shares one grid;
- the model's input: `Quantized(model, input=...)` around the whole;
- what nothing but floating-point arithmetic reads stays floating: the model's result, or the
  argument of a tanh, whose result then has a grid if need be.
Layers of the ef-operator stay floating, in models of both kinds of ranges.

A model that is quantised already loses its grids: the new ones come from the floating-point weights
that it keeps. `fold_batchnorm` comes first; a batch norm that it leaves is a scale and a shift,
whose integer form is a depthwise 1x1 convolution with weights of +-127.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinynn.compress import calibrate
from tinynn.compress.batchnorm import by_channel, fold_batchnorm
from tinynn.compress.exchange import require_weights, swap
from tinynn.compress.places import places, weighted
from tinynn.errors import ConfigError, DataError
from tinynn.graph import Node, Value, trace
from tinynn.nn.conv import BatchNorm
from tinynn.nn.module import Module, Parameter
from tinynn.nn.quantized import (
    ActivationQuantizer,
    DynamicQuantizer,
    HalfQuantizer,
    Quantized,
    Quantizer,
    Ranges,
    WeightQuantizer,
    affine,
)
from tinynn.observe import Histogram, Observer, observe, require_batches
from tinynn.op import Array

_BINS = 2048
#: the quantisers of a `Quantized`, by the names of its arguments
Slots = dict[str, Module]


@dataclass(frozen=True)
class Scheme:
    """How weights become integers.

    `bits` for every weight; `first_last` for those of the first and the last layer. `clip` chooses
    where a channel's grid ends. With `allocate`, channels get different numbers of bits. With
    `correct`, the rounded weights of each channel are scaled to the deviation that they had, and
    the bias takes back what the rounding does to the mean of the result.

    With `scales`, the channels of a layer have at most so many different ones (0: any number), each
    the next larger of a geometric series: in a file, a code and a short book for 4 bytes a channel.
    Then `correct` leaves deviations as they are.
    """

    bits: int = 8
    first_last: int = 8
    per_channel: bool = True
    clip: calibrate.Clip = calibrate.largest
    allocate: bool = False
    correct: bool = False
    scales: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.scales, int) or self.scales < 0:
            raise ConfigError(f"quantize: required scales >= 0, a number; came {self.scales!r}")
        if not all(b in range(2, 9) for b in (self.bits, self.first_last)):
            raise ConfigError(
                f"quantize: required weights of 2 ... 8 bits; came {self.bits}, {self.first_last}"
            )


# --- passes ---------------------------------------------------------------------------------------


def float16(model: Module, example: npt.ArrayLike | None = None) -> Module:
    """A new model whose layers have their weights and biases rounded to float16.

    Nothing but the storage changes: it computes in float32. Batch norms are folded first, as a plan
    folds them: their factors would make numbers of float32 out of rounded weights. That takes
    `example`, a batch to trace the graph on; a model without batch norms does without.

    Raises ConfigError for a weight beyond float16's range, for batch norms without an example, and
    for hashed layers.
    """
    out = floating(model)
    require_weights(out, "quantize.float16")
    if example is not None:
        out = fold_batchnorm(out, example)
    elif norms := _norms(out):
        raise ConfigError(
            f"quantize.float16: batch norms at {norms}; float16(model, example) folds them, else "
            "their factors undo the rounding where the model is used"
        )
    slots: dict[Module, Slots] = {}
    for path, module in out.named_modules():
        if not hasattr(module, "using"):
            continue
        layer: Any = module
        for p in (layer.weight, layer.bias):
            if p is not None and not (np.abs(p.data) < 65520).all():
                raise ConfigError(
                    f"quantize.float16: {path} has weights up to {np.abs(p.data).max()}; float16 "
                    "ends at 65504"
                )
        slots[module] = {"weight": HalfQuantizer()}
    return _wrap(out, slots)


def dynamic(model: Module, example: npt.ArrayLike, scheme: Scheme | None = None) -> Module:
    """A new model with integer weights whose layers find the range of their input at run time.

    Each layer rounds its input to uint8, every image of a batch by itself, between its smallest and
    largest number; results are floating. (ONNX's DynamicQuantizeLinear has one range for a batch,
    so that an image's result would depend on the others.) Batch norms are folded first; `example`
    is a batch to trace the graph on. A scale and shift stays floating.
    """
    scheme = scheme or Scheme()
    out = fold_batchnorm(floating(model), example)
    graph = trace(out, example)
    layers = {p: n for p, n in weighted(graph, out).items() if n.op.name != "scale_shift"}
    modules = dict(out.named_modules())
    slots: dict[Module, Slots] = {}
    for path, node in layers.items():
        edge = path in (next(iter(layers)), list(layers)[-1])
        grid = _weights(modules[path], node, scheme, edge)
        slots[modules[path]] = {"input": DynamicQuantizer(), "weight": grid}
    return _wrap(out, slots)


def int8(
    model: Module,
    data: Observer | Iterable[Any],
    *,
    ranges: calibrate.Range = calibrate.minmax,
    scheme: Scheme | None = None,
    activations: int = 8,
) -> Module:
    """A new model in fixed point: integer weights, and activations on calibrated ranges.

    `ranges` chooses each activation's range from its histogram, `activations` are their bits; the
    model's input always has 8. What lies beyond a range gets its end, infinities too; NaN stays in
    the model, but a plan of it makes it some number of the range, so that its result looks like any
    other: check inputs that can have it.

    Raises ConfigError naming a layer whose weights cannot be rounded, or for an Observer of a model
    with batch norms or grids; DataError without data, or for one array instead of batches.
    """
    if activations not in range(2, 9):
        raise ConfigError(f"quantize: required activations of 2 ... 8 bits; came {activations}")
    folded, seen = _observed(model, data)
    out, scheme = folded.copy(), scheme or Scheme()
    modules, layers = dict(out.named_modules()), weighted(seen.graph, out)
    slots: dict[Module, Slots] = defaultdict(dict)
    whole: Quantizer | None = None
    x_scale: dict[str, float] = {}
    for place in places(seen.graph, out):
        bits = 8 if place.is_input else activations
        least, most = ranges(_pooled(seen, place.values), 2**bits - 1)
        grid = ActivationQuantizer(least, most, bits).astype(seen.graph.input.dtype)
        for path in place.outputs:
            slots[modules[path]]["output"] = grid.copy()
        for path in place.inputs:
            slots[modules[path]]["input"] = grid.copy()
        if place.is_input:
            whole = grid.copy()
        x_scale |= dict.fromkeys(place.layers, float(affine(least, most, bits)[0][0]))
    for path, node in layers.items():
        edge = path in (next(iter(layers)), list(layers)[-1])
        x = x_scale.get(path), seen[node.inputs[0]].mean
        slots[modules[path]]["weight"] = _weights(modules[path], node, scheme, edge, *x)
    out = _wrap(out, slots)
    return out if whole is None else Quantized(out, input=whole).train(out.training)


def low_bit(
    model: Module,
    data: Observer | Iterable[Any],
    *,
    weights: int = 4,
    activations: int = 8,
    clip: calibrate.Clip | None = None,
    ranges: calibrate.Range | None = None,
    allocate: bool = True,
    correct: bool = True,
    scales: int = 0,
) -> Module:
    """`int8` with fewer bits, and what makes that bearable (Banner et al. 2019), each switchable.

    Weights are cut by `clip` (ACIQ unless given), channels get bits by their range with `allocate`,
    and their moments are restored with `correct`; `scales` as for `Scheme`. Activations are cut by
    `ranges`: ACIQ unless given where they have less than 8 bits, else from the smallest number to
    the largest. The first and the last layer's weights have 8 bits.
    """
    scheme = Scheme(
        bits=weights,
        clip=clip or calibrate.weights_aciq(),
        allocate=allocate,
        correct=correct,
        scales=scales,
    )
    default = calibrate.minmax if activations == 8 else calibrate.aciq()
    return int8(model, data, ranges=ranges or default, scheme=scheme, activations=activations)


def floating(model: Module) -> Module:
    """A copy without the grids of an earlier quantisation: it computes with the floating weights.

    Those are there still, as training and the quantisation of a model need them.
    """
    out = model.copy()
    for _, module in list(out.named_modules()):
        if isinstance(module, Quantized):
            if module is out:
                out = module.layer.train(module.training)
            else:
                swap(out, module, module.layer)
    return out


def trainable(model: Module, ranges: Ranges = "running") -> Module:
    """A new model for quantisation-aware fine-tuning: what becomes of its stored grids in training.

    "fixed": nothing. "running": the activations' ranges follow the batches by moving averages
    (Jacob et al. 2018, section 3.1) and each channel's grid its largest weight. "learned": scales
    are parameters (Esser et al. 2020); make the optimiser anew. Adam and its kind move each scale
    by about the learning rate a step, however small it is: choose a rate far below the scales.
    """
    out = model.copy()
    found = [m for _, m in out.named_modules() if isinstance(m, Quantizer)]
    if not found:
        raise ConfigError("quantize.trainable: the model has no stored grids")
    for quantizer in found:
        quantizer.train_ranges(ranges)
    return out


# --- weights --------------------------------------------------------------------------------------


def _weights(
    module: Any,
    node: Node,
    scheme: Scheme,
    edge: bool,
    x_scale: float | None = None,
    x_mean: Array | None = None,
) -> WeightQuantizer:
    """The grids of a layer's weights; with `correct` they and the bias are moved, in place."""
    weight: Parameter = module.weight
    columns, back = _columns(weight.data.astype(np.float64), node)
    bits = scheme.first_last if edge else scheme.bits
    lone = node.op.name == "scale_shift"  # one weight a channel, which a grid of its own keeps
    per_channel = scheme.per_channel or lone
    if not per_channel:
        columns = columns.reshape(-1, 1)
    high = _steps(np.full(columns.shape[1], bits))
    if scheme.allocate and scheme.per_channel and not edge and not lone:
        high = _steps(calibrate.allocate(scheme.clip(columns, high), bits))
    scale = scheme.clip(columns, high) / high
    # a channel of zeros: any grid will do, but its bias is counted in its steps
    scale = np.where(scale > 0, scale, scale.max() or 1.0)
    if x_scale is not None and module.bias is not None:  # biases are int32, in x_scale scale
        bias = np.abs(module.bias.data.astype(np.float64))
        least = (bias if per_channel else bias.max()) / (x_scale * 2.0**30)
        scale = np.maximum(scale, least)
    if scheme.scales:
        scale = calibrate.shared(scale, scheme.scales)
    before, correct = weight.data.astype(np.float64), scheme.correct and not edge
    if correct and not scheme.scales:  # weights and scale alike: the integers stay
        factor = _deviation(columns, scale, high)
        scale = scale * factor
        share = by_channel(factor, module) if per_channel else factor
        module.weight = weight.like((before * share).astype(weight.dtype))
        module.weight.mask = weight.mask
    dtype = weight.dtype
    shape = by_channel(scale, module).shape if per_channel else (1,) * weight.ndim
    grid = (scale.astype(dtype).reshape(shape), high.astype(dtype).reshape(shape))
    found = WeightQuantizer(*grid, module.weight.data)
    if correct and x_mean is not None:
        rounded = np.clip(np.rint(module.weight.data / grid[0]), found.low, found.high) * grid[0]
        error, _ = _columns(before - rounded, node)
        shift = (error * back(x_mean)).sum(axis=0).astype(dtype)
        bias = module.bias
        module.bias = Parameter(shift) if bias is None else bias.like(bias.data + shift)
    return found


def _columns(weight: Array, node: Node) -> tuple[Array, Callable[[Array], Array]]:
    """The weights as (K, N), and how means of the input channels lie along them."""
    if node.op.name == "scale_shift":
        return weight[None], lambda mean: mean[None]
    if node.op.name == "depthwise_conv2d":
        factor = weight.shape[3]
        return weight.reshape(-1, weight.shape[2] * factor), lambda mean: np.repeat(mean, factor)
    columns = weight.reshape(-1, weight.shape[-1])
    return columns, lambda mean: np.tile(mean, len(columns) // len(mean))[:, None]


def _steps(bits: Array) -> Array:
    return (2.0 ** (bits - 1)) - 1


def _deviation(columns: Array, scale: Array, high: Array) -> Array:
    """What gives each rounded column the deviation that it had (Banner et al. 2019)."""
    rounded = np.clip(np.rint(columns / scale), -high, high) * scale
    before, after = columns.std(axis=0), rounded.std(axis=0)
    return np.where((before > 0) & (after > 0), before / np.where(after > 0, after, 1), 1.0)


# --- fixed ranges ---------------------------------------------------------------------------------


def _observed(model: Module, data: Observer | Iterable[Any]) -> tuple[Module, Observer]:
    """The model without batch norms, and what was seen of that."""
    if isinstance(data, Observer):
        data.require(model, "quantize")
        if norms := _norms(model):
            raise ConfigError(
                f"quantize: batch norms at {norms}; fold_batchnorm(model, example) first, and "
                "observe the result"
            )
        if any(isinstance(m, Quantized) for _, m in model.named_modules()):
            raise ConfigError("quantize: required batches, or an Observer of a model without grids")
        return model, data
    require_batches("quantize", data)
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise DataError("quantize: required at least one batch; came none")
    x = np.asarray(first[0] if isinstance(first, tuple) else first)
    folded = fold_batchnorm(floating(model), x[:1])
    return folded, observe(folded, itertools.chain([first], batches), bins=_BINS)


def _norms(model: Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, BatchNorm)]


def _pooled(seen: Observer, values: Iterable[Value]) -> Histogram:
    first, *others = (seen.histogram(v) for v in values)
    if not others:
        return first
    out = Histogram(first.bins)
    for one in (first, *others):
        out.merge(one)
    return out


def _wrap(root: Module, slots: Mapping[Module, Slots]) -> Module:
    """`root` with these modules, which it holds, in `Quantized` ones, in place."""
    for module, parts in slots.items():
        new = Quantized(module, **parts)
        new.training = module.training
        if module is root:
            root = new
        else:
            swap(root, module, new)
    return root
