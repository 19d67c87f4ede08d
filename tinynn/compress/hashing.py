"""Layers whose weights are made of few values by hashing, also in the frequency domain.

    small = hashing.hashed(model, 1 / 8)        # an eighth of the numbers
    tn.fit(small, ...)                          # trains the values
    plain = hashing.expanded(small)             # weights again, for other passes

Which weights share a value is drawn, not chosen (Chen et al. 2015, "Compressing Neural Networks
with the Hashing Trick"), so that nothing need be stored but the values; what it loses, training has
to bring back. K x K filters share DCT coefficients, of high frequencies more than of low ones
(Chen et al. 2016, "Compressing Convolutional Neural Networks in the Frequency Domain"). A layer
costs as many multiply-adds as before.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from tinynn.compress.exchange import (
    LAYERS,
    exchange,
    hashed_layers,
    plain_layers,
    require_floating,
)
from tinynn.errors import ConfigError
from tinynn.nn.conv import Conv2d, PointwiseConv2d
from tinynn.nn.hashed import HashedConv2d, HashedLinear
from tinynn.nn.layers import Linear
from tinynn.nn.module import Module
from tinynn.ops.hashing import share_out


def hashed(
    model: Module,
    share: float,
    *,
    alpha: float = 1.0,
    beta: float = 2.0,
    seed: int = 0,
    only: Collection[str] | None = None,
) -> Module:
    """A new model whose linear layers and convolutions have `share` times as many values.

    The values are those whose weights are nearest to the model's: means. `alpha` and `beta` say
    which frequencies get more: see `ops.hashing.share_out`; layers hash by `seed` and their place
    among those of the model. `only` names the layers, by dotted path.

    Left alone: depthwise and transposed convolutions, subclasses with a forward of their own,
    layers that share their weights with others. Masks are not kept. Raises ConfigError for numbers
    out of range, for `only` that names other than such layers, for a model that is one layer, and
    for quantised or hashed layers, unless `only` passes them over.
    """
    if isinstance(model, LAYERS):
        raise ConfigError("hashing: required layers inside a model; put this one in a Sequential")
    share_out((1, 1), share, alpha, beta)  # refuses numbers that no layer may ask about
    if only is None:
        require_floating(model, "hashing")
    found = plain_layers(model)
    if only is not None and (unknown := sorted(set(only) - found.keys())):
        raise ConfigError(f"hashing: no layers {unknown} to hash; there are {sorted(found)}")
    new = {
        path: _hashed(layer, share, (alpha, beta), seed + place)
        for place, (path, layer) in enumerate(found.items())
        if only is None or path in only
    }
    if not new:
        raise ConfigError("hashing: required a model with layers to hash; came one without")
    return exchange(model, new)


def expanded(model: Module) -> Module:
    """A new model in which hashed layers are plain ones of the weights that they had made."""
    if isinstance(model, HashedLinear | HashedConv2d):
        return _expanded(model).train(model.training)
    return exchange(model, {p: _expanded(layer) for p, layer in hashed_layers(model).items()})


def _hashed(
    layer: Linear | Conv2d, share: float, frequencies: tuple[float, float], seed: int
) -> HashedLinear | HashedConv2d:
    *kernel, m_in, m_out = layer.weight.shape
    out: HashedLinear | HashedConv2d
    if isinstance(layer, Linear):
        out = HashedLinear(m_in, m_out, share=share, seed=seed, **_replaced())
    else:
        alpha, beta = frequencies
        size = kernel[0], kernel[1]
        options = {"alpha": alpha, "beta": beta, **_window(layer), **_replaced()}
        out = HashedConv2d(m_in, m_out, size, share=share, seed=seed, **options)
    out.values = layer.weight.like(out.op().fitted(layer.weight.data))
    out.bias = None if layer.bias is None else layer.bias.like(layer.bias.data)
    return out


def _expanded(layer: HashedLinear | HashedConv2d) -> Linear | Conv2d:
    out: Linear | Conv2d
    if isinstance(layer, HashedLinear):
        out = Linear(1, 1, **_replaced())
    elif layer.shape[:2] == (1, 1):
        out = PointwiseConv2d(1, 1, **_window(layer), **_replaced())
    else:
        out = Conv2d(1, 1, 1, **_window(layer), **_replaced())
    out.weight = layer.values.like(layer.weights().data)
    out.bias = None if layer.bias is None else layer.bias.like(layer.bias.data)
    return out


def _window(layer: Conv2d | HashedConv2d) -> dict[str, Any]:
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def _replaced() -> dict[str, Any]:
    """Options of a layer whose weights and bias are replaced at once."""
    return {"bias": False, "rng": np.random.default_rng(0)}
