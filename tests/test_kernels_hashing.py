"""Weights made by hashing: the hash is the published one for ever, the transform is a DCT."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import fft

from kernels import hashing, reference_compressed
from tinynn import get_threads, max_threads, ops, set_threads
from tinynn.errors import ConfigError, ShapeError
from tinynn.ops.hashing import Hashed, band_sizes, share_out

SHAPE, BUCKETS = (3, 4, 5, 6), (3, 9, 7, 20, 2, 1)


def test_the_hash_is_splitmix64() -> None:
    published = [  # of the authors' C code for the seed 1234567
        6457827717110365317, 3203168211198807973, 9817491932198370423,
        4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert hashing.splitmix64(1234567, np.arange(5, dtype=np.uint64)).tolist() == published
    assert [reference_compressed.splitmix64(1234567, i) for i in range(5)] == published


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "buckets"), [(SHAPE, BUCKETS), ((7, 9), (5,)), ((1, 1, 6, 4), (24,))]
)
def test_weights_equal_the_plain_loops(shape: tuple, buckets: tuple, dtype: type) -> None:
    values = np.random.default_rng(0).standard_normal(sum(buckets)).astype(dtype)
    for seed in (0, (1 << 63) - 1):
        got = hashing.weights(values, shape, buckets, seed)
        want = reference_compressed.hashed(values.astype(np.float64), shape, buckets, seed)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, atol=1e-12 if dtype == np.float64 else 1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hashing._table(SHAPE, BUCKETS, 3).copy()
    monkeypatch.setattr(hashing, "_BLOCK", 7)
    np.testing.assert_array_equal(hashing._table.__wrapped__(SHAPE, BUCKETS, 3), whole)


def test_a_band_has_buckets_of_its_own_and_signs_are_even() -> None:
    shape, buckets = (3, 3, 40, 50), (50, 40, 30, 20, 10)
    ends = np.cumsum(buckets)
    for band in range(5):
        values = np.zeros(150, np.float32)
        values[ends[band] - buckets[band] : ends[band]] = 1
        found = fft.dctn(hashing.weights(values, shape, buckets, 0), axes=(0, 1), norm="ortho")
        inside = np.add.outer(np.arange(3), np.arange(3)) == band
        np.testing.assert_allclose(np.abs(found), np.broadcast_to(
            inside[..., None, None], shape), atol=1e-5)  # fmt: skip
        assert abs(found[inside].mean()) < 0.05


def test_fitted_values_are_the_nearest() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(SHAPE)
    values = hashing.fitted(w, BUCKETS, 1)
    matrix = np.stack(
        [hashing.weights(e, SHAPE, BUCKETS, 1).reshape(-1) for e in np.eye(len(values))], axis=1
    )
    want = np.linalg.lstsq(matrix, w.reshape(-1), rcond=None)[0]
    np.testing.assert_allclose(values, want, atol=1e-12)
    again = hashing.fitted(hashing.weights(values, SHAPE, BUCKETS, 1), BUCKETS, 1)
    np.testing.assert_allclose(again, values, atol=1e-12)
    empty = hashing.fitted(w[:1, :1, 0], (6,), 0)  # fewer weights than it takes to fill buckets
    assert empty.shape == (6,) and np.isfinite(empty).all()


def test_bits_do_not_depend_on_threads() -> None:
    values = np.random.default_rng(0).standard_normal(900).astype(np.float32)
    shape, buckets = (5, 5, 32, 33), (100,) * 9
    found, before = [], get_threads()
    try:
        for threads in (1, max_threads()):
            set_threads(threads)
            w = hashing.weights(values, shape, buckets, 0)
            found.append((w.tobytes(), hashing.weights_grad(w, buckets, 0).tobytes()))
    finally:
        set_threads(before)
    assert found[0] == found[1]


def test_buckets_go_to_low_frequencies() -> None:
    shape = (5, 5, 16, 32)
    sizes = band_sizes(shape)
    assert sum(sizes) == np.prod(shape) and sizes[:3] == (512, 1024, 1536)
    for share in (1.0, 0.5, 0.1, 0.01):
        buckets = share_out(shape, share, 1.0, 2.0)
        rates = np.divide(buckets, sizes)
        assert abs(sum(buckets) - share * sum(sizes)) <= 1 and (rates <= 1).all()
        assert (np.diff(rates) <= 0.01).all()
    np.testing.assert_allclose(rates / rates[0], (1 - np.arange(1, 10) / 10) / 0.9, atol=0.06)
    even = np.divide(share_out(shape, 0.25, 1.0, 1.0), sizes)
    np.testing.assert_allclose(even, 0.25, atol=1e-3)
    assert share_out(shape, 1e-9, 1.0, 2.0) == (1,) * 9  # at least one a band
    assert share_out((300, 10), 0.5, 1.0, 2.0) == share_out((1, 1, 300, 10), 0.5, 3, 4) == (1500,)


def test_what_does_not_fit_is_refused_before_anything_is_made() -> None:
    wrong = [
        ((3, 3, 3), (1,)), ((2, 2), (0,)), ((2, 2), (5,)), ((2, 2), (1, 1)), ((2, 2), ()),
        ((0, 2), (1,)), ((2.0, 2), (1,)), ((True, 2), (1,)), ((1 << 27, 1), (1 << 20,)),
        ((64, 64, 1, 1), (1,) * 127), ((1 << 13, 1), (1,)), ((2, "2"), (1,)),
    ]  # fmt: skip
    for shape, buckets in wrong:
        with pytest.raises(ConfigError, match="hashed: required"):
            Hashed(shape, buckets)
    for seed in (-1, 1 << 63, 0.0, True):
        with pytest.raises(ConfigError, match="hashed: required"):
            Hashed((2, 2), (1,), seed)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"values \(3,\)"):
        ops.hashed(np.ones(2), (2, 2), (3,))
    for share, alpha, beta in ((0, 1, 1), (1.1, 1, 1), (np.nan, 1, 1), (0.5, 0, 1), (0.5, 1, -1)):
        with pytest.raises(ConfigError, match="share"):
            share_out((3, 3, 2, 2), share, alpha, beta)
