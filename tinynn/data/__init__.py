"""Data for training and evaluation."""

from tinynn.data.augment import Augment
from tinynn.data.batches import Batches
from tinynn.data.images import Dataset, ImageBatches
from tinynn.data.sets import cifar10, cifar100, fashion_mnist, load, mnist

__all__ = [
    "Augment",
    "Batches",
    "Dataset",
    "ImageBatches",
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "load",
    "mnist",
]
