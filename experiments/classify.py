"""What the experiments on labelled images share: their settings, one training, one evaluation."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import tinynn as tn
from experiments import pictures
from experiments.runner import OPTIMIZERS, Context, Option, Record, Row, flag, spread
from tinynn import metrics, nn
from tinynn.data import Augment, Dataset
from tinynn.errors import ConfigError
from tinynn.op import Array
from tinynn.schedule import Constant, Cosine, MultiStep, Schedule
from tinynn.train import Loss

EVALUATION_BATCH = 250  #: images; divides the usual test sets

#: settings of a training on images; the literal column is the published one of Çallı 2017, 2.4.1
OPTIONS: dict[str, Option] = {
    "dataset": Option(
        "cifar10",
        "cifar10",
        "data set",
        ("cifar10", "cifar100", "mnist", "fashion_mnist", "glyphs"),
    ),
    "images": Option(0, 0, "train on the first so many images; 0: all", least=0),
    "test_images": Option(0, 0, "evaluate on the first so many images; 0: all", least=0),
    "crop": Option(0, 24, "side of the random window; 0: the image's own", least=0),
    "pad": Option(4, 0, "black pixels around the image before the window is cut", least=0),
    "flip": Option(True, True, "mirror left and right every second time"),
    "brightness": Option(0.0, 0.25, "largest change, as a share of the range", least=0),
    "contrast": Option(0.0, 0.8, "largest change of the factor 1", least=0, below=1),
    "standardize": Option(True, True, "subtract each image's mean, divide by its deviation"),
    "batch": Option(128, 128, "images a step", least=1),
    "epochs": Option(4.0, 0.0, "epochs; 0: --steps says", least=0),
    "steps": Option(0, 80_000, "optimiser steps, if --epochs is 0", least=0),
    "schedule": Option("cosine", "steps", "the learning rate", ("cosine", "steps", "constant")),
    "warmup": Option(0.05, 0.0, "share of the steps with a rising rate (cosine)", least=0, below=1),
    "optimizer": Option("nesterov", "sgd", "optimiser", tuple(OPTIMIZERS)),
    "lr": Option(0.2, 0.1, "learning rate", above=0),
    "momentum": Option(0.9, 0.9, "momentum", least=0, below=1),
    "l2": Option(5e-4, 1e-3, "lambda / 2 |w|^2 of the weights", least=0),
    "smoothing": Option(0.0, 0.0, "label smoothing", least=0, below=1),
    "evaluate_every": Option(5, 5, "epochs between evaluations on the test set", least=1),
}

#: when the published step schedule divides the rate by ten, as shares of all steps
MILESTONES = (0.5, 0.75)


class Sets(NamedTuple):
    """Training and test images, as a configuration asks for them."""

    train: Dataset
    test: Dataset


def load(config: Record, context: Context) -> Sets:
    """The data set of a configuration."""
    train, test = tn.data.load(config["dataset"], context.data_dir)
    if config["images"]:
        train = train.take(config["images"])
    if config["test_images"]:
        test = test.take(config["test_images"])
    return Sets(train, test)


def augmentation(config: Record) -> Augment:
    """The random changes to training images; `.evaluation()` is the view for the test."""
    return Augment(
        crop=config["crop"] or None,
        pad=config["pad"],
        flip=config["flip"],
        brightness=config["brightness"],
        contrast=(1 - config["contrast"], 1 + config["contrast"]),
        standardize=config["standardize"],
    )


def schedule_of(config: Record, steps: int) -> Schedule:
    """The schedule of a configuration for so many steps."""
    if config["schedule"] == "cosine":
        return Cosine(steps, warmup=min(steps - 1, round(config["warmup"] * steps)))
    if config["schedule"] == "steps":
        milestones = sorted({max(1, round(share * steps)) for share in config["milestones"]})
        return MultiStep(milestones, factor=0.1)
    return Constant()


class Taught:
    """Batches (x, teacher(x)) of those of `data`: a model is to compute what another does.

    Ba & Caruana 2014, "Do deep nets really need to be deep?", section 2.2, regress logits so.
    """

    def __init__(self, data: Any, teacher: Callable[[Array], Array]) -> None:
        self.data, self.teacher = data, teacher

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for x, _ in self.data:
            yield x, self.teacher(x)

    @property
    def waited(self) -> float:
        """Seconds for which images were waited for."""
        return self.data.waited

    def restart(self) -> None:
        """Forget the epoch under way."""
        self.data.restart()

    def state_dict(self) -> dict[str, Any]:
        """Where the images are."""
        found: dict[str, Any] = self.data.state_dict()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.data.load_state_dict(state)


def train(
    model: nn.Module,
    sets: Sets,
    config: Record,
    rng: np.random.Generator,
    context: Context,
    each_step: Callable[[int], None] | None = None,
    teacher: Callable[[Array], Array] | None = None,
) -> Record:
    """Train and evaluate `model`; a checkpoint in `context.files` lets a run be taken up again.

    `each_step` is called after every update with the number of steps so far. With a `teacher` the
    labels are not read: its outputs for the same augmented images are what `model` is to give.
    Returns the training's curve (a record an epoch), the seconds for which steps waited for images,
    and what `evaluate` gives.
    """
    augment = augmentation(config)
    data: Any = sets.train.batches(config["batch"], rng, augment, drop_last=True)
    loss: Loss = partial(tn.softmax_cross_entropy, smoothing=config["smoothing"])
    if teacher is not None:
        data, loss = Taught(data, teacher), tn.mse
    steps = round(config["epochs"] * len(data)) or config["steps"]
    if not steps:
        raise ConfigError(f"required {flag('epochs')} or {flag('steps')} above 0; came none")
    test = sets.test.batches(EVALUATION_BATCH, augment=augment)
    optimizer = OPTIMIZERS[config["optimizer"]](
        model.parameters(), config["lr"], momentum=config["momentum"], l2=config["l2"]
    )
    checkpoint = context.files / "checkpoint.safetensors"
    if not context.resume:
        checkpoint.unlink(missing_ok=True)

    def each_epoch(record: Record) -> None:
        last = record["step"] >= steps
        if last or record["epoch"] % config["evaluate_every"] == 0:
            record["accuracy"] = metrics.accuracy(*tn.predict(model, test))
        shown = f", test accuracy {record['accuracy']:.4f}" if "accuracy" in record else ""
        context(
            f"  epoch {record['epoch']:3}, step {record['step']:6}: loss {record['loss']:.4f}, "
            f"rate {record['lr']:.3g}, {record['seconds']:.1f} s{shown}"
        )

    history = tn.fit(
        model,
        data,
        loss=loss,
        optimizer=optimizer,
        steps=steps,
        schedule=schedule_of(config, steps),
        each_step=each_step,
        each_epoch=each_epoch,
        checkpoint=checkpoint,
        resume=context.resume,
        log=context.files / "epochs.jsonl",
    )
    return {
        "steps": history.records[-1]["step"],
        "train_loss": history.losses[-1],
        "training_seconds": round(sum(r["seconds"] for r in history.records), 3),
        "waiting_seconds": round(data.waited, 3),
        "curve": history.records,
        **evaluate(model, test, sets.test.classes),
    }


def evaluate(model: nn.Module, test: Any, classes: tuple[str, ...]) -> Record:
    """Accuracy over all of `test`, by class, and the confusion matrix (row = true class)."""
    outputs, labels = tn.predict(model, test)
    scores = metrics.class_scores(outputs, labels)
    return {
        "accuracy": metrics.accuracy(outputs, labels),
        "test_images": len(labels),
        "class_recall": dict(zip(classes, scores.recall.tolist(), strict=True)),
        "class_precision": dict(zip(classes, scores.precision.tolist(), strict=True)),
        "confusion": metrics.confusion_matrix(outputs, labels).tolist(),
    }


def multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Of one inference on images of this shape (1, H, W, C)."""
    example = tn.Tensor(np.zeros(shape, np.float32), copy=False)
    nodes = tn.graph.trace(model, example).nodes
    return sum(node.op.macs(*(v.shape for v in node.inputs)) for node in nodes)


