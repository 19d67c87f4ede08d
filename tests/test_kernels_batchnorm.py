"""Batch normalisation against its plain-loop twin, against torch, and beside guarded memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from borders import bordered
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import batchnorm as kernels
from kernels import reference, simd

DTYPES = [np.float32, np.float64]
EPS = 1e-5
#: M, C: one row or channel, fewer rows than fold, tails of rows and channels, several chunks.
SHAPES = [(1, 1), (1, 40), (3, 3), (9, 16), (50, 17), (700, 3), (2100, 1), (300, 64), (40, 300)]


def numbers(rows, columns, dtype=np.float64, seed=0):
    """x, grad (M, C), gamma, beta (C,)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * rng.uniform(0.1, 3, columns)
    x += rng.uniform(-4, 4, columns)
    arrays = (x, rng.standard_normal(x.shape), *rng.standard_normal((2, columns)))
    return [a.astype(dtype) for a in arrays]


def wide(*arrays):
    return [None if a is None else np.asarray(a, np.float64) for a in arrays]


def check(dtype, got, expected, terms=1.0):
    """Rounding of sums of some thousand terms, relative to the largest value or term."""
    assert got.dtype == dtype and got.shape == expected.shape
    scale = max(1.0, terms, float(np.abs(expected).max()))
    tolerance = (2e-5 if dtype == np.float32 else 1e-12) * scale
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape, relu, dtype):
    compare(*shape, relu, dtype)


@given(st.integers(1, 300), st.integers(1, 40), st.booleans(), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_forward_and_gradients_of_any_size(rows, columns, relu, dtype):
    compare(rows, columns, relu, dtype)


def compare(rows, columns, relu, dtype):
    x, grad, gamma, beta = numbers(rows, columns, dtype)
    got = kernels.batchnorm(x, gamma, beta, EPS, relu)
    for a, b in zip(got, reference.batchnorm(*wide(x, gamma, beta), EPS, relu), strict=True):
        check(dtype, a, b)
    y, mean, var = got
    y = y if relu else None
    expected = reference.batchnorm_grad(*wide(grad, x, y, gamma, mean, var), EPS)
    grads = kernels.batchnorm_grad(grad, x, beta if relu else None, gamma, mean, var, EPS)
    terms = float(np.abs(gamma / np.sqrt(var + EPS)).max())
    for a, b in zip(grads, expected, strict=True):
        check(dtype, a, b, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_stops_exactly_where_the_result_is_zero(shape, dtype):
    x, grad, gamma, beta = numbers(*shape, dtype)
    beta[::2] = 0  # with rounded values, some results are exactly 0
    x[:, ::2] = np.round(x[:, ::2])
    y, mean, var = kernels.batchnorm(x, gamma, beta, EPS, True)
    gated = kernels.batchnorm_grad(grad, x, beta, gamma, mean, var, EPS)
    zeroed = np.where(y <= 0, dtype(0), grad)
    plain = kernels.batchnorm_grad(zeroed, x, None, gamma, mean, var, EPS)
    for a, b in zip(gated, plain, strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=3),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from(DTYPES),
)
@settings(max_examples=40, deadline=None)
def test_scale_shift(leading, columns, relu, dtype):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((*leading, columns)).astype(dtype)
    scale, shift = rng.standard_normal((2, columns)).astype(dtype)
    expected = x.astype(np.float64) * scale + shift
    expected = reference.relu(expected) if relu else expected
    check(dtype, kernels.scale_shift(x, scale, shift, relu), expected)


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("columns", [16, 100, 300])
def test_plans_of_large_arrays(columns, huge, monkeypatch):
    kernels._plan.cache_clear()
    monkeypatch.setattr(kernels, "_LARGE", 1)
    monkeypatch.setattr(kernels, "_HUGE", 1 if huge else 1 << 60)
    assert (kernels._plan(700, columns, 4).step == 1) == (huge and columns != 16)
    compare(700, columns, True, np.float32)
    kernels._plan.cache_clear()


def test_each_plan_covers_the_array():
    for rows in (1, 7, 100, 5000, 200_000):
        for columns in (1, 3, 16, 17, 100, 128, 1000, 5000):
            plan = kernels._plan(rows, columns, 4)
            assert plan.width % columns == 0 and plan.padded >= plan.width
            assert plan.padded % (kernels._NV * simd.LANES) == 0
            assert plan.step >= 1 and 1 <= plan.chunks <= 16


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1e3, -1e5])
def test_the_variance_does_not_cancel_far_from_zero(offset):
    x = (np.random.default_rng(0).standard_normal((20_000, 3)) + offset).astype(np.float32)
    y, mean, var = kernels.batchnorm(x, *np.ones((2, 3), np.float32), 0.0, False)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(var, exact.var(0), rtol=1e-5)
    # The mean that it subtracts is rounded to float32.
    rounding = np.spacing(np.float32(abs(offset))) + 1e-5
    expected = (exact - exact.mean(0)) / exact.std(0) + 1
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=rounding)


