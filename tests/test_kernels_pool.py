"""Pools and their gradients against the reference loops."""

from __future__ import annotations

import numpy as np
import pytest
from borders import bordered
from hypothesis import given, settings
from hypothesis import strategies as st
from windows import image_windows

from kernels import _jit, pool, reference
from kernels.geometry import Window, window

QUICK = settings(max_examples=40, deadline=None)
DTYPES = [np.float32, np.float64]
#: (shape, kernel, stride, padding, dilation)
CASES = [
    ((2, 8, 8, 16), (2, 2), (2, 2), "valid", (1, 1)),
    ((2, 9, 7, 35), (3, 3), (2, 2), "same", (1, 1)),
    ((3, 7, 9, 3), (3, 2), (1, 2), ((1, 0), (0, 1)), (2, 1)),
    ((1, 6, 5, 70), (2, 3), (4, 5), ((1, 1), (0, 1)), (1, 1)),
    ((1, 1, 1, 1), (5, 3), (1, 1), "same", (1, 1)),
    ((2, 3, 3, 5), (1, 1), (1, 1), ((2, 2), (0, 3)), (1, 1)),
]


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if request.param == "parallel" else 1 << 60)
        yield request.param


#: float64 is the same code on vectors half as long, and parallel versions take long to compile.
KINDS = [("serial", np.float32), ("serial", np.float64), ("parallel", np.float32)]
EVERY_KIND = pytest.mark.parametrize("variant, dtype", KINDS, indirect=["variant"])


def problem(case, dtype, special=0.0):
    """x, full of ties, with some NaN and infinities; grad; the window."""
    shape, kernel, stride, padding, dilation = case
    win = window(*shape[1:3], kernel, stride, padding, dilation)
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, shape).astype(dtype)
    odd = rng.choice([np.nan, np.inf, -np.inf, -np.inf], shape)
    x = np.where(rng.random(shape) < special, odd, x).astype(dtype)
    out = (shape[0], *win.output(*shape[1:3]), shape[3])
    return x, rng.standard_normal(out).astype(dtype), win


def check(got, expected, dtype):
    assert got.dtype == dtype and got.shape == expected.shape and got.flags.carray
    np.testing.assert_allclose(got, expected, rtol=0, atol=200 * np.finfo(dtype).eps)


