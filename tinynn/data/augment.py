"""Random changes to training images, and the fixed view of them for evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from kernels import augment as kernel
from tinynn.errors import ConfigError, ShapeError
from tinynn.op import Array


@dataclass(frozen=True)
class Augment:
    """What happens to byte images (n, H, W, C) on their way to float32 (n, h, w, C).

    `crop`: the side of a square window at a random place, of the image with `pad` zero pixels
    around it; without, the window has the image's size. `shift`: moves the window by up to this
    share of height and width, rounded down to whole pixels; what comes in from outside repeats the
    border. `flip`: mirrors left and right every second time. `contrast`: multiplies each pixel's
    distance from its channel's mean by a factor between these two. `brightness`: adds a number
    between plus and minus this share of the range. Nothing is clipped. All are drawn uniformly.

    `standardize` then subtracts the image's mean and divides by max(standard deviation,
    1 / sqrt(number of values)), in units of a byte: A. Krizhevsky's cuda-convnet recipe as
    TensorFlow's tutorial has it. It takes away exactly what `brightness` added. Without it bytes
    are divided by 255.

    Raises ConfigError for values outside their range.
    """

    crop: int | None = None
    pad: int = 0
    shift: float = 0.0
    flip: bool = False
    brightness: float = 0.0
    contrast: tuple[float, float] = (1.0, 1.0)
    standardize: bool = False
    central: bool = False  #: the window is the middle one, not a random one

    def __post_init__(self) -> None:
        whole = {"crop": (self.crop, 1), "pad": (self.pad, 0)}
        for name, (value, least) in whole.items():
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"Augment: required a whole {name} >= {least}; came {value!r}")
        if not 0 <= self.shift < 1 or not (math.isfinite(self.brightness) and self.brightness >= 0):
            raise ConfigError(
                "Augment: required 0 <= shift < 1 and a finite brightness >= 0; came "
                f"{self.shift!r} and {self.brightness!r}"
            )
        if self.shift and self.pad:
            raise ConfigError("Augment: shift repeats the border and pad adds zeros; choose one")
        low, high = self.contrast
        if not 0 <= low <= high < math.inf:
            raise ConfigError(f"Augment: required 0 <= low <= high contrast; came {self.contrast}")

    @property
    def random(self) -> bool:
        """Whether anything is drawn."""
        moves = not self.central and (self.crop is not None or self.pad > 0 or self.shift > 0)
        return moves or self.flip or self.brightness > 0 or self.contrast != (1.0, 1.0)

    def evaluation(self) -> Augment:
        """The same without chance: the middle window, standardised if this one does."""
        return replace(self, flip=False, brightness=0.0, contrast=(1.0, 1.0), central=True)

    def __call__(
        self, images: Array, rng: np.random.Generator | None = None, rows: Array | None = None
    ) -> Array:
        """Augmented copies of images[rows], or of all images; (n, h, w, C) float32.

        The same generator state gives the same bits on any number of threads. Raises ConfigError
        if chance is asked for and `rng` is None, ShapeError if the window is larger than the
        padded image or the images are not (n, H, W, C) bytes.
        """
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ShapeError(
                f"Augment: required images (n, H, W, C) of uint8; came {images.dtype} "
                f"{images.shape}"
            )
        height, width = images.shape[1:3]
        h, w = (height, width) if self.crop is None else (self.crop, self.crop)
        free = (height + 2 * self.pad - h, width + 2 * self.pad - w)
        if min(free) < 0:
            raise ShapeError(
                f"Augment: required images of at least {h} x {w} with {self.pad} pixels of "
                f"padding; came {images.shape}"
            )
        if self.random and rng is None:
            raise ConfigError(f"Augment: required a generator for {self}; came None")
        chosen = np.arange(len(images)) if rows is None else np.asarray(rows, np.int64)
        n = len(chosen)
        tops = np.full(n, free[0] // 2 - self.pad)
        lefts = np.full(n, free[1] // 2 - self.pad)
        mirror, contrast, brightness = np.zeros(n, np.bool_), np.ones(n), np.zeros(n)
        if self.random:
            assert rng is not None
            # every number is drawn whether it is used or not: a setting changes no other's draws
            draws = rng.random((7, n))
            if not self.central:
                tops = _place(free[0], self.shift * height, draws[0], draws[1]) - self.pad
                lefts = _place(free[1], self.shift * width, draws[2], draws[3]) - self.pad
            mirror = (draws[4] < 0.5) & self.flip
            low, high = self.contrast
            contrast = low + (high - low) * draws[5]
            brightness = 255 * self.brightness * (2 * draws[6] - 1)
        return kernel.windows(
            np.ascontiguousarray(images),
            chosen,
            tops,
            lefts,
            mirror,
            contrast,
            brightness,
            (h, w),
            self.shift > 0,
            self.standardize,
        )


def _place(free: int, shift: float, first: Array, second: Array) -> Array:
    """Where windows begin: one of free + 1 places, moved by up to `shift` whole pixels."""
    most = int(shift)
    begin = np.floor(first * (free + 1)) + np.floor(second * (2 * most + 1)) - most
    return begin.astype(np.int64)
