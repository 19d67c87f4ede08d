"""The published formats, read back exactly; whatever is damaged or hostile gives a typed error."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn import data
from tinynn.data import cifar, files, published, sets
from tinynn.data.tar import read_members
from tinynn.errors import ConfigError, DataNotFoundError, FileFormatError

RNG = np.random.default_rng(0)
QUICK = settings(max_examples=150, deadline=None)
OTHER_DATA = pytest.mark.filterwarnings("ignore:.*other data in the same format")


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    """No data set but the test's own is found, and none is downloaded."""
    monkeypatch.delenv("TINYNN_DATA", raising=False)
    monkeypatch.setenv("TINYNN_CACHE", str(tmp_path / "cache"))

    def offline(remote, folder):
        raise DataNotFoundError(f"{remote.name}: no network in tests")

    monkeypatch.setattr(sets, "fetch", offline)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def mnist_files(train=7, test=3):
    contents, arrays = {}, []
    for part, n in (("train", train), ("t10k", test)):
        images, labels = RNG.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8)
        contents[f"{part}-images-idx3-ubyte"] = idx(images)
        contents[f"{part}-labels-idx1-ubyte"] = idx(labels)
        arrays.append((images, labels))
    return contents, arrays


def write(folder, contents, pack=lambda b: b, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}{suffix}").write_bytes(pack(content))


def records(n, limits):
    labels = np.stack([np.arange(n) % limit for limit in limits], axis=1)
    return np.concatenate([labels, RNG.integers(0, 256, (n, 3072))], axis=1).astype(np.uint8)


def python2_pickle(rows, names):
    """What Python 2 and NumPy of 2009 wrote, instruction by instruction."""
    pixels = rows[:, len(names) :]
    out = b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x05hello"
    for i, name in enumerate(names):
        out += b"U" + bytes([len(name)]) + name.encode() + b"]q\x03("
        out += b"".join(b"K" + bytes([v]) for v in rows[:, i]) + b"e"
    out += b"U\x04datacnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05K\x00\x85"
    out += b"U\x01b\x87Rq\x06(K\x01J" + struct.pack("<i", len(rows)) + b"M\x00\x0c\x86"
    out += b"cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87Rq\x08(K\x03U\x01|NNNJ\xff\xff\xff\xff"
    out += b"J\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", pixels.size) + pixels.tobytes()
    return out + b"tbu."


