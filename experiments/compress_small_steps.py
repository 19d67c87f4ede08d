"""The steps of a compression recipe: every pass by name, training between passes, kept stages.

A recipe is a list of steps, each a dict: `do` names it, the other entries are its arguments, so
that a recipe is a run's configuration as it stands. What a training step leaves is kept as a file;
recipes that begin alike share it, and a later run takes it up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tinynn as tn
from experiments import classify
from experiments.runner import Context, Record
from tinynn import nn
from tinynn.compress import (
    blocks,
    calibrate,
    cluster,
    factorize,
    fold_batchnorm,
    hashing,
    importance,
    merge,
    prune,
    quantize,
    reestimate,
    saliency,
    select,
    sparsify,
)
from tinynn.data import Augment
from tinynn.errors import ConfigError
from tinynn.models import thesis
from tinynn.nn.module import Module

ROOT = Path(__file__).resolve().parents[1]
SEEN = 250  #: images of a batch that passes look at
WATCHED = 4  #: such batches, for calibration and importance

Step = Callable[["Workshop", Module, Record], Module]
STEPS: dict[str, Step] = {}


@dataclass(frozen=True)
class Workshop:
    """What steps work with: the images, the settings of training, a generator, places for files."""

    sets: classify.Sets
    config: Record
    rng: np.random.Generator
    context: Context

    @property
    def view(self) -> Augment:
        """How images are shown to a model that is not in training."""
        return classify.augmentation(self.config).evaluation()

    @property
    def example(self) -> Any:
        """A batch (1, H, W, C) of what the models get."""
        return self.view(self.sets.test.images[:1])

    def batches(self, size: int, images: int) -> list[Any]:
        """The first training images as (x, y) batches, without chance."""
        return list(self.sets.train.take(images).batches(size, augment=self.view))

    def trained(self, size: int, images: int) -> Iterator[Any]:
        """As many images as (x, y) batches as training shows them: at random, augmented."""
        some = self.sets.train.take(images)
        return iter(some.batches(size, self.rng, classify.augmentation(self.config)))

    @property
    def loss(self) -> Any:
        """What training minimises."""
        return partial(tn.softmax_cross_entropy, smoothing=self.config["smoothing"])


def step(name: str) -> Callable[[Step], Step]:
    """Register a step under this name."""

    def register(function: Step) -> Step:
        STEPS[name] = function
        return function

    return register


# --- models and training --------------------------------------------------------------------------


@step("load")
def _load(shop: Workshop, model: Module, step: Record) -> Module:
    return tn.load(model_file(step["path"]))


@step("design")
def _design(shop: Workshop, model: Module, step: Record) -> Module:
    images, classes = shop.sets.train.images, shop.sets.train.classes
    return thesis.small_cifar(
        m_in=images.shape[3],
        classes=len(classes),
        stem=step["stem"],
        widths=step["widths"],
        rng=shop.rng,
    )


@step("train")
def _train(shop: Workshop, model: Module, step: Record) -> Module:
    """Training from `rate` on, by labels or by the `teacher` at that path.

    A `pad` of its own stands for the setting. With `sparsity`, weights are pruned gradually in the
    first three quarters of it.
    """
    settings = {**shop.config, "epochs": step["epochs"], "lr": step["rate"]}
    settings["pad"] = step.get("pad", settings["pad"])
    steps = round(step["epochs"] * (len(shop.sets.train) // settings["batch"]))
    gradual = teacher = None
    if "sparsity" in step:
        gradual = sparsify.Gradual(
            model,
            max(1, steps * 3 // 4),
            step["sparsity"],
            every=max(1, steps // 40),
            keep=partial(sparsify.share, scope=step["scope"]),
        )
    if "teacher" in step:
        teacher = tn.compile(tn.load(model_file(step["teacher"])), shop.example)
        settings["l2"] = 0.0  # what the teacher computes is not to be made smaller
    # the accuracy that counts is measured at the end, on all images
    sets = shop.sets._replace(test=shop.sets.test.take(1000))
    classify.train(model, sets, settings, shop.rng, shop.context, gradual, teacher)
    return model


def model_file(path: str) -> Path:
    """A model's path, from here or from the repository."""
    return Path(path) if Path(path).exists() else ROOT / path


# --- single weights -------------------------------------------------------------------------------


