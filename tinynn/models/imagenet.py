"""ResNet-34 for ImageNet, and its rebuild from separable blocks with a cheap stem.

He et al. 2016, "Deep Residual Learning for Image Recognition", table 1; Çallı, "Faster and Lighter
Convolutional Neural Networks" (MSc thesis, Radboud 2017), section 2.4.1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinynn import nn
from tinynn.nn.module import Module

_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  #: blocks and channels


def resnet34(*, m_in: int = 3, classes: int = 1000, rng: np.random.Generator) -> nn.Sequential:
    """ResNet-34 of images (B, 224, 224, m_in): 21,797,672 parameters, 3.66 G multiply-adds.

    A 7x7 stem of stride 2 and a 3x3 max pool of stride 2, 16 blocks of two 3x3 convolutions in four
    stages, global average pool, linear. Where a stage reduces, the shortcut is a 1x1 convolution
    of stride 2 with batch normalisation (option B of the paper).
    """

    def block(m_in: int, m_out: int, stride: int) -> Module:
        body = nn.Sequential(
            nn.Conv2d(m_in, m_out, 3, stride=stride, bias=False, rng=rng),
            nn.BatchNorm(m_out),
            nn.ReLU(),
            nn.Conv2d(m_out, m_out, 3, bias=False, rng=rng),
            nn.BatchNorm(m_out),
        )
        return nn.Sequential(nn.Add(body, _shortcut(m_in, m_out, stride, rng)), nn.ReLU())

    return nn.Sequential(
        nn.Conv2d(m_in, 64, 7, stride=2, bias=False, rng=rng),
        nn.BatchNorm(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding="same"),
        *_stages(block),
        nn.GlobalAvgPool2d(),
        nn.Linear(512, classes, rng=rng),
    )


def separable_resnet34(
    *,
    m_in: int = 3,
    classes: int = 1000,
    stem: tuple[int, int] = (12, 8),
    rng: np.random.Generator,
) -> nn.Sequential:
    """ResNet-34 rebuilt from pre-activation separable residual blocks, with the cheap stem.

    3,109,508 parameters, 0.465 G multiply-adds at 224x224.
    The stem: two 3x3 convolutions (the first of stride 2), a 3x3 depthwise one with channel
    multiplier 2, a pointwise one to 64 channels, a 3x3 max pool of stride 2. The thesis gives no
    widths of the two convolutions; `stem` are chosen to cost what it reports, a quarter of the 7x7
    stem. Where a stage reduces, the identity is a 1x1 convolution of stride 2.
    """

    def block(m_in: int, m_out: int, stride: int) -> Module:
        body = nn.Sequential(*_half(m_in, m_out, stride, rng), *_half(m_out, m_out, 1, rng))
        return nn.Add(body, _projection(m_in, m_out, stride, rng))

    first, second = stem
    return nn.Sequential(
        *_unit(nn.Conv2d(m_in, first, 3, stride=2, bias=False, rng=rng), first),
        *_unit(nn.Conv2d(first, second, 3, bias=False, rng=rng), second),
        nn.DepthwiseConv2d(second, 3, multiplier=2, bias=False, rng=rng),
        nn.PointwiseConv2d(2 * second, 64, bias=False, rng=rng),
        nn.MaxPool2d(3, stride=2, padding="same"),
        *_stages(block),
        nn.GlobalAvgPool2d(),
        nn.BatchNorm(512),
        nn.ReLU(),
        nn.Linear(512, classes, rng=rng),
    )


def _stages(block: Callable[[int, int, int], Module]) -> list[Module]:
    """The blocks of all stages; the first of each but the first stage halves the image."""
    blocks: list[Module] = []
    m = 64
    for number, m_out in _STAGES:
        for _ in range(number):
            blocks.append(block(m, m_out, 1 if m_out == m else 2))
            m = m_out
    return blocks


def _shortcut(m_in: int, m_out: int, stride: int, rng: np.random.Generator) -> Module:
    projection = _projection(m_in, m_out, stride, rng)
    return projection if m_in == m_out else nn.Sequential(projection, nn.BatchNorm(m_out))


def _projection(m_in: int, m_out: int, stride: int, rng: np.random.Generator) -> Module:
    """The identity, or a 1x1 convolution where sizes change."""
    if m_in == m_out:
        return nn.Shortcut(m_in, m_out)
    return nn.PointwiseConv2d(m_in, m_out, stride=stride, bias=False, rng=rng)


def _half(m_in: int, m_out: int, stride: int, rng: np.random.Generator) -> list[Module]:
    return [
        nn.BatchNorm(m_in),
        nn.ReLU(),
        nn.DepthwiseConv2d(m_in, 3, stride=stride, bias=False, rng=rng),
        nn.PointwiseConv2d(m_in, m_out, bias=False, rng=rng),
    ]


def _unit(layer: Module, m: int) -> list[Module]:
    return [layer, nn.BatchNorm(m), nn.ReLU()]
