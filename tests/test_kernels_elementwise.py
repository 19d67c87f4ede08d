"""ReLU and its gradient against the reference loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels import _jit, elementwise, reference

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5, -1.5, 1e-45]
ARRAYS = st.sampled_from([np.float32, np.float64]).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(max_dims=4, max_side=9),
        elements=st.floats(width=32) | st.sampled_from(SPECIAL),
    )
)


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if request.param == "parallel" else 1 << 60)
        yield


@settings(max_examples=60, deadline=None)
@given(ARRAYS, st.integers(0, 2**31))
def test_relu_and_gradient(x, seed):
    y = elementwise.relu(x)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, reference.relu(x))
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    grad = np.random.default_rng(seed).permuted(x.reshape(-1)).reshape(x.shape)
    got = elementwise.relu_grad(grad, y)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, reference.relu_grad(grad, y))


def test_gradient_passes_where_the_result_is_nan():
    y = np.array([np.nan, 0.0, -0.0, 1.0, np.inf])
    expected = np.array([7.0, 0.0, 0.0, 7.0, 7.0])
    np.testing.assert_array_equal(elementwise.relu_grad(np.full(5, 7.0), y), expected)


@pytest.mark.parametrize("size", [16383, 16384, 16385, 50001])
def test_more_than_one_chunk(size):
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    y = elementwise.relu(x)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(elementwise.relu_grad(x, y), np.where(x > 0, x, 0))


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
def test_threads_do_not_change_a_bit():
    x = np.random.default_rng(0).standard_normal(70001).astype(np.float32)
    before = _jit.get_threads()
    results = []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            results.append(elementwise.relu_grad(x, elementwise.relu(x)).tobytes())
    finally:
        _jit.set_threads(before)
    assert results[0] == results[1]


def test_any_layout_is_taken():
    x = np.random.default_rng(0).standard_normal((6, 8, 4))
    x.flags.writeable = False
    for view in (x.T, x[::2], x[:, 1:3]):
        y = elementwise.relu(view)
        np.testing.assert_array_equal(y, np.maximum(view, 0))
        np.testing.assert_array_equal(elementwise.relu_grad(view, y), np.where(view > 0, view, 0))


def test_wrong_operands_are_named():
    with pytest.raises(TypeError, match=r"relu: .*float32 or float64, got int64"):
        elementwise.relu(np.ones(3, np.int64))
    with pytest.raises(ValueError, match=r"relu_grad: .*\(3,\), got \(4,\)"):
        elementwise.relu_grad(np.ones(4), np.ones(3))
