"""The observer's kernel against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference, statistics
from kernels._jit import get_threads, max_threads, set_threads


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from([np.float32, np.float64]))
def test_against_the_reference(rows: int, columns: int, dtype: type) -> None:
    rng = np.random.default_rng(rows * 1000 + columns)
    x = rng.normal(100, 3, (rows, columns)).astype(dtype)
    x[:, ::3] -= 100
    x[:, 0] = 7.25  # a constant column has no deviation at all
    got, expected = statistics.channels(x), reference.channels(x)
    for name, a, b in zip(("count", "mean", "squares", "low", "high"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-7, err_msg=name)
    assert got[2][0] == 0 and got[1][0] == 7.25


def test_threads_do_not_change_a_bit() -> None:
    x = np.random.default_rng(0).standard_normal((500, 1001)).astype(np.float32)
    before = get_threads()
    results = []
    for threads in {1, max_threads()}:
        set_threads(threads)
        results.append(statistics.channels(x))
    set_threads(before)
    for parts in zip(*results, strict=True):
        np.testing.assert_array_equal(parts[0], parts[-1])


def test_non_finite_values() -> None:
    x = np.array([[np.nan, np.inf, -np.inf], [1.0, 1.0, 1.0]])
    count, mean, _, low, high = statistics.channels(x)
    assert count.tolist() == [1, 2, 1]
    assert np.isnan(mean[0])
    assert low.tolist() == [1, 1, -np.inf] and high.tolist() == [1, np.inf, 1]


def test_bad_shapes_are_refused() -> None:
    for shape in ((3,), (0, 3), (2, 2, 2)):
        with pytest.raises(ValueError, match="channels"):
            statistics.channels(np.ones(shape))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1), (5,), (7, 3), (0, 4), (300_001, 1), (90_001, 3), (40, 30, 31), (20, 5000)]
)
def test_sums_by_channel(shape, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype) + dtype(1)
    rows = x.reshape(-1, shape[-1]) if x.size else x
    got = statistics.sums(x)
    expected = rows.sum(0, dtype=np.float64)
    assert got.dtype == dtype and got.shape == shape[-1:]
    scale = np.abs(rows).sum(0, dtype=np.float64)
    tolerance = 64 * np.finfo(dtype).eps * scale + 1e-30
    assert (np.abs(got - expected) <= tolerance).all()


def test_sums_take_any_layout_and_let_nan_and_infinity_through():
    x = np.ones((5000, 6), np.float32)
    x[4321, 2], x[17, 4] = np.nan, np.inf
    expected = [5000, 5000, np.nan, 5000, np.inf, 5000]
    np.testing.assert_array_equal(statistics.sums(x), expected)
    np.testing.assert_array_equal(statistics.sums(np.asfortranarray(x)), expected)


@pytest.mark.skipif(max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
def test_threads_do_not_change_a_bit_of_sums():
    x = np.random.default_rng(0).standard_normal((70001, 7)).astype(np.float32)
    before = get_threads()
    results = []
    try:
        for threads in (1, 2):
            set_threads(threads)
            results.append(statistics.sums(x).tobytes())
    finally:
        set_threads(before)
    assert results[0] == results[1]
