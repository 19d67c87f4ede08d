"""Digits drawn from fonts: reproducible, balanced, readable; the warp against SciPy."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kernels import augment as kernel
from tinynn import data
from tinynn.errors import ConfigError, DataNotFoundError


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 8), st.integers(1, 8))
def test_the_warp_equals_scipy(seed, side, h, w):
    rng = np.random.default_rng(seed)
    drawings, chosen = rng.integers(0, 256, (3, side, side), np.uint8), rng.integers(0, 3, 4)
    matrix, moved = rng.normal(size=(4, 2, 2)), rng.normal(size=(4, 2, h, w))
    got = kernel.warp(drawings, chosen, matrix, moved)
    assert got.shape == (4, h, w) and got.dtype == np.float32
    for b in range(4):
        pixels = np.indices((h, w)) - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
        places = np.einsum("rc,cij->rij", matrix[b], pixels - moved[b]) + (side - 1) / 2
        drawing = drawings[chosen[b]] / 255
        expected = ndimage.map_coordinates(drawing, places, order=1, mode="grid-constant")
        np.testing.assert_allclose(got[b], expected, atol=1e-6)


def test_without_distortion_the_drawing_stays():
    drawings = np.random.default_rng(0).integers(0, 256, (2, 5, 5), np.uint8)
    got = kernel.warp(drawings, np.arange(2), np.stack([np.eye(2)] * 2), np.zeros((2, 2, 5, 5)))
    np.testing.assert_allclose(got, drawings / np.float32(255), rtol=1e-6)


def test_the_warp_refuses_drawings_that_are_not_there():
    drawings = np.zeros((2, 5, 5), np.uint8)
    for chosen in (np.array([2]), np.array([-1]), np.array([0.0])):
        with pytest.raises(ValueError, match="chosen"):
            kernel.warp(drawings, chosen, np.zeros((1, 2, 2)), np.zeros((1, 2, 5, 5)))


def test_the_interface_is_that_of_mnist():
    train, test = data.load("glyphs")
    assert train.images.shape == (10_000, 28, 28, 1) and test.images.shape == (2_000, 28, 28, 1)
    assert train.images.dtype == np.uint8 and train.classes == tuple("0123456789")
    np.testing.assert_array_equal(np.bincount(train.labels), 1000)
    assert np.mean(train.images == 0) > 0.3 and train.images.max() == 255


def test_a_seed_makes_the_same_images_whatever_their_number():
    train, test = data.glyphs(3, 1200, 20)
    fewer, _ = data.glyphs(3, 7, 1)
    np.testing.assert_array_equal(fewer.images, train.images[:7])
    np.testing.assert_array_equal(fewer.labels, train.labels[:7])
    again, _ = data.glyphs(3, 1200, 20)
    np.testing.assert_array_equal(again.images, train.images)
    other, _ = data.glyphs(4, 7, 1)
    assert not np.array_equal(other.images, fewer.images)
    assert not np.array_equal(test.images[:7], fewer.images)


def test_no_image_comes_twice():
    train, test = data.glyphs(0, 2000, 1000)
    rows = np.concatenate([train.images, test.images]).reshape(3000, -1)
    assert len(np.unique(rows, axis=0)) == 3000


def test_the_digits_can_be_told_apart_but_not_by_their_means():
    train, test = data.glyphs(0, 3000, 500)
    x, y = train.floats().reshape(3000, -1), test.floats().reshape(500, -1)
    means = np.stack([x[train.labels == k].mean(0) for k in range(10)])
    by_mean = np.square(y[:, None] - means).sum(-1).argmin(1)
    nearest = (np.square(x).sum(1) - 2 * y @ x.T).argmin(1)
    assert 0.4 < np.mean(by_mean == test.labels) < 0.85
    assert np.mean(train.labels[nearest] == test.labels) > 0.65


@pytest.mark.parametrize("wrong", [(-1, 1, 1), (0, 0, 1), (0, 1, 0), (0.5, 1, 1), (0, 2.5, 1)])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ConfigError, match="glyphs"):
        data.glyphs(*wrong)


def test_missing_fonts_are_an_error(tmp_path, monkeypatch):
    import sys

    module = sys.modules["tinynn.data.glyphs"]
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataNotFoundError, match="fonts"):
        module._alphabet.__wrapped__()