def test_first_rows_far_from_the_others():
    x = np.random.default_rng(0).standard_normal((4096, 4)).astype(np.float32)
    x[0] = 1e4
    _, mean, var = kernels.batchnorm(x, *np.ones((2, 4), np.float32), EPS, False)
    np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(var, x.var(0, dtype=np.float64), rtol=1e-4)


def test_a_constant_channel_becomes_beta_exactly():
    x = np.full((1000, 5), 0.1, np.float32) * np.array([1, 10, 1e3, 1e5, 1e7], np.float32)
    gamma, beta = np.full(5, 3, np.float32), np.arange(5, dtype=np.float32)
    y, mean, var = kernels.batchnorm(x, gamma, beta, EPS, False)
    np.testing.assert_array_equal(var, 0)
    np.testing.assert_array_equal(mean, x[0])
    np.testing.assert_array_equal(y, np.broadcast_to(beta, y.shape))


# --- NaN and infinity -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [0, 5, 699])
@pytest.mark.parametrize(("value", "mean"), [(np.nan, np.nan), (np.inf, np.inf)])
def test_what_is_not_finite_stays_in_its_channel(value, mean, row, dtype):
    x, grad, gamma, beta = numbers(700, 5, dtype)
    clean = kernels.batchnorm(x, gamma, beta, EPS, True)
    x[row, 2] = value
    y, means, var = kernels.batchnorm(x, gamma, beta, EPS, True)
    np.testing.assert_equal(means[2], dtype(mean))
    assert np.isnan(var[2]) and np.isnan(y[:, 2]).all()
    others = [0, 1, 3, 4]
    for a, b in zip((y, means, var), clean, strict=True):
        np.testing.assert_array_equal(a[..., others], b[..., others])
    gx, ggamma, gbeta = kernels.batchnorm_grad(grad, x, beta, gamma, means, var, EPS)
    assert np.isnan(gx[:, 2]).all() and np.isnan(ggamma[2])
    assert np.isfinite(gbeta).all()  # NaN in y lets the gradient pass
    assert np.isfinite(gx[:, others]).all() and np.isfinite(ggamma[others]).all()


