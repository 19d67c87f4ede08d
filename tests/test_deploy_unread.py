"""Plans leave out weights whose results nothing reads, and compute the same without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_deploy import MODELS as COMMON

import tinynn as tn
from tinynn import deploy, nn

Make = Callable[[np.random.Generator], nn.Module]

MODELS: dict[str, tuple[Make, tuple[int, ...]]] = {
    **{name: COMMON[name] for name in ("small_cifar", "bottleneck")},
    "inception": (
        lambda r: nn.Sequential(
            nn.InceptionBlock(8, (4, 8, 8, 4), rng=r),
            nn.InceptionBlock(24, (8, 8, 4, 4), rng=r),
            nn.ConvTranspose2d(24, 6, 3, stride=2, rng=r),
            nn.Softmax(),
        ),
        (9, 7, 8),
    ),
    "layers": (
        lambda r: nn.Sequential(
            nn.Conv2d(3, 4, 1, rng=r),
            nn.ReLU(),
            nn.ScaleShift(np.float32([1, 0, -1, 2]), np.zeros(4, np.float32)),
            nn.Conv2d(4, 4, 1, rng=r),
            nn.DepthwiseConv2d(4, 3, multiplier=3, rng=r),
            nn.Tanh(),
            nn.AvgPool2d(3, stride=2, padding="same"),
            nn.Conv2d(12, 10, 3, stride=2, rng=r),
            nn.Flatten(),
            nn.Linear(40, 20, rng=r),
            nn.ReLU(),
            nn.Linear(20, 7, bias=False, rng=r),
        ),
        (8, 8, 3),
    ),
}


def emptied(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    """The model without two of three of its inputs, layer by layer, and with biases."""
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim > 1:
            p.mutate()[..., rng.random(p.shape[-2]) < 0.67, :] = 0
        elif name.endswith("bias"):
            p.mutate()[...] = rng.normal(0, 0.3, p.shape)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_nothing_reads_is_zero_and_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = MODELS[name]
    rng = np.random.default_rng(0)
    model = emptied(make(rng), rng)
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    plan = tn.compile(model, x, choose="dense")
    monkeypatch.setattr(deploy, "blank_unread", lambda sketch: sketch)
    whole = tn.compile(model, x, choose="dense")
    assert np.array_equal(plan(x), whole(x))
    fewer = 0
    for mine, other in zip(plan.network.layers, whole.network.layers, strict=True):
        for key, array in mine.arrays.items():
            changed = array != other.arrays[key]
            assert not np.any(array[changed])
            fewer += np.count_nonzero(changed)
    assert fewer >= 0.2 * sum(count(layer) for layer in whole.network.layers)
    assert plan.nbytes < 0.9 * whole.nbytes


def count(layer: Any) -> int:
    """Numbers of a layer that are not zero."""
    return sum(np.count_nonzero(a) for a in layer.arrays.values())


def test_a_network_that_reads_everything_is_left_as_it_is() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, rng=rng), nn.ReLU(), nn.Conv2d(8, 4, 3, rng=rng))
    sketch = deploy.lower(tn.graph.trace(model, np.ones((1, 5, 5, 3), np.float32)))
    same = deploy.blank_unread(sketch)
    assert all(a is b for a, b in zip(same.layers, sketch.layers, strict=True))
