"""The published architectures, one file per source, and a table of them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinynn import nn
from tinynn.models import imagenet, thesis
from tinynn.nn.module import Module


@dataclass(frozen=True)
class Published:
    """A model as it was trained: `build(rng)`, the shape of a batch of its inputs, its loss."""

    build: Callable[[np.random.Generator], Module]
    batch: tuple[int, ...]
    loss: Literal["softmax_cross_entropy", "mse", "rmse"]


def _baseline(kind: thesis.Convolution) -> Published:
    return Published(
        lambda rng: thesis.baseline(kind, rng=rng), (128, 24, 24, 3), "softmax_cross_entropy"
    )


def _summation(rng: np.random.Generator) -> Module:
    return nn.Sequential(nn.Linear(2, 1000, rng=rng), nn.ReLU(), nn.Linear(1000, 1, rng=rng))


PUBLISHED = {
    "summation": Published(_summation, (1000, 2), "rmse"),
    "autoencoder": Published(lambda rng: thesis.autoencoder(rng=rng), (128, 28, 28, 1), "mse"),
    "baseline": _baseline("conv"),
    "baseline_composing": _baseline("composing"),
    "baseline_separable": _baseline("separable"),
    "baseline_nonlinear": _baseline("nonlinear"),
    "small_cifar": Published(
        lambda rng: thesis.small_cifar(rng=rng), (128, 32, 32, 3), "softmax_cross_entropy"
    ),
}

#: Models that are published, too, but that no experiment here trains by default.
FURTHER = {
    "resnet20": Published(
        lambda rng: thesis.resnet20(rng=rng), (128, 32, 32, 3), "softmax_cross_entropy"
    ),
    "resnet34": Published(
        lambda rng: imagenet.resnet34(rng=rng), (1, 224, 224, 3), "softmax_cross_entropy"
    ),
    "separable_resnet34": Published(
        lambda rng: imagenet.separable_resnet34(rng=rng),
        (1, 224, 224, 3),
        "softmax_cross_entropy",
    ),
}

#: All of them.
KNOWN = PUBLISHED | FURTHER
