"""Sparse layers against plain loops that leave out the zeros."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from borders import bordered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import _jit, simd, sparse
from kernels import reference_compressed as reference
from kernels.geometry import Window, window
from kernels.sparse_pack import SLACK

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
BLOCKS = st.sampled_from([1, 4])
DENSITY = st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0])


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays.

    The parallel one with blocks of one size only: each is a kernel, and takes seconds to compile.
    """
    parallel, plan = request.param == "parallel", sparse.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if parallel else 1 << 60)
        if parallel:
            patch.setattr(sparse, "plan", lambda *args: plan(*args)._replace(vectors=2))
        yield


def weights(shape, density, block=1, seed=0):
    """Random weights of which whole blocks are zero."""
    rng = np.random.default_rng(seed)
    kept = rng.random((*shape[:-1], -(-shape[-1] // block))) < density
    kept = np.repeat(kept, block, -1)[..., : shape[-1]]
    return np.where(kept, rng.standard_normal(shape), 0).astype(np.float32)


def randoms(*shapes, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def check(got, exact, terms):
    assert got.dtype == np.float32 and got.shape == exact.shape and got.flags.carray
    bound = (8 + 2 * terms) * np.finfo(np.float32).eps
    np.testing.assert_allclose(got, exact, rtol=0, atol=bound)


# --- the layout -----------------------------------------------------------------------------------


@QUICK
@given(
    st.integers(1, 400),
    st.integers(1, 70),
    DENSITY,
    BLOCKS,
    st.one_of(st.none(), st.integers(1, 255)),
)
def test_packing_keeps_every_weight(k, n, density, block, depth):
    w = weights((k, n), density)
    packed = sparse.pack(w, block, depth)
    np.testing.assert_array_equal(sparse.unpack(packed)[0, 0], w)
    assert packed.counts.sum() == len(packed.indices) - SLACK == packed.starts[-1, 0]
    assert len(packed.values) == packed.starts[-1, 1]
    assert np.diff(packed.edges).max() == packed.depth <= 255 and packed.edges[-1] == k
    if block == 1:
        assert len(packed.values) == np.count_nonzero(w)
    if depth is None:
        # what does not grow with the weights: counts for each chunk and row, some starts
        chunks = len(packed.edges) - 1
        rows = 3 * -(-n // 2) if block == 1 else -(-n // 4)
        room = chunks * (rows + 8 * -(-n // 16)) + 4 * (chunks + 3)
        assert packed.nbytes <= len(packed.values) * (4 + 1 / block) + room


@pytest.mark.parametrize("taps", [(1, 1), (3, 3), (1, 5)])
@pytest.mark.parametrize("channels", [1, 3, 16, 64, 100, 300])
def test_chunks_never_cut_a_tap_but_in_parts(taps, channels):
    w = weights((*taps, channels, 20), 0.5)
    packed = sparse.pack(w)
    np.testing.assert_array_equal(sparse.unpack(packed), w)
    for lo, hi in zip(packed.edges[:-1], packed.edges[1:], strict=True):
        whole = lo % channels == 0 and hi % channels == 0
        assert whole or lo // channels == (hi - 1) // channels


def test_a_sparse_layer_is_small():
    packed = sparse.pack(weights((512, 512), 0.1))
    assert packed.nbytes <= 0.14 * 4 * 512 * 512
    assert sparse.pack(weights((512, 512), 0.1, 4), 4).nbytes <= 0.12 * 4 * 512 * 512
    assert abs(packed.density - 0.1) < 0.01


# --- linear layers --------------------------------------------------------------------------------


@QUICK
@given(
    st.sampled_from([1, 2, 3, 16, 33, 97, 200]),
    st.integers(1, 70),
    st.integers(1, 40),
    DENSITY,
    BLOCKS,
    st.booleans(),
    st.booleans(),
)
def test_linear(m, k, n, density, block, relu, biased):
    w = weights((k, n), density, block)
    x, bias = randoms((m, k), n)
    bias = bias if biased else None
    y = sparse.linear(x, sparse.pack(w, block), bias, relu)
    wide = None if bias is None else bias.astype(np.float64)
    exact = x.astype(np.float64) @ w.astype(np.float64) + (0 if wide is None else wide)
    check(y, np.maximum(exact, 0) if relu else exact, k)


@QUICK
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 9), DENSITY, BLOCKS, st.booleans())
def test_linear_against_the_loops(m, k, n, density, block, relu):
    w = weights((k, n), density, block)
    x, bias = randoms((m, k), n)
    exact = reference.sparse_linear(x.astype(np.float64), w, bias, relu)
    check(sparse.linear(x, sparse.pack(w, block), bias, relu), exact, k)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("sizes", [(1, 700, 90), (2, 300, 33), (100, 700, 90), (30, 70, 1100)])
def test_several_chunks_and_parts(sizes, block):
    m, k, n = sizes
    w = weights((k, n), 0.4, block)
    w[64:200] = 0  # chunks without any weight
    w[:, 17:] *= np.arange(n - 17) % 3 > 0
    x, bias = randoms((m, k), n)
    y = sparse.linear(x, sparse.pack(w, block), bias, True)
    check(y, np.maximum(x.astype(np.float64) @ w + bias, 0), k)


# --- convolutions ---------------------------------------------------------------------------------


@QUICK
@given(st.data(), DENSITY, BLOCKS, st.booleans())
def test_convolution(data, density, block, relu):
    draw = data.draw
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    b, h, v = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    c, n = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    win = window(h, v, kernel, stride, "same", dilation)
    w = weights((*kernel, c, n), density, block)
    x, bias = randoms((b, h, v, c), n)
    exact = reference.sparse_conv2d(x.astype(np.float64), w, bias, win, relu)
    check(sparse.conv2d(x, sparse.pack(w, block), bias, win, relu), exact, w[..., 0].size)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("images", [1, 100])
def test_pixels_along_rows_and_along_images(images, block):
    win = window(6, 5, (3, 3), (1, 1), "same")
    w = weights((3, 3, 70, 20), 0.3, block)
    x, bias = randoms((images, 6, 5, 70), 20)
    y = sparse.conv2d(x, sparse.pack(w, block), bias, win, True)
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = bias + sum(
        padded[:, i : i + 6, j : j + 5] @ w[i, j] for i in range(3) for j in range(3)
    )
    check(y, np.maximum(exact, 0), 630)


# --- numbers, memory, threads ---------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pruned_weight_silences_what_is_not_finite(rows, value, block):
    w = np.abs(weights((30, 24), 1)) + 0.1
    w[7, 4:8] = 0
    (x,) = randoms((rows, 30))
    x = np.abs(x)
    x[rows // 2, 7] = value
    y = sparse.linear(x, sparse.pack(w, block))
    np.testing.assert_array_equal(np.isfinite(y[rows // 2]), w[7] == 0)
    assert np.isfinite(np.delete(y, rows // 2, 0)).all()
    exact = reference.sparse_linear(x.astype(np.float64), w, None, True)
    np.testing.assert_allclose(sparse.linear(x, sparse.pack(w, block), None, True), exact, 1e-5)


@pytest.mark.parametrize("block", [1, 4])
def test_infinity_in_an_image_reaches_its_windows_only(block):
    win = window(5, 6, (3, 3), (1, 1), "same")
    w = np.abs(weights((3, 3, 3, 5), 1)) + 0.1
    (x,) = randoms((2, 5, 6, 3))
    x[1, 0, 5, 2] = np.inf
    marked = ~np.isfinite(sparse.conv2d(x, sparse.pack(w, block), None, win))
    assert marked[1, :2, 4:].all() and marked.sum() == 4 * 5


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("sizes", [(1, 30, 21), (23, 17, 21), (100, 67, 35)])
def test_kernels_stay_within_their_operands(sizes, block):
    m, k, n = sizes
    w = weights((k, n), 0.5, block)
    packed = sparse.pack(w, block)
    x, bias = randoms((m, k), n)
    guarded = packed._replace(
        values=bordered(packed.values)[0], indices=bordered(packed.indices)[0]
    )
    y, border = bordered(np.zeros((m, n), np.float32))
    assert sparse.linear(bordered(x)[0], guarded, bias, True, out=y) is y
    assert (border == 255).all()
    check(y.copy(), np.maximum(x.astype(np.float64) @ w + bias, 0), k)


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("sizes", [(1, 900, 300), (700, 130, 70), (20, 300, 600)])
def test_threads_do_not_change_a_bit(sizes, block):
    m, k, n = sizes
    packed = sparse.pack(weights((k, n), 0.3, block), block)
    x, bias = randoms((m, k), n)
    before, results = _jit.get_threads(), []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            results.append(sparse.linear(x, packed, bias, True).tobytes())
    finally:
        _jit.set_threads(before)
    assert results[0] == results[1]


@pytest.mark.parametrize("level", simd.available()[1:])
def test_other_levels(level):
    code = (
        "import numpy as np; from kernels import sparse\n"
        "rng = np.random.default_rng(0)\n"
        "x = rng.standard_normal((50, 70)).astype(np.float32)\n"
        "w = rng.standard_normal((70, 33)).astype(np.float32)\n"
        "w[rng.random(w.shape) < 0.6] = 0\n"
        "for block in (1, 4):\n"
        "    for rows in (x, x[:1]):\n"
        "        y = sparse.linear(rows, sparse.pack(w, block))\n"
        "        np.testing.assert_allclose(y, np.float64(rows) @ w, rtol=0, atol=1e-4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"TINYNN_CPU": level},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_wrong_operands_are_named():
    w = weights((4, 5), 0.5)
    packed, x = sparse.pack(w), np.zeros((3, 4), np.float32)
    with pytest.raises(TypeError, match=r"sparse\.pack: .*float64"):
        sparse.pack(w.astype(np.float64))
    with pytest.raises(ValueError, match="block 1 or 4"):
        sparse.pack(w, 2)
    with pytest.raises(ValueError, match="depth <= 255, got 256"):
        sparse.pack(w, depth=256)
    with pytest.raises(ValueError, match="finite"):
        sparse.pack(np.full((2, 2), np.inf, np.float32))
    with pytest.raises(ValueError, match=r"expected x \(M, 4\)"):
        sparse.linear(np.zeros((3, 5), np.float32), packed)
    with pytest.raises(TypeError, match=r"sparse\.linear: .*float64"):
        sparse.linear(x.astype(np.float64), packed)
    with pytest.raises(ValueError, match=r"expected bias \(5,\), got \(4,\)"):
        sparse.linear(x, packed, np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"expected out \(3, 5\)"):
        sparse.linear(x, packed, out=np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"sparse\.conv2d: .*got \(1, 3, 3, 4\)"):
        sparse.conv2d(np.zeros((1, 3, 3, 4), np.float32), packed, None, Window((3, 3)))
