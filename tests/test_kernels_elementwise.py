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


@pytest.mark.parametrize("size", [1, 31, 16385])
def test_relu_in_place(size):  # as plans call it
    x = np.random.default_rng(0).choice(SPECIAL, size).astype(np.float32)
    expected = np.maximum(x, 0)
    elementwise._relu.choose(x.nbytes)(x, x)
    np.testing.assert_array_equal(x, expected)


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


ARITHMETIC = [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)]


@pytest.mark.parametrize(("name", "ufunc"), ARITHMETIC)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((40001,), (40001,)),
        ((), (33000,)),
        ((130, 9, 31), (31,)),
        ((1, 31), (130, 9, 31)),
        ((130, 9, 31), (9, 31)),
        ((130, 9, 31), (130, 1, 31)),
        ((3, 1, 20000), (1, 2, 20000)),
        ((3, 17001), (3, 1)),
        ((3, 17001), (17001,)),
        ((2, 3), (3,)),
        ((0, 3), (3,)),
        ((), ()),
        ((4, 1), (1, 1, 5)),
    ],
)
def test_arithmetic_is_that_of_numpy(name, ufunc, dtype, left, right):
    rng = np.random.default_rng(0)
    a, b = (
        rng.choice([*SPECIAL, *rng.standard_normal(40)], s).astype(dtype) for s in (left, right)
    )
    with np.errstate(all="ignore"):
        got, expected = getattr(elementwise, name)(a, b), ufunc(a, b)
        other = getattr(elementwise, name)(b, a)
    assert isinstance(got, np.ndarray) and got.dtype == dtype and got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(other, ufunc(b, a))


def test_arithmetic_takes_any_layout_and_dtype():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 300))
    fixed = x.copy()
    fixed.flags.writeable = False
    for a, b in (
        (x, fixed),
        (x.T, x.T),
        (x[:, ::2], x[:, 1::2]),
        (x, np.broadcast_to(x[:1], x.shape)),
        (x, x.astype(np.float32)),
        (x.astype(np.int64), x.astype(np.int64)),
    ):
        got, expected = elementwise.add(a, b), a + b
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="broadcast"):
        elementwise.add(x, x.T)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_frame_adds_and_cuts(data):
    shape = data.draw(hnp.array_shapes(max_dims=5, max_side=5))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    x = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    widths = []
    for n in shape:
        before = data.draw(st.sampled_from([0, 0, 1, 3, -1, -n]))
        widths.append((before, data.draw(st.integers(-n - before, 4))))
    padded = np.pad(x, [(max(0, b), max(0, a)) for b, a in widths], constant_values=0.5)
    inner = tuple(
        slice(max(0, -b), padded.shape[i] - max(0, -a)) for i, (b, a) in enumerate(widths)
    )
    got = elementwise.frame(x, widths, 0.5)
    np.testing.assert_array_equal(got, padded[inner])
    assert got.dtype == dtype and got.flags.carray


def test_frame_of_a_large_array():
    x = np.random.default_rng(0).standard_normal((40, 7, 5, 33)).astype(np.float32)
    widths = ((0, 0), (1, 2), (0, 1), (3, 4))
    y = elementwise.frame(x, widths)
    np.testing.assert_array_equal(y, np.pad(x, widths))
    np.testing.assert_array_equal(elementwise.frame(y, [(-b, -a) for b, a in widths]), x)
    with pytest.raises(ValueError, match="frame: expected sizes >= 0"):
        elementwise.frame(x, ((0, 0), (0, 0), (0, 0), (-30, -4)))