def tar_bytes(members, kind="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# --- IDX ----------------------------------------------------------------------------------------


@OTHER_DATA
@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw", "."])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_back(tmp_path, folder, packed):
    contents, arrays = mnist_files()
    write(tmp_path / folder, contents, *((gzip.compress, ".gz") if packed else ()))
    for part, (images, labels) in zip(data.load("mnist", tmp_path), arrays, strict=True):
        np.testing.assert_array_equal(part.images, images[..., None])
        np.testing.assert_array_equal(part.labels, labels)
        assert part.classes == tuple("0123456789") and part.labels.dtype == np.int64


@OTHER_DATA
def test_the_environment_and_the_cache_are_searched(tmp_path, monkeypatch):
    contents, _ = mnist_files()
    names = {k.replace("-idx", ".idx"): v for k, v in contents.items()}
    write(tmp_path / "cache" / "data" / "fashion-mnist", names)
    assert data.fashion_mnist()[0].classes[9] == "Ankle boot"
    write(tmp_path / "named" / "mnist", contents)
    monkeypatch.setenv("TINYNN_DATA", str(tmp_path / "named"))
    assert len(data.mnist(tmp_path / "nothing")[0]) == 7


def test_what_is_nowhere_is_explained(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"(?s)train-images-idx3-ubyte\.gz.*mnist in one"):
        data.mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary\.tar\.gz in one of them"):
        data.cifar10(tmp_path)
    with pytest.raises(ConfigError, match=r"cifar10.*came 'cifar'"):
        data.load("cifar", tmp_path)


HEADER = bytes([0, 0, 8, 3]) + struct.pack(">3I", 7, 28, 28)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "offset 0: required 4 bytes"),
        (HEADER[:9], "offset 4: required 12 bytes"),
        (HEADER, "offset 16: required 5488 bytes"),
        (HEADER + bytes(5487), "offset 16: required 5488 bytes"),
        (HEADER + bytes(5489), "offset 5504: required the end"),
        (b"\0\0\x0d\x03" + HEADER[4:] + bytes(5488), "offset 0: .*00 00 0d 03"),
        (b"\0\0\x08\x01" + HEADER[4:] + bytes(5488), "offset 0: .*3 dimensions"),
        (HEADER[:4] + b"\xff" * 12, "offset 4: required 1 to .*4294967295"),
        (HEADER[:4] + struct.pack(">3I", 7, 0, 28), "offset 4: required 1 to"),
        (HEADER[:4] + struct.pack(">3I", 5, 10000, 10000) + bytes(99), "offset 16: required 5000"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_damaged_idx_file_is_refused_with_its_offset(tmp_path, content, message, pack):
    contents, _ = mnist_files()
    contents["train-images-idx3-ubyte"] = content
    write(tmp_path, contents, pack)
    if pack is gzip.compress:
        message = message.split(":")[0].split(" ")[0]  # packed, the end shows only later
    with pytest.raises(FileFormatError, match=f"train-images-idx3-ubyte: {message}"):
        data.mnist(tmp_path)


def test_a_label_that_is_no_digit_and_labels_too_few(tmp_path):
    contents, _ = mnist_files()
    for wrong, message in (
        (np.array([0, 10, 2], np.uint8), r"offset 9: required labels below 10; came 10"),
        (np.arange(4, dtype=np.uint8), r"offset 4: required 3 labels, one an image; came 4"),
    ):
        contents["t10k-labels-idx1-ubyte"] = idx(wrong)
        write(tmp_path, contents)
        with pytest.raises(FileFormatError, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.mnist(tmp_path)


@OTHER_DATA
def test_images_for_testing_are_as_large_as_those_for_training(tmp_path):
    contents, _ = mnist_files()
    contents["t10k-images-idx3-ubyte"] = idx(np.zeros((3, 20, 28), np.uint8))
    write(tmp_path, contents)
    with pytest.raises(FileFormatError, match=r"t10k-images.*offset 8: required images of"):
        data.mnist(tmp_path)


def test_damaged_gzip_files_are_refused(tmp_path):
    contents, _ = mnist_files()
    write(tmp_path, contents, gzip.compress, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1  # in the checksum
    for bad in (good[:-9], good[: len(good) // 2], bytes(flipped), good[:20] + bytes(300)):
        path.write_bytes(bad)
        with pytest.raises(FileFormatError, match=r"train-images-idx3-ubyte\.gz: offset \d+"):
            data.mnist(tmp_path)


def test_a_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    with files.Reader(path, limit=1_000_000) as reader:
        with pytest.raises(FileFormatError, match="more than the 1000000 bytes allowed"):
            reader.read(2_000_000)
        assert reader.offset == 1_000_000


# --- CIFAR --------------------------------------------------------------------------------------

C10 = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar_members(name, form, protocol=2):
    """(folder, [(file, content)], rows) of a small data set in one of the published forms."""
    limits = {"cifar10": (10,), "cifar100": (20, 100)}[name]
    labels = {"cifar10": ["labels"], "cifar100": ["coarse_labels", "fine_labels"]}[name]
    parts = C10 if name == "cifar10" else ["train", "test"]
    rows = [records(5 + i, limits) for i in range(len(parts))]
    number = name.removeprefix("cifar")
    if form == "binary":
        folder = "cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary"
        return folder, [(f"{p}.bin", r.tobytes()) for p, r in zip(parts, rows, strict=True)], rows
    folder = "cifar-10-batches-py" if name == "cifar10" else "cifar-100-python"
    contents = []
    for part, r in zip(parts, rows, strict=True):
        if protocol == "python2":
            contents.append((part, python2_pickle(r, labels)))
        else:
            entry = {k.encode(): [int(v) for v in r[:, i]] for i, k in enumerate(labels)}
            entry[b"data"] = r[:, len(labels) :]
            contents.append((part, pickle.dumps(entry, protocol)))
    assert number in folder
    return folder, contents, rows


def check_cifar(name, place, rows):
    train, test = data.load(name, place)
    expected = np.concatenate(rows[:-1])
    planes = expected[:, -3072:].reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(train.images, planes.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(train.labels, expected[:, -3073])
    np.testing.assert_array_equal(test.labels, rows[-1][:, -3073])
    assert len(train.classes) == {"cifar10": 10, "cifar100": 100}[name]


@OTHER_DATA
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("packing", ["folder", "itself", "tar.gz", "tar"])
@pytest.mark.parametrize(
    ("form", "protocol"),
    [
        ("binary", 0),
        ("python", "python2"),
        ("python", 2),
        ("python", 3),
        ("python", 4),
        ("python", 5),
    ],
)
def test_cifar_is_read_back(tmp_path, name, packing, form, protocol):
    folder, contents, rows = cifar_members(name, form, protocol)
    if packing in ("folder", "itself"):
        write(tmp_path / folder, dict(contents))
        check_cifar(name, tmp_path if packing == "folder" else tmp_path / folder, rows)
        return
    archive = f"cifar-{name.removeprefix('cifar')}-{form}.{packing}"
    members = [(f"{folder}/{file}", content) for file, content in contents]
    members.insert(1, (f"{folder}/readme.html", b"<html>"))
    raw = tar_bytes(members)
    (tmp_path / archive).write_bytes(gzip.compress(raw) if packing == "tar.gz" else raw)
    check_cifar(name, tmp_path, rows)


def test_damaged_records_are_refused_with_their_offset():
    rows = records(4, (20, 100))
    good = rows.tobytes()
    bad = bytearray(good)
    bad[3074 * 2 + 1] = 100
    with pytest.raises(FileFormatError, match="f: offset 6149: required a label below 100"):
        cifar.records(bytes(bad), "f", (20, 100))
    with pytest.raises(FileFormatError, match="f: offset 9222: required whole records"):
        cifar.records(good[:-1], "f", (20, 100))
    with pytest.raises(FileFormatError, match="f: offset 0"):
        cifar.records(b"", "f", (20, 100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, "a list of 3 labels"),
        ({"labels": [0, 1, 10]}, r"labels\[2\]: required a label from 0 to 9; came int 10"),
        ({"labels": [0, 1, -1]}, r"labels\[2\]"),
        ({"labels": [0, 1, "2"]}, r"labels\[2\].*str"),
        ({"labels": [0, 1, True]}, r"labels\[2\].*bool"),
        ({"labels": None}, "a list of 3 labels"),
        ({"data": np.zeros((3, 3071), np.uint8)}, r"\(3, 3071\)"),
        ({"data": np.zeros((0, 3072), np.uint8)}, r"\(0, 3072\)"),
        ({"data": np.zeros((3, 3072))}, "unsigned bytes"),
        ({"data": [1]}, "unsigned bytes"),
    ],
)
def test_wrong_pickled_contents_are_refused(change, message):
    entry = {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 2], **change}
    with pytest.raises(FileFormatError, match=f"f: .*{message}"):
        cifar.pickled_records(pickle.dumps(entry, 4), "f", ["labels"], (10,))


# --- what was published -------------------------------------------------------------------------


def described(content):
    step = -(-len(content) // 16)
    blocks = [f"{zlib.crc32(content[i * step : (i + 1) * step]):08x}" for i in range(16)]
    return published.Content(len(content), hashlib.sha256(content).hexdigest(), " ".join(blocks))


def test_a_changed_byte_in_a_published_file_is_found(tmp_path, monkeypatch):
    content = RNG.bytes(1600)
    monkeypatch.setitem(published.CONTENTS, "mnist", {"f": described(content)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        published.check("p", content, "mnist", "f")
        changed = bytearray(content)
        changed[555] ^= 4
        with pytest.raises(FileFormatError, match="p: offset 500: corrupted: bytes 500 to 600"):
            published.check("p", bytes(changed), "mnist", "f")
        with pytest.raises(FileFormatError, match="p: offset 800: corrupted"):
            published.check("p", content[:800], "mnist", "f")
        with pytest.raises(FileFormatError, match="required fashion_mnist; came mnist"):
            published.check("p", content, "fashion_mnist", "f")
    with pytest.warns(UserWarning, match="other data in the same format"):
        published.check("p", RNG.bytes(1600), "mnist", "f")


def test_every_known_block_and_hash_is_whole():
    for sets_files in published.CONTENTS.values():
        for content in sets_files.values():
            assert len(content.blocks.split()) == 16 and len(content.sha256) == 64
    for remotes in published.REMOTES.values():
        assert all(len(r.sha256) == 64 and len(r.mirrors) > 1 for r in remotes)


# --- hostile archives ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil"])
def test_members_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "t.tar").write_bytes(tar_bytes([("a/ok", b"1"), (name, b"x")]))
    with pytest.raises(FileFormatError, match=r"t\.tar: offset 1024: member .* leads out"):
        read_members(tmp_path / "t.tar", ["a/ok"])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("a/f")
    info.type, info.linkname = kind, "/etc/passwd"
    (tmp_path / "t.tar").write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(FileFormatError, match="required files and folders"):
        read_members(tmp_path / "t.tar", ["a/f"])


def test_damaged_archives_are_refused(tmp_path):
    good = tar_bytes([("a/f", b"x" * 700), ("a/g", b"y" * 10)])
    path = tmp_path / "t.tar.gz"
    cases = {
        "not a tar header": b"\1" + good[1:],
        "truncated|can follow": good[:900],
        "required each member once": tar_bytes([("a/f", b"1"), ("a/f", b"2")]),
        "octal": good[:148] + b"9" + good[149:],
    }
    for message, content in cases.items():
        for packed in (content, gzip.compress(content)):
            path.write_bytes(packed)
            with pytest.raises(FileFormatError, match=rf"t\.tar\.gz: offset \d+: .*({message})"):
                read_members(path, ["a/f", "a/g"])
    path.write_bytes(gzip.compress(good)[:-6])
    with pytest.raises(FileFormatError, match="too early"):
        read_members(path, ["a/f"])


def test_an_archive_that_lacks_a_file_says_which(tmp_path):
    (tmp_path / "cifar-100-python.tar").write_bytes(tar_bytes([("cifar-100-python/train", b"")]))
    with pytest.raises(FileFormatError, match="lacks cifar-100-python/test"):
        data.cifar100(tmp_path)


def test_a_tar_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes([("a/f", bytes(9_000_000))])))
    with pytest.raises(FileFormatError, match="more than the 1000000 bytes"):
        read_members(path, [], limit=1_000_000)


# --- fuzz of whole files ------------------------------------------------------------------------

ARCHIVE = gzip.compress(
    tar_bytes([(f"cifar-100-binary/{n}.bin", records(2, (20, 100)).tobytes())
               for n in ("train", "test")])
)  # fmt: skip


@OTHER_DATA
@QUICK
@given(st.data())
def test_changed_files_are_read_or_refused(tmp_path_factory, draw):
    place = tmp_path_factory.mktemp("fuzz")
    contents, _ = mnist_files(2, 2)
    targets = {
        "cifar100": [("cifar-100-binary.tar.gz", ARCHIVE),
                     ("cifar-100-binary.tar", gzip.decompress(ARCHIVE))],
        "mnist": [(n, c) for n, c in contents.items()],
    }  # fmt: skip
    name = draw.draw(st.sampled_from(sorted(targets)))
    file, content = draw.draw(st.sampled_from(targets[name]))
    changed = bytearray(content)
    for _ in range(draw.draw(st.integers(0, 3))):
        changed[draw.draw(st.integers(0, min(600, len(changed)) - 1))] = draw.draw(
            st.integers(0, 255)
        )
    changed = changed[: draw.draw(st.integers(0, len(changed)))]
    write(place, contents if name == "mnist" else {})
    (place / file).write_bytes(bytes(changed))
    try:
        data.load(name, place)
    except FileFormatError as error:
        assert str(place / file.removesuffix(".gz")) in str(error) or "t10k" in str(error)
        assert "offset" in str(error)


# --- the real ones ------------------------------------------------------------------------------

REAL = os.environ.get("TINYNN_DATA", "")


@pytest.mark.skipif(not REAL, reason="$TINYNN_DATA names no folder with the data sets")
@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [
        ("mnist", (28, 28, 1), 33.3184),
        ("cifar10", (32, 32, 3), 120.7076),
        ("cifar100", (32, 32, 3), 121.9362),
    ],
)
def test_the_published_files_are_recognised(name, shape, mean):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = data.load(name, REAL)
    assert train.images.shape[1:] == shape and len(test) == 10_000
    assert train.images.mean(dtype=np.float64) == pytest.approx(mean, abs=0.01)
