"""8-bit kernels against the exact loops of `kernels.quantized_reference`, at every level."""

from __future__ import annotations

import os

import numpy as np
import pytest
from borders import bordered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels_simd import on_linux, run

from kernels import _jit, int8, int8_depthwise, int8_product, simd
from kernels import quantized_reference as reference
from kernels.geometry import Window, window
from kernels.int8_conv import conv2d, pack_conv2d
from kernels.int8_depthwise import depthwise2d, pack_depthwise2d
from kernels.int8_pool import avg_pool2d, max_pool2d
from kernels.int8_product import linear, pack_linear

#: Whether this is a run for a processor of a lower level: fewer examples of fewer kernels.
LOWER = "TINYNN_CPU" in os.environ
# Each size of tile is compiled once: the same examples in every run keep to those in the cache.
QUICK = settings(
    max_examples=6 if LOWER else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def some(*values):
    """One of the values; the last at lower levels."""
    return st.sampled_from(values[-1:] if LOWER else values)


@pytest.fixture
def few_tiles(monkeypatch):
    """Tiles of two heights for all sizes: the layers below have the heights that suit them."""
    monkeypatch.setattr(int8_product, "_HEIGHTS", (4, 1))
    monkeypatch.setattr(int8_depthwise, "_HEIGHTS", (4,))


ZEROS = st.sampled_from([0, 1, 128, 255])
SEEDS = st.integers(0, 2**32 - 1)


def activations(rng, shape):
    """Bytes, of which many are the extremes."""
    values = rng.integers(0, 256, shape)
    return np.where(rng.random(shape) < 0.3, rng.choice([0, 255], shape), values).astype(np.uint8)


def weights(rng, shape):
    values = rng.integers(-128, 128, shape)
    return np.where(rng.random(shape) < 0.3, rng.choice([-128, 127], shape), values).astype(np.int8)


def scaling(rng, channels, terms, floating=False):
    """To bytes of any kind, some of which saturate, or to float32."""
    w_scale = rng.random(channels) * rng.choice([0.5, 1, 30]) / np.sqrt(terms)
    if floating:
        return int8.dequantized(0.01, w_scale, relu=bool(rng.integers(2)))
    zero = int(rng.choice([0, 7, 128, 255]))
    relu, top = bool(rng.integers(2)), max(zero, int(rng.choice([15, 255])))
    return int8.requantized(0.01, w_scale, 0.7, zero, relu=relu, top=top)


def biases(rng, channels):
    return None if rng.random() < 0.2 else rng.integers(-9999, 9999, channels).astype(np.int32)


def same(got, exact):
    assert got.dtype == exact.dtype and got.flags.carray
    np.testing.assert_array_equal(got, exact)


def exact_conv(x, w, bias, x_zero, how, win):
    """Tap by tap in NumPy's int64: for sizes that are too slow for plain loops."""
    (top, bottom), (left, right) = win.padding
    sides = ((0, 0), (top, bottom), (left, right), (0, 0))
    padded = np.pad(x.astype(np.int64) - x_zero, sides)
    height, width = win.output(*x.shape[1:3])
    total = np.zeros((len(x), height, width, w.shape[3]), np.int64)
    for ky, kx in np.ndindex(*win.kernel):
        rows, columns = (
            slice(k * d, k * d + (n - 1) * s + 1, s)
            for k, d, n, s in zip((ky, kx), win.dilation, (height, width), win.stride, strict=True)
        )
        total += padded[:, rows, columns] @ w[ky, kx].astype(np.int64)
    return finished(total if bias is None else total + bias, how)


def finished(total, how):
    assert abs(total).max() < 2**31
    value = np.minimum(np.maximum(total.astype(np.float32) * how.multiplier, how.low), how.high)
    return value if how.dtype == np.float32 else (np.rint(value) + how.zero).astype(np.uint8)


# --- element by element ---------------------------------------------------------------------------

SIZES = st.sampled_from([1, 3, 15, 16, 17, 64, 100, 4 * 1024 + 5])


@QUICK
@given(SIZES, ZEROS, SEEDS)
def test_quantize_and_dequantize(size, zero, seed):
    rng = np.random.default_rng(seed)
    scale = float(rng.choice([0.1, 1, 0.5, 1e-3]))
    x = (rng.standard_normal(size) * 200 * scale).astype(np.float32)
    x[rng.random(size) < 0.2] = 2.5 * scale  # ties
    special = [np.nan, np.inf, -np.inf, -0.0, 3e38]
    where = rng.random(size) < 0.2
    x[where] = rng.choice(special, where.sum())
    q = int8.quantize(x, scale, zero)
    same(q, reference.quantize(x, scale, zero))
    same(int8.dequantize(q, scale, zero), reference.dequantize(q, scale, zero))


@QUICK
@given(SIZES, ZEROS, ZEROS, ZEROS, st.booleans(), SEEDS)
def test_add(size, a_zero, b_zero, zero, relu, seed):
    rng = np.random.default_rng(seed)
    a, b = activations(rng, (2, size))
    scales = rng.choice([1e-4, 0.02, 0.9, 7.0], 3)
    how = int8.addition(scales[0], a_zero, scales[1], b_zero, scales[2], zero, relu=relu)
    expected = reference.add(a, b, how)
    same(int8.add(a, b, how), expected)
    exact = scales[0] * (a.astype(float) - a_zero) + scales[1] * (b.astype(float) - b_zero)
    exact = np.clip(np.rint(exact / scales[2]), 0 if relu else -zero, 255 - zero) + zero
    assert abs(expected - exact).max() <= 1
    same(int8.add(a, b, how, out=a), expected)


def test_rounding_is_to_even_and_saturates():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, np.nan], np.float32)
    np.testing.assert_array_equal(int8.quantize(x, 1, 100), [100, 102, 102, 100, 98, 255, 0, 0])


