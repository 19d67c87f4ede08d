"""Models of Çallı, "Faster and Lighter Convolutional Neural Networks" (MSc thesis, Radboud 2017).

Parameter counts that the thesis gives are reproduced; the tests hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tinynn import nn
from tinynn.errors import ConfigError
from tinynn.nn.module import Module

Convolution = Literal["conv", "composing", "separable", "nonlinear"]


def autoencoder(
    *, channels: tuple[int, int, int] = (32, 64, 32), rng: np.random.Generator
) -> nn.Sequential:
    """The MNIST auto-encoder of section 3.1.2: (B, 28, 28, 1) to the same, code (7, 7, c2).

    Two 3x3 convolutions and two 3x3 transposed ones, all of stride 2 with batch normalisation;
    ReLU after each but the last, which has tanh.
    """
    first, code, last = channels
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2, rng=rng),
        nn.BatchNorm(first),
        nn.ReLU(),
        nn.Conv2d(first, code, 3, stride=2, rng=rng),
        nn.BatchNorm(code),
        nn.ReLU(),
        nn.ConvTranspose2d(code, last, 3, stride=2, rng=rng),
        nn.BatchNorm(last),
        nn.ReLU(),
        nn.ConvTranspose2d(last, 1, 3, stride=2, rng=rng),
        nn.BatchNorm(1),
        nn.Tanh(),
    )


def baseline(
    kind: Convolution = "conv", *, m_in: int = 3, classes: int = 10, rng: np.random.Generator
) -> nn.Sequential:
    """The net of section 3.2: three 5x5 layers of 32, 64, 128 channels, the last two replaceable.

    Each is followed by batch normalisation and ReLU, the first two by a 2x2 max pool; then global
    average pool and a linear layer. Images (B, H, W, m_in); the published counts are for 24x24.
    """

    def layer(a: int, b: int, n: int) -> Module:
        if kind == "conv":
            return nn.Conv2d(a, b, 5, rng=rng)
        if kind == "composing":
            return nn.KernelComposingConv2d(a, b, 5, n, rng=rng)
        if kind in ("separable", "nonlinear"):
            return nn.SeparableConv2d(a, b, 5, nonlinear=kind == "nonlinear", rng=rng)
        raise ConfigError(f"baseline: kind is conv, composing, separable, nonlinear; came {kind!r}")

    return nn.Sequential(
        nn.Conv2d(m_in, 32, 5, rng=rng),
        nn.BatchNorm(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        layer(32, 64, 48),
        nn.BatchNorm(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        layer(64, 128, 96),
        nn.BatchNorm(128),
        nn.ReLU(),
        nn.GlobalAvgPool2d(),
        nn.Linear(128, classes, rng=rng),
    )


def small_cifar(
    *,
    m_in: int = 3,
    classes: int = 10,
    stem: int = 32,
    widths: Sequence[int] = (64, 64, 64, 128, 128, 128),
    rng: np.random.Generator,
) -> nn.Sequential:
    """The small CIFAR-10 model of section 2.4.1: images (B, H, W, m_in), 131,018 parameters.

    A 3x3 stem of 32 channels, six full pre-activation separable residual blocks (64, 64, 64, 128,
    128, 128; the first of each width with stride 2), global average pool, batch normalisation,
    ReLU, linear. 124,288 weights; the published total follows if every convolution has a bias and
    the separable convolutions are the non-linear ones, with batch normalisation in their middle.
    Other `stem` and `widths` give narrower or shallower nets of the kind.
    """
    blocks: list[Module] = []
    m = stem
    for m_out in widths:
        stride = 1 if m_out == m else 2
        blocks.append(
            nn.SeparableResidualBlock(m, m_out, stride=stride, nonlinear=True, bias=True, rng=rng)
        )
        m = m_out
    return nn.Sequential(
        nn.Conv2d(m_in, stem, 3, rng=rng),
        *blocks,
        nn.GlobalAvgPool2d(),
        nn.BatchNorm(m),
        nn.ReLU(),
        nn.Linear(m, classes, rng=rng),
    )


def resnet20(*, m_in: int = 3, classes: int = 10, rng: np.random.Generator) -> nn.Sequential:
    """ResNet-20, with which section 3.3.1 compares: images (B, H, W, m_in), 0.27 M parameters.

    He et al. 2016, section 4.2: a 3x3 stem and three times three blocks of 16, 32 and 64 channels;
    shortcuts without weights, here those of `nn.Shortcut`.
    """
    blocks: list[Module] = []
    m = 16
    for m_out in (16, 16, 16, 32, 32, 32, 64, 64, 64):
        blocks.append(nn.ResidualBlock(m, m_out, stride=1 if m_out == m else 2, rng=rng))
        m = m_out
    return nn.Sequential(
        nn.Conv2d(m_in, 16, 3, bias=False, rng=rng),
        nn.BatchNorm(16),
        nn.ReLU(),
        *blocks,
        nn.GlobalAvgPool2d(),
        nn.Linear(m, classes, rng=rng),
    )
