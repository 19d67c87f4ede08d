"""The published architectures: shapes, counts, and that they learn."""

from __future__ import annotations

import numpy as np
import pytest

import tinynn as tn
from tinynn.models import thesis
from tinynn.tensor import Tensor, recording


def weights(model: tn.Module) -> int:
    return sum(p.size for p in model.parameters() if p.ndim > 1)


def multiply_adds(model: tn.Module, shape: tuple[int, ...]) -> int:
    total = 0

    def count(op: tn.Op, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += op.macs(*(t.shape for t in inputs))

    with recording(count), tn.no_grad():
        model.eval()(Tensor(np.zeros(shape, np.float32)))
    return total


def test_small_cifar_has_the_published_weights_and_multiply_adds() -> None:
    model = thesis.small_cifar(rng=np.random.default_rng(0))
    assert weights(model) == 124_288
    assert model.size() == 131_018
    assert round(multiply_adds(model, (1, 32, 32, 3)) / 1e6, 2) == 13.64
    assert round(multiply_adds(model, (1, 24, 24, 3)) / 1e6, 2) == 7.67


def test_resnet20_has_the_published_size() -> None:
    model = thesis.resnet20(rng=np.random.default_rng(0))
    assert round(model.size() / 1e6, 2) == 0.27
    assert round(multiply_adds(model, (1, 32, 32, 3)) / 1e6) == 41


@pytest.mark.parametrize(
    ("kind", "millions"),
    [("conv", 16.1), ("composing", 8.0), ("separable", 2.1), ("nonlinear", 2.1)],
)
def test_baseline_and_alternatives_have_the_published_multiply_adds(
    kind: thesis.Convolution, millions: float
) -> None:
    model = thesis.baseline(kind, rng=np.random.default_rng(0))
    assert round(multiply_adds(model, (1, 24, 24, 3)) / 1e6, 1) == millions


def test_the_autoencoder_gives_back_the_shape() -> None:
    model = thesis.autoencoder(rng=np.random.default_rng(0))
    assert model(Tensor(np.zeros((2, 28, 28, 1), np.float32))).shape == (2, 28, 28, 1)


@pytest.mark.parametrize("name", ["small_cifar", "baseline", "resnet20"])
def test_a_few_steps_reduce_the_loss(name: str) -> None:
    rng = np.random.default_rng(0)
    model = getattr(thesis, name)(rng=rng)
    x = rng.standard_normal((16, 12, 12, 3), dtype=np.float32)
    labels = rng.integers(0, 10, 16)
    data = tn.Batches(x, labels, size=16, rng=rng)
    optimizer = tn.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history = tn.fit(model, data, loss=tn.softmax_cross_entropy, optimizer=optimizer, epochs=8)
    assert history.losses[-1] < history.losses[0] / 2


def test_same_bits_for_any_thread_count() -> None:
    if tn.max_threads() < 2:
        pytest.skip("one core")
    states = []
    before = tn.get_threads()
    for threads in (1, 2):
        tn.set_threads(threads)
        rng = np.random.default_rng(0)
        model = thesis.small_cifar(rng=rng)
        x = rng.standard_normal((32, 24, 24, 3), dtype=np.float32)
        data = tn.Batches(x, rng.integers(0, 10, 32), size=32, rng=rng)
        optimizer = tn.SGD(model.parameters(), lr=0.05, momentum=0.9)
        tn.fit(model, data, loss=tn.softmax_cross_entropy, optimizer=optimizer, epochs=2)
        states.append(model.state_dict())
    tn.set_threads(before)
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
