"""Convolutions, their gradients and their transpose against the reference loops."""

from __future__ import annotations

import numpy as np
import pytest
from borders import bordered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import _jit, conv, conv_weights, deconv, reference
from kernels.geometry import Window, window

# Each size of tile is compiled once: the same examples in every run keep to those in the cache.
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
DTYPES = st.sampled_from([np.float32, np.float64])


@st.composite
def geometries(draw):
    """Sizes (B, H, W, C, N) and a window that fits, often by its padding only."""
    pair = lambda lo, hi: (draw(st.integers(lo, hi)), draw(st.integers(lo, hi)))  # noqa: E731
    kernel, stride, dilation = pair(1, 4), pair(1, 4), pair(1, 3)
    height, width = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 5, 8, 13]))
    sides = []
    for n, k, d in zip((height, width), kernel, dilation, strict=True):
        before, after = pair(0, 3)
        lacking = (k - 1) * d + 1 - n - before - after
        sides.append((before + max(0, lacking), after))
    channels = draw(st.sampled_from([1, 3, 5, 8])), draw(st.sampled_from([1, 3, 8, 17, 33]))
    sizes = (draw(st.integers(1, 3)), height, width, *channels)
    return sizes, Window(kernel, stride, (sides[0], sides[1]), dilation)


LAYERS = [  # whole tiles, panels and blocks; C or N of 1 and 3, odd tails
    ((3, 24, 24, 3, 32), window(24, 24, (5, 5), padding="same")),
    ((2, 6, 6, 64, 80), window(6, 6, (3, 3), padding="same")),
    ((2, 16, 16, 16, 40), window(16, 16, (3, 3), (2, 2), "same")),
    ((17, 28, 28, 1, 32), window(28, 28, (3, 3), (2, 2), "same")),
    ((2, 13, 27, 19, 3), window(13, 27, (1, 5), padding="same")),
    ((2, 9, 12, 8, 70), window(9, 12, (3, 1), (1, 1), "same", (2, 2))),
    ((40, 8, 8, 32, 48), window(8, 8, (3, 3), padding="same")),
    ((2, 7, 7, 20, 20), Window((1, 1))),
    ((2, 7, 7, 20, 20), Window((1, 1), (2, 2))),
]


def operands(sizes, win, dtype=np.float64, seed=0):
    """x, w, bias (N,), grad, bias of the transpose (C,)."""
    b, height, width, c, n = sizes
    rng = np.random.default_rng(seed)
    grad = (b, *win.output(height, width), n)
    shapes = ((b, height, width, c), (*win.kernel, c, n), n, grad, c)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def swapped(w):
    return np.ascontiguousarray(w.transpose(0, 1, 3, 2))


def ours(x, w, bias, grad, other, win):
    """The results of all six functions."""
    return [
        conv.conv2d(x, w, bias, win),
        conv.conv2d_input_grad(grad, w, x.shape, win),
        conv.conv2d_weight_grad(grad, x, win),
        deconv.conv2d_transpose(grad, swapped(w), other, x.shape, win),
        deconv.conv2d_transpose_input_grad(x, swapped(w), win),
        deconv.conv2d_transpose_weight_grad(x, grad, win),
    ]


def from_three(y, gx, gw, bias, other):
    """The same results from those of the convolution and its gradients."""
    return [y, gx, gw, gx + other, y - bias, swapped(gw)]


def references(x, w, bias, grad, other, win):
    y = reference.conv2d(x, w, bias, win)
    gx = reference.conv2d_input_grad(grad, w, x.shape, win)
    return from_three(y, gx, reference.conv2d_weight_grad(grad, x, win), bias, other)


def einsum(x, w, bias, grad, other, win):
    """As `references`, tap by tap in NumPy: for sizes that are too slow for plain loops."""
    (top, bottom), (start, end) = win.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (start, end), (0, 0)))
    y, gx, gw = np.zeros_like(grad) + bias, np.zeros_like(padded), np.zeros_like(w)
    for ky, kx in np.ndindex(*win.kernel):
        rows, columns = (
            slice(k * d, k * d + (n - 1) * s + 1, s)
            for k, d, n, s in zip((ky, kx), win.dilation, grad.shape[1:3], win.stride, strict=True)
        )
        at = (slice(None), rows, columns)
        y += padded[at] @ w[ky, kx]
        gx[at] += grad @ w[ky, kx].T
        gw[ky, kx] = np.tensordot(padded[at], grad, ((0, 1, 2), (0, 1, 2)))
    height, width = x.shape[1:3]
    gx = gx[:, top : top + height, start : start + width]
    return from_three(y, gx, gw, bias, other)


