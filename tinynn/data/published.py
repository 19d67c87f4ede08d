"""What was published: the files' contents and hashes, and where they can be had."""

from __future__ import annotations

import hashlib
import warnings
import zlib
from typing import Any, NamedTuple

from tinynn.data.files import fail


class Remote(NamedTuple):
    """A file to download: its folder below the directory of data sets, its size and hash."""

    folder: str
    name: str
    mirrors: tuple[str, ...]  #: addresses of its folder
    size: int
    sha256: str


class Content(NamedTuple):
    """A file's unpacked content: its size, hash, and the CRC-32 of 16 blocks of equal size."""

    size: int
    sha256: str
    blocks: str


_MNIST = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
_CIFAR = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")

REMOTES: dict[str, list[Remote]] = {
    "mnist": [
        Remote("mnist", f"{name}-ubyte.gz", _MNIST, size, sha256)
        for name, size, sha256 in [
            (
                "train-images-idx3",
                9_912_422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            (
                "train-labels-idx1",
                28_881,
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            (
                "t10k-images-idx3",
                1_648_877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            (
                "t10k-labels-idx1",
                4_542,
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ]
    ],
    "fashion_mnist": [
        Remote("fashion-mnist", f"{name}-ubyte.gz", _FASHION, size, sha256)
        for name, size, sha256 in [
            (
                "train-images-idx3",
                26_421_880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            (
                "train-labels-idx1",
                29_515,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            (
                "t10k-images-idx3",
                4_422_102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            (
                "t10k-labels-idx1",
                5_148,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ]
    ],
    "cifar10": [
        Remote(
            "",
            "cifar-10-binary.tar.gz",
            (*_CIFAR, "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"),
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        )
    ],
    "cifar100": [
        Remote(
            "",
            "cifar-100-binary.tar.gz",
            _CIFAR,
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        )
    ],
}

CONTENTS: dict[str, dict[str, Content]] = {
    "mnist": {
        "train-images-idx3-ubyte": Content(
            47040016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "7a40895a e87bd0a0 b2b7d01f 82e1a9b6 a74c0513 4dc7f628 c086bab3 61a0eea8"
            " a6162253 6b1fe971 ac998a80 821131bb 73a291b9 6c33ad88 dafb8fb3 d77c12d6",
        ),
        "train-labels-idx1-ubyte": Content(
            60008,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "51e6eb08 1642e180 a49193df a4732aff 253fbb0f 56136acf f2a0ee1a 3375d196"
            " be2d2340 18822c54 f49a3fbc 1ac83b83 c77c7708 0c0e7a4c 3fc7141a 05f1fd3a",
        ),
        "t10k-images-idx3-ubyte": Content(
            7840016,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "d6ab4ac9 12a5be2f f8d5240d 28d29f43 4eac1115 0f7b5450 97372473 dfb29e11"
            " c7bee80e 29e539af c73a3d3f a60b39b8 f6d65f1f 5e9cc17d 9a63b108 df65ab53",
        ),
        "t10k-labels-idx1-ubyte": Content(
            10008,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            "791d5f52 266f362f 0316283c acd506a6 868bb637 7651614d 30fb0ed4 5f57b105"
            " 751d062b 88234da5 1647f567 0d6cac32 801fb3db c93fa3f7 755384d9 e9c1102b",
        ),
    },
    "cifar10": {
        "data_batch_1.bin": Content(
            30730000,
            "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "cb579c6c b6e2807e 5c4f5e07 49bd4f49 bb3920a3 97351b36 d6ee090b c6a04d40"
            " 99f6d50a 37f951b3 7dd9c710 c6a67fd0 799f9b31 22adcb73 3ff851cd 7bc8fd98",
        ),
        "data_batch_2.bin": Content(
            30730000,
            "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "bc1856f0 b18796d9 e5f651a0 1f3988c1 d82f22e8 6c90cad6 3388cc09 bb328697"
            " f00428cd d3497562 b7fa5d75 eab3ae8c 0cfd855d 90086b23 20d77065 c214ef00",
        ),
        "data_batch_3.bin": Content(
            30730000,
            "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "b03b7cfd f32b759a f61ec2b7 7f8ff042 28b38c93 9d4498ee 092857f1 9c30ed2f"
            " 0815f722 5d2a6f21 69416939 8316bf00 30de8169 f1491db9 9f3e0647 ae0c3921",
        ),
        "data_batch_4.bin": Content(
            30730000,
            "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "7e54445f 5ec58a0a d89d5c47 26aab206 ba74806c d9dc4045 cb5f7afb afa3c5df"
            " a3acc216 c8c9d457 471c139c 4542d463 4b396319 9554bd08 23d7c08c 8258410a",
        ),
        "data_batch_5.bin": Content(
            30730000,
            "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "cd4c2898 9f4eddfc 1af0ac64 b3b0b724 4af3847e 831c6d3b f5693ba1 2f5f649f"
            " b6b2b5cc 16243255 999be1c0 786571a6 cdeae7ff f2b82b15 dd30223e dc609637",
        ),
        "test_batch.bin": Content(
            30730000,
            "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
            "baf0f965 4ba4bed9 23710982 9c99aa69 6ef1233f 15856e38 3adc13b3 102ac861"
            " 16e1326c 78a96414 50c5a426 8e7b79a0 c11f8e24 e48ef45d 0b314642 e11cb859",
        ),
    },
    "cifar100": {
        "train.bin": Content(
            153700000,
            "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
            "aefad395 641963c1 fcffa220 7a4501d6 88bee63a 2e33da11 02073af9 8131ec0e"
            " 4ddf4dc1 d7ae65f8 8ce30a6b 237523b1 f14eb0a9 757f6875 45aef9ab 4364d4bb",
        ),
        "test.bin": Content(
            30740000,
            "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
            "88b96128 0d8b3877 eadbc056 804ce751 c510ed64 5b978222 669666f6 a2e052ad"
            " 5b675a85 f0053160 7405b6fb 1f639a5f 573fd435 a02a4d09 c92c7d6e bec13dd4",
        ),
    },
}


def check(path: object, content: Any, data_set: str, file: str) -> None:
    """Raise FileFormatError if `content` is the published one but damaged.

    Content that shares no block with what was published is somebody's own data in the same format:
    a warning says so. `content`: the unpacked bytes, or an array of them. Of data sets that are not
    in CONTENTS nothing is known.
    """
    published = CONTENTS.get(data_set, {}).get(file)
    view = memoryview(content).cast("B")
    sha256 = hashlib.sha256(view).hexdigest()
    for other, files in CONTENTS.items():
        if other != data_set and file in files and files[file].sha256 == sha256:
            fail(path, 0, f"required {data_set}; came {other}, whose files have the same names")
    if published is None or sha256 == published.sha256:
        return
    step = -(-published.size // 16)
    known = [int(crc, 16) for crc in published.blocks.split()]
    same = [zlib.crc32(view[i * step : (i + 1) * step]) == crc for i, crc in enumerate(known)]
    if any(same):
        bad = same.index(False) if False in same else 16
        start, stop = bad * step, min((bad + 1) * step, published.size)
        fail(
            path,
            start,
            f"corrupted: bytes {start} to {stop} are not those of the published {data_set} "
            f"({published.size} bytes, SHA-256 {published.sha256}); came {len(view)} bytes",
        )
    warnings.warn(
        f"{path}: not the published {data_set}, taken for other data in the same format",
        stacklevel=2,
    )
