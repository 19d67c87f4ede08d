"""Data for training and evaluation."""

from tinynn.data.augment import Augment
from tinynn.data.batches import Batches
from tinynn.data.glyphs import glyphs
from tinynn.data.images import Dataset, ImageBatches
from tinynn.data.sets import SETS, cifar10, cifar100, fashion_mnist, load, mnist

__all__ = [
    "SETS",
    "Augment",
    "Batches",
    "Dataset",
    "ImageBatches",
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "glyphs",
    "load",
    "mnist",
]