def check(results, expected, dtype, terms):
    for got, exact in zip(results, expected, strict=True):
        assert got.dtype == dtype and got.shape == exact.shape and got.flags.carray
        tolerance = (8 + 2 * terms) * np.finfo(dtype).eps
        np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance)


def terms(sizes, win):
    b, height, width, c, n = sizes
    return max(win.kernel[0] * win.kernel[1] * max(c, n), b * height * width)


@QUICK
@given(geometries(), DTYPES)
def test_any_geometry(case, dtype):
    sizes, win = case
    arrays = operands(sizes, win)
    arrays = [a.astype(dtype).astype(np.float64) for a in arrays]
    results = ours(*(a.astype(dtype) for a in arrays), win)
    check(results, references(*arrays, win), dtype, terms(sizes, win))


# float64 runs the same code, on vectors half as long: three layers compile all of it, serial ones,
# as compiling a parallel version takes three times as long.
@pytest.mark.parametrize(
    "sizes, win, dtype",
    [(*layer, np.float32) for layer in LAYERS] + [(*layer, np.float64) for layer in LAYERS[3:6]],
)
def test_layers(monkeypatch, sizes, win, dtype):
    if dtype == np.float64:
        monkeypatch.setattr(_jit, "PARALLEL_BYTES", 1 << 60)
    arrays = operands(sizes, win, dtype)
    expected = einsum(*(a.astype(np.float64) for a in arrays), win)
    check(ours(*arrays, win), expected, dtype, terms(sizes, win))
    x, w, bias, grad, other = arrays
    y = conv.conv2d(x, w, bias, win, relu=True)
    np.testing.assert_array_equal(y, np.maximum(conv.conv2d(x, w, bias, win), 0))
    y = deconv.conv2d_transpose(grad, swapped(w), other, x.shape, win, relu=True)
    check([y], [np.maximum(expected[3], 0)], dtype, terms(sizes, win))


@pytest.mark.parametrize("channels", [1, 5, 17, 21, 70])
def test_weight_gradients_over_several_blocks_of_images(monkeypatch, channels):
    # Their last tile of rows lies over rows of the one before, which must not be summed twice.
    monkeypatch.setattr(conv_weights, "_BLOCK_BYTES", 1)
    conv_weights._weight_calls.cache_clear()
    x, grad = (np.random.default_rng(n).standard_normal((5, 6, 7, n)) for n in (channels, 35))
    win = Window((3, 3), padding=((1, 1), (1, 1)))
    got = conv.conv2d_weight_grad(grad.astype(np.float32), x.astype(np.float32), win)
    conv_weights._weight_calls.cache_clear()
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    np.testing.assert_allclose(got, np.einsum("byxckl,byxn->klcn", views, grad), atol=1e-4)


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
@pytest.mark.parametrize("sizes, win", LAYERS[:-1])
def test_threads_do_not_change_a_bit(monkeypatch, sizes, win):
    monkeypatch.setattr(_jit, "PARALLEL_BYTES", 0)
    arrays = operands(sizes, win, np.float32)
    before = _jit.get_threads()
    results = []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            results.append(ours(*arrays, win))
    finally:
        _jit.set_threads(before)
    for one, two in zip(*results, strict=True):
        assert one.tobytes() == two.tobytes()
    expected = einsum(*(a.astype(np.float64) for a in arrays), win)
    check(results[0], expected, np.float32, terms(sizes, win))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_nan_and_infinity_reach_what_reads_them_and_nothing_else(value, stride):
    sizes = (2, 5, 8, 3, 17)
    win = window(5, 8, (3, 3), stride, "same")
    for place in range(5):
        for position in (0, -1):
            arrays = operands(sizes, win)
            arrays[place].reshape(-1)[position] = value
            with np.errstate(invalid="ignore"):
                expected = references(*arrays, win)
                results = ours(*arrays, win)
            if place == 2:  # `from_three` takes the bias off again
                expected.pop(4), results.pop(4)
            for got, exact in zip(results, expected, strict=True):
                np.testing.assert_allclose(got, exact, rtol=1e-12, atol=1e-12)


