"""Compress the small CIFAR-10 model by every pass and by useful combinations of them.

Each recipe (experiments.compress_small_recipes) is a list of passes and trainings that begins with
the trained model; "designed" recipes are the control: narrower networks trained from scratch. For
each: accuracy on the test set, computed by the plan that `tn.compile` makes of the result (by the
model itself where no plan can express it, which the table says); bytes of the plan's file, and what
they would be under an entropy coder; parameters, those that are not zero, multiply-adds and those
that kernels carry out; milliseconds of the plan at batch 1 and 64; an estimate of its energy.

The times are a run of their own, after all others: all plans in turns, in one process, each with
kernels that were chosen anew by measuring just before. To measure on a machine that has nothing
else to do, take the other results up:

    python experiments/compress_small.py --threads 1 --resume --times 2

--group chooses recipes; --sweep adds pruning x SVD error x rounding. With --jobs above 1 times are
left out. What a training leaves is kept in OUT/runs/stages, and used by all that begin with it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinynn as tn
from experiments import classify, compress_small_figures, compress_small_recipes
from experiments.compress_small_costs import Executable, costs, executed_multiply_adds
from experiments.compress_small_findings import findings, summary, table
from experiments.compress_small_steps import SEEN, Workshop, carry_out
from experiments.runner import (
    Context,
    Experiment,
    Option,
    Record,
    add_options,
    main,
    written,
)
from kernels._jit import get_threads
from kernels.timing import compare
from tinynn import metrics
from tinynn.deploy.choose import MEASURE, choose_kernels
from tinynn.errors import ConfigError

BATCHES = (1, 64)  #: at which plans are timed
TIMES = "times"  #: the cell that measures them

#: settings of classify's trainings that can be changed here
_SHARED = (
    "dataset", "images", "test_images", "crop", "pad", "flip", "brightness", "contrast",
    "standardize", "batch", "optimizer", "momentum", "l2", "smoothing",
)  # fmt: skip
OPTIONS: dict[str, Option] = {name: classify.OPTIONS[name] for name in _SHARED} | {
    "tuning": Option(1.0, 5.0, "a factor on the epochs of every fine-tuning", above=0),
    "epochs": Option(3.0, 48.0, "epochs of the networks that are designed small", above=0),
}

PUBLISHED = {
    "pruning": "could not be recovered by retraining",
    "factorisation": "never faster at equal accuracy",
    "int8": "kept the accuracy at half the speed (TensorFlow 1.2)",
    "sparse": "dense is faster unless fewer than 10 % are not zero",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's own flags."""
    group = parser.add_argument_group("compress_small")
    group.add_argument("--group", nargs="+", default=None, help="the kinds of recipes; all")
    group.add_argument("--without", nargs="+", default=[], help="recipes to leave out")
    group.add_argument("--sweep", action="store_true", help="pruning x SVD error x rounding, too")
    group.add_argument(
        "--times", type=int, default=1, help="number of the measurement of times; 0: none"
    )
    add_options(group, OPTIONS)


def cells(args: argparse.Namespace) -> dict[str, Record]:
    """A cell a recipe, then one that times them all."""
    settings = {n: o.literal if args.full else o.default for n, o in OPTIONS.items()}
    for name in ("brightness", "contrast", "crop", "pad", "optimizer", "l2"):
        settings[name] = OPTIONS[name].default  # the trained model's own recipe
    if args.quick:
        quick = {"dataset": "glyphs", "images": 2560, "test_images": 1000, "pad": 2, "flip": False}
        settings |= {**quick, "epochs": 3.0}
    settings |= written(args, OPTIONS)
    tuning, epochs = settings.pop("tuning"), settings.pop("epochs")
    groups = (
        compress_small_recipes.quick(tuning, epochs)
        if args.quick
        else compress_small_recipes.published(tuning, epochs)
    )
    if args.sweep:
        groups |= compress_small_recipes.sweep()
    chosen = list(groups) if args.group is None else args.group
    if unknown := sorted(set(chosen) - groups.keys()):
        raise ConfigError(f"required --group of {list(groups)}; came {unknown}")
    if unknown := sorted(set(args.without) - {name for g in groups.values() for name in g}):
        raise ConfigError(f"required --without recipes that there are; came {unknown}")
    found: dict[str, Record] = {
        name: {"group": group, "recipe": recipe, **settings}
        for group in groups
        if group in chosen
        for name, recipe in groups[group].items()
        if name not in args.without
    }
    for name, config in found.items():
        config["name"] = name
    if args.jobs == 1 and args.scheduler is None and args.times:
        timed = [name for name, c in found.items() if c["group"] != "sweep"]
        rounds = 3 if args.quick else 5
        times_of = {"group": TIMES, "names": timed, "number": args.times, "rounds": rounds}
        found[TIMES] = {**times_of, **settings}
    return found