@step("weights")
def _weights(shop: Workshop, model: Module, step: Record) -> Module:
    keep = sparsify.share(step["kept"], step.get("scope", "layer"))
    return sparsify.weights(model, _score(shop, model, step.get("score", "magnitude")), keep)


@step("threshold")
def _threshold(shop: Workshop, model: Module, step: Record) -> Module:
    return sparsify.weights(model, sparsify.magnitude, sparsify.deviation(step["width"]))


@step("n of m")
def _n_of_m(shop: Workshop, model: Module, step: Record) -> Module:
    keep = sparsify.n_of_m(step["n"], step["m"])
    return sparsify.weights(model, sparsify.magnitude, keep, only=_products(model))


@step("4x1")
def _blocks(shop: Workshop, model: Module, step: Record) -> Module:
    keep = sparsify.blocks(step["kept"])
    return sparsify.weights(model, sparsify.magnitude, keep, only=_products(model))


def _products(model: Module) -> list[str]:
    """The weights that products read: not those of depthwise convolutions, whose rows are short."""
    chosen = (nn.Linear, nn.Conv2d, nn.PointwiseConv2d)
    return [f"{path}.weight" for path, m in model.named_modules() if isinstance(m, chosen)]


def _score(shop: Workshop, model: Module, name: str) -> sparsify.Score:
    if name == "magnitude":
        return sparsify.magnitude
    if name == "lamp":
        return sparsify.lamp
    if name == "random":
        return sparsify.random(shop.rng)
    if name == "taylor":
        data = shop.batches(SEEN, SEEN * WATCHED)
        return sparsify.taylor(saliency.gradients(model, data, shop.loss))
    if name == "fisher":  # batches of one image: the diagonal of Fisher's matrix
        return sparsify.fisher(saliency.gradients(model, shop.batches(1, SEEN), shop.loss))
    if name == "brain damage":
        data = shop.batches(SEEN, SEEN)
        found = saliency.hessian_diagonal(model, data, shop.loss, shop.rng)
        return sparsify.brain_damage(found)
    raise ConfigError(f"compress_small: no score of weights {name!r}")


# --- channels and blocks --------------------------------------------------------------------------


@step("channels")
def _channels(shop: Workshop, model: Module, step: Record) -> Module:
    return prune.channels(
        model,
        tn.observe(model, shop.batches(SEEN, SEEN * WATCHED)),
        _importance(shop, model, step["importance"]),
        select.share(step["kept"]),
        fold="mean",
        least=1,
        union=step.get("union", False),
    )


@step("thin")
def _thin(shop: Workshop, model: Module, step: Record) -> Module:
    seen = tn.observe(model, shop.batches(SEEN, SEEN * WATCHED))
    return blocks.thin(model, seen, importance.l1, select.share(step["kept"]))


@step("drop blocks")
def _drop(shop: Workshop, model: Module, step: Record) -> Module:
    data = shop.batches(SEEN, SEEN * WATCHED)
    return blocks.drop(model, blocks.weakest(model, data, shop.loss, step["number"]))


@step("merge")
def _merge(shop: Workshop, model: Module, step: Record) -> Module:
    data = shop.batches(SEEN, SEEN * WATCHED)
    return merge.duplicates(model, data, similarity=step["similarity"])