@QUICK
@given(geometries(), DTYPES)
def test_nothing_outside_is_read_or_written(monkeypatch, case, dtype):
    sizes, win = case
    arrays = operands(sizes, win, dtype)
    expected = ours(*arrays, win)
    borders = []

    def empty(shape, dtype):
        """Lends results and packed operands bordered too."""
        array, border = bordered(np.full(shape, np.nan, dtype))
        borders.append(border)
        return array

    with monkeypatch.context() as patch:
        patch.setattr(conv.memory, "empty", empty)
        patch.setattr(conv, "_aligned", empty)
        patch.setattr(conv_weights, "_aligned", empty)
        results = ours(*(bordered(a)[0] for a in arrays), win)
    assert borders and all((border == 255).all() for border in borders)
    for got, exact in zip(results, expected, strict=True):
        np.testing.assert_array_equal(got, exact)


def test_any_layout_is_taken():
    win = window(6, 6, (3, 3), (2, 1), "same")
    arrays = operands((2, 6, 6, 5, 17), win, np.float32)
    expected = ours(*arrays, win)
    for turned in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2], misaligned):
        others = [turned(a) for a in arrays]
        for a in others:
            a.flags.writeable = False
        for got, exact in zip(ours(*others, win), expected, strict=True):
            np.testing.assert_array_equal(got, exact)


def misaligned(a):
    raw = np.empty(a.nbytes + 1, np.uint8)
    copy = raw[1:].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def test_wrong_operands_are_named():
    win = window(6, 6, (3, 3), padding="same")
    x, w, bias, grad, _ = operands((2, 6, 6, 5, 7), win, np.float32)
    with pytest.raises(ValueError, match=r"conv2d: .*\(2, 6, 6, 5\) and \(3, 3, 7, 5\)"):
        conv.conv2d(x, swapped(w), bias, win)
    with pytest.raises(ValueError, match=r"conv2d: .*bias \(7,\), got \(6,\)"):
        conv.conv2d(x, w, bias[1:], win)
    with pytest.raises(TypeError, match=r"conv2d: .*float32, float64"):
        conv.conv2d(x, w.astype(np.float64), None, win)
    with pytest.raises(ValueError, match=r"conv2d_input_grad: .*\(2, 5, 6, 7\)"):
        conv.conv2d_input_grad(grad[:, 1:], w, x.shape, win)
    with pytest.raises(ValueError, match=r"conv2d_weight_grad: .*\(2, 5, 6, 7\)"):
        conv.conv2d_weight_grad(grad[:, 1:], x, win)
    with pytest.raises(ValueError, match=r"conv2d_transpose: .*weights.*\(3, 3, 7, 5\)"):
        deconv.conv2d_transpose(grad, w, None, x.shape, win)
    with pytest.raises(ValueError, match=r"does not fit"):
        large = operands((1, 9, 9, 5, 7), Window((9, 9)), np.float32)[1]
        conv.conv2d(x, large, None, Window((9, 9)))


@pytest.mark.parametrize("sizes, win", LAYERS)
def test_against_torch(sizes, win):
    torch = pytest.importorskip("torch")
    x, w, bias, grad, other = operands(sizes, win)
    (top, bottom), (start, end) = win.padding
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, w)]
    image = torch.nn.functional.pad(leaves[0].permute(0, 3, 1, 2), (start, end, top, bottom))
    y = torch.nn.functional.conv2d(
        image,
        leaves[1].permute(3, 2, 0, 1),
        torch.from_numpy(bias),
        win.stride,
        dilation=win.dilation,
    )
    y.backward(torch.from_numpy(grad).permute(0, 3, 1, 2))
    three = (y.detach().permute(0, 2, 3, 1).numpy(), *(leaf.grad.numpy() for leaf in leaves))
    expected = from_three(*three, bias, other)
    check(ours(x, w, bias, grad, other, win), expected, np.float64, terms(sizes, win))
