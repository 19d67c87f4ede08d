"""Four ways to make a convolution: which is as good, which is cheaper, which is faster?

A net of three 5x5 convolutions (tinynn.models.thesis.baseline) on MNIST or CIFAR-10, with its
second and third replaced: kernel-composing (1xK to n channels, ReLU, Kx1), separable (depthwise,
pointwise) and non-linear separable (batch normalisation and ReLU between the two). Reported for
each: accuracy over runs, parameters, multiply-adds, and the measured time of a training step and of
an inference, which the publication could only count; Welch's t-test between the alternatives and
the convolution.

The published schedule is 50k steps of momentum 0.9 with the rate 0.1 divided by 10 at 20k, 30k and
40k (--full); the default is a cosine over the epochs that --epochs says.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.style
import numpy as np
from scipy import stats

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import classify, pictures
from experiments.runner import (
    Context,
    Experiment,
    Option,
    Record,
    Row,
    add_options,
    main,
    spread,
    written,
)
from tinynn.models import thesis

KINDS: tuple[thesis.Convolution, ...] = ("conv", "composing", "separable", "nonlinear")
DATASETS = ("mnist", "cifar10")

#: top-1 in percent: mean and maximum of ten runs on CIFAR-10; MNIST: "99 +/- 0.3"
CIFAR10 = {
    "conv": (81.84, 82.56),
    "composing": (81.98, 82.51),
    "separable": (82.11, 82.53),
    "nonlinear": (82.16, 82.75),
}
MILLIONS = {"conv": 16.1, "composing": 8.0, "separable": 2.1, "nonlinear": 2.1}
PUBLISHED = {"cifar10_mean_and_max": CIFAR10, "mnist": "99 +/- 0.3", "multiply_adds_M": MILLIONS}

#: where the thesis' setting differs from that of its small CIFAR model
THESIS: Record = {"steps": 50_000, "l2": 0.0}
MILESTONES = (0.4, 0.6, 0.8)

#: what differs from classify's defaults, by data set: digits must not be mirrored
DEFAULTS: dict[str, Record] = {
    "mnist": {"epochs": 3.0, "pad": 2, "flip": False, "crop": 28, "lr": 0.1},
    "cifar10": {"epochs": 10.0, "crop": 24, "pad": 0, "lr": 0.1},
}


def _settings(dataset: str, full: bool) -> Record:
    """Every setting on a data set, before what the command line says."""
    own = DEFAULTS["mnist" if dataset == "glyphs" else dataset]
    shared = {n: o.literal if full else o.default for n, o in classify.OPTIONS.items()}
    if full:
        return shared | {k: v for k, v in own.items() if k in ("flip", "crop", "pad")} | THESIS
    return shared | own


def _told(name: str) -> str:
    """The values of a setting, as --help shows them."""
    words = []
    for full in (False, True):
        values = {dataset: _settings(dataset, full)[name] for dataset in DATASETS}
        several = ", ".join(f"{dataset} {value}" for dataset, value in values.items())
        words.append(several if len(set(values.values())) > 1 else str(values[DATASETS[0]]))
    return words[0] if words[0] == words[1] else f"{words[0]}; literal {words[1]}"


OPTIONS: dict[str, Option] = {
    k: replace(v, told=_told(k)) for k, v in classify.OPTIONS.items() if k != "dataset"
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's own flags."""
    group = parser.add_argument_group("conv_alternatives")
    group.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="which")
    group.add_argument(
        "--dataset",
        nargs="+",
        choices=(*DATASETS, "glyphs"),
        default=None,
        help=f"on what (default: {' '.join(DATASETS)}; --quick: glyphs)",
    )
    add_options(group, OPTIONS)


def cells(args: argparse.Namespace) -> dict[str, Record]:
    """A cell for each data set and kind."""
    datasets = args.dataset or (["glyphs"] if args.quick else list(DATASETS))
    asked = written(args, OPTIONS)
    if "steps" in asked and "epochs" not in asked:
        asked["epochs"] = 0.0
    found = {}
    for dataset in datasets:
        settings = _settings(dataset, args.full) | classify.quick_settings(args) | asked
        settings |= {"milestones": list(MILESTONES), "dataset": dataset}
        for kind in args.kind:
            found[f"{dataset}, {kind}"] = {"kind": kind, **settings}
    return found


