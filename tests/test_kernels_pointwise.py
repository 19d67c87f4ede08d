"""Matrix products and linear layers against the reference loops."""

from __future__ import annotations

import numpy as np
import pytest
from borders import bordered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import _jit, pointwise, product, reference, simd

QUICK = settings(max_examples=25, deadline=None)
DTYPES = st.sampled_from([np.float32, np.float64])
# One long side and two short ones, in any order; 4 is the largest side held in registers.
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 100)).flatmap(
    st.permutations
)
LARGE = [
    (200, 70, 33),
    (70, 300, 530),
    (40, 1100, 150),
    (33, 259, 5),
    (5, 7, 1030),
    (1000, 2, 100),
    (100, 1000, 1),
    (1, 100, 90),
]


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if request.param == "parallel" else 1 << 60)
        yield


def randoms(dtype, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def check(got, exact, dtype, terms):
    """`terms` products of standard normal numbers were added: their sizes bound the rounding."""
    assert got.dtype == dtype and got.shape == exact.shape
    assert got.flags.carray
    np.testing.assert_allclose(got, exact, rtol=0, atol=(8 + 2 * terms) * np.finfo(dtype).eps)


def wide(*arrays):
    return [a.astype(np.float64) for a in arrays]


@QUICK
@given(SIZES, DTYPES)
def test_products(sizes, dtype):
    m, k, n = sizes
    a, b, c = randoms(dtype, (m, k), (k, n), (m, n))
    check(pointwise.matmul(a, b), reference.matmul(*wide(a, b)), dtype, k)
    check(pointwise.matmul_tn(a, c), reference.matmul_tn(*wide(a, c)), dtype, m)
    check(pointwise.matmul_nt(c, b), reference.matmul_nt(*wide(c, b)), dtype, n)


@QUICK
@given(SIZES, DTYPES, st.booleans(), st.booleans())
def test_linear(sizes, dtype, relu, biased):
    m, k, n = sizes
    x, w, bias, grad = randoms(dtype, (m, k), (k, n), n, (m, n))
    b = bias if biased else None
    y = pointwise.linear(x, w, b, relu)
    exact = reference.linear(*wide(x, w), bias.astype(np.float64) if biased else None, relu)
    check(y, exact, dtype, k + 1)

    gradients = pointwise.linear_grad(grad, x, w, y, relu)
    expected = reference.linear_grad(*wide(grad, x, w, y), relu)
    for got, exact, terms in zip(gradients, expected, (n, m, m), strict=True):
        check(got, exact, dtype, terms)


@pytest.mark.parametrize("sizes", LARGE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sizes_beyond_one_block(sizes, dtype):
    m, k, n = sizes
    x, w, bias, grad = randoms(dtype, (m, k), (k, n), n, (m, n))
    y = pointwise.linear(x, w, bias, True)
    x8, w8, bias8, grad8 = wide(x, w, bias, grad)
    check(y, np.maximum(x8 @ w8 + bias8, 0), dtype, k)
    gx, gw, gb = pointwise.linear_grad(grad, x, w, y, True)
    masked = np.where(y <= 0, 0, grad8)
    check(gx, masked @ w8.T, dtype, n)
    check(gw, x8.T @ masked, dtype, m)
    check(gb, masked.sum(0), dtype, m)


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
@pytest.mark.parametrize("sizes", [*LARGE, (97, 3, 50), (61, 50, 3), (130, 67, 35), (3000, 40, 24)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_do_not_change_a_bit(sizes, dtype):
    m, k, n = sizes
    x, w, bias, grad = randoms(dtype, (m, k), (k, n), n, (m, n))
    before = _jit.get_threads()
    results = []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            y = pointwise.linear(x, w, bias, True)
            results.append([y, *pointwise.linear_grad(grad, x, w, y, True)])
    finally:
        _jit.set_threads(before)
    for one, two in zip(*results, strict=True):
        assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize(
    "sizes", [(5, 1, 9), (6, 2, 9), (5, 3, 9), (5, 9, 1), (2, 9, 9), (9, 9, 9)]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_pass(sizes, value):
    m, k, n = sizes
    for place in range(5):
        x, w, bias, grad, y = arrays = randoms(np.float64, (m, k), (k, n), n, (m, n), (m, n))
        arrays[place][-1] = value
        with np.errstate(invalid="ignore"):
            for relu in (False, True):
                expected = reference.linear(x, w, bias, relu)
                got = pointwise.linear(x, w, bias, relu)
                np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
            expected = reference.linear_grad(grad, x, w, y, True)
            gradients = pointwise.linear_grad(grad, x, w, y, True)
        for got, exact in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-12, atol=1e-12)


def test_only_what_is_needed_is_computed():
    x, w, grad = randoms(np.float32, (6, 2), (2, 9), (6, 9))
    whole = pointwise.linear_grad(grad, x, w, None, False)
    for needs in np.ndindex(2, 2, 2):
        some = pointwise.linear_grad(grad, x, w, None, False, tuple(map(bool, needs)))
        for need, one, all_of_it in zip(needs, some, whole, strict=True):
            assert (one is not None) == bool(need)
            if need:
                np.testing.assert_array_equal(one, all_of_it)


def test_any_layout_is_taken():
    x, w, bias, grad = randoms(np.float32, (12, 18), (18, 14), 28, (12, 14))
    expected = pointwise.linear(x, w, bias[::2].copy(), True)
    turned = np.asfortranarray(x)
    turned.flags.writeable = False
    y = pointwise.linear(turned, np.asfortranarray(w), bias[::2], True)
    np.testing.assert_array_equal(y, expected)
    for got, exact in zip(
        pointwise.linear_grad(np.asfortranarray(grad), turned, np.asfortranarray(w), y, True),
        pointwise.linear_grad(grad, x, w, y, True),
        strict=True,
    ):
        np.testing.assert_array_equal(got, exact)


def test_wrong_operands_are_named():
    x, w = randoms(np.float32, (3, 4), (5, 2))
    for function in (pointwise.matmul, pointwise.matmul_tn, pointwise.matmul_nt):
        with pytest.raises(ValueError, match=rf"{function.__name__}: .*\(3, 4\) and \(5, 2\)"):
            function(x, w)
    with pytest.raises(ValueError, match=r"expected bias \(2,\), got \(3,\)"):
        pointwise.linear(x, w[:4], np.zeros(3, np.float32), True)
    with pytest.raises(TypeError, match=r"matmul: .*float32, float64"):
        pointwise.matmul(x, w[:4].astype(np.float64))
    with pytest.raises(TypeError, match=r"matmul: .*int64, int64"):
        pointwise.matmul(np.ones((2, 2), np.int64), np.ones((2, 2), np.int64))
    with pytest.raises(ValueError, match=r"linear_grad: .*shape \(3, 2\), got \(3, 4\)"):
        pointwise.linear_grad(x, x, w[:4], None, False)
    with pytest.raises(ValueError, match=r"got .* and None"):
        pointwise.linear_grad(np.zeros((3, 2), np.float32), x, w[:4], None, True)


# --- the general product, beside what it must not touch -------------------------------------------

WIDTH = simd.TILE[1] * simd.LANES
#: Around the tile's height, the vector's length and the panel's width.
ODD = st.one_of(st.integers(1, 40), st.integers(WIDTH - 2, WIDTH + 18))


@pytest.fixture(params=["packed", "direct", "chunks"])
def path(request, monkeypatch):
    """Sends small operands the ways of large ones."""
    if request.param == "packed":
        monkeypatch.setattr(product, "_DIRECT_BYTES", 0)
        monkeypatch.setattr(product, "_DIRECT_ROWS", 0)
        monkeypatch.setattr(product, "_BLOCK_ROWS", simd.TILE[0])
    elif request.param == "chunks":
        monkeypatch.setattr(product, "_CHUNK_TERMS", 16)
    product._plan.cache_clear()
    yield request.param
    product._plan.cache_clear()


@pytest.mark.usefixtures("path")
@settings(QUICK, suppress_health_check=list(HealthCheck))
@given(ODD, ODD, ODD, DTYPES)
def test_general_product_stays_within_its_operands(monkeypatch, m, k, n, dtype):
    a, b, bias = randoms(dtype, (m, k), (k, n), n)
    exact = np.maximum(np.float64(a) @ b + bias, 0.25)
    results = []

    def empty(shape, dtype):
        """Lends results and packed operands bordered too."""
        array, border = bordered(np.zeros(shape, dtype))
        results.append(border)
        return array

    with monkeypatch.context() as patch:
        patch.setattr(product.memory, "empty", empty)
        patch.setattr(product, "_aligned", empty)
        for ta, tb in np.ndindex(2, 2):
            x, _ = bordered(np.ascontiguousarray(a.T) if ta else a)
            w, _ = bordered(np.ascontiguousarray(b.T) if tb else b)
            c, _ = bordered(bias)
            y = product.product(x, w, c, 0.25, transpose_a=bool(ta), transpose_b=bool(tb))
            np.testing.assert_allclose(y, exact, rtol=0, atol=(8 + 8 * k) * np.finfo(dtype).eps)
    assert all((border == 255).all() for border in results)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("n", [WIDTH, WIDTH + 5])
def test_one_special_number_marks_its_row_or_column_only(value, n):
    m, k = 3 * simd.TILE[0] + 1, 37
    a, b = (abs(x) + 0.1 for x in randoms(np.float32, (m, k), (k, n)))
    for place in range(m):
        x = a.copy()
        x[place, k - 1] = value
        marked = ~np.isfinite(pointwise.linear(x, b, None, True))
        assert marked[place].all() and marked.sum() == n
    for place in range(n):
        w = b.copy()
        w[k - 1, place] = value
        marked = ~np.isfinite(pointwise.matmul_nt(a, np.ascontiguousarray(w.T)))
        assert marked[:, place].all() and marked.sum() == m


@QUICK
@given(st.integers(1, 300), st.integers(5, 70), DTYPES, st.booleans())
def test_gated_sums(m, n, dtype, gate):
    grad, y = randoms(dtype, (m, n), (m, n))
    y[::3] = 0
    y[1::7] = np.nan
    g, total = product.gated_sums(grad, y if gate else None)
    expected = np.where(y <= 0, 0, grad) if gate else grad
    np.testing.assert_array_equal(g, expected)
    check(total, expected.astype(np.float64).sum(0), dtype, m)
