"""Learned scales of quantisers: optimisers keep them positive, nothing takes them for weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tinynn as tn
from tinynn import nn
from tinynn.compress import cluster, quantize, saliency, sparsify
from tinynn.errors import PruneError
from tinynn.nn.module import Parameter, is_weight
from tinynn.nn.quantized import WeightQuantizer

Array = np.ndarray


def learned() -> nn.Module:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, rng=rng), nn.ReLU(), nn.GlobalAvgPool2d(), nn.Linear(8, 4, rng=rng)
    ).eval()
    return quantize.trainable(quantize.int8(model, [images()]), "learned")


def images() -> Array:
    return np.random.default_rng(1).standard_normal((32, 8, 8, 3), dtype=np.float32)


def batches() -> tn.Batches:
    labels = np.random.default_rng(2).integers(0, 4, 32)
    return tn.Batches(images(), labels, size=8, rng=np.random.default_rng(3))


def scales(model: nn.Module) -> dict[str, Parameter]:
    return {n: p for n, p in model.named_parameters() if n.endswith("scale")}


WEIGHTS = {"layer.0.layer.weight", "layer.3.layer.weight"}


@pytest.mark.filterwarnings("error")  # x / scale must not overflow
@pytest.mark.parametrize(
    "make",
    [
        lambda p: tn.SGD(p, lr=0.1, momentum=0.9),
        lambda p: tn.Adam(p, lr=1e-2, weight_decay=1e-2),
        lambda p: tn.RMSProp(p, lr=1e-2),
    ],
)
def test_scales_stay_positive_whatever_trains_them(
    make: Callable[[list[Parameter]], tn.Optimizer], tmp_path: Path
) -> None:
    model = learned()
    least = []
    tn.fit(
        model,
        batches(),
        loss=tn.softmax_cross_entropy,
        optimizer=make(model.parameters()),
        steps=16,
        each_step=lambda step: least.append(min(p.data.min() for p in scales(model).values())),
    )
    assert 0 < min(least) < 1e-15  # the bound was needed
    tn.save(tmp_path / "m", model)
    again = tn.load(tmp_path / "m")
    assert {n: p.least for n, p in again.named_parameters()} == {
        n: p.least for n, p in model.named_parameters()
    }
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value)


def test_scales_are_no_weights() -> None:
    model = learned()
    assert len(scales(model)) == 5
    assert max(p.ndim for p in scales(model).values()) == 4
    assert {n for n, p in model.named_parameters() if is_weight(p)} == WEIGHTS
    assert sparsify.weights_of(model, None).keys() == WEIGHTS
    with pytest.raises(PruneError, match="no weights"):
        sparsify.weights_of(model, scales(model))
    assert saliency.gates(model, batches(), tn.softmax_cross_entropy).rows.keys() == WEIGHTS
    cost = tn.count(model, images())
    assert cost.weights == sum(layer.weights for layer in cost.layers) == 3 * 3 * 3 * 8 + 8 * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda m: sparsify.weights(m, sparsify.magnitude, sparsify.share(0.5)),
        lambda m: cluster.kmeans(m, 4),
        lambda m: cluster.rounded(m, 1),
        lambda m: tn.distort(m, np.random.default_rng(0)),
    ],
)
def test_passes_over_weights_leave_scales_alone(change: Callable[[nn.Module], nn.Module]) -> None:
    model = learned()
    changed = change(model)
    for name, p in scales(changed).items():
        np.testing.assert_array_equal(p.data, scales(model)[name].data)
    one = next(iter(WEIGHTS))
    assert not np.array_equal(changed.state_dict()[one], model.state_dict()[one])


def test_scales_that_are_distorted_by_name_stay_positive() -> None:
    model = learned()
    out = tn.distort(model, np.random.default_rng(0), scale=-1.0, only=list(scales(model)))
    assert all((p.data > 0).all() for p in scales(out).values())
    assert not all(np.array_equal(p.data, scales(model)[n].data) for n, p in scales(out).items())


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("term", ["l1", "l2", "weight_decay"])
def test_no_penalty_pulls_on_scales(term: str, biases: bool) -> None:
    model = learned()
    before = model.state_dict()
    options = {term: 0.5, "penalise_biases": biases}
    optimizer = tn.SGD(model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
    for p in model.parameters():
        p.grad = np.zeros_like(p.data)
    optimizer.step()
    for name, p in scales(model).items():
        np.testing.assert_array_equal(p.data, before[name])
    for name in WEIGHTS:
        assert not np.array_equal(model.state_dict()[name], before[name])


def test_what_is_made_of_a_scale_is_one() -> None:
    quantizer = WeightQuantizer(*np.ones((2, 1, 3), np.float32), np.ones((4, 3), np.float32))
    quantizer.train_ranges("learned")
    for made in (quantizer, quantizer.copy(), quantizer.astype(np.float64)):
        assert isinstance(made.scale, Parameter) and not is_weight(made.scale)
    quantizer.train_ranges("fixed")
    assert not isinstance(quantizer.scale, Parameter)
