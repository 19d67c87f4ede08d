"""Digits drawn from fonts and distorted: a data set like MNIST that needs no file.

Every digit of every suitable font that Matplotlib ships is drawn once, large. An image is one of
these seen through a random map: shift, rotation, scale and shear, and an elastic distortion as of
Simard, Steinkraus and Platt 2003, "Best practices for convolutional neural networks applied to
visual document analysis", section 2; then its strokes get a random weight, and noise is added.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kernels import augment as kernel
from tinynn.data.batches import is_count
from tinynn.data.images import Dataset
from tinynn.data.names import DIGITS
from tinynn.errors import ConfigError, DataNotFoundError
from tinynn.op import Array

_SIDE = 28
_CANVAS, _HEIGHT = 44, 24  # pixels of a drawing, and of a digit's height in it
_FINE = 6  # drawings are made so many times larger, and averaged
_FONTS = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmb10", "cmr10", "cmss10", "cmt[it]10")
_COARSE = 6  # the elastic field is drawn at so many points a side, and interpolated
_CHUNK = 1000


def glyphs(seed: int = 0, train: int = 10_000, test: int = 2_000) -> tuple[Dataset, Dataset]:
    """(train, test) of distorted digits, 28 x 28 x 1 uint8, white on black, labels 0 to 9.

    The same seed gives the same images, whatever the numbers of images: the first n of a larger set
    are the set of n. Test images come from the same fonts and distortions, from draws of their own.
    Raises ConfigError for numbers < 1 or a negative seed, DataNotFoundError without the fonts.
    """
    if not is_count(train) or not is_count(test) or not (seed == 0 or is_count(seed)):
        raise ConfigError(
            f"glyphs: required train and test >= 1 and a seed >= 0; came {train!r}, {test!r} and "
            f"{seed!r}"
        )
    return _draw([int(seed), 0], int(train)), _draw([int(seed), 1], int(test))


def _draw(seed: list[int], n: int) -> Dataset:
    images, labels = np.empty((n, _SIDE, _SIDE, 1), np.uint8), np.empty(n, np.int64)
    for number, start in enumerate(range(0, n, _CHUNK)):
        rng = np.random.default_rng([*seed, number])  # whole chunks are drawn, so that n is free
        part = slice(start, min(start + _CHUNK, n))
        count = part.stop - part.start
        drawn, classes = _chunk(rng)
        images[part], labels[part] = drawn[:count], classes[:count]
    return Dataset("glyphs", images, labels, DIGITS)


def _chunk(rng: np.random.Generator) -> tuple[Array, Array]:
    """_CHUNK images (n, 28, 28, 1) uint8 and their labels (n,), a tenth of each digit."""
    n, alphabet = _CHUNK, _alphabet()
    labels = rng.permutation(np.arange(n) % len(DIGITS))
    chosen = rng.integers(0, len(alphabet) // len(DIGITS), n) * len(DIGITS) + labels
    angle, shear = rng.uniform(-0.25, 0.25, n), rng.uniform(-0.3, 0.3, n)
    height, width = rng.uniform(15, 21, n), rng.uniform(0.8, 1.3, n)
    shift = rng.uniform(-2.5, 2.5, (n, 2))
    strength = rng.uniform(0, 1.6, n)
    field = rng.normal(size=(n, 2, _COARSE, _COARSE))
    weight, noise = rng.uniform(-0.25, 0.25, n), rng.uniform(0, 0.06, n)

    # from a pixel of the image to its place in the drawing: turn back, shear back, scale
    cos, sin, scale = np.cos(angle), np.sin(angle), _HEIGHT / height
    matrix = np.empty((n, 2, 2))  # (row, column) to (row, column)
    matrix[:, 0, 0], matrix[:, 0, 1] = cos * scale, -sin * scale
    matrix[:, 1, 0] = (sin + shear * cos) * scale / width
    matrix[:, 1, 1] = (cos - shear * sin) * scale / width
    moved = shift[:, :, None, None] + strength[:, None, None, None] * _smooth(field)
    values = kernel.warp(alphabet, chosen, matrix, moved)
    values += 4 * weight.astype(np.float32)[:, None, None] * values * (1 - values)
    values += noise.astype(np.float32)[:, None, None] * rng.standard_normal(
        values.shape, np.float32
    )
    return (255 * np.clip(values, 0, 1) + 0.5).astype(np.uint8)[..., None], labels


def _smooth(field: Array) -> Array:
    """(n, 2, c, c) normal numbers -> (n, 2, 28, 28) of variance about 1 that change slowly."""
    points = np.linspace(0, _COARSE - 1, _SIDE)
    basis = np.exp(-0.5 * ((points[:, None] - np.arange(_COARSE)) / 0.7) ** 2)
    basis /= np.sqrt(np.square(basis).sum(1, keepdims=True))
    rows = np.einsum("ik,nckl->ncil", basis, field)
    return np.einsum("jl,ncil->ncij", basis, rows)


@functools.cache
def _alphabet() -> Array:
    """Drawings (fonts * 10, side, side) uint8, white on black; of each font the digits in order."""
    import matplotlib  # here: it takes a tenth of a second to import

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = sorted({path for name in _FONTS for path in folder.glob(f"{name}.ttf")})
    fonts = [path for path in fonts if "Display" not in path.name]  # these have no digits
    if not fonts:
        raise DataNotFoundError(f"glyphs: required Matplotlib's fonts in {folder}; came none")
    return np.stack([_drawing(str(path), digit) for path in fonts for digit in DIGITS])


def _drawing(path: str, digit: str) -> Array:
    """One digit in the middle of a square, at the size at which a zero has the wanted height."""
    probe = ImageFont.truetype(path, 1000, layout_engine=ImageFont.Layout.BASIC)
    _, top, _, bottom = probe.getbbox("0")
    size = round(1000 * _HEIGHT * _FINE / (bottom - top))
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(digit)
    side = _CANVAS * _FINE
    image = Image.new("L", (side, side))
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, digit, fill=255, font=font)
    fine = np.asarray(image, np.float32).reshape(_CANVAS, _FINE, _CANVAS, _FINE)
    return np.rint(fine.mean(axis=(1, 3))).astype(np.uint8)