def run(config: Record, seed: int, context: Context) -> Record:
    """Train one of the four nets, evaluate it on the whole test set, time it."""
    init_rng, data_rng = (np.random.default_rng([seed, i]) for i in range(2))
    sets = classify.load(config, context)
    model = thesis.baseline(
        config["kind"],
        m_in=sets.train.images.shape[3],
        classes=len(sets.train.classes),
        rng=init_rng,
    )
    view = classify.augmentation(config).evaluation()
    result = classify.train(model, sets, config, data_rng, context)
    batch = view(sets.test.images[: config["batch"]])
    return {
        "kind": config["kind"],
        "dataset": config["dataset"],
        "parameters": model.size(),
        "multiply_adds": classify.multiply_adds(model, (1, *batch.shape[1:])),
        **result,
        **classify.step_seconds(model, batch, config),
    }


def summary(runs: list[Record]) -> Record:
    """What `classify.summary` gives, times, and each alternative tested against the convolution."""
    whole = classify.summary(runs)
    for cell, members in classify.by_cell(runs).items():
        entry = whole["cells"][cell]
        for name in ("training_step_seconds", "inference_seconds"):
            entry[name] = float(np.median([r[name] for r in members]))
        entry["p_against_conv"] = _p_value(members, _twins(runs, members[0]))
    return whole


def _twins(runs: list[Record], like: Record) -> list[Record]:
    """The runs of the plain convolution on the same data set."""
    return [r for r in runs if r["kind"] == "conv" and r["dataset"] == like["dataset"]]


def _p_value(a: list[Record], b: list[Record]) -> float | None:
    """Of Welch's two-sided t-test between the accuracies; None for too few runs or no spread."""
    first, second = ([r["accuracy"] for r in runs] for runs in (a, b))
    if a == b or min(len(a), len(b)) < 2:
        return None
    p = float(stats.ttest_ind(first, second, equal_var=False).pvalue)
    return p if np.isfinite(p) else None


def table(runs: list[Record], summary: Record) -> list[Row]:
    """Accuracy, size and time of each kind beside what was published."""
    rows = []
    for cell, members in classify.by_cell(runs).items():
        kind, entry = members[0]["kind"], summary["cells"][cell]
        published = "?"
        if members[0]["dataset"] == "cifar10":
            published = "{} (max {})".format(*CIFAR10[kind])
        elif members[0]["dataset"] == "mnist":
            published = "99 +/- 0.3"
        rows.append(classify.accuracy_row(cell, published, members))
        if entry["p_against_conv"] is not None:
            rows.append(Row(f"{cell}: p against conv", "?", f"{entry['p_against_conv']:.3f}", "-"))
        millions = entry["multiply_adds"] / 1e6
        at = f"{MILLIONS[kind]} at 24x24"
        rows.append(Row(f"{cell}: multiply-adds, M", at, f"{millions:.1f}", "-"))
        rows.append(Row(f"{cell}: parameters", "?", f"{entry['parameters']:,}", "-"))
        for name in ("training_step_seconds", "inference_seconds"):
            times = [1e3 * r[name] for r in members]
            what = f"{cell}: ms of {name.removesuffix('_seconds').replace('_', ' ')}"
            rows.append(Row(what, "?", f"{np.median(times):.1f}", spread(times)))
    return rows


def figures(out: Path, runs: list[Record]) -> list[Path]:
    """Learning curves, and accuracy against cost."""
    drawn = [pictures.write(out / "curves.png", classify.draw_curves(runs))]
    datasets = list(dict.fromkeys(r["dataset"] for r in runs))
    with matplotlib.style.context(["default", pictures.STYLE]):
        figure = pictures.figure(10, 3.4 * len(datasets))
        axes = figure.subplots(len(datasets), 2, squeeze=False)
        for dataset, row in zip(datasets, axes, strict=True):
            costs = {"multiply_adds": 1e-6, "training_step_seconds": 1e3}
            for ax, (cost, unit) in zip(row, costs.items(), strict=True):
                for kind, colour in zip(KINDS, pictures.CYCLE, strict=False):
                    members = [r for r in runs if (r["dataset"], r["kind"]) == (dataset, kind)]
                    x = [unit * r[cost] for r in members]
                    y = [100 * r["accuracy"] for r in members]
                    if members:  # nothing in the legend that was not run
                        ax.scatter(x, y, color=colour, label=kind, alpha=0.8)
                names = {"multiply_adds": "multiply-adds of an image, M"}
                ax.set(xlabel=names.get(cost, "ms of a training step"), ylabel="test accuracy, %")
                ax.set(title=dataset, xlim=(0, None))
            row[0].legend()
        drawn.append(pictures.write(out / "costs.png", figure))
    return drawn


EXPERIMENT = Experiment(
    name="conv_alternatives",
    source="Çallı, Faster and Lighter Convolutional Neural Networks (2017), 2.3 and 3.2",
    description="Compare the convolution with its three alternatives.",
    published=PUBLISHED,
    arguments=arguments,
    cells=cells,
    run=run,
    line=classify.line,
    summary=summary,
    table=table,
    figures=figures,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