# --- linear layers --------------------------------------------------------------------------------


@QUICK
@given(
    some(1, 6, 25, 13),
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 31, 64]),
    some(33, 7, 80),
    ZEROS,
    SEEDS,
)
def test_linear(m, k, n, x_zero, seed):
    rng = np.random.default_rng(seed)
    x, w, bias = activations(rng, (m, k)), weights(rng, (k, n)), biases(rng, n)
    how = scaling(rng, n, k, floating=n == 7 and m == 13)
    same(linear(x, pack_linear(w, bias, x_zero, how)), reference.linear(x, w, bias, x_zero, how))


@pytest.mark.parametrize("shape", [(1, 2049, 100), (300, 515, 130), (6, 70, 1000), (0, 5, 5)])
def test_large_linear(shape, monkeypatch):
    m, k, n = shape
    rng = np.random.default_rng(1)
    x, w, bias = activations(rng, (m, k)), weights(rng, (k, n)), biases(rng, n)
    how = int8.requantized(0.01, rng.random(n) * 0.05, 0.7, 120)
    monkeypatch.setattr(_jit, "PARALLEL_BYTES", 1 << 40)
    total = (x.astype(np.int64) - 128) @ w.astype(np.int64)
    expected = finished(total if bias is None else total + bias, how) if m else total
    got = linear(x, pack_linear(w, bias, 128, how))
    np.testing.assert_array_equal(got, expected)


def test_results_beyond_int32_saturate():
    """Multipliers so large that a result may not be rounded to int32 before it is cut."""
    x = np.array([[0], [1], [2], [255]], np.uint8).repeat(8, 1)
    w = np.full((8, 3), [[127, -127, 0]], np.int8)
    how = int8.requantized(1, 1, 1e-7, 5, top=200)
    layer = pack_linear(w, None, 1, how)
    assert not isinstance(layer.scaling.high, int)
    np.testing.assert_array_equal(linear(x, layer), [[0, 200, 5], [5, 5, 5], *[[200, 0, 5]] * 2])
    sums = int8.addition(1e9, 1, 1e9, 1, 1, 5)
    assert not isinstance(sums.high, int)
    np.testing.assert_array_equal(int8.add(x[:, 0], x[:, 0], sums), [0, 5, 255, 255])


def test_extreme_sums_are_exact():
    """The largest sums that int32 holds, where 16-bit steps or the fold of zero points overflow."""
    k = (2**31 - 1) // (255 * 128)
    for byte, zero, weight in ((255, 0, -128), (0, 255, -128), (255, 0, 127), (0, 255, 127)):
        x, w = np.full((13, k), byte, np.uint8), np.full((k, 7), weight, np.int8)
        how = int8.dequantized(1, 1)
        total = np.float32((byte - zero) * weight * k)
        assert (linear(x, pack_linear(w, None, zero, how)) == total).all()


