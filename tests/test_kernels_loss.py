"""Losses against the reference loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import loss, reference

QUICK = settings(max_examples=60, deadline=None)
DTYPES = st.sampled_from([np.float32, np.float64])


def close(got, exact, dtype, size=1.0):
    np.testing.assert_allclose(got, exact, rtol=0, atol=8 * size * np.finfo(dtype).eps)


@QUICK
@given(st.lists(st.integers(1, 9), max_size=3), DTYPES, st.floats(-3, 3), st.integers(0, 999))
def test_mse(shape, dtype, scale, seed):
    rng = np.random.default_rng(seed)
    pred, target = (rng.standard_normal(tuple(shape)).astype(dtype) for _ in range(2))
    pred8, target8 = pred.astype(np.float64), target.astype(np.float64)
    close(loss.mse(pred, target), reference.mse(pred8, target8), dtype, 4)
    grad = loss.mse_grad(pred, target, scale)
    assert grad.dtype == dtype and grad.shape == pred.shape
    close(grad, reference.mse_grad(pred8, target8, scale), dtype, 12)


@QUICK
@given(
    st.integers(1, 9),
    st.integers(1, 12),
    DTYPES,
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([1.0, 30.0]),
    st.sampled_from([np.int64, np.int32, np.uint8]),
    st.integers(0, 999),
)
def test_softmax_cross_entropy(batch, classes, dtype, smoothing, spread, kind, seed):
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal((batch, classes))).astype(dtype)
    labels = rng.integers(0, classes, batch).astype(kind)
    value, p = loss.softmax_cross_entropy(logits, labels, smoothing)
    exact, exact_p = reference.softmax_cross_entropy(logits.astype(np.float64), labels, smoothing)
    assert p.dtype == dtype
    close(value, exact, dtype, 4 * spread)
    close(p, exact_p, dtype, 2)
    grad = loss.softmax_cross_entropy_grad(p, labels, smoothing, 2.5)
    assert grad.dtype == dtype
    expected = reference.softmax_cross_entropy_grad(p.astype(np.float64), labels, smoothing, 2.5)
    close(grad, expected, dtype, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_is_that_of_the_loss(smoothing):
    rng = np.random.default_rng(0)
    z, direction = rng.standard_normal((2, 3, 5))
    labels = np.array([4, 0, 2])
    _, p = loss.softmax_cross_entropy(z, labels, smoothing)
    slope = (loss.softmax_cross_entropy_grad(p, labels, smoothing, 3.0) * direction).sum()
    ahead, behind = (
        loss.softmax_cross_entropy(z + h * direction, labels, smoothing)[0] for h in (1e-5, -1e-5)
    )
    assert slope == pytest.approx(3.0 * (ahead - behind) / 2e-5, rel=1e-7)

    slope = (loss.mse_grad(z, direction, 3.0) * direction).sum()
    ahead, behind = (loss.mse(z + h * direction, direction) for h in (1e-5, -1e-5))
    assert slope == pytest.approx(3.0 * (ahead - behind) / 2e-5, rel=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_against_torch(smoothing):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((64, 10))).astype(np.float32)
    labels = rng.integers(0, 10, 64)
    z = torch.from_numpy(logits.copy()).requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        z, torch.from_numpy(labels), label_smoothing=smoothing
    )
    expected.backward()
    value, p = loss.softmax_cross_entropy(logits, labels, smoothing)
    assert value == pytest.approx(expected.item(), rel=1e-6)
    grad = loss.softmax_cross_entropy_grad(p, labels, smoothing)
    np.testing.assert_allclose(grad, z.grad.numpy(), atol=1e-8)


def test_large_logits_neither_overflow_nor_vanish():
    logits = np.array([[1e4, 0.0, -1e4], [3e38, 3e38, -3e38]], np.float32)
    value, p = loss.softmax_cross_entropy(logits, np.array([1, 0]))
    assert value == pytest.approx((1e4 + np.log(2)) / 2)
    np.testing.assert_array_equal(p, np.array([[1, 0, 0], [0.5, 0.5, 0]], np.float32))


def test_minus_infinity_means_impossible():
    logits = np.array([[0.0, -np.inf, 0.0]])
    value, p = loss.softmax_cross_entropy(logits, np.array([2]))
    assert value == pytest.approx(np.log(2))
    np.testing.assert_array_equal(p, [[0.5, 0, 0.5]])
    assert loss.softmax_cross_entropy(logits, np.array([1]))[0] == np.inf


def test_nan_is_seen():
    for row in ([1.0, np.nan], [np.nan, 1.0]):
        value, p = loss.softmax_cross_entropy(np.array([row, [0.0, 0.0]]), np.array([0, 0]))
        assert np.isnan(value) and np.isnan(p[0]).all() and not np.isnan(p[1]).any()
    assert np.isnan(loss.mse(np.array([1.0, np.nan]), np.zeros(2)))
    assert loss.mse(np.array([1.0, np.inf]), np.zeros(2)) == np.inf


def test_any_layout_is_taken():
    z = np.random.default_rng(0).standard_normal((8, 6))
    labels = np.arange(12)[::2] % 8
    labels.flags.writeable = False
    value, p = loss.softmax_cross_entropy(z.T, labels)
    again, q = loss.softmax_cross_entropy(z.T.copy(), labels.copy())
    assert value == again
    np.testing.assert_array_equal(p, q)
    assert loss.mse(z[::2], z[1::2]) == loss.mse(z[::2].copy(), z[1::2].copy())


def test_wrong_operands_are_named():
    z, labels = np.zeros((3, 4)), np.array([0, 1, 2])
    for bad, error, text in (
        (np.array([0, 1, 4]), ValueError, r"expected labels in \[0, 4\), got 0 to 4"),
        (np.array([0, -1, 3]), ValueError, r"expected labels in \[0, 4\), got -1 to 3"),
        (np.array([0, 1]), ValueError, r"got \(3, 4\) and \(2,\)"),
        (np.array([0.0, 1, 2]), TypeError, "integer labels, got float64"),
    ):
        with pytest.raises(error, match=f"softmax_cross_entropy: .*{text}"):
            loss.softmax_cross_entropy(z, bad)
        with pytest.raises(error, match=f"softmax_cross_entropy_grad: .*{text}"):
            loss.softmax_cross_entropy_grad(z, bad)
    with pytest.raises(ValueError, match="smoothing in"):
        loss.softmax_cross_entropy(z, labels, 1.5)
    with pytest.raises(ValueError, match="not empty"):
        loss.softmax_cross_entropy(np.zeros((0, 4)), np.zeros(0, np.int64))
    for function in (loss.mse, loss.mse_grad):
        with pytest.raises(ValueError, match=rf"{function.__name__}: .*\(3,\) and \(4,\)"):
            function(np.zeros(3), np.zeros(4))
        with pytest.raises(ValueError, match="not empty"):
            function(np.zeros(0), np.zeros(0))
