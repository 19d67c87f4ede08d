"""float16 weights: conversion bit by bit, and the layers that decode while they run."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import _jit, half, simd
from kernels import reference_compressed as reference
from kernels.geometry import window
from kernels.reference import conv2d

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if request.param == "parallel" else 1 << 60)
        yield


def check(got, exact, terms):
    assert got.dtype == np.float32 and got.shape == exact.shape and got.flags.carray
    bound = (8 + 4 * terms) * np.finfo(np.float32).eps
    np.testing.assert_allclose(got, exact, rtol=0, atol=bound)


EVERY = np.arange(1 << 16, dtype=np.uint16)


def test_every_half_is_decoded_exactly():
    layer = half.Half(EVERY.view(np.float16).reshape(256, 256))
    exact = np.array([reference.half_value(b) for b in EVERY.tolist()], np.float32)
    np.testing.assert_array_equal(half.unpack(layer).ravel(), exact)
    assert np.signbit(half.unpack(layer).ravel()[1 << 15])


@given(st.floats(width=32, allow_nan=False))
def test_rounding_is_to_nearest_even(value):
    (bits,) = half.pack(np.full((1, 1), value, np.float32)).values.view(np.uint16)[0]
    assert bits == reference.half_bits(value)


def test_rounding_at_ties_and_ends():
    near = [2049, 2051, 65504, 65519, 65520, 1e30, 2**-24, 2**-25, 3 * 2**-26, 2**-14, 0, np.inf]
    values = np.array([near, [-v for v in near]], np.float32)
    packed = half.pack(values).values
    bits = [reference.half_bits(v) for v in values.ravel().tolist()]
    np.testing.assert_array_equal(packed.view(np.uint16).ravel(), bits)
    expected = [2048, 2052, 65504, 65504, np.inf, np.inf, 2**-24, 0, 2**-24, 2**-14, 0, np.inf]
    np.testing.assert_array_equal(packed[0].astype(np.float64), expected)
    assert np.isnan(half.pack(np.full((1, 1), np.nan, np.float32)).values).all()


@pytest.mark.parametrize("level", simd.available())
def test_every_level_decodes_alike(level):
    code = (
        "import numpy as np; from kernels import half\n"
        "every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)\n"
        "got = half.unpack(half.Half(every))\n"
        "np.testing.assert_array_equal(got, every.astype(np.float32))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"TINYNN_CPU": level},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@QUICK
@given(
    st.sampled_from([1, 2, 3, 7, 30, 250]),
    st.integers(1, 300),
    st.one_of(st.integers(1, 40), st.sampled_from([16, 64, 70, 272])),
    st.booleans(),
)
def test_linear(m, k, n, relu):
    rng = np.random.default_rng(1)
    layer = half.pack(rng.standard_normal((k, n)).astype(np.float32))
    assert layer.nbytes == 2 * k * n
    x, bias = rng.standard_normal((m, k)).astype(np.float32), np.arange(n, dtype=np.float32) / n
    exact = x.astype(np.float64) @ layer.values.astype(np.float64) + bias
    out = np.full((m, n), np.nan, np.float32)
    assert half.linear(x, layer, bias, relu, out=out) is out
    check(out, np.maximum(exact, 0) if relu else exact, k)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_convolution(kernel):
    win = window(6, 7, kernel, (1, 1), "same")
    rng = np.random.default_rng(1)
    layer = half.pack(rng.standard_normal((*kernel, 5, 18)).astype(np.float32))
    x = rng.standard_normal((3, 6, 7, 5)).astype(np.float32)
    y = half.conv2d(x, layer, None, win, True)
    exact = conv2d(x.astype(np.float64), layer.values.astype(np.float64), None, win)
    check(y, np.maximum(exact, 0), 45)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_mark_their_row_and_column_only(value):
    weights, x = np.ones((40, 20), np.float32), np.ones((9, 40), np.float32)
    weights[3, 4] = x[2, 1] = value
    marked = ~np.isfinite(half.linear(x, half.pack(weights)))
    assert marked[2].all() and marked[:, 4].all() and marked.sum() == 20 + 9 - 1


def test_wrong_operands_are_named():
    with pytest.raises(TypeError, match=r"half\.pack: .*float64"):
        half.pack(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"half\.pack: .*\(2,\)"):
        half.pack(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"half\.linear: expected x \(M, 2\)"):
        half.linear(np.zeros((1, 3), np.float32), half.pack(np.zeros((2, 2), np.float32)))