def test_leading_axes_and_views():
    rng = np.random.default_rng(0)
    x, w = activations(rng, (2, 2, 3, 20)), weights(rng, (20, 7))
    layer = pack_linear(w, None, 3, int8.requantized(0.1, 0.01, 1, 5))
    expected = linear(np.ascontiguousarray(x[:, ::2]), layer)
    np.testing.assert_array_equal(linear(x[:, ::2], layer), expected)
    assert expected.shape == (2, 1, 3, 7)


# --- windows --------------------------------------------------------------------------------------


@st.composite
def geometries(draw, kernels=None):
    """B, H, W and a window that fits, often by its padding only."""
    pair = lambda lo, hi: (draw(st.integers(lo, hi)), draw(st.integers(lo, hi)))  # noqa: E731
    kernel = pair(1, 4) if kernels is None else draw(kernels)
    stride, dilation = pair(1, 4), pair(1, 3)
    height, width = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 5, 8, 13]))
    sides = []
    for n, k, d in zip((height, width), kernel, dilation, strict=True):
        before, after = pair(0, 3)
        lacking = (k - 1) * d + 1 - n - before - after
        sides.append((before + max(0, lacking), after))
    sizes = (draw(st.integers(1, 3)), height, width)
    return sizes, Window(kernel, stride, (sides[0], sides[1]), dilation)


@QUICK
@given(geometries(), st.sampled_from([1, 2, 3, 4, 5, 8]), some(8, 33, 7), ZEROS, SEEDS)
def test_conv2d(few_tiles, geometry, c, n, x_zero, seed):
    (sizes, win), rng = geometry, np.random.default_rng(seed)
    x, w, bias = activations(rng, (*sizes, c)), weights(rng, (*win.kernel, c, n)), biases(rng, n)
    how = scaling(rng, n, c * win.kernel[0] * win.kernel[1], floating=n == 8)
    got = conv2d(x, pack_conv2d(w, bias, x_zero, how, win))
    expected = exact_conv(x, w, bias, x_zero, how, win)
    same(got, expected)
    if expected.size < 300:
        same(expected, reference.conv2d(x, w, bias, x_zero, how, win))


LAYERS = [  # whole tiles, panels and blocks; C or N of 1 and 3, odd tails
    ((3, 24, 24, 3, 32), window(24, 24, (5, 5), padding="same")),
    ((2, 6, 6, 64, 80), window(6, 6, (3, 3), padding="same")),
    ((17, 28, 28, 1, 32), window(28, 28, (3, 3), (2, 2), "same")),
    ((2, 13, 27, 19, 3), window(13, 27, (1, 5), padding="same")),
    ((2, 7, 7, 20, 7), Window((1, 1))),
    ((2, 7, 7, 20, 20), Window((1, 1), (2, 2))),
]


@pytest.mark.parametrize(("sizes", "win"), LAYERS)
@pytest.mark.parametrize("x_zero", [0, 255])
def test_conv2d_layers(sizes, win, x_zero, monkeypatch):
    monkeypatch.setattr(_jit, "PARALLEL_BYTES", 1 << 40)
    rng, (*image, c, n) = np.random.default_rng(0), sizes
    x, w = activations(rng, (*image, c)), weights(rng, (*win.kernel, c, n))
    bias = rng.integers(-9999, 9999, n).astype(np.int32)
    how = int8.requantized(0.01, rng.random(n) / 30, 0.7, 99)
    got = conv2d(x, pack_conv2d(w, bias, x_zero, how, win))
    same(got, exact_conv(x, w, bias, x_zero, how, win))


def as_dense(w):
    """Depthwise weights (KH, KW, C, R) as those of a convolution (KH, KW, C, C R)."""
    kh, kw, c, r = w.shape
    dense = np.zeros((kh, kw, c, c, r), np.int8)
    dense[:, :, np.arange(c), np.arange(c)] = w
    return dense.reshape(kh, kw, c, c * r)


