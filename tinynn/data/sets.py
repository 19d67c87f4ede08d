"""The data sets by name: where their files lie, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kernels._jit import user_cache_dir
from tinynn.data import cifar
from tinynn.data.files import fail
from tinynn.data.idx import read_idx
from tinynn.data.images import Dataset
from tinynn.errors import ConfigError, DataNotFoundError
from tinynn.storage import PathLike

Pair = tuple[Dataset, Dataset]

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FASHION = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DIGITS = [str(i) for i in range(10)]


def mnist(data_dir: PathLike | None = None) -> Pair:
    """MNIST: 60,000 and 10,000 digits, 28 x 28 x 1. Y. LeCun, C. Cortes and C. Burges."""
    return _idx("mnist", ("mnist", "MNIST", "MNIST/raw"), DIGITS, data_dir)


def fashion_mnist(data_dir: PathLike | None = None) -> Pair:
    """Fashion-MNIST: 60,000 and 10,000 articles, 28 x 28 x 1. Xiao et al. 2017, 1708.07747."""
    folders = ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw")
    return _idx("fashion_mnist", folders, FASHION, data_dir)


def cifar10(data_dir: PathLike | None = None) -> Pair:
    """CIFAR-10: 50,000 and 10,000 photographs, 32 x 32 x 3, in 10 classes. A. Krizhevsky 2009."""
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    folder = _find("cifar10", ("cifar-10-batches-bin", ""), [*train, "test_batch.bin"], data_dir)

    def part(names: Sequence[str]) -> Dataset:
        rows = [cifar.read_records(folder / name, [10]) for name in names]
        return Dataset("cifar10", *cifar.images_and_labels(rows), tuple(CIFAR10))

    return part(train), part(["test_batch.bin"])


def cifar100(data_dir: PathLike | None = None) -> Pair:
    """CIFAR-100: 50,000 and 10,000 photographs, 32 x 32 x 3, in 100 (fine) classes."""
    names = ["train.bin", "test.bin", "fine_label_names.txt"]
    folder = _find("cifar100", ("cifar-100-binary", ""), names, data_dir)
    classes = tuple((folder / names[2]).read_text().split())

    def part(name: str) -> Dataset:
        rows = cifar.read_records(folder / name, [20, 100])
        return Dataset("cifar100", *cifar.images_and_labels([rows]), classes)

    return part("train.bin"), part("test.bin")


SETS: dict[str, Callable[[PathLike | None], Pair]] = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
}


def load(name: str, data_dir: PathLike | None = None) -> Pair:
    """(train, test) of the data set with this name: a key of SETS. Raises ConfigError for others.

    The files are looked for in `data_dir`, then `$TINYNN_DATA`, then the user's cache directory.
    Raises DataNotFoundError if they are nowhere, FileFormatError if they are damaged.
    """
    if name not in SETS:
        raise ConfigError(f"data.load: required one of {sorted(SETS)}; came {name!r}")
    return SETS[name](data_dir)


def _idx(
    name: str, folders: Sequence[str], classes: Sequence[str], data_dir: PathLike | None
) -> Pair:
    pairs = []
    for part in ("train", "t10k"):
        files = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
        folder = _find(name, (*folders, ""), files, data_dir)
        images, labels = read_idx(folder / files[0], 3), read_idx(folder / files[1], 1)
        if len(images) != len(labels):
            fail(folder / files[1], 4, f"required {len(images)} labels; came {len(labels)}")
        pairs.append(Dataset(name, images[..., None], labels.astype("int64"), tuple(classes)))
    return pairs[0], pairs[1]


def _places(data_dir: PathLike | None) -> Iterator[Path]:
    for place in (data_dir, os.environ.get("TINYNN_DATA")):
        if place:
            yield Path(place)
    yield user_cache_dir() / "data"


def _find(
    name: str, folders: Sequence[str], files: Sequence[str], data_dir: PathLike | None
) -> Path:
    """The first folder that holds all files."""
    for place in _places(data_dir):
        for folder in folders:
            if all((place / folder / file).is_file() for file in files):
                return place / folder
    where = ", ".join(str(p) for p in _places(data_dir))
    raise DataNotFoundError(
        f"{name}: required the files {', '.join(files)} in a folder {folders[0]} in one of: {where}"
    )