def check_all(x, grad, win):
    dtype = x.dtype
    y, place = pool.max_pool2d(x, win)
    largest, first = reference.max_pool2d(x, win)
    np.testing.assert_array_equal(y, largest)
    np.testing.assert_array_equal(place, first)
    assert y.dtype == dtype and place.dtype == np.int32
    wide = grad.astype(np.float64)
    expected = reference.max_pool2d_grad(wide, place, x.shape)
    check(pool.max_pool2d_grad(grad, place, x.shape, win), expected, dtype)
    with np.errstate(invalid="ignore"):
        mean = reference.avg_pool2d(x.astype(np.float64), win)
    check(pool.avg_pool2d(x, win), mean, dtype)
    expected = reference.avg_pool2d_grad(wide, x.shape, win)
    check(pool.avg_pool2d_grad(grad, x.shape, win), expected, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@EVERY_KIND
@pytest.mark.parametrize("special", [0.0, 0.2, 1.0])
def test_pools(variant, case, dtype, special):
    check_all(*problem(case, dtype, special))


@QUICK
@given(
    image_windows(9, 5, [1, 3, 15, 16, 17, 33, 65]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.1]),
)
def test_any_geometry(variant, case, dtype, special):
    dtype = np.float32 if variant == "parallel" else dtype
    check_all(*problem(case, dtype, special))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_in_gradients_pass(variant, value):
    dtype = np.float32 if variant == "parallel" else np.float64
    x, grad, win = problem(CASES[1], dtype)
    grad[0, 0, 0, 0] = grad[-1, -1, -1, -1] = value
    _, place = pool.max_pool2d(x, win)
    check(
        pool.max_pool2d_grad(grad, place, x.shape, win),
        reference.max_pool2d_grad(grad, place, x.shape),
        dtype,
    )
    expected = reference.avg_pool2d_grad(grad, x.shape, win)
    check(pool.avg_pool2d_grad(grad, x.shape, win), expected, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@EVERY_KIND
def test_stays_within_its_arrays(variant, case, dtype, monkeypatch):
    x, grad, win = problem(case, dtype)
    borders = []

    def empty(shape, dtype):
        array, border = bordered(np.zeros(shape, dtype))
        borders.append(border)
        return array

    monkeypatch.setattr(pool.memory, "empty", empty)
    check_all(bordered(x)[0], bordered(grad)[0], win)
    assert len(borders) == 5 and all((border == 255).all() for border in borders)


def test_places_outside_the_image_write_nothing():
    grad = np.ones((1, 1, 2, 2), np.float32)
    place = np.array([[[[-1, 4], [3, 2**31 - 1]]]], np.int32)
    gx = pool.max_pool2d_grad(grad, place, (1, 2, 2, 2), Window((2, 1)))
    expected = np.zeros((1, 4, 2), np.float32)
    expected[0, 3, 0] = 1
    np.testing.assert_array_equal(gx.reshape(1, 4, 2), expected)


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
@pytest.mark.parametrize("batch", [1, 37])
def test_threads_do_not_change_a_bit(batch):
    x, grad, win = problem(((batch, *CASES[1][0][1:]), *CASES[1][1:]), np.float32)
    before, results = _jit.get_threads(), []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            y, place = pool.max_pool2d(x, win)
            results.append(
                [
                    y,
                    place,
                    pool.max_pool2d_grad(grad, place, x.shape, win),
                    pool.avg_pool2d(x, win),
                    pool.avg_pool2d_grad(grad, x.shape, win),
                ]
            )
    finally:
        _jit.set_threads(before)
    for one, two in zip(*results, strict=True):
        assert one.tobytes() == two.tobytes()


def test_any_layout_is_taken():
    x, grad, win = problem(CASES[1], np.float32)
    raw = np.zeros(x.nbytes + 4, np.uint8)[1:-3].view(np.float32).reshape(x.shape)
    raw[...] = x
    check_all(raw, np.asfortranarray(grad), win)
    _, place = pool.max_pool2d(x, win)
    np.testing.assert_array_equal(
        pool.max_pool2d_grad(grad, np.asfortranarray(place), x.shape, win),
        pool.max_pool2d_grad(grad, place, x.shape, win),
    )


def test_against_torch():
    torch = pytest.importorskip("torch")
    shape = (2, 9, 8, 17)
    win = Window((3, 2), (2, 2), ((1, 1), (1, 1)))
    x = np.random.default_rng(0).standard_normal(shape)
    grad = np.random.default_rng(1).standard_normal((2, *win.output(9, 8), 17))
    y, place = pool.max_pool2d(x, win)
    functional = torch.nn.functional
    for got, gradient, function in (
        (
            y,
            pool.max_pool2d_grad(grad, place, shape, win),
            lambda t: functional.max_pool2d(t, win.kernel, win.stride, 1),
        ),
        (
            pool.avg_pool2d(x, win),
            pool.avg_pool2d_grad(grad, shape, win),
            lambda t: functional.avg_pool2d(t, win.kernel, win.stride, 1, count_include_pad=False),
        ),
    ):
        tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
        ty = function(tx)
        ty.backward(torch.tensor(grad.transpose(0, 3, 1, 2)))
        check(got, ty.detach().numpy().transpose(0, 2, 3, 1), np.float64)
        check(gradient, tx.grad.numpy().transpose(0, 2, 3, 1), np.float64)


def test_wrong_operands_are_named():
    x, grad, win = problem(CASES[0], np.float32)
    _, place = pool.max_pool2d(x, win)
    with pytest.raises(ValueError, match=r"max_pool2d: expected x \(B, H, W, C\), not empty"):
        pool.max_pool2d(x[0], win)
    with pytest.raises(ValueError, match=r"does not fit an image of 8 x 8"):
        pool.avg_pool2d(x, Window((9, 1)))
    with pytest.raises(ValueError, match=r"avg_pool2d_grad: expected grad \(2, 4, 4, 16\)"):
        pool.avg_pool2d_grad(grad[1:], x.shape, win)
    with pytest.raises(ValueError, match=r"max_pool2d_grad: expected grad and place"):
        pool.max_pool2d_grad(grad[1:], place, x.shape, win)
    with pytest.raises(TypeError, match=r"expected places of int32, got int64"):
        pool.max_pool2d_grad(grad, place.astype(np.int64), x.shape, win)
    with pytest.raises(TypeError, match=r"avg_pool2d: .*int64"):
        pool.avg_pool2d(x.astype(np.int64), win)