@QUICK
@given(
    geometries(some((1, 1), (7, 3), (5, 2), (3, 3))),
    some(48, 3, 17),
    st.sampled_from([1, 1, 1, 2]),
    ZEROS,
    SEEDS,
)
def test_depthwise2d(few_tiles, geometry, c, factor, x_zero, seed):
    (sizes, win), rng = geometry, np.random.default_rng(seed)
    x, w = activations(rng, (*sizes, c)), weights(rng, (*win.kernel, c, factor))
    bias = biases(rng, c * factor)
    how = scaling(rng, c * factor, win.kernel[0] * win.kernel[1], floating=c == 3)
    got = depthwise2d(x, pack_depthwise2d(w, bias, x_zero, how, win))
    expected = exact_conv(x, as_dense(w), bias, x_zero, how, win)
    same(got, expected)
    if expected.size < 300:
        same(expected, reference.depthwise2d(x, w, bias, x_zero, how, win))


@pytest.mark.parametrize(
    ("width", "c", "kernel", "stride", "x_zero"),
    [(41, 72, 3, 1, 9), (22, 40, 3, 1, 9), (44, 40, 5, 2, 200)],
)
def test_depthwise2d_layers(width, c, kernel, stride, x_zero):
    rng = np.random.default_rng(kernel)
    win = window(9, width, (kernel, kernel), (stride, stride), "same")
    x, w = activations(rng, (2, 9, width, c)), weights(rng, (kernel, kernel, c, 1))
    how = int8.requantized(0.01, rng.random(c) / 9, 0.7, 99, relu=True)
    if width == 22:  # INTERLEAVED vectors to numbers in order
        how = int8.dequantized(0.01, rng.random(c) / 9)
    got = depthwise2d(x, pack_depthwise2d(w, None, x_zero, how, win))
    same(got, exact_conv(x, as_dense(w), None, x_zero, how, win))


@QUICK
@given(geometries(), some(1, 16, 64, 17, 70), ZEROS, SEEDS)
def test_pools(geometry, c, x_zero, seed):
    (sizes, win), rng = geometry, np.random.default_rng(seed)
    x = activations(rng, (*sizes, c))
    same(max_pool2d(x, win), reference.max_pool2d(x, win))
    how = scaling(rng, 1, 1, floating=c == 17)
    same(avg_pool2d(x, x_zero, how, win), reference.avg_pool2d(x, x_zero, how, win))


# --- memory, threads, levels, errors --------------------------------------------------------------


def layers(rng, c=5, n=19):
    """A function and the arrays it reads and writes, for each kernel."""
    how = int8.requantized(0.01, 0.05, 0.7, 99)
    win = Window((3, 3), (1, 1), ((1, 1), (1, 1)))
    dense = pack_conv2d(weights(rng, (3, 3, c, n)), None, 3, how, win)
    each = pack_depthwise2d(weights(rng, (3, 3, c, 1)), None, 3, how, win)
    flat = pack_linear(weights(rng, (c, n)), None, 3, how)
    sums = int8.addition(0.1, 3, 0.2, 4, 0.3, 5)
    x = activations(rng, (1, 4, 9, c))
    return [
        (lambda x, out: conv2d(x, dense, out=out), x, (1, 4, 9, n), np.uint8),
        (lambda x, out: depthwise2d(x, each, out=out), x, x.shape, np.uint8),
        (lambda x, out: linear(x, flat, out=out), x, (1, 4, 9, n), np.uint8),
        (lambda x, out: max_pool2d(x, win, out=out), x, x.shape, np.uint8),
        (lambda x, out: avg_pool2d(x, 3, how, win, out=out), x, x.shape, np.uint8),
        (lambda x, out: int8.add(x, x, sums, out=out), x, x.shape, np.uint8),
        (lambda x, out: int8.dequantize(x, 0.1, 3, out=out), x, x.shape, np.float32),
        (
            lambda x, out: int8.quantize(x, 0.1, 3, out=out),
            x.astype(np.float32) / 9,
            x.shape,
            np.uint8,
        ),
    ]


