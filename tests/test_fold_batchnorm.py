"""Batch normalisation folded: the same numbers with fewer layers."""

from __future__ import annotations

import numpy as np
import pytest

import tinynn as tn
from tinynn import nn
from tinynn.compress.batchnorm import fold_batchnorm
from tinynn.models import thesis
from tinynn.nn.conv import BatchNorm, ScaleShift

Array = np.ndarray


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with batch norms as after a training."""
    rng = np.random.default_rng(seed)
    for _, m in model.named_modules():
        if isinstance(m, BatchNorm):
            n = m.gamma.size
            m.gamma.mutate()[...] = rng.uniform(-1.5, 1.5, n)
            m.beta.mutate()[...] = rng.normal(0, 0.5, n)
            m.mean = rng.normal(0, 0.5, n).astype(m.gamma.dtype)
            m.variance = rng.uniform(0.3, 2, n).astype(m.gamma.dtype)
    return model.eval()


def answers(model: nn.Module, x: Array) -> Array:
    with tn.no_grad():
        return model.eval()(tn.Tensor(x)).numpy()


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(m, kind) for _, m in model.named_modules())


NETS = {
    "autoencoder": (lambda rng: thesis.autoencoder(channels=(3, 4, 3), rng=rng), (2, 8, 8, 1), 0),
    "nonlinear": (lambda rng: thesis.baseline("nonlinear", rng=rng), (2, 8, 8, 3), 0),
    "small": (lambda rng: thesis.small_cifar(rng=rng), (2, 8, 8, 3), 7),
    "resnet20": (lambda rng: thesis.resnet20(rng=rng), (2, 8, 8, 3), 0),
}


@pytest.mark.parametrize("name", NETS)
def test_the_folded_model_computes_the_same(name: str) -> None:
    build, shape, left = NETS[name]
    model = settled(build(np.random.default_rng(1)))
    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    before = model.state_dict()
    folded = fold_batchnorm(model, x[:1])
    assert count(folded, BatchNorm) == 0 and count(folded, ScaleShift) == left
    expected = answers(model, x)
    tolerance = 2e-4 * np.abs(expected).max()
    np.testing.assert_allclose(answers(folded, x), expected, rtol=0, atol=tolerance)
    assert all(np.array_equal(v, before[k]) for k, v in model.state_dict().items())


def test_only_a_layer_that_nothing_else_reads_takes_over() -> None:
    rng = np.random.default_rng(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            self.conv = nn.Conv2d(2, 2, 3, rng=rng)
            self.norm = BatchNorm(2)

        def forward(self, x: tn.Tensor) -> tn.Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = settled(Twice())
    x = rng.standard_normal((2, 4, 4, 2), dtype=np.float32)
    folded = fold_batchnorm(model, x)
    assert count(folded, ScaleShift) == 1
    np.testing.assert_allclose(answers(folded, x), answers(model, x), rtol=1e-5, atol=1e-6)

    after = settled(nn.Sequential(nn.Linear(2, 3, rng=rng), nn.ReLU(), BatchNorm(3)))
    rows = rng.standard_normal((5, 2), dtype=np.float32)
    folded = fold_batchnorm(after, rows)
    assert count(folded, ScaleShift) == 1
    np.testing.assert_allclose(answers(folded, rows), answers(after, rows), rtol=1e-5, atol=1e-6)


def test_masks_and_frozen_weights_stay_so() -> None:
    rng = np.random.default_rng(0)
    conv = nn.Conv2d(2, 3, 3, bias=False, rng=rng)
    conv.weight.mask = rng.random(conv.weight.shape) < 0.5
    conv.weight.requires_grad = False
    folded = fold_batchnorm(
        settled(nn.Sequential(conv, BatchNorm(3))), np.ones((1, 4, 4, 2), np.float32)
    )
    weight = next(p for p in folded.parameters() if p.ndim == 4)
    assert weight.mask is not None and not weight.data[~weight.mask].any()
    assert not weight.requires_grad and len(folded.parameters()) == 2