def step_seconds(model: nn.Module, x: np.ndarray[Any, Any], config: Record) -> Record:
    """Median seconds of an inference and of a training step on the batch x (B, H, W, C).

    A plain measurement beside the accuracy: `python -m bench train_step` is the careful one.
    """
    labels = np.zeros(len(x), np.int64)
    optimizer = tn.SGD(model.parameters(), config["lr"], momentum=config["momentum"])
    batch = tn.Tensor(x, copy=False)

    def inference() -> None:
        with tn.no_grad():
            model(batch)

    def step() -> None:
        tn.softmax_cross_entropy(model(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "inference_seconds": _median_seconds(model.eval(), inference),
        "training_step_seconds": _median_seconds(model.train(), step),
    }


def _median_seconds(model: nn.Module, call: Callable[[], None], rounds: int = 11) -> float:
    call()  # compiles
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


# --- summaries, tables, figures -----------------------------------------------------------------


def by_cell(runs: list[Record]) -> dict[str, list[Record]]:
    """Runs by cell, in the order of first appearance."""
    cells: dict[str, list[Record]] = {}
    for run in runs:
        cells.setdefault(run["cell"], []).append(run)
    return cells


def summary(runs: list[Record]) -> Record:
    """Mean, best and spread of the accuracy, and the costs, of every cell."""
    cells = {}
    for cell, members in by_cell(runs).items():
        accuracies = [r["accuracy"] for r in members]
        cells[cell] = {
            "runs": len(members),
            "accuracy_mean": float(np.mean(accuracies)),
            "accuracy_max": max(accuracies),
            "accuracy_min": min(accuracies),
            "accuracy_std": float(np.std(accuracies, ddof=1)) if len(members) > 1 else None,
            "parameters": members[0]["parameters"],
            "multiply_adds": members[0]["multiply_adds"],
            "training_seconds": float(np.median([r["training_seconds"] for r in members])),
        }
    return {"cells": cells}


def line(r: Record) -> str:
    """A finished run in one line."""
    return (
        f"{100 * r['accuracy']:.2f} % of {r['test_images']} test images after {r['steps']} steps, "
        f"loss {r['train_loss']:.4f}, {r['training_seconds']:.0f} s of training"
    )


def accuracy_row(cell: str, published: str, members: list[Record]) -> Row:
    """The accuracy of a cell over its runs, in percent."""
    values = [100 * r["accuracy"] for r in members]
    shown = f"{np.mean(values):.2f}"
    if len(values) > 1:
        shown += f" (max {max(values):.2f})"
    return Row(f"{cell}: top-1, %", published, shown, spread(values, 4))


def draw_curves(runs: list[Record]) -> Figure:
    """Training loss and test accuracy of every run by epoch."""
    with matplotlib.style.context(["default", pictures.STYLE]):
        figure = pictures.figure(9, 3.6)
        left, right = figure.subplots(1, 2)
        for (cell, members), colour in zip(by_cell(runs).items(), _colours(runs), strict=True):
            for i, run in enumerate(members):
                curve = run["curve"]
                label = cell if i == 0 else None
                left.plot(
                    [r["epoch"] for r in curve],
                    [r["loss"] for r in curve],
                    color=colour,
                    label=label,
                )
                seen = [r for r in curve if "accuracy" in r]
                right.plot(
                    [r["epoch"] for r in seen],
                    [100 * r["accuracy"] for r in seen],
                    color=colour,
                    marker="o",
                    markersize=3,
                )
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        left.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
        right.set(xlabel="epoch", ylabel="test accuracy, %")
        left.legend()
        return figure


def draw_classes(run: Record) -> Figure:
    """The confusion matrix of a run and the recall of each class."""
    classes = list(run["class_recall"])
    with matplotlib.style.context(["default", pictures.STYLE]):
        figure = pictures.figure(10.5, 5)
        left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
        pictures.confusion(left, np.array(run["confusion"]), classes)
        left.set_title(f"{run['cell']}, seed {run['seed']}: % of the true class")
        # None, of a run taken up from its record, becomes NaN again: no image is of that class
        recall = 100 * np.array(list(run["class_recall"].values()), np.float64)
        right.barh(range(len(classes)), recall, color=pictures.BLUE)
        if len(classes) <= 20:
            right.set_yticks(range(len(classes)), classes)
        right.invert_yaxis()
        right.axvline(100 * run["accuracy"], color=pictures.BLACK, linewidth=1, linestyle="--")
        right.set(
            xlabel="recall, % (dashed: all classes)", xlim=(max(0, np.nanmin(recall) - 10), 100)
        )
        return figure


def _colours(runs: list[Record]) -> list[str]:
    return [pictures.CYCLE[i % len(pictures.CYCLE)] for i in range(len(by_cell(runs)))]


def quick_settings(args: argparse.Namespace) -> Record:
    """What --quick changes: few images of a data set that needs no file."""
    if not args.quick:
        return {}
    return {
        "dataset": "glyphs",
        "images": 2560,
        "test_images": 1000,
        "epochs": 2.0,
        "pad": 2,
        "flip": False,
        "evaluate_every": 1,
    }