@on_linux
@pytest.mark.parametrize("c", [2, 3, 5, 13, 31, 79])
def test_nothing_beyond_the_operands_is_read_or_written(c):
    for call, x, shape, dtype in layers(np.random.default_rng(c), c):
        expected = call(x, None)
        out, before = bordered(np.zeros(shape, dtype))
        np.testing.assert_array_equal(call(bordered(x)[0], out), expected)
        assert (before == 255).all()
        around = np.full(expected.size + 128, 77, dtype)
        inner = around[64 : 64 + expected.size].reshape(shape)
        assert call(x, inner) is inner
        np.testing.assert_array_equal(inner, expected)
        assert (around[:64] == 77).all() and (around[-64:] == 77).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_so_many_bytes_are_copied_and_filled(dtype):
    copy = int8.widen_bytes if dtype == np.int16 else int8.copy_bytes
    x = activations(np.random.default_rng(0), 300)
    for count in (*range(70), 127, 129, 256):
        copied, filled = np.full((2, 300), 77, dtype)
        expected = copied.copy()
        copy(x, 3, copied, 5, count)
        expected[5 : 5 + count] = x[3 : 3 + count]
        np.testing.assert_array_equal(copied, expected)
        if dtype == np.uint8:
            int8.fill_bytes(200, filled, 5, count)
            expected[5 : 5 + count] = 200
            np.testing.assert_array_equal(filled, expected)


def test_the_same_for_any_number_of_threads(few_tiles, monkeypatch):
    monkeypatch.setattr(_jit, "PARALLEL_BYTES", 1)
    rng = np.random.default_rng(0)
    win = window(9, 8, (3, 3), padding="same")
    x = activations(rng, (20, 9, 8, 17))
    how = int8.requantized(0.01, 0.05, 0.7, 99)
    dense = pack_conv2d(weights(rng, (3, 3, 17, 16)), None, 3, how, win)
    flat = pack_linear(weights(rng, (17, 16)), None, 3, how)
    results = {}
    before = _jit.get_threads()
    for count in {1, 2, _jit.max_threads()}:
        if count <= _jit.max_threads():
            _jit.set_threads(count)
            results[count] = (
                conv2d(x, dense),
                linear(x, flat),
            )
    _jit.set_threads(before)
    for some in results.values():
        for got, expected in zip(some, results[1], strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("level", [name for name in simd.available() if name != simd.LEVEL])
@pytest.mark.skipif(LOWER, reason="this is such a run")
def test_other_levels(level):
    """The exact comparisons of this file as a processor of a lower level would run them.

    Where vectors are as long as here, only the two dot products differ.
    """
    names = "linear or depthwise2d"
    if simd.LEVELS[level].vector_bytes != 4 * simd.LANES:
        names += " or conv2d or add or pools or dequantize"
    names = f"({names}) and not large and not layers"
    done = run(level, "-m", "pytest", "-x", "-q", "-k", names, __file__)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_cannot_be_computed_is_refused():
    how = int8.requantized(0.01, 0.05, 0.7, 99)
    big = np.full(((2**31 - 1) // (255 * 128) + 1, 2), -128, np.int8)
    with pytest.raises(OverflowError, match=r"pack_linear: .* channel 0 can reach"):
        pack_linear(big, None, 0, how)
    pack_linear(big, None, 128, how)  # 128 * 128 a term
    one, most = np.ones((4, 2), np.int8), np.array([0, 2**31 - 1], np.int32)
    with pytest.raises(OverflowError, match="channel 1"):
        pack_linear(one, most, 0, how)
    with pytest.raises(TypeError, match="expected w int8 and bias int32"):
        pack_linear(one.astype(np.int16), None, 0, how)
    with pytest.raises(ValueError, match="zero points"):
        pack_linear(one, None, 256, how)
    with pytest.raises(ValueError, match="1 or 2 multipliers"):
        pack_linear(one, None, 0, int8.requantized(1, [1, 2, 3], 1, 0))
    for scales in ((0, 1, 1), (1, 1, np.inf), (1, np.nan, 1), (1, -1, 1)):
        with pytest.raises(ValueError, match="finite"):
            int8.requantized(*scales, 0)
    layer = pack_linear(one, None, 0, how)
    with pytest.raises(ValueError, match=r"expected x \(\.\.\., 4\)"):
        linear(np.zeros((2, 5), np.uint8), layer)
    with pytest.raises(TypeError, match="uint8"):
        linear(np.zeros((2, 4), np.int8), layer)
    with pytest.raises(ValueError, match="expected out"):
        linear(np.zeros((2, 4), np.uint8), layer, out=np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="too far apart"):
        int8.addition(1e-30, 0, 1e30, 0, 1e-30, 0)
