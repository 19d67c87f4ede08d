"""The recipes that `compress_small` carries out, by name: what is done to the trained model.

`published` are those for the small CIFAR model, `quick` those for a tiny one, `sweep` the thesis'
three thresholds against each other. Names say what is done; "tuned" models are trained afterwards,
"gradual" ones meanwhile, to compute what the trained model computes; those "by labels" as that was
trained, those "nearly in place" too, at the end, with images moved by a pixel at most, where it had
four: in the test they are not moved. The table says for how many epochs. Code books and decimals
come after batch norm was folded: folding scales each channel, so that equal weights would differ
again.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

Record = dict[str, Any]
Recipe = list[Record]

MODEL = "experiments/results/small_cifar/model.safetensors"
RATE = 0.05  #: at which tuning begins
LABELS_RATE = 0.02  #: by labels
FOLDED_RATE = 1e-4  #: without batch normalisation
SHARED_RATE = 5e-6  #: of values that many weights share, whose gradients are summed
CRITERIA = ("magnitude", "lamp", "random", "taylor", "fisher", "brain damage")
CHANNELS = ("l1", "l2", "scale", "count", "variance", "taylor", "fisher", "random")
RANGES = ("min-max", "percentile", "squared error", "KL")
#: stem, widths of the blocks
DESIGNED = {
    "0.5": (16, (32, 32, 32, 64, 64, 64)),
    "0.35": (11, (22, 22, 22, 45, 45, 45)),
}
SWEPT: dict[str, tuple[Any, ...]] = {
    "threshold": (None, -0.5, 0.0, 0.5),
    "error": (None, 1e-5, 1e-4, 1e-3),
    "decimals": (None, 3, 2),
}

FOLD, ANEW = {"do": "fold"}, {"do": "statistics anew", "images": 4000}
FLOAT16 = {"do": "float16"}


def do(name: str, **settings: Any) -> Record:
    """A step."""
    return {"do": name, **settings}


def tune(epochs: float = 0.25, rate: float = RATE) -> Record:
    """Training to compute what the model did before."""
    return do("train", epochs=epochs, rate=rate, teacher=MODEL)


def by_labels(steps: Recipe) -> Recipe:
    """The same, trained by labels."""
    return [{k: v for k, v in item.items() if k != "teacher"} for item in steps]


def in_place(epochs: float) -> Recipe:
    """Training by labels on images that are moved by a pixel at most."""
    return by_labels([{**tune(epochs, LABELS_RATE), "pad": 1}])


def gradually(sparsity: float, epochs: float) -> Record:
    """Tuning during which weights are pruned, the smallest of all layers together."""
    return {**tune(epochs), "sparsity": sparsity, "scope": "global"}


PRUNED, MORE_PRUNED = [gradually(0.7, 12.0)], [gradually(0.9, 2.0)]
NIBBLES = do("4 bits", clip=False, allocate=False, scales=8)
SLIM = [do("channels", importance="l2", kept=0.7), tune(1.0)]


def published(tuning: float, epochs: float) -> dict[str, dict[str, Recipe]]:
    """Recipes by group and name; `tuning` stretches all fine-tuning, `epochs` trains designs."""
    groups: dict[str, dict[str, Recipe]] = {
        "dense": {
            "dense": [],
            "dense, by labels": by_labels([tune(1.0, LABELS_RATE)]),
            "dense, nearly in place": in_place(1.5),
        },
        "weights": _weights(),
        "channels": _channels(),
        "low rank": {
            "low rank, error 0.001": [do("low rank", by="error", value=1e-3), ANEW],
            "low rank, energy 0.9": [do("low rank", by="energy", value=0.9), ANEW],
            "low rank, energy 0.9, cheapest form": [
                do("low rank", by="energy", value=0.9, form="cheapest"), ANEW
            ],
            "low rank, energy 0.9, tuned": [do("low rank", by="energy", value=0.9), tune()],
        },
        "code books": {
            "3 decimals": [FOLD, do("round", decimals=3)],
            "2 decimals": [FOLD, do("round", decimals=2)],
            "16 values": [FOLD, do("k-means", entries=16)],
            "16 values a channel": [FOLD, do("k-means", entries=16, per="channel")],
            "8 values": [FOLD, do("k-means", entries=8)],
            "8 values, tuned": [FOLD, do("k-means", entries=8), tune(0.25, SHARED_RATE)],
            "hashed to a half, tuned": [do("hashed", share=0.5), tune()],
        },
        "bits": _bits(),
        "combined": _combined(),
        "ef-operator": {
            "ef-operator at the end, by labels": [
                do("additive", pointwise=False), *by_labels([tune(0.25, LABELS_RATE)])
            ]
        },
    }  # fmt: skip
    head = [do("load", path=MODEL)]
    recipes = {
        group: {name: head + _stretched(steps, tuning) for name, steps in members.items()}
        for group, members in groups.items()
    }
    recipes["designed small"] = {
        f"designed, width {width}": _designed(stem, widths, epochs)
        for width, (stem, widths) in DESIGNED.items()
    }
    return recipes


def _weights() -> dict[str, Recipe]:
    half = {
        f"weights 50 %, {score}": [do("weights", kept=0.5, score=score, scope="global"), ANEW]
        for score in CRITERIA
    }
    return {
        **half,
        "weights 50 % of each layer, magnitude": [do("weights", kept=0.5), ANEW],
        "weights 50 %, magnitude, statistics old": [do("weights", kept=0.5, scope="global")],
        "weights below the mean": [do("threshold", width=0.0), ANEW],
        "weights 70 %, gradual": PRUNED,
        "weights 70 %, gradual, nearly in place": [*PRUNED, *in_place(1.5)],
        "weights 90 %, gradual": MORE_PRUNED,
        "weights 70 %, one shot, by labels": [
            do("weights", kept=0.3, scope="global"), *by_labels([tune(1.0, LABELS_RATE)])
        ],
        "weights 70 %, one shot, tuned": [do("weights", kept=0.3, scope="global"), tune(0.5)],
        "weights 70 %, two rounds, tuned": [
            do("weights", kept=0.3**0.5, scope="global"), tune(0.25),
            do("weights", kept=0.3, scope="global"), tune(0.25),
        ],
        "2 of 4 weights, tuned": [do("n of m", n=2, m=4), tune()],
        "4x1 blocks 70 %, tuned": [do("4x1", kept=0.3), tune()],
    }  # fmt: skip


def _channels() -> dict[str, Recipe]:
    fifth = {
        f"channels 20 %, {name}": [do("channels", importance=name, kept=0.8), ANEW]
        for name in CHANNELS
    }
    return {
        **fifth,
        "channels 20 %, l1, union": [do("channels", importance="l1", kept=0.8, union=True), ANEW],
        "alike channels merged": [do("merge", similarity=0.7), ANEW],
        "channels 30 %, l2, tuned": SLIM,
        "branches thinned by 50 %, tuned": [do("thin", kept=0.5), tune()],
        "one block dropped, tuned": [do("drop blocks", number=1), tune()],
    }


def _bits() -> dict[str, Recipe]:
    return {
        "float16": [FLOAT16],
        "int8, dynamic": [do("dynamic")],
        **{f"int8, {name}": [do("int8", ranges=name)] for name in RANGES},
        "int8, one scale a layer": [do("int8", ranges="min-max", per_channel=False)],
        "int8, four scales a layer": [do("int8", ranges="min-max", scales=4)],
        "int8, tuned": [
            do("int8", ranges="min-max"), do("train ranges", ranges="running"),
            tune(0.25, FOLDED_RATE),
        ],
        "4 bits, plain": [do("4 bits", clip=False, allocate=False, correct=False)],
        "4 bits, clipped": [do("4 bits", clip=True, allocate=False, correct=False)],
        "4 bits, allocated": [do("4 bits", clip=False, allocate=True, correct=False)],
        "4 bits, corrected": [do("4 bits", clip=False, allocate=False, correct=True)],
        "4 bits": [do("4 bits")],
        "4 bits, eight scales a layer": [NIBBLES],
        "4 bits, eight scales a layer, tuned": [NIBBLES, tune(0.25, FOLDED_RATE)],
    }  # fmt: skip


def _combined() -> dict[str, Recipe]:
    clustered = [FOLD, do("k-means", entries=16)]
    int8 = do("int8", ranges="min-max")
    return {
        "70 % pruned, float16": [*PRUNED, FLOAT16],
        "70 % pruned, 16 values": [*PRUNED, *clustered],
        "70 % pruned, 16 values, float16": [*PRUNED, *clustered, FLOAT16],
        "70 % pruned, 16 values, tuned, float16": [
            *PRUNED, *clustered, tune(0.25, SHARED_RATE), FLOAT16
        ],
        "90 % pruned, 16 values, float16": [*MORE_PRUNED, *clustered, FLOAT16],
        "70 % pruned, int8": [*PRUNED, int8],
        "70 % pruned, nearly in place, int8": [*PRUNED, *in_place(1.5), int8],
        "90 % pruned, int8": [*MORE_PRUNED, int8],
        "30 % of channels off, 16 values, float16": [*SLIM, *clustered, FLOAT16],
        "30 % of channels off, int8": [*SLIM, int8],
        "30 % of channels off, 4 bits": [*SLIM, NIBBLES],
        "70 % pruned, 4 bits": [*PRUNED, NIBBLES],
    }  # fmt: skip


def _designed(stem: int, widths: tuple[int, ...], epochs: float) -> Recipe:
    return [do("design", stem=stem, widths=list(widths)), do("train", epochs=epochs, rate=0.2)]


def _stretched(steps: Iterable[Record], factor: float) -> Recipe:
    return [
        {**item, "epochs": factor * item["epochs"]} if "epochs" in item else item for item in steps
    ]


def quick(tuning: float, epochs: float) -> dict[str, dict[str, Recipe]]:
    """A few of each kind, on a tiny network that is trained for `epochs` first."""
    base = _designed(8, (16, 32), epochs)
    clustered = [FOLD, do("k-means", entries=16)]
    gradual = gradually(0.7, 1.0)
    members: dict[str, dict[str, Recipe]] = {
        "dense": {"dense": []},
        "weights": {
            "weights 50 %, magnitude": [do("weights", kept=0.5)],
            "weights 70 %, gradual": [gradual],
        },
        "channels": {
            "channels 30 %, taylor, tuned": [do("channels", importance="taylor", kept=0.7), tune()]
        },
        "low rank": {"low rank, error 0.001": [do("low rank", by="error", value=1e-3), ANEW]},
        "code books": {"16 values, tuned": [*clustered, tune(0.5, SHARED_RATE)]},
        "bits": {
            "float16": [FLOAT16],
            "int8, min-max": [do("int8", ranges="min-max")],
            "4 bits": [NIBBLES],
        },
        "combined": {"70 % pruned, 16 values, float16": [
            gradual, *clustered, FLOAT16
        ]},
        "ef-operator": {
            "ef-operator at the end, tuned": [do("additive", pointwise=False), tune()],
        },
        "designed small": {},
    }  # fmt: skip
    recipes: dict[str, dict[str, Recipe]] = {
        group: {name: base + by_labels(_stretched(steps, tuning)) for name, steps in found.items()}
        for group, found in members.items()
    }
    recipes["designed small"] = {"designed, width 0.7": _designed(6, (11, 22), epochs)}
    return recipes


def sweep() -> dict[str, dict[str, Recipe]]:
    """Pruning x SVD error x rounding, without training: the thesis' sweep and its rounding."""
    found: dict[str, Recipe] = {}
    for threshold, error, decimals in product(*SWEPT.values()):
        steps = [do("load", path=MODEL), FOLD]
        if threshold is not None:
            steps.append(do("threshold", width=threshold))
        if error is not None:
            steps.append(do("low rank", by="error", value=error))
        if decimals is not None:
            steps.append(do("round", decimals=decimals))
        found[f"threshold {threshold}, error {error}, decimals {decimals}"] = steps
    return {"sweep": found}