def test_scale_shift_passes_nan_and_infinity():
    x = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    got = kernels.scale_shift(x, np.ones(4, np.float32), np.zeros(4, np.float32), True)
    np.testing.assert_array_equal(got, [[np.nan, np.inf, 0, 1]])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_other_layouts_give_the_same(relu, dtype):
    x, grad, gamma, beta = numbers(90, 20, dtype)
    y, mean, var = kernels.batchnorm(x, gamma, beta, EPS, relu)
    grads = kernels.batchnorm_grad(grad, x, beta, gamma, mean, var, EPS)
    for change in (np.asfortranarray, misaligned, spaced, frozen):
        X, G, ga, be = map(change, (x, grad, gamma, beta))
        again = kernels.batchnorm(X, ga, be, EPS, relu)
        for a, b in zip(again, (y, mean, var), strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(
            kernels.batchnorm_grad(G, X, be, ga, change(mean), change(var), EPS),
            grads,
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(
            kernels.scale_shift(X, ga, be, relu), kernels.scale_shift(x, gamma, beta, relu)
        )


def misaligned(array):
    raw = np.empty(array.nbytes + 1, np.uint8)[1:]
    copy = raw.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def spaced(array):
    return np.repeat(array, 2, axis=-1)[..., ::2]


def frozen(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (37, 100), (2053, 5)])
def test_nothing_is_touched_behind_the_arrays(shape, dtype, monkeypatch):
    lent = []

    def empty(shape, dtype):
        lent.append(bordered(np.zeros(shape, dtype))[0])
        return lent[-1]

    monkeypatch.setattr(kernels.memory, "empty", empty)
    x, grad, gamma, beta = (bordered(a)[0] for a in numbers(*shape, dtype))
    _, mean, var = kernels.batchnorm(x, gamma, beta, EPS, True)
    kernels.batchnorm_grad(grad, x, beta, gamma, bordered(mean)[0], bordered(var)[0], EPS)
    kernels.scale_shift(x, gamma, beta, True)
    assert len(lent) == 3


def test_nothing_is_written_before_or_behind_the_result(monkeypatch):
    fields = []

    def empty(shape, dtype):
        field = np.full(int(np.prod(shape)) + 200, 7, dtype)
        fields.append(field)
        return field[100:-100].reshape(shape)

    monkeypatch.setattr(kernels.memory, "empty", empty)
    for shape in SHAPES:
        x, grad, gamma, beta = numbers(*shape, np.float32)
        _, mean, var = kernels.batchnorm(x, gamma, beta, EPS, True)
        kernels.batchnorm_grad(grad, x, beta, gamma, mean, var, EPS)
        kernels.scale_shift(x, gamma, beta, False)
    assert len(fields) == 3 * len(SHAPES)
    for field in fields:
        assert (field[:100] == 7).all() and (field[-100:] == 7).all()


# --- threads --------------------------------------------------------------------------------------

_HASH = """
import hashlib, sys
import numpy as np
from kernels import batchnorm as k
from kernels._jit import set_threads
set_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for rows, columns in ((3000, 40), (40_000, 3), (2049, 129)):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, rows, columns)).astype(np.float32)
    v, w = rng.standard_normal((2, columns)).astype(np.float32)
    y, mean, var = k.batchnorm(x, v, w, 1e-5, True)
    for a in (y, mean, var, *k.batchnorm_grad(g, x, w, v, mean, var, 1e-5)):
        digest.update(a.tobytes())
    digest.update(k.scale_shift(x, v, w, True).tobytes())
print(digest.hexdigest())
"""


def test_one_and_two_threads_give_the_same_bits():
    def run(threads):
        return subprocess.run(
            [sys.executable, "-c", _HASH, str(threads)],
            env={**os.environ, "NUMBA_NUM_THREADS": "2"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert run(1) == run(2)


# --- errors, torch --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda x, v: kernels.batchnorm(x, v, v[:2], EPS, False),
        lambda x, v: kernels.batchnorm(x[:0], v, v, EPS, False),
        lambda x, v: kernels.batchnorm(x[0], v, v, EPS, False),
        lambda x, v: kernels.batchnorm_grad(x[:2], x, None, v, v, v, EPS),
        lambda x, v: kernels.batchnorm_grad(x, x, v[:2], v, v, v, EPS),
        lambda x, v: kernels.batchnorm_grad(x, x, None, v, v, v[:1], EPS),
        lambda x, v: kernels.scale_shift(x, v[:2], v, False),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match=r"\(4, 3\)|\(0, 3\)|\(3,\)"):
        call(np.ones((4, 3), np.float32), np.ones(3, np.float32))


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64"):
        kernels.batchnorm(np.ones((4, 3)), *np.ones((2, 3), np.float32), EPS, False)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(700, 3), (300, 64), (50, 17)])
def test_torch_computes_the_same(shape, relu):
    torch = pytest.importorskip("torch")
    x, grad, gamma, beta = numbers(*shape)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    out = torch.nn.functional.batch_norm(
        leaves[0], None, None, leaves[1], leaves[2], training=True, eps=EPS
    )
    out = torch.relu(out) if relu else out
    out.backward(torch.tensor(grad))
    y, mean, var = kernels.batchnorm(x, gamma, beta, EPS, relu)
    np.testing.assert_allclose(y, out.detach().numpy(), atol=1e-12)
    grads = kernels.batchnorm_grad(grad, x, beta if relu else None, gamma, mean, var, EPS)
    for a, leaf in zip(grads, leaves, strict=True):
        np.testing.assert_allclose(a, leaf.grad.numpy(), atol=1e-11)
