"""Labelled images, and batches of them that are prepared beside the training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinynn.data.augment import Augment
from tinynn.data.batches import Batches, Epoch, is_count
from tinynn.errors import ConfigError, DataError, DTypeError
from tinynn.op import Array

_PLAIN = Augment()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images (n, H, W, C) of bytes, labels (n,) int64 from 0 on, and the classes' names.

    The arrays are read-only. Raises DataError for other shapes, dtypes, or labels without a name.
    """

    name: str
    images: Array
    labels: Array
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
            raise DataError(
                f"Dataset {self.name}: required images (n, H, W, C) of uint8; came {images.dtype} "
                f"{images.shape}"
            )
        if labels.shape != images.shape[:1] or labels.dtype != np.int64:
            raise DataError(
                f"Dataset {self.name}: required int64 labels ({len(images)},); came "
                f"{labels.dtype} {labels.shape}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"Dataset {self.name}: required labels from 0 to {len(self.classes) - 1}; came "
                f"{low} to {high}"
            )
        for name, array in (("images", images), ("labels", labels)):
            view = np.ascontiguousarray(array).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.images.shape))
        return f"Dataset({self.name}: {shape}, {len(self.classes)} classes)"

    def take(self, n: int) -> Dataset:
        """The first `n` images and labels; all if there are fewer."""
        if not is_count(n):
            raise ConfigError(f"Dataset.take: required a whole n >= 1; came {n!r}")
        return Dataset(self.name, self.images[:n], self.labels[:n], self.classes)

    def floats(self) -> Array:
        """All images as float32 (n, H, W, C) from 0 to 1: four times the bytes."""
        return _PLAIN(self.images)

    def batches(
        self,
        size: int,
        rng: np.random.Generator | None = None,
        augment: Augment = _PLAIN,
        *,
        labels: bool = True,
        drop_last: bool = False,
        prefetch: int = 2,
    ) -> ImageBatches:
        """Batches of `size` images for training: shuffled and augmented by `rng`.

        Without `rng`: the images as they lie, for evaluation (`augment.evaluation()` if there is
        chance in `augment`). `labels=False` makes the images their own targets, for auto-encoders.
        """
        if rng is None:
            augment = augment.evaluation()
        y = self.labels if labels else None
        return ImageBatches(
            self.images, y, size, rng, augment, rng is not None, drop_last, prefetch
        )


class ImageBatches(Batches):
    """Batches (x, y) of byte images as float32 (b, h, w, C), augmented, with int64 labels (b,).

    All that Batches promises holds, resuming in the middle of an epoch included: each batch draws
    from a generator of its own, which only the epoch and the batch's number determine. A thread
    prepares up to `prefetch` batches ahead, outside the interpreter's lock; with 0, each is made
    when it is asked for. Both give the same bits. `waited` is the time in seconds that iterating
    has spent without a batch, in all. `take(n)` is for looking: without augmentation.

    Raises like Batches, and ConfigError for a random `augment` without `rng` and for a prefetch
    that is no whole number >= 0.
    """

    _x_kinds = "u"

    def __init__(
        self,
        images: Array,
        labels: Array | None,
        size: int,
        rng: np.random.Generator | None = None,
        augment: Augment = _PLAIN,
        shuffle: bool = True,
        drop_last: bool = False,
        prefetch: int = 2,
    ) -> None:
        if np.asarray(images).dtype != np.uint8:
            raise DTypeError(
                f"ImageBatches: required uint8 images; came {np.asarray(images).dtype}"
            )
        if augment.random and rng is None:
            raise ConfigError(f"ImageBatches: required a generator for {augment}; came None")
        if prefetch != 0 and not is_count(prefetch):
            raise ConfigError(f"ImageBatches: required a whole prefetch >= 0; came {prefetch!r}")
        super().__init__(images, labels, size, rng, shuffle, drop_last)
        self.augment = augment
        self.prefetch = int(prefetch)
        self.waited = 0.0
        augment.evaluation()(self._x[:1])  # refuses images that do not fit

    def take(self, n: int) -> ImageBatches:
        """The first `n` batches as the images lie, without chance; all if there are fewer."""
        part = super().take(n)
        assert isinstance(part, ImageBatches)
        part.augment = self.augment.evaluation()
        return part

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "augment": repr(self.augment)}

    def _is_random(self) -> bool:
        return self.shuffle or self.augment.random

    def _draw(self, rng: np.random.Generator) -> tuple[Array | None, list[int]]:
        order = rng.permutation(len(self._x)) if self.shuffle else None
        return order, [int(k) for k in rng.integers(0, 1 << 64, 2, np.uint64)]

    def _batch(self, epoch: Epoch, number: int) -> tuple[Array, Array]:
        rows = np.arange(number * self.size, min((number + 1) * self.size, len(self._x)))
        if epoch.order is not None:
            rows = epoch.order[rows]
        rng = None
        if epoch.key:
            bits = np.random.Philox(key=np.array(epoch.key, np.uint64), counter=[0, 0, 0, number])
            rng = np.random.Generator(bits)
        x = self.augment(self._x, rng, rows)
        return x, x if self._y is None else self._y[rows]

    def _walk(self, epoch: Epoch) -> Generator[tuple[Array, Array], None, None]:
        with closing(self._ahead(epoch) if self.prefetch else super()._walk(epoch)) as batches:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - asked
                if batch is None:
                    return
                yield batch

    def _ahead(self, epoch: Epoch) -> Generator[tuple[Array, Array], None, None]:
        """The batches of an epoch from a thread that is always `prefetch` of them ahead."""
        ahead: deque[Future[tuple[Array, Array]]] = deque()
        with ThreadPoolExecutor(1, "batches") as pool:
            try:
                for number in range(epoch.done, len(self)):
                    while number + len(ahead) < len(self) and len(ahead) <= self.prefetch:
                        ahead.append(pool.submit(self._batch, epoch, number + len(ahead)))
                    batch = ahead.popleft().result()
                    epoch.done = number + 1
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()
        self._end(epoch)
