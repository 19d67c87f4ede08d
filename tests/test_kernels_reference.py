"""The reference loops against NumPy, where NumPy has the same operation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels import reference

VALUES = st.floats(-10, 10, width=32)
ARRAYS = hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=4), elements=VALUES)
QUICK = settings(max_examples=40, deadline=None)


@st.composite
def array_and_axes(draw):
    x = draw(ARRAYS)
    axes = draw(st.lists(st.integers(-x.ndim, x.ndim - 1), max_size=x.ndim))
    unique = {a % x.ndim: a for a in axes}
    return x, tuple(unique.values())


@QUICK
@given(array_and_axes(), st.booleans())
def test_reductions(case, keepdims):
    x, axes = case
    for ours, numpys in (
        (reference.reduce_sum, np.sum),
        (reference.reduce_mean, np.mean),
        (reference.reduce_var, np.var),
        (reference.reduce_max, np.max),
    ):
        expected = numpys(x, axis=axes, keepdims=keepdims)
        np.testing.assert_allclose(ours(x, axes, keepdims), expected, rtol=1e-12, atol=1e-12)
        everything = ours(x, keepdims=keepdims)
        np.testing.assert_allclose(everything, numpys(x, keepdims=keepdims), rtol=1e-12, atol=1e-12)


def test_reductions_pass_nan_and_infinity():
    x = np.array([[1.0, np.nan], [np.inf, 2.0], [np.inf, -np.inf], [-np.inf, -np.inf]])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(reference.reduce_sum(x, 1), x.sum(1))
        np.testing.assert_array_equal(reference.reduce_mean(x, 1), x.mean(1))
    np.testing.assert_array_equal(reference.reduce_max(x, 1), x.max(1))
    np.testing.assert_array_equal(reference.reduce_max(x[:, ::-1], 1), x.max(1))


@QUICK
@given(ARRAYS, st.data())
def test_softmax(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    p = reference.softmax(x, axis)
    e = np.exp(x - x.max(axis, keepdims=True))
    np.testing.assert_allclose(p, e / e.sum(axis, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(reference.softmax(x + 700, axis), p, rtol=1e-9)


@QUICK
@given(ARRAYS, st.data())
def test_moving_elements(x, data):
    order = data.draw(st.permutations(range(x.ndim)))
    np.testing.assert_array_equal(reference.transpose(x, order), x.transpose(order))
    np.testing.assert_array_equal(reference.transpose(x), x.T)

    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    parts = [x, np.flip(x, axis), x.take([0], axis)]
    np.testing.assert_array_equal(reference.concat(parts, axis), np.concatenate(parts, axis))

    widths = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)),
                                min_size=x.ndim, max_size=x.ndim))  # fmt: skip
    expected = np.pad(x, widths, constant_values=1.5)
    np.testing.assert_array_equal(reference.pad(x, widths, 1.5), expected)

    slices = [data.draw(st.slices(n)) for n in x.shape[: data.draw(st.integers(0, x.ndim))]]
    np.testing.assert_array_equal(reference.take_slice(x, slices), x[tuple(slices)])


@QUICK
@given(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3))
def test_elementwise_broadcasts(shapes):
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(s) for s in shapes.input_shapes)
    out = reference.elementwise(lambda x, y, z: x * y - z, a, b, c)
    assert out.shape == shapes.result_shape
    np.testing.assert_array_equal(out, a * b - c)


def test_elementwise_promotes_like_numpy():
    f, d = np.ones(2, np.float32), np.ones(2)
    assert reference.elementwise(lambda x: x, f).dtype == np.float32
    assert reference.elementwise(lambda x, y: x + y, f, d).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products(dtype):
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(s).astype(dtype) for s in ((3, 4), (4, 2), (3, 2)))
    for got, expected in (
        (reference.matmul(a, b), a @ b),
        (reference.matmul_tn(a, c), a.T @ c),
        (reference.matmul_nt(c, b), c @ b.T),
        (reference.linear(a, b, c[0], False), a @ b + c[0]),
        (reference.linear(a, b, c[0], True), np.maximum(a @ b + c[0], 0)),
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
