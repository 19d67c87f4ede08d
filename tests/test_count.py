"""Counting: the published figures to the digit, and memory by lifetime on nets counted by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import tinynn as tn
from kernels._jit import planning
from tinynn import nn
from tinynn.models import imagenet, thesis
from tinynn.tensor import Tensor


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Counting follows shapes: what a kernel would compute that is not compiled is not needed."""
    with planning(), np.errstate(all="ignore"):
        yield


def test_small_cifar_costs_what_the_thesis_says() -> None:
    model = thesis.small_cifar(rng=rng())
    cost = tn.count(model, zeros(1, 32, 32, 3))
    assert (cost.weights, cost.parameters, cost.trainable) == (124_288, 131_018, 131_018)
    assert cost.buffers == 2 * 2240 and cost.with_statistics == 131_018 + 4480
    assert cost.weight_bytes == 4 * cost.with_statistics
    assert (cost.macs, cost.flops) == (13_636_864, 27_273_728)
    assert tn.count(model, zeros(1, 24, 24, 3)).macs == 7_671_296
    assert tn.count(model, zeros(3, 32, 32, 3)).macs == 3 * cost.macs


@pytest.mark.parametrize(
    ("kind", "macs"),
    [
        ("conv", 16_129_280),  # 24^2 25 3 32 + 12^2 25 32 64 + 6^2 25 64 128 + 1280
        ("composing", 8_019_200),
        ("separable", 2_146_304),
        ("nonlinear", 2_146_304),
    ],
)
def test_alternatives_to_the_convolution(kind: thesis.Convolution, macs: int) -> None:
    assert tn.count(thesis.baseline(kind, rng=rng()), zeros(1, 24, 24, 3)).macs == macs


def test_resnet20_has_the_published_parameters() -> None:
    cost = tn.count(thesis.resnet20(rng=rng()), zeros(1, 32, 32, 3))
    assert (cost.parameters, cost.macs) == (269_722, 40_551_040)


@pytest.mark.parametrize(
    ("make", "parameters", "macs"),
    [
        (imagenet.resnet34, 21_797_672, 3_663_761_408),  # known: 21.8 M and 3.66 G
        (imagenet.separable_resnet34, 3_109_508, 465_154_304),
    ],
)
def test_networks_for_imagenet(make: Callable[..., nn.Module], parameters: int, macs: int) -> None:
    model = make(rng=rng())
    cost = tn.count(model, zeros(1, 224, 224, 3))
    assert (cost.parameters, cost.macs) == (parameters, macs)
    assert cost.layers[-1].output == (1, 1000)
    pooled = next(layer for layer in cost.layers if layer.kind == "MaxPool2d")
    assert pooled.output == (1, 56, 56, 64)


def test_the_cheap_stem_costs_a_quarter() -> None:
    stems = []
    for make in (imagenet.resnet34, imagenet.separable_resnet34):
        layers = tn.count(make(rng=rng()), zeros(1, 64, 64, 3)).layers
        end = next(i for i, layer in enumerate(layers) if layer.kind == "MaxPool2d")
        stems.append(sum(layer.macs for layer in layers[:end]))
    assert round(stems[0] / stems[1], 1) == 4.0


def test_layers_add_up_to_the_totals() -> None:
    cost = tn.count(thesis.baseline("nonlinear", rng=rng()), zeros(2, 12, 12, 3))
    for name in ("weights", "parameters", "buffers", "weight_bytes", "macs", "flops"):
        assert sum(getattr(layer, name) for layer in cost.layers) == getattr(cost, name), name
    made = sum(layer.activation_bytes for layer in cost.layers)
    assert made + 4 * 2 * 12 * 12 * 3 == cost.activation_bytes


def test_memory_of_a_chain_is_two_neighbours() -> None:
    net = nn.Sequential(
        nn.Linear(10, 30, rng=rng()), nn.Tanh(), nn.Linear(30, 20, rng=rng()), nn.Tanh()
    )
    cost = tn.count(net, zeros(2, 10))
    assert cost.activation_bytes == 4 * 2 * (10 + 30 + 30 + 20 + 20)
    assert cost.peak_activation_bytes == 4 * 2 * (30 + 30)


def test_memory_holds_a_shortcut_until_the_addition() -> None:
    body = nn.Sequential(nn.Linear(10, 30, rng=rng()), nn.Tanh(), nn.Linear(30, 10, rng=rng()))
    cost = tn.count(nn.Add(body, nn.Shortcut(10, 10)), zeros(1, 10))
    assert cost.peak_activation_bytes == 4 * (10 + 30 + 30)


def test_memory_of_a_flatten_is_that_of_what_it_looks_at() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, rng=rng()))
    cost = tn.count(net, zeros(1, 2, 2, 3))
    assert cost.activation_bytes == 4 * (12 + 3) == cost.peak_activation_bytes


def test_float64_has_twice_the_bytes() -> None:
    net = nn.Sequential(nn.Linear(10, 30, rng=rng()), nn.BatchNorm(30))
    one, two = tn.count(net, zeros(1, 10)), tn.count(net.astype(np.float64), np.zeros((1, 10)))
    assert (two.weight_bytes, two.peak_activation_bytes) == (
        2 * one.weight_bytes, 2 * one.peak_activation_bytes
    )  # fmt: skip
    assert two.macs == one.macs


def test_a_layer_used_twice_has_its_parameters_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(4, 4, rng=rng())
            self.idle = nn.Linear(4, 4, rng=rng())
            self.layer.weight.requires_grad = False

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    cost = tn.count(Twice(), zeros(1, 4))
    assert sum(layer.parameters for layer in cost.layers) == 20
    assert (cost.parameters, cost.trainable, cost.macs) == (40, 24, 32)


def test_the_table_names_its_units() -> None:
    net = nn.Sequential(nn.Linear(10, 30, rng=rng()), nn.BatchNorm(30), nn.ReLU())
    lines = str(tn.count(net, zeros(1, 10))).splitlines()
    assert lines[0].split()[0] == "layer"
    for unit in ("parameters", "multiply-adds", "FLOPs", "weight bytes", "activation bytes"):
        assert unit in lines[0]
    row = next(line for line in lines if line.startswith("0 "))
    assert row.split()[1:] == ["Linear", "1x30", "330", "300", "600", "1,320", "120"]
    total = next(line for line in lines if line.startswith("total"))
    assert total.split()[1:] == ["390", "300", "600", "1,800", "280"]
    assert "390 parameters (300 weights" in "\n".join(lines) and "450 with running" in str(lines)
