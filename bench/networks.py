"""The published networks as plain lists of layers, so that a peer builds them without tinynn.

Importing tinynn would load Numba and set the OpenMP environment of the library that is timed. The
tests hold these lists to `tinynn.models`: the same parameters in the same order, the same loss.

Strided windows have the padding that every library has, (K - 1) // 2 in front and as much behind
as the result needs, so that no peer has to pad in a pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.layers import Geometry

Kind = Literal[
    "conv",
    "depthwise",
    "deconv",
    "linear",
    "norm",
    "relu",
    "tanh",
    "max_pool",
    "global_pool",
    "residual",
]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One layer: channels in and out, the kernel's rows and columns; a residual has a `body`.

    A residual's shortcut is a 2x2 average pool where the body has stride 2, then new channels of
    zeros, half of them in front.
    """

    kind: Kind
    m_in: int = 0
    m_out: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    bias: bool = True
    body: tuple[Layer, ...] = ()

    def weight(self) -> Shape:
        """The shape of its weights: HWIO, (K, K, m_in, 1) if depthwise, (m_in, m_out) if linear."""
        if self.kind == "linear":
            return self.m_in, self.m_out
        return *self.kernel, self.m_in, 1 if self.kind == "depthwise" else self.m_out

    def geometry(self) -> Geometry:
        """Its window; of a transposed convolution that of the convolution it is the gradient of."""
        half = [(k - 1) // 2 for k in self.kernel]
        behind = half
        if self.kind == "deconv":
            behind = [k - self.stride - f for k, f in zip(self.kernel, half, strict=True)]
        return Geometry(list(self.kernel), [self.stride] * 2, half, behind)


WEIGHTED = ("conv", "depthwise", "deconv", "linear")


def _conv(m_in: int, m_out: int, rows: int, columns: int, **options: Any) -> Layer:
    return Layer("conv", m_in, m_out, (rows, columns), **options)


def _norm(m: int) -> tuple[Layer, Layer]:
    return Layer("norm", m), Layer("relu")


def autoencoder() -> list[Layer]:
    """Images (B, 28, 28, 1) to a code (B, 7, 7, 64) and back."""
    three: Any = {"kernel": (3, 3), "stride": 2}
    return [
        *(Layer("conv", 1, 32, **three), *_norm(32)),
        *(Layer("conv", 32, 64, **three), *_norm(64)),
        *(Layer("deconv", 64, 32, **three), *_norm(32)),
        *(Layer("deconv", 32, 1, **three), Layer("norm", 1), Layer("tanh")),
    ]


def baseline(kind: str) -> list[Layer]:
    """Images (B, H, W, 3) to 10 classes, in one of the four kinds of `tinynn.models.thesis`."""

    def replaced(a: int, b: int, n: int) -> list[Layer]:
        if kind == "conv":
            return [_conv(a, b, 5, 5)]
        if kind == "composing":
            return [_conv(a, n, 1, 5), Layer("relu"), _conv(n, b, 5, 1)]
        between = list(_norm(a)) if kind == "nonlinear" else []
        depthwise = Layer("depthwise", a, a, (5, 5), bias=not between)
        return [depthwise, *between, _conv(a, b, 1, 1)]

    return [
        *(_conv(3, 32, 5, 5), *_norm(32), Layer("max_pool")),
        *(*replaced(32, 64, 48), *_norm(64), Layer("max_pool")),
        *(*replaced(64, 128, 96), *_norm(128)),
        *(Layer("global_pool"), Layer("linear", 128, 10)),
    ]


def _separable(m_in: int, m_out: int, stride: int) -> list[Layer]:
    """Half the body of a block: pre-activation, depthwise, batch normalisation, pointwise."""
    depthwise = Layer("depthwise", m_in, m_in, (3, 3), stride)
    return [*_norm(m_in), depthwise, *_norm(m_in), _conv(m_in, m_out, 1, 1)]


def small_cifar() -> list[Layer]:
    """Images (B, H, W, 3) to 10 classes through six separable residual blocks."""
    layers = [_conv(3, 32, 3, 3)]
    m_in = 32
    for m_out in (64, 64, 64, 128, 128, 128):
        stride = 1 if m_out == m_in else 2
        body = (*_separable(m_in, m_out, stride), *_separable(m_out, m_out, 1))
        layers.append(Layer("residual", m_in, m_out, stride=stride, body=body))
        m_in = m_out
    return [*layers, Layer("global_pool"), *_norm(m_in), Layer("linear", m_in, 10)]


def flat(layers: Sequence[Layer]) -> Iterator[Layer]:
    """The layers in the order in which they compute, residuals replaced by their bodies."""
    for layer in layers:
        yield from flat(layer.body) if layer.body else [layer]


def multiply_adds(layers: Sequence[Layer], image: Shape) -> list[int]:
    """Of each layer with weights, for a batch (B, H, W, C): taps inside the image alone."""
    batch, height, width, _ = image
    found = []
    for layer in flat(layers):
        if layer.kind in ("conv", "depthwise"):
            g = layer.geometry()
            channels = 1 if layer.kind == "depthwise" else layer.m_in
            found.append(batch * g.taps(height, width) * channels * layer.m_out)
            height, width = g.output(height, width)
        elif layer.kind == "deconv":
            height, width = layer.stride * height, layer.stride * width
            taps = layer.geometry().taps(height, width)
            found.append(batch * taps * layer.m_in * layer.m_out)
        elif layer.kind == "linear":
            found.append(batch * layer.m_in * layer.m_out)
        elif layer.kind == "max_pool":
            height, width = height // 2, width // 2
    return found


def parameters(layers: Sequence[Layer]) -> list[Shape]:
    """Their shapes, in order."""
    found: list[Shape] = []
    for layer in flat(layers):
        if layer.kind in WEIGHTED:
            found.append(layer.weight())
        if layer.kind == "norm":
            found += [(layer.m_in,), (layer.m_in,)]
        elif layer.kind in WEIGHTED and layer.bias:
            found.append((layer.m_out,))
    return found


def initial(layers: Sequence[Layer]) -> list[Any]:
    """The values that every library starts from: He et al. 2015; unit scales, no shifts."""
    import numpy as np

    rng = np.random.default_rng(0)
    found: list[Any] = []
    for layer in flat(layers):
        if layer.kind in WEIGHTED:
            shape = layer.weight()
            inputs = math.prod(shape[:-1]) // (layer.m_in if layer.kind == "depthwise" else 1)
            found.append(rng.normal(0, (2 / inputs) ** 0.5, shape).astype(np.float32))
        if layer.kind == "norm":
            found += [np.ones(layer.m_in, np.float32), np.zeros(layer.m_in, np.float32)]
        elif layer.kind in WEIGHTED and layer.bias:
            found.append(np.zeros(layer.m_out, np.float32))
    return found


# --- torch ----------------------------------------------------------------------------------------


def torch_network(layers: Sequence[Layer]) -> Any:
    """The network in torch, images (B, C, H, W), in its `initial` state; ReLUs work in place."""
    import torch

    values = iter(initial(layers))
    network = _torch_sequence(layers)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.copy_(torch.from_numpy(next(values).T.copy()))
            elif isinstance(part, torch.nn.Conv2d):
                swap = (2, 3, 0, 1) if part.groups > 1 else (3, 2, 0, 1)
                part.weight.copy_(torch.from_numpy(next(values).transpose(swap).copy()))
            elif isinstance(part, torch.nn.ConvTranspose2d):
                part.weight.copy_(torch.from_numpy(next(values).transpose(2, 3, 0, 1).copy()))
            elif isinstance(part, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                part.weight.copy_(torch.from_numpy(next(values)))
            else:
                continue
            if part.bias is not None:
                part.bias.copy_(torch.from_numpy(next(values)))
    return network


def _torch_sequence(layers: Sequence[Layer]) -> Any:
    import torch

    parts = []
    images = True  # until the global pool: then (B, C)
    for layer in layers:
        parts.append(_torch_layer(layer, images))
        images = images and layer.kind != "global_pool"
    return torch.nn.Sequential(*parts)


def _torch_layer(layer: Layer, images: bool) -> Any:
    import torch
    from torch import nn

    kind, m_in, m_out = layer.kind, layer.m_in, layer.m_out
    if kind in ("conv", "depthwise"):
        groups = m_in if kind == "depthwise" else 1
        rows, columns = layer.geometry().padding
        return nn.Conv2d(
            m_in,
            m_out,
            layer.kernel,
            layer.stride,
            (rows, columns),
            groups=groups,
            bias=layer.bias,
        )
    if kind == "deconv":
        g = layer.geometry()
        (rows, columns), (below, right) = g.padding, g.behind
        extra = rows - below, columns - right
        return nn.ConvTranspose2d(
            m_in, m_out, layer.kernel, layer.stride, (rows, columns), extra, bias=layer.bias
        )
    if kind == "linear":
        return nn.Linear(m_in, m_out)
    if kind == "norm":
        return nn.BatchNorm2d(m_in) if images else nn.BatchNorm1d(m_in)
    if kind == "global_pool":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if kind == "max_pool":
        return nn.MaxPool2d(2)
    if kind != "residual":
        return nn.ReLU(inplace=True) if kind == "relu" else nn.Tanh()

    front = (m_out - m_in) // 2

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = _torch_sequence(layer.body)

        def forward(self, x: Any) -> Any:
            short = nn.functional.avg_pool2d(x, 2) if layer.stride == 2 else x
            if m_out > m_in:
                short = nn.functional.pad(short, (0, 0, 0, 0, front, m_out - m_in - front))
            return torch.add(self.body(x), short)

    return Residual()
