"""Code books: streams of bits, look-ups, and the layers that decode while they run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import _jit, codebook, conv, decoded
from kernels import reference_compressed as reference
from kernels.geometry import Window, window
from kernels.reference import conv2d

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
BITS = st.integers(1, 8)
KINDS = [(3, True), (8, False)]  #: bits, and whether a channel has a book of its own


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays.

    The parallel one with fewer kinds of code books: each is a kernel, and takes long to compile.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if request.param == "parallel" else 1 << 60)
        yield request.param


def packed(shape, bits, each, seed=0):
    rng = np.random.default_rng(seed)
    entries = rng.integers(2 ** (bits - 1) + 1, 2**bits + 1)
    book = rng.standard_normal((shape[-1], entries) if each else entries).astype(np.float32)
    return codebook.pack(rng.integers(0, entries, shape), book)


def check(got, exact, terms):
    assert got.dtype == np.float32 and got.shape == exact.shape and got.flags.carray
    bound = (8 + 4 * terms) * np.finfo(np.float32).eps
    np.testing.assert_allclose(got, exact, rtol=0, atol=bound)


@given(BITS, st.integers(1, 200), st.randoms())
def test_streams_of_bits(bits, size, random):
    numbers = np.array([random.randrange(2**bits) for _ in range(size)])
    stream = codebook.pack_bits(numbers, bits)
    np.testing.assert_array_equal(stream, reference.pack_bits(numbers, bits))
    np.testing.assert_array_equal(codebook.unpack_bits(stream, bits, size), numbers)


@QUICK
@given(BITS, st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_decoding_is_exact(variant, bits, k, n, each):
    if variant == "parallel":
        bits = 3 if bits < 5 else 8
    layer = packed((k, n), bits, each)
    assert layer.bits == bits
    weights = reference.look_up(codebook.codes(layer), layer.book)
    np.testing.assert_array_equal(codebook.unpack(layer), weights)


@pytest.mark.parametrize(("bits", "each"), KINDS)
@pytest.mark.parametrize(
    ("channels", "first", "cols", "width"), [(32, 16, 16, 16), (21, 13, 7, 16), (21, 4, 17, 24)]
)
def test_panels_hold_their_columns_and_zeros(channels, first, cols, width, bits, each):
    layer = packed((9, channels), bits, each)
    kind, data, book, columns = layer.source
    out = np.full(decoded.LEAD + 9 * width, np.nan, np.float32)
    run = decoded.panel_kernel(kind).serial
    run(data, book, columns, 9, channels, first, cols, width, out)
    exact = np.zeros((9, width), np.float32)
    weights = reference.look_up(codebook.codes(layer), layer.book)
    exact[:, :cols] = weights[:, first : first + cols]
    np.testing.assert_array_equal(out[decoded.LEAD :].reshape(9, width), exact)


def test_bytes_are_those_of_the_codes_and_the_book():
    layer = packed((100, 70), 3, False)
    assert layer.nbytes == -(-7000 * 3 // 8) + layer.book.nbytes
    assert codebook.pack(np.array([[255]]), np.arange(256, dtype=np.float32)).bits == 8


@QUICK
@given(
    st.sampled_from([1, 2, 3, 7, 30, 250]),
    st.integers(1, 300),
    st.one_of(st.integers(1, 40), st.sampled_from([16, 64, 70, 272])),
    st.sampled_from(KINDS),
    st.booleans(),
)
def test_linear(variant, m, k, n, kind, relu):
    if variant == "parallel":
        kind = (3, True)
    layer = packed((k, n), *kind)
    rng = np.random.default_rng(1)
    x, bias = rng.standard_normal((m, k)).astype(np.float32), np.arange(n, dtype=np.float32) / n
    weights = reference.look_up(codebook.codes(layer), layer.book)
    exact = x.astype(np.float64) @ weights + bias
    out = np.full((m, n), np.nan, np.float32)
    assert codebook.linear(x, layer, bias, relu, out=out) is out
    check(out, np.maximum(exact, 0) if relu else exact, k)
    np.testing.assert_array_equal(codebook.linear(x, layer, bias, relu), out)


# Rows that begin at sixteens or not, panels filled in part, several panels.
CONVOLUTIONS = [
    (Window((1, 1)), 18),
    (window(6, 7, (3, 3), (1, 1), "same"), 18),
    (window(6, 7, (3, 2), (2, 2), "same"), 16),
    (Window((2, 3), (1, 2), ((1, 0), (2, 1)), (2, 1)), 32),
    (Window((1, 1), (2, 1)), 18),
]


@pytest.mark.parametrize(("bits", "each"), KINDS)
@pytest.mark.parametrize(("win", "channels"), CONVOLUTIONS)
def test_convolution(win, channels, bits, each):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 6, 7, 5)).astype(np.float32)
    layer = packed((*win.kernel, 5, channels), bits, each)
    bias = np.linspace(-1, 1, channels).astype(np.float32)
    y = codebook.conv2d(x, layer, bias, win, True)
    out = np.zeros_like(y)
    assert codebook.conv2d(x, layer, bias, win, True, out=out) is out
    np.testing.assert_array_equal(out, y)
    weights = reference.look_up(codebook.codes(layer), layer.book)
    if not conv.is_pointwise(win):  # every bit is that of the dense kernel
        np.testing.assert_array_equal(y, conv.conv2d(x, weights, bias, win, True))
    exact = conv2d(x.astype(np.float64), *map(np.float64, (weights, bias)), win)
    check(y, np.maximum(exact, 0), 45)


@pytest.mark.parametrize(("bits", "each"), KINDS)
def test_nan_and_infinity_mark_their_row_and_column_only(bits, each):
    layer = packed((40, 20), bits, each)
    weights = codebook.unpack(layer)
    x = np.ones((9, 40), np.float32)
    x[4, 3] = np.nan
    y = codebook.linear(x, layer)
    assert np.isnan(y[4]).all() and np.isnan(y).sum() == 20
    layer.book[..., codebook.codes(layer)[5, 7]] = np.inf
    again = codebook.pack(codebook.codes(layer), layer.book)
    marked = ~np.isfinite(codebook.unpack(again))
    assert marked[5, 7] and (marked | np.isfinite(weights)).all()
    x[4, 3] = 1
    y = codebook.linear(x, again)
    np.testing.assert_array_equal(~np.isfinite(y).all(0), marked.any(0))


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
@pytest.mark.parametrize("sizes", [(1, 900, 300), (700, 130, 70)])
def test_threads_do_not_change_a_bit(sizes):
    m, k, n = sizes
    layer = packed((k, n), 8, False)
    x = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
    before, results = _jit.get_threads(), []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            results.append(codebook.linear(x, layer, None, True).tobytes())
    finally:
        _jit.set_threads(before)
    assert results[0] == results[1]


def test_wrong_operands_are_named():
    book = np.zeros(4, np.float32)
    with pytest.raises(TypeError, match=r"codebook\.pack: .*float64"):
        codebook.pack(np.zeros((2, 2), int), book.astype(np.float64))
    with pytest.raises(ValueError, match="2 to 256 entries"):
        codebook.pack(np.zeros((2, 2), int), book[:1])
    with pytest.raises(ValueError, match="codes from 0 to 3, got 0 to 4"):
        codebook.pack(np.array([[0, 4]]), book)
    layer = codebook.pack(np.zeros((2, 3), int), book)
    with pytest.raises(ValueError, match=r"codebook\.linear: expected x \(M, 2\)"):
        codebook.linear(np.zeros((1, 3), np.float32), layer)
    with pytest.raises(TypeError, match=r"codebook\.linear: .*float64"):
        codebook.linear(np.zeros((1, 2)), layer)
    with pytest.raises(ValueError, match=r"expected bias \(3,\)"):
        codebook.linear(np.zeros((1, 2), np.float32), layer, book)
    with pytest.raises(ValueError, match=r"expected out \(1, 3\)"):
        codebook.linear(np.zeros((1, 2), np.float32), layer, out=np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match=r"codebook\.conv2d: "):
        codebook.conv2d(np.zeros((1, 3, 3, 2), np.float32), layer, None, Window((3, 3)))
