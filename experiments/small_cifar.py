"""Train the small separable residual network on CIFAR-10, beside ResNet-20.

The model has six pre-activation separable residual blocks, 131,018 parameters and 13.64 M
multiply-adds (tinynn.models.thesis.small_cifar). --recipe chooses how it is trained:

- cosine (the default): whole images, shifted by up to 4 pixels and flipped, per-image
  standardisation, Nesterov momentum, a cosine from 0.2 after a short warm-up, L2 5e-4;
- published: 24x24 windows, flips, random brightness and contrast, rates 0.1 / 0.01 / 0.001 from
  steps 0, 40k and 60k of 80k, L2 1e-3 (--full runs all of it; --steps shortens it in proportion).

Every flag overrides the recipe. The trained weights are left in OUT/runs/RUN/model.safetensors,
and the best run's in OUT/model.safetensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinynn as tn
from experiments import classify, pictures
from experiments.runner import (
    Context,
    Experiment,
    Record,
    Row,
    add_options,
    main,
    spread,
    written,
)
from tinynn.models import thesis

MODELS = {"small": thesis.small_cifar, "resnet20": thesis.resnet20}
PUBLISHED = {
    "small": {"accuracy": 0.911, "parameters": 131_018, "multiply_adds": 13.64e6},
    "resnet20": {"accuracy": 0.9125, "parameters": 0.27e6, "multiply_adds": 40e6},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's own flags."""
    group = parser.add_argument_group("small_cifar")
    group.add_argument(
        "--model", nargs="+", choices=tuple(MODELS), default=["small"], help="what to train"
    )
    group.add_argument(
        "--recipe", choices=("cosine", "published"), default=None, help="how (--full: published)"
    )
    add_options(group, classify.OPTIONS)


def cells(args: argparse.Namespace) -> dict[str, Record]:
    """A cell a model. Later entries win: recipe, --quick, flags."""
    recipe = args.recipe or ("published" if args.full else "cosine")
    settings = {
        name: option.literal if recipe == "published" else option.default
        for name, option in classify.OPTIONS.items()
    }
    if recipe == "published" and not args.full:
        settings |= {"epochs": classify.OPTIONS["epochs"].default}
    settings |= classify.quick_settings(args)
    asked = written(args, classify.OPTIONS)
    if "steps" in asked and "epochs" not in asked:
        asked["epochs"] = 0.0
    settings |= asked | {"milestones": list(classify.MILESTONES)}
    return {f"{model}, {recipe}": {"model": model, **settings} for model in args.model}


def run(config: Record, seed: int, context: Context) -> Record:
    """Train one model and evaluate it on the whole test set."""
    init_rng, data_rng = (np.random.default_rng([seed, i]) for i in range(2))
    sets = classify.load(config, context)
    model = MODELS[config["model"]](
        m_in=sets.train.images.shape[3], classes=len(sets.train.classes), rng=init_rng
    )
    shape = classify.augmentation(config).evaluation()(sets.test.images[:1]).shape
    record = {
        "parameters": model.size(),
        "multiply_adds": classify.multiply_adds(model, shape),
        **classify.train(model, sets, config, data_rng, context),
    }
    tn.save(context.files / "model.safetensors", model)
    return record | {"files": context.files.name}


def table(runs: list[Record], summary: Record) -> list[Row]:
    """Accuracy and size beside the published ones."""
    rows = []
    for cell, members in classify.by_cell(runs).items():
        published = PUBLISHED[cell.partition(",")[0]]
        rows.append(classify.accuracy_row(cell, f"{100 * published['accuracy']:g}", members))
        for name, unit in (("parameters", 1), ("multiply_adds", 1e6)):
            value = f"{members[0][name] / unit:,.{0 if unit == 1 else 2}f}"
            what = name.replace("_", "-") + ("" if unit == 1 else ", M")
            rows.append(Row(f"{cell}: {what}", f"{published[name] / unit:,g}", value, "-"))
        times = [r["training_seconds"] for r in members]
        rows.append(Row(f"{cell}: s of training", "?", f"{np.median(times):.0f}", spread(times)))
        waited = [r["waiting_seconds"] for r in members if "waiting_seconds" in r]
        if waited:
            what = f"{cell}: of them, s of waiting for images"
            rows.append(Row(what, "?", f"{np.median(waited):.2f}", spread(waited)))
    return rows


def figures(out: Path, runs: list[Record]) -> list[Path]:
    """Learning curves, the best run's confusion matrix, and its weights."""
    best = max(runs, key=lambda r: r["accuracy"])
    drawn = [
        pictures.write(out / "curves.png", classify.draw_curves(runs)),
        pictures.write(out / "classes.png", classify.draw_classes(best)),
    ]
    weights = out / "runs" / best["files"] / "model.safetensors"
    if weights.exists():
        tn.save(out / "model.safetensors", tn.load(weights))
        drawn.append(out / "model.safetensors")
    return drawn


EXPERIMENT = Experiment(
    name="small_cifar",
    source="Çallı, Faster and Lighter Convolutional Neural Networks (2017), 2.4.1 and 3.3.1",
    description="Train the small CIFAR-10 network.",
    published=PUBLISHED,
    arguments=arguments,
    cells=cells,
    run=run,
    line=classify.line,
    summary=classify.summary,
    table=table,
    figures=figures,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
