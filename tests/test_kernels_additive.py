"""The ef-operator against plain loops, and its layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import _jit, additive
from kernels import reference_compressed as reference
from kernels.geometry import Window, window
from tinynn import nn, ops
from tinynn.errors import ConfigError, ShapeError
from tinynn.optim import SGD
from tinynn.tensor import Tensor

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
SMALL = st.integers(1, 9)


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if request.param == "parallel" else 1 << 60)
        yield request.param


def numbers(*shapes, zeros=0.2):
    """Standard normal, some of them zero: where the operator jumps."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s) * (rng.random(s) >= zeros) for s in shapes]


@QUICK
@given(SMALL, SMALL, SMALL)
def test_product(m, k, n):  # of float32; the convolutions below are products of float64
    dtype = np.float32
    x, w, grad = (a.astype(dtype) for a in numbers((m, k), (k, n), (m, n)))
    got = additive.linear(x, w)
    assert got.dtype == dtype
    tolerance = 20 * k * np.finfo(dtype).eps
    wide = [a.astype(np.float64) for a in (x, w)]
    np.testing.assert_allclose(got, reference.additive_linear(*wide), rtol=0, atol=tolerance)
    exact = reference.additive_linear_grad(grad.astype(np.float64), *wide)
    for a, b in zip(additive.linear_grad(grad, x, w), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=20 * max(m, n) * np.finfo(dtype).eps)


# All but what the product uses, too, are kernels of the convolution, which has tests of its own.
@pytest.mark.parametrize("variant", ["serial"], indirect=True)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_convolution(variant, stride, padding):
    win = window(5, 4, (3, 2), stride, padding)
    x, w = numbers((2, 5, 4, 3), (3, 2, 3, 5))
    y = additive.conv2d(x, w, win)
    np.testing.assert_allclose(y, reference.additive_conv2d(x, w, win), atol=1e-12)
    (grad,) = numbers(y.shape)
    exact = reference.additive_conv2d_grad(grad, x, w, win)
    for a, b in zip(additive.conv2d_grad(grad, x, w, win), exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert additive.conv2d_grad(grad, x, w, win, (False, False)) == (None, None)


def test_it_is_the_definition_of_the_paper():
    x, w = np.array([[2.0, -3.0, 0.0]]), np.array([[1.0], [4.0], [5.0]])
    assert additive.linear(x, w).item() == (2 + 1) - (3 + 4)
    # the product of a vector with itself is twice its 1-norm
    assert additive.linear(x, x.T.copy()).item() == 2 * 5


def test_nan_marks_its_row_only():
    x, w = numbers((5, 6), (6, 7), zeros=0)
    x[3, 2] = np.nan
    np.testing.assert_array_equal(np.isnan(additive.linear(x, w)).any(1), np.arange(5) == 3)


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
def test_threads_do_not_change_a_bit():
    x, w = (a.astype(np.float32) for a in numbers((300, 200), (200, 70)))
    before, results = _jit.get_threads(), []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            results.append(additive.linear(x, w).tobytes())
    finally:
        _jit.set_threads(before)
    assert results[0] == results[1]


def test_wrong_operands_are_named():
    with pytest.raises(ValueError, match=r"additive\.linear: .*\(2, 3\), \(2, 3\)"):
        additive.linear(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"additive\.conv2d: "):
        additive.conv2d(np.ones((1, 3, 3, 2)), np.ones((3, 3, 1, 1)), Window((3, 3)))
    with pytest.raises(ShapeError, match="Additive"):
        ops.additive_linear(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ConfigError, match="AdditiveLinear"):
        nn.AdditiveLinear(0, 3, rng=np.random.default_rng(0))


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["serial"], indirect=True)
def test_layers_scale_and_shift(variant):
    rng = np.random.default_rng(0)
    layer = nn.AdditiveLinear(6, 4, rng=rng, dtype=np.float64)
    (x,) = numbers((5, 6))
    expected = reference.additive_linear(x, layer.weight.data) / np.sqrt(6)
    np.testing.assert_allclose(layer(Tensor(x)).data, expected, atol=1e-12)
    conv = nn.AdditiveConv2d(2, 3, 3, stride=2, rng=rng, dtype=np.float64)
    (x,) = numbers((1, 5, 5, 2))
    assert conv(Tensor(x)).shape == (1, 3, 3, 3)
    np.testing.assert_array_equal(conv(Tensor(x), relu=True).data, conv(Tensor(x)).relu().data)


def test_a_network_learns_exclusive_or():
    """The example of the paper, section 3: one hidden layer separates it."""
    rng = np.random.default_rng(1)
    net = nn.Sequential(
        nn.AdditiveLinear(2, 8, rng=rng), nn.ReLU(), nn.AdditiveLinear(8, 2, rng=rng)
    )
    x = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
    labels = np.array([0, 1, 1, 0])
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(300):
        loss = ops.softmax_cross_entropy(net(Tensor(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert (net(Tensor(x)).data.argmax(1) == labels).all()