def run(config: Record, seed: int, context: Context) -> Record:
    """Carry out one recipe and measure what comes out, or time what all have left."""
    if config["group"] == TIMES:
        return times(config, seed, context)
    sets = classify.load(config, context)
    settings = _training(config, seed)
    model = carry_out(config["recipe"], sets, settings, context)
    shop = Workshop(sets, settings, np.random.default_rng(seed), context)
    runs = Executable.of(model, shop.example)
    outputs = [runs(x) for x, _ in sets.test.batches(SEEN, augment=shop.view)]
    record = {
        "group": config["group"],
        "dataset": config["dataset"],
        "accuracy": metrics.accuracy(np.concatenate(outputs), sets.test.labels),
        "test_images": len(sets.test),
        "tuning_epochs": sum(s.get("epochs", 0) for s in config["recipe"]),
        **costs(runs, shop.example),
    }
    if runs.plan is not None and config["group"] != "sweep":
        runs.plan.save(_plan_file(context, config["name"], seed))
    return record


def _training(config: Record, seed: int) -> Record:
    """The settings of every training of a recipe, in classify's terms."""
    fixed = {name: option.default for name, option in classify.OPTIONS.items()}
    own = {name: config[name] for name in _SHARED}
    return {**fixed, **own, "evaluate_every": 1000, "milestones": [], "seed": seed}


def _plan_file(context: Context, name: str, seed: int) -> Path:
    slug = re.sub(r"\W+", "-", name)
    return context.files.parent / "plans" / f"{slug}-seed-{seed}.plan"


# --- times ----------------------------------------------------------------------------------------


def times(config: Record, seed: int, context: Context) -> Record:
    """Median seconds of every plan, in turns; of those with other kernels, on dense ones, too.

    Kernels are chosen first: the machine may not have been as quiet when the plan was made.
    """
    plans: dict[str, tn.Plan] = {}
    for name in config["names"]:
        path = _plan_file(context, name, seed)
        if path.exists():
            plan = tn.Plan.load(path)
            plans[name] = tn.Plan(choose_kernels(plan.network, MEASURE, plan.images_at_once(1)))
    dense = {name: on_dense_kernels(plan) for name, plan in plans.items()}
    found: dict[str, Record] = {}
    for batch in BATCHES:
        some = next(iter(plans.values()))
        x = np.random.default_rng(0).normal(size=(batch, *some.input_shape)).astype(np.float32)
        contestants = {name: _call(plan, x) for name, plan in plans.items()}
        others = {name: _call(plan, x) for name, plan in dense.items() if plan is not None}
        both = contestants | {f"{name} ": call for name, call in others.items()}
        taken = compare(both, rounds=config["rounds"])
        found[str(batch)] = {
            name: {
                "seconds": taken[name].median,
                "spread": taken[name].spread,
                "dense_seconds": taken[f"{name} "].median if name in others else None,
            }
            for name in plans
        }
    executed = {name: executed_multiply_adds(plan) for name, plan in plans.items()}
    return {
        "group": TIMES,
        "threads": get_threads(),
        "batches": found,
        "executed_multiply_adds": executed,
    }


def on_dense_kernels(plan: tn.Plan) -> tn.Plan | None:
    """The same plan with dense kernels in the place of sparse and packed ones, if it has such."""
    if all(layer.kernel == "dense" for layer in plan.network.layers):
        return None
    return tn.Plan(choose_kernels(plan.network, "dense"))


def _call(plan: tn.Plan, x: np.ndarray) -> Callable[[], object]:
    return lambda: plan(x)


def line(r: Record) -> str:
    """A finished run in one line."""
    if r["group"] == TIMES:
        return f"{len(r['batches'][str(BATCHES[0])])} plans on {r['threads']} threads"
    return (
        f"{100 * r['accuracy']:.2f} % of {r['test_images']} test images, {r['bytes']:,} bytes, "
        f"{r['executed_multiply_adds']:,} multiply-adds, as {r['executed_as']}, "
        f"{r['seconds']:.0f} s"
    )


EXPERIMENT = Experiment(
    name="compress_small",
    source="Çallı, Faster and Lighter Convolutional Neural Networks (2017), 2.4 and 3.3.2-3.3.4",
    description="Compress the small CIFAR-10 network.",
    published=PUBLISHED,
    arguments=arguments,
    cells=cells,
    run=run,
    line=line,
    summary=summary,
    table=table,
    figures=compress_small_figures.draw,
    remarks=findings,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
