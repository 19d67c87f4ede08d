"""Every op, with every attribute, is computed by a plan as by the model, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn import nn
from tinynn.deploy.lower import _LOWER
from tinynn.errors import CompileError
from tinynn.op import Op, Sample, registry
from tinynn.ops.reduce import Sum
from tinynn.ops.shape import Concat, Reshape
from tinynn.tensor import apply

#: What else than its sample's value an attribute is tried with, given the number of axes.
VALUES: dict[str, Any] = {
    "axis": lambda ndim: range(-ndim, ndim),
    "axes": lambda ndim: [c for n in (1, 2, 3) for c in combinations(range(ndim), n)],
    "keepdims": lambda _: [True],
    "relu": lambda _: [True],
    "stride": lambda _: [(1, 1), (2, 1)],
    "padding": lambda _: ["same", "valid", ((1, 0), (0, 1))],
    "dilation": lambda _: [(1, 2)],
    "kernel_size": lambda _: [(1, 2), (3, 2)],
    "eps": lambda _: [0.1],
    "value": lambda _: [1.5],
    "widths": lambda ndim: [((0, 0),) * i + ((1, 2),) + ((0, 0),) * (ndim - i - 1)
                            for i in range(ndim)],
    "gain": lambda _: [],  # matters in training only
    "dynamic": lambda _: [],  # says where the other operands come from
    "buckets": lambda _: [],  # of weights, which depend on no input
    "seed": lambda _: [],
    "shape": lambda _: [],  # these go together with the operands: the samples have them
    "output": lambda _: [],
    "places": lambda _: [],
    "width": lambda _: [],
    "exponent": lambda _: [],
    "smoothing": lambda _: [],
    "keys": lambda _: [],
}  # fmt: skip

#: Beside the ops' own samples, which have what a plan expresses in no case.
MORE = {
    "concat": [Sample(Concat(1), ((2, 3, 4), (2, 3, 4)))],
    "reshape": [Sample(Reshape((2, 6)), ((2, 3, 2),))],
    "sum": [Sample(Sum((1, 2)), ((2, 3, 4, 5),))],
}


class Applied(nn.Module):
    """An op on the model's input as one operand, or as each (-1); the others are constant."""

    def __init__(self, op: Op, arrays: list[np.ndarray], position: int) -> None:
        self.__dict__.update(op=op, arrays=arrays, position=position)

    def forward(self, x: tn.Tensor) -> tn.Tensor:
        operands = [
            x if self.position in (-1, i) else tn.Tensor(a) for i, a in enumerate(self.arrays)
        ]
        return apply(self.op, *operands)


def variants(sample: Sample) -> Iterator[Op]:
    """The sample's op, and the same with one attribute changed."""
    yield sample.op
    for field in fields(sample.op):  # type: ignore[arg-type]
        for value in VALUES[field.name](len(sample.shapes[0])):
            yield replace(sample.op, **{field.name: value})  # type: ignore[type-var]


def outcome(op: Op, arrays: list[np.ndarray], position: int) -> str:
    """What a plan of the op says; fails where it says something else than the model."""
    model = Applied(op, arrays, position).eval()
    x = arrays[position]
    try:
        with tn.no_grad():
            want = model(tn.Tensor(x)).numpy()
    except (tn.errors.TinynnError, IndexError, ValueError):
        return "no such op"
    try:
        y = tn.compile(model, x, choose="dense", threads=1)(x)
    except CompileError as error:
        assert type(op).__name__ in str(error), error
        return "refused"
    assert y.shape == want.shape, (op, position)
    assert np.allclose(y, want, rtol=1e-5, atol=1e-5), (op, position)
    return "computed"


@pytest.mark.parametrize("name", sorted(registry))
def test_attributes_are_honoured_or_refused(name: str) -> None:
    rng = np.random.default_rng(0)
    found = set()
    for sample in [*registry[name].samples(), *MORE.get(name, [])]:
        shapes = sample.shapes
        arrays = [rng.uniform(sample.low, sample.high, s).astype(np.float32) for s in shapes]
        for op in variants(sample):
            found.update(outcome(op, arrays, i) for i, a in enumerate(arrays) if a.ndim)
            if len(arrays) > 1 and len(set(shapes)) == 1 and shapes[0]:
                found.add(outcome(op, arrays, -1))
    assert ("computed" in found) == (name in _LOWER)


def test_softmax_is_along_the_last_axis() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    operands = [x]
    assert outcome(registry["softmax"](3), operands, 0) == "computed"  # type: ignore[call-arg]
    assert outcome(registry["softmax"](-1), operands, 0) == "computed"  # type: ignore[call-arg]
    for axis in (0, 1, 2, -2):
        with pytest.raises(CompileError, match=rf"last axis.*axis {axis}"):
            model = Applied(registry["softmax"](axis), operands, 0)  # type: ignore[call-arg]
            tn.compile(model, x)