def _importance(shop: Workshop, model: Module, name: str) -> importance.Importance:
    if name == "taylor":
        data = shop.batches(SEEN // 10, SEEN * WATCHED)
        return importance.taylor(saliency.gates(model, data, shop.loss))
    if name == "fisher":
        return importance.fisher(saliency.gates(model, shop.batches(1, SEEN), shop.loss))
    return importance.by_name(name, shop.rng)


# --- low rank, code books, bits -------------------------------------------------------------------


@step("low rank")
def _low_rank(shop: Workshop, model: Module, step: Record) -> Module:
    rank = {"error": factorize.error, "energy": factorize.energy}[step["by"]](step["value"])
    return factorize.layers(model, shop.example, rank, form=step.get("form", "matrix"))


@step("round")
def _round(shop: Workshop, model: Module, step: Record) -> Module:
    return cluster.rounded(model, step["decimals"])


@step("k-means")
def _kmeans(shop: Workshop, model: Module, step: Record) -> Module:
    return cluster.kmeans(model, step["entries"], per=step.get("per", "layer"))


@step("hashed")
def _hashed(shop: Workshop, model: Module, step: Record) -> Module:
    return hashing.hashed(model, step["share"])


@step("float16")
def _float16(shop: Workshop, model: Module, step: Record) -> Module:
    return quantize.float16(fold_batchnorm(model, shop.example))


@step("dynamic")
def _dynamic(shop: Workshop, model: Module, step: Record) -> Module:
    return quantize.dynamic(model, shop.example)


@step("int8")
def _int8(shop: Workshop, model: Module, step: Record) -> Module:
    ranges: dict[str, calibrate.Range] = {
        "min-max": calibrate.minmax,
        "percentile": calibrate.percentile(),
        "squared error": calibrate.mse,
        "KL": calibrate.kl,
    }
    scheme = quantize.Scheme(
        per_channel=step.get("per_channel", True), scales=step.get("scales", 0)
    )
    data = shop.batches(SEEN, SEEN * WATCHED)
    return quantize.int8(model, data, ranges=ranges[step["ranges"]], scheme=scheme)


@step("4 bits")
def _four_bits(shop: Workshop, model: Module, step: Record) -> Module:
    return quantize.low_bit(
        model,
        shop.batches(SEEN, SEEN * WATCHED),
        clip=None if step.get("clip", True) else calibrate.largest,
        allocate=step.get("allocate", True),
        correct=step.get("correct", True),
        scales=step.get("scales", 0),
    )


@step("train ranges")
def _trainable(shop: Workshop, model: Module, step: Record) -> Module:
    return quantize.trainable(model, step["ranges"])


# --- batch norm, the ef-operator ------------------------------------------------------------------


@step("statistics anew")
def _reestimate(shop: Workshop, model: Module, step: Record) -> Module:
    # the first layers' statistics are those of padded, flipped crops, and so must the new ones be
    return reestimate(model, shop.trained(SEEN, step["images"]))


@step("fold")
def _fold(shop: Workshop, model: Module, step: Record) -> Module:
    return fold_batchnorm(model, shop.example)


@step("additive")
def _additive(shop: Workshop, model: Module, step: Record) -> Module:
    """The ef-operator in the place of linear layers, or of pointwise convolutions, too."""
    new: dict[str, Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            new[path] = nn.AdditiveLinear(*module.weight.shape, rng=shop.rng)
        elif step["pointwise"] and isinstance(module, nn.PointwiseConv2d):
            m_in, m_out = module.weight.shape[2:]
            new[path] = nn.AdditiveConv2d(m_in, m_out, 1, rng=shop.rng)
    return tn.compress.exchange(model, new)


# --- recipes --------------------------------------------------------------------------------------


def carry_out(
    recipe: list[Record], sets: classify.Sets, config: Record, context: Context
) -> Module:
    """The model that the recipe makes; `config` has the settings of training, and `seed`."""
    keys = list(_keys(recipe, config))
    stages = context.files.parent / "stages"
    model: Module = nn.Sequential()
    first = 0
    for i, key in enumerate(keys):
        if (stages / f"{key}.safetensors").exists():
            first = i + 1
    if first:
        model = tn.load(stages / f"{keys[first - 1]}.safetensors")
        _hold(model, recipe[:first])
    for item, key in list(zip(recipe, keys, strict=True))[first:]:
        rng = np.random.default_rng(int(key, 16))
        shop = Workshop(sets, config, rng, replace(context, files=stages / key))
        model = STEPS[item["do"]](shop, model, item)
        if item["do"] == "train":
            tn.save(stages / f"{key}.safetensors", model)
    return model


def _keys(recipe: list[Record], config: Record) -> Iterator[str]:
    """What identifies the model after each step."""
    text = json.dumps(config, sort_keys=True)
    for item in recipe:
        text += json.dumps(item, sort_keys=True)
        if "path" in item:
            text += hashlib.sha256(model_file(item["path"]).read_bytes()).hexdigest()
        yield hashlib.sha256(text.encode()).hexdigest()[:16]


def _hold(model: Module, done: list[Record]) -> None:
    """Masks and shared values are not in a file: find them again in the weights."""
    names = {item["do"] for item in done} | {"weights" for item in done if "sparsity" in item}
    if names & {"weights", "threshold", "n of m", "4x1"}:
        sparsify.freeze_zeros(model)
    if names & {"round", "k-means"}:
        cluster.tie(model)
