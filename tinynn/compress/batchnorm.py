"""Batch normalisation of a model in use is one factor and one summand a channel: fold them away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from tinynn.compress.exchange import swap
from tinynn.graph import Graph, Node, trace
from tinynn.nn.conv import BatchNorm, DepthwiseConv2d, ScaleShift
from tinynn.nn.module import Module, Parameter, Sequential
from tinynn.op import Array


def fold_batchnorm(model: Module, example: npt.ArrayLike) -> Module:
    """A new model without batch normalisation that computes in eval mode what `model` does.

    W x + b followed by gamma (y - mean) / sqrt(variance + eps) + beta is another W' x + b': factors
    and summands go into the layer before (convolution, depthwise, transposed, linear) if nothing
    else reads its result and no ReLU lies between. Every other batch norm, for instance in front of
    a pre-activation block, becomes a `nn.ScaleShift`. `example` is a batch to trace the graph on.

    Statistics can neither be re-estimated nor move in training afterwards.
    """
    out = model.copy()
    graph = trace(out, example)
    modules = dict(out.named_modules())
    runs = Counter(node.path for node in graph.nodes)
    made_by = {node.output.index: node for node in graph.nodes}
    for node in graph.nodes:
        norm = modules.get(node.path)
        if node.op.name != "batch_norm_eval" or not isinstance(norm, BatchNorm):
            continue
        before = made_by.get(node.inputs[0].index)
        alone = before is not None and _may_take_over(before, graph, runs, modules)
        if before is not None and alone and runs[node.path] == 1:
            _take_over(modules[before.path], *_affine(norm))
            _drop(out, norm)
        else:
            swap(out, norm, _scale_shift(norm))
    for path, module in modules.items():  # those that the graph does not reach
        if isinstance(module, BatchNorm) and path not in runs:
            swap(out, module, _scale_shift(module))
    return out


def _affine(norm: BatchNorm) -> tuple[Array, Array]:
    """The factor and the summand of each channel, float64."""
    gamma, beta = norm.gamma.data.astype(np.float64), norm.beta.data.astype(np.float64)
    factor = gamma / np.sqrt(norm.variance.astype(np.float64) + norm.eps)
    return factor, beta - norm.mean.astype(np.float64) * factor


def _scale_shift(norm: BatchNorm) -> ScaleShift:
    factor, shift = (a.astype(norm.gamma.dtype) for a in _affine(norm))
    return ScaleShift(factor, shift)


def _may_take_over(
    node: Node, graph: Graph, runs: Counter[str], modules: dict[str, Module]
) -> bool:
    """Whether the op's layer has weights that only it uses, a result that only one op reads."""
    layer = modules.get(node.path)
    own = node.inputs[1].name if len(node.inputs) > 1 else ""
    readers = sum(v.index == node.output.index for n in graph.nodes for v in n.inputs)
    uses = sum(v.name == own for n in graph.nodes for v in n.inputs)
    return (
        hasattr(layer, "using")
        and own == f"{node.path}.weight".lstrip(".")
        and not getattr(node.op, "relu", False)
        and readers == uses == runs[node.path] == 1
        and graph.output.index != node.output.index
    )


def _take_over(layer: Any, factor: Array, shift: Array) -> None:
    weight: Parameter = layer.weight
    dtype = weight.dtype
    scaled = weight.data * by_channel(factor, layer)
    folded, mask = weight.like(scaled.astype(dtype)), weight.mask
    folded.mask = mask
    if layer.bias is None:
        layer.bias = Parameter(shift.astype(dtype))
    else:
        layer.bias = layer.bias.like((layer.bias.data * factor + shift).astype(dtype))
    layer.weight = folded


def by_channel(values: Array, layer: Any) -> Array:
    """One value for each result channel, (N,), in a shape that broadcasts against the weights.

    (1, N) for linear (K, N), (1, 1, 1, N) for convolutions, (1, 1, C, R) for depthwise, (C,) for
    a scale and shift.
    """
    shape = layer.weight.shape
    channels = shape[-2:] if isinstance(layer, DepthwiseConv2d) else shape[-1:]
    return values.reshape((1,) * (len(shape) - len(channels)) + channels)


def _drop(model: Module, module: Module) -> None:
    """Take a module out of the sequences that it stands in; elsewhere nothing takes its place."""
    for _, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if child is not module:
                continue
            if type(parent) is Sequential:
                delattr(parent, name)
            else:
                setattr(parent, name, Sequential())
