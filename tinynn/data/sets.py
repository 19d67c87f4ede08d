"""The data sets by name: where their files lie, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from kernels._jit import user_cache_dir
from tinynn.data import cifar
from tinynn.data.fetch import fetch
from tinynn.data.files import Reader, fail
from tinynn.data.glyphs import glyphs
from tinynn.data.idx import parse_idx
from tinynn.data.images import Dataset
from tinynn.data.names import CIFAR10, CIFAR100, DIGITS, FASHION
from tinynn.data.published import REMOTES, check
from tinynn.data.tar import read_members
from tinynn.errors import ConfigError, DataNotFoundError, TinynnError
from tinynn.storage import PathLike

Pair = tuple[Dataset, Dataset]
_Found = TypeVar("_Found")


class _Form(NamedTuple):
    """One way in which a CIFAR data set is published."""

    folder: str
    archive: str
    files: tuple[str, ...]  #: the last one is the test part
    labels: tuple[str, ...]  #: their names in the Python version, or none


_C10 = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
_FORMS = {
    "cifar10": (
        _Form(
            "cifar-10-batches-bin", "cifar-10-binary.tar.gz", tuple(f"{n}.bin" for n in _C10), ()
        ),
        _Form("cifar-10-batches-py", "cifar-10-python.tar.gz", tuple(_C10), ("labels",)),
    ),
    "cifar100": (
        _Form("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin", "test.bin"), ()),
        _Form(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            ("train", "test"),
            ("coarse_labels", "fine_labels"),
        ),
    ),
}
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST", ""),
    "fashion_mnist": ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "FashionMNIST", ""),
    "cifar10": ("", "cifar-10", "cifar10"),
    "cifar100": ("", "cifar-100", "cifar100"),
}
_IDX = tuple(
    f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
)


def mnist(data_dir: PathLike | None = None) -> Pair:
    """MNIST: 60,000 and 10,000 digits, 28 x 28 x 1. Y. LeCun, C. Cortes and C. Burges."""
    return _idx("mnist", DIGITS, data_dir)


def fashion_mnist(data_dir: PathLike | None = None) -> Pair:
    """Fashion-MNIST: 60,000 and 10,000 articles, 28 x 28 x 1. Xiao et al. 2017, 1708.07747."""
    return _idx("fashion_mnist", FASHION, data_dir)


def cifar10(data_dir: PathLike | None = None) -> Pair:
    """CIFAR-10: 50,000 and 10,000 photographs, 32 x 32 x 3, in 10 classes. A. Krizhevsky 2009."""
    return _cifar("cifar10", (10,), CIFAR10, data_dir)


def cifar100(data_dir: PathLike | None = None) -> Pair:
    """CIFAR-100: 50,000 and 10,000 photographs, 32 x 32 x 3, in 100 (fine) classes."""
    return _cifar("cifar100", (20, 100), CIFAR100, data_dir)


def _glyphs(data_dir: PathLike | None) -> Pair:
    return glyphs()


SETS: dict[str, Callable[[PathLike | None], Pair]] = {
    "glyphs": _glyphs,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
}


def load(name: str, data_dir: PathLike | None = None) -> Pair:
    """(train, test) of the data set with this name, one of SETS. Raises ConfigError for others.

    Its files are looked for in `data_dir`, then `$TINYNN_DATA`, then the user's cache directory, as
    published: MNIST's four IDX files (.gz or not, in a folder `mnist`, `fashion-mnist` or directly
    there), CIFAR's binary or Python version (the .tar.gz or the folder in it). What is nowhere is
    downloaded into the cache directory; `glyphs` are drawn and need no file. Raises
    DataNotFoundError if a download fails, FileFormatError for damaged files.
    """
    if name not in SETS:
        raise ConfigError(f"data.load: required one of {sorted(SETS)}; came {name!r}")
    return SETS[name](data_dir)


def _idx(name: str, classes: tuple[str, ...], data_dir: PathLike | None) -> Pair:
    def look(place: Path) -> list[Path] | None:
        for folder in _FOLDERS[name]:
            found = [_idx_file(place / folder, file) for file in _IDX]
            paths = [path for path in found if path]
            if len(paths) == len(_IDX):
                return paths
        return None

    paths = _find(name, look, data_dir, [f"{file}.gz" for file in _IDX])
    arrays = []
    for path, file in zip(paths, _IDX, strict=True):
        with Reader(path) as reader:
            header, values = parse_idx(reader, 3 if "images" in file else 1)
        check(path, header + values.tobytes(), name, file)
        arrays.append(values)
    pixels, others = arrays[0].shape[1:], arrays[2].shape[1:]
    if pixels != others:
        fail(paths[2], 8, f"required images of {pixels}, as for training; came {others}")
    pairs = []
    for i in (0, 2):
        images, labels, where = arrays[i], arrays[i + 1], paths[i + 1]
        if len(images) != len(labels):
            fail(where, 4, f"required {len(images)} labels, one an image; came {len(labels)}")
        bad = np.flatnonzero(labels >= len(classes))
        if bad.size:
            fail(
                where,
                8 + int(bad[0]),
                f"required labels below {len(classes)}; came {labels[bad[0]]}",
            )
        pairs.append(Dataset(name, images[..., None], labels.astype(np.int64), classes))
    return pairs[0], pairs[1]


def _idx_file(folder: Path, name: str) -> Path | None:
    """The file under one of the names that are in use."""
    for written in (name, name.replace("-idx", ".idx")):
        for path in (folder / written, folder / f"{written}.gz"):
            if path.is_file():
                return path
    return None


def _cifar(
    name: str, limits: tuple[int, ...], classes: tuple[str, ...], data_dir: PathLike | None
) -> Pair:
    def look(place: Path) -> tuple[_Form, Path] | None:
        for base in (place / folder for folder in _FOLDERS[name]):
            for form in _FORMS[name]:
                for folder in (base / form.folder, base):
                    if all((folder / file).is_file() for file in form.files):
                        return form, folder
                for archive in (base / form.archive, base / form.archive.removesuffix(".gz")):
                    if archive.is_file():
                        return form, archive
        return None

    binary = _FORMS[name][0]
    form, path = _find(name, look, data_dir, [binary.archive])
    contents = _from_archive(form, path) if path.is_file() else _from_folder(form, path)
    parts = []
    for (where, data), file in zip(contents, binary.files, strict=True):
        if form.labels:
            rows = cifar.pickled_records(data, where, form.labels, limits)
        else:
            rows = cifar.records(data, where, limits)
        check(where, rows, name, file)
        parts.append(rows)
    train, test = cifar.images_and_labels(parts[:-1]), cifar.images_and_labels(parts[-1:])
    return Dataset(name, *train, classes), Dataset(name, *test, classes)


def _from_folder(form: _Form, folder: Path) -> list[tuple[str, bytes]]:
    contents = []
    for file in form.files:
        with Reader(folder / file) as reader:
            contents.append((str(folder / file), reader.read(reader.limit)))
    return contents


def _from_archive(form: _Form, path: Path) -> list[tuple[str, bytes]]:
    names = [f"{form.folder}/{file}" for file in form.files]
    found = read_members(path, names)
    missing = [name for name in names if name not in found]
    if missing:
        fail(path, 0, f"required the members {', '.join(names)}; it lacks {', '.join(missing)}")
    return [(f"{path}: {name}", found[name]) for name in names]


def _places(data_dir: PathLike | None) -> list[Path]:
    named = [Path(place) for place in (data_dir, os.environ.get("TINYNN_DATA")) if place]
    try:
        return [*named, user_cache_dir() / "data"]
    except RuntimeError:  # no home directory
        return named


def _find(
    name: str,
    look: Callable[[Path], _Found | None],
    data_dir: PathLike | None,
    needed: list[str],
) -> _Found:
    """What `look` finds in the first place that has it, after a download if none has."""
    places = _places(data_dir)
    for place in places:
        found = look(place)
        if found:
            return found
    try:
        if not places:
            raise DataNotFoundError("there is no home directory to download into")
        for remote in REMOTES[name]:
            fetch(remote, places[-1] / remote.folder)
    except TinynnError as error:
        folder = REMOTES[name][0].folder
        raise DataNotFoundError(
            f"{name}: found in none of {', '.join(map(str, places))}, and not downloaded: {error}. "
            f"Put {', '.join(needed)}{f' into a folder {folder}' if folder else ''} in one of them"
        ) from error
    found = look(places[-1])
    assert found is not None
    return found
