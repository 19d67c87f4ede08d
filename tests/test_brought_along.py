"""What a user brings along: an op of their own, data in other forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn import nn
from tinynn.errors import DataError, StaleArrayError
from tinynn.op import Array, Op, Saved, registry
from tinynn.roofline import Limits
from tinynn.tensor import Tensor, apply


@pytest.fixture
def reverse() -> Iterator[nn.Module]:
    """Gradient reversal (Ganin & Lempitsky 2015) in as few lines as an op can have."""

    @dataclass(frozen=True)
    class ReverseGradient(Op):
        channels = "same"

        def forward(self, *arrays: Array) -> tuple[Array, Saved]:
            return arrays[0], ()

        def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
            return (-grad,)

    class Reverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return apply(ReverseGradient(), x)

    yield Reverse()
    del registry["reverse_gradient"]
    del nn.Module.registry[Reverse.kind()]


def batch() -> Array:
    return np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)


def net(reverse: nn.Module) -> nn.Module:
    rng = np.random.default_rng(0)
    return nn.Sequential(reverse, nn.Linear(3, 5, rng=rng), reverse, nn.Linear(5, 2, rng=rng))


def test_a_result_that_is_the_operand_is_a_value_of_its_own(reverse: nn.Module) -> None:
    nodes = tn.graph.trace(net(reverse), batch()).nodes
    assert [n.op.name for n in nodes] == ["reverse_gradient", "linear"] * 2
    made = [n.output.index for n in nodes]
    assert len(set(made)) == 4 and {n.output.kind for n in nodes} == {"result"}
    assert [n.inputs[0].index for n in nodes] == [0, *made[:-1]]


def test_such_a_result_still_shares_the_memory(reverse: nn.Module) -> None:
    x = nn.Parameter(batch())
    y = reverse(x)
    loss = (y * y).sum()
    x.mutate()[...] = 0
    with pytest.raises(StaleArrayError):
        loss.backward()


def test_channels_are_pruned_through_it(reverse: nn.Module) -> None:
    model = net(reverse)
    smaller = tn.prune.channels(
        model, tn.observe(model, [batch()]), tn.importance.l1, tn.select.share(0.6)
    )
    assert smaller.parameters()[0].shape == (3, 3)


def test_it_is_profiled_though_it_has_no_samples(reverse: nn.Module) -> None:
    limits = Limits(1, 1e11, {"L1": 1 << 15}, {"L1": 1e11, "memory": 1e10}, 0.0)
    found = tn.profile.step(net(reverse), batch(), seconds=0.01, limits=limits)
    assert [layer.op for layer in found.layers] == ["reverse_gradient", "linear"] * 2
    assert found.layers[0].forward.bounds["overhead"] == 0.0


def test_positions_as_input_are_profiled_in_the_dtype_of_the_results() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            self.table = nn.Parameter(np.ones((7, 4), np.float32))

        def forward(self, x: Tensor) -> Tensor:
            return tn.ops.take(self.table, x)

    limits = Limits(1, 1e11, {"L1": 1 << 15}, {"L1": 1e11, "memory": 1e10}, 0.0)
    found = tn.profile.step(Rows(), np.array([0, 6, 6]), seconds=0.01, limits=limits)
    assert [(layer.op, layer.output) for layer in found.layers] == [("take", (3, 4))]


@pytest.mark.parametrize("wrong", [batch(), (batch(), batch()), [Tensor(batch()), Tensor(batch())]])
def test_arrays_are_no_batches(wrong: Any) -> None:
    model = nn.Linear(3, 3, rng=np.random.default_rng(0))
    optimizer = tn.SGD(model.parameters(), lr=0.1)
    with pytest.raises(DataError, match=r"fit: required an iterable of batches \(x, y\)"):
        tn.fit(model, wrong, loss=tn.mse, optimizer=optimizer, epochs=1)
    with pytest.raises(DataError, match="predict: required"):
        tn.predict(model, wrong)
    with pytest.raises(DataError, match="evaluate: required"):
        tn.evaluate(model, wrong, tn.mse)
