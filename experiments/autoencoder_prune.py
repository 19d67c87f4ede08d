"""Prune a convolutional auto-encoder of digits, cycle by cycle, by what its channels do.

1-32-64-32-1 channels: two convolutions and two transposed ones, 3x3, stride 2, batch normalisation,
ReLU, tanh at the end. A cycle is: train, run the training images, collect the variance (or count)
of every channel's activations, remove channels by bounds around the mean of these scores, and
again until a cycle removes nothing.

The publication says neither which side of the bounds goes (--bounds-remove) nor, in one voice, the
unit of their width (--bounds-unit; thesis: variance, draft: standard deviation): --table runs
all readings. --controls adds, to every run, random pruning of as many channels a cycle and a net of
the final size trained from scratch for as many steps.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinynn as tn
from experiments import autoencoder_figures as figures
from experiments.classify import by_cell
from experiments.runner import (
    OPTIMIZERS,
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
from tinynn import importance, nn, prune, select
from tinynn.compress.distort import FORMULAS
from tinynn.compress.prune import Decision
from tinynn.data import Dataset, ImageBatches
from tinynn.models import thesis
from tinynn.schedule import Cosine

Array = np.ndarray[Any, Any]

SHOWN = 10  #: digits in the figure of reconstructions
POSITIONS = 49  #: of the code: 7 x 7
SIZE = (2, 4, 3)  #: of the published result
PUBLISHED = {
    "channels": SIZE,
    "cycles": "10 +/- 4",
    "loss": "very close to 0",
    "best": "variance, mean +/- 2 var, L2 with lambda 0.01, no distortion",
    "draft": "plain activation pruning gives only 16-64-22",
}

OPTIONS: dict[str, Option] = {
    "dataset": Option("mnist", "mnist", "data set", ("mnist", "fashion_mnist", "glyphs")),
    "images": Option(10_000, 0, "train on the first so many images; 0: all", least=0),
    "test_images": Option(2_000, 0, "evaluate on the first so many; 0: all", least=0),
    "batch": Option(128, 128, "images a step", least=1),
    "first_steps": Option(300, 300, "optimiser steps of the first cycle", least=1),
    "steps": Option(200, 200, "optimiser steps of every later cycle", least=1),
    "cycles": Option(20, 20, "cycles at the most", least=1),
    "loss": Option("rmse", "rmse", "loss", ("rmse", "mse")),
    "optimizer": Option("adam", "adam", "optimiser, made anew each cycle", tuple(OPTIMIZERS)),
    "lr": Option(3e-3, 3e-3, "learning rate; falls along a cosine within each cycle", above=0),
    "momentum": Option(0.9, 0.9, "momentum (beta 1)", least=0, below=1),
    "regulariser": Option("l2", "l2", "penalty on the weights", ("none", "l1", "l2")),
    "penalty": Option(0.01, 0.01, "lambda of the regulariser", least=0),
    "criterion": Option(
        "variance",
        "variance",
        "what a channel is judged by: variance of its activations, number or share of them above 0",
        ("variance", "count", "rate"),
    ),
    "bounds": Option(2.0, 2.0, "width of the bounds around the mean score", least=0),
    "bounds_unit": Option("variance", "variance", "unit of the width", ("std", "variance")),
    "bounds_remove": Option("inside", "inside", "side removed", ("outside", "inside")),
    "distortion": Option(
        "none",
        "none",
        "amplitude of U[0,1) added to all weights after pruning",
        ("none", *FORMULAS),
    ),
    "least": Option(1, 1, "channels that every layer keeps whatever the criterion says", least=1),
    "controls": Option(True, True, "random pruning and the final size from scratch, for each run"),
}


class Sets(NamedTuple):
    """Images to train on and to test with, and their batches."""

    train: Dataset
    test: Dataset
    batches: ImageBatches
    test_batches: ImageBatches


def arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's own flags."""
    group = parser.add_argument_group("autoencoder_prune")
    group.add_argument(
        "--table",
        action="store_true",
        help="every criterion with every reading of its bounds; regularisers, distortion, losses",
    )
    add_options(group, OPTIONS)


def cells(args: argparse.Namespace) -> dict[str, Record]:
    """One configuration, or with --table all of them."""
    base = {name: o.literal if args.full else o.default for name, o in OPTIONS.items()}
    if args.quick:
        base |= {"dataset": "glyphs", "images": 1024, "test_images": 200, "first_steps": 60}
        base |= {"steps": 30, "cycles": 4}
    base |= written(args, OPTIONS)
    if not args.table:
        return {_name(base): base}
    grid = [
        {"criterion": c, "bounds_unit": u, "bounds_remove": r}
        for c in ("variance", "count", "rate")
        for u in ("variance", "std")
        for r in ("inside", "outside")
        if (c, u) != ("rate", "std")  # the same as of counts: one is a multiple of the other
    ]
    grid += [{"regulariser": "none"}, {"regulariser": "l1"}, {"distortion": "published"}]
    grid += [{"loss": "mse"}]
    return {_name(config): config for config in (base | changes for changes in grid)}


def _name(c: Record) -> str:
    """The configuration in words."""
    rest = [c["regulariser"]] if c["regulariser"] != "l2" else []
    rest += ["distortion"] if c["distortion"] != "none" else []
    rest += ["mse"] if c["loss"] == "mse" else []
    unit = "std" if c["bounds_unit"] == "std" else "var"
    where = f"{c['bounds_remove']} mean ± {c['bounds']:g} {unit} goes"
    return ", ".join([c["criterion"], where, *rest])


def run(config: Record, seed: int, context: Context) -> Record:
    """Prune one auto-encoder to the end; then its controls."""
    rngs = [np.random.default_rng([seed, i]) for i in range(5)]
    sets = _sets(config, rngs[0], context)
    net = thesis.autoencoder(rng=rngs[1])
    cycles, snapshots, final = _prune(net, sets, config, rngs[2], context)
    steps = sum(c["steps"] for c in cycles)
    record: Record = {
        "channels": channels(final),
        "cycles": cycles,
        "ended": cycles[-1]["ended"],
        "guard_acted": sum(bool(c["guarded"]) for c in cycles),
        "steps": steps,
        "parameters": final.size(),
        "unpruned": {"rmse": cycles[0]["rmse"], "mse": cycles[0]["mse"]},
        **_errors(final, sets.test_batches),
        "baselines": _baselines(sets, channels(final)[1]),
    }
    if config["controls"]:
        scratch = thesis.autoencoder(channels=channels(final), rng=rngs[1])
        _train(scratch, sets, config, steps)
        removals = [c["removed"] for c in cycles if any(c["removed"])]
        fresh = thesis.autoencoder(rng=rngs[3])
        control = _prune(fresh, sets, config, rngs[4], lambda text: None, removals)[2]
        record["scratch"] = _errors(scratch, sets.test_batches)
        record["random"] = {"channels": channels(control), **_errors(control, sets.test_batches)}
        snapshots += [_snapshot(scratch, sets, "from scratch"), _snapshot(control, sets, "random")]
    originals = sets.test.floats()[:SHOWN]
    tn.save(context.files / "model.safetensors", final)
    return record | {"snapshots": [{"name": "original", "images": originals}, *snapshots]}


def channels(net: nn.Module) -> tuple[int, int, int]:
    """How many channels the three inner layers have."""
    first, code, last, _ = (p.size for n, p in net.named_parameters() if n.endswith("gamma"))
    return first, code, last


def _prune(
    net: nn.Module,
    sets: Sets,
    config: Record,
    rng: np.random.Generator,
    report: Callable[[str], None],
    removals: list[list[int]] | None = None,
) -> tuple[list[Record], list[Record], nn.Module]:
    """The cycles, a snapshot of each, and the last net, which was trained after its last removal.

    With `removals` (for each cycle: how many channels each layer loses) random ones go instead.
    """
    cycles: list[Record] = []
    snapshots: list[Record] = []
    for number in range(1, config["cycles"] + 1):
        steps = config["first_steps"] if number == 1 else config["steps"]
        _train(net, sets, config, steps)
        record: Record = {"cycle": number, "steps": steps, "channels": channels(net)}
        record |= _errors(net, sets.test_batches)
        snapshots.append(_snapshot(net, sets, f"cycle {number}"))
        record |= {"removed": [0, 0, 0], "guarded": {}, "ended": ""}
        cycles.append(record)
        if number == config["cycles"]:
            record["ended"] = "all cycles used"  # nothing would train what another removal leaves
            break
        wanted = None
        if removals is not None:
            if number > len(removals):
                record["ended"] = "as many cycles as the criterion's"
                break
            wanted = removals[number - 1]
        smaller = _smaller(net, sets, config, rng, wanted, record["guarded"])
        before, after = channels(net), channels(smaller)
        record["removed"] = [b - a for b, a in zip(before, after, strict=True)]
        report(_cycle_line(record, after))
        if before == after and removals is None:
            record["ended"] = "a cycle removed nothing"
            break
        if config["distortion"] != "none":
            smaller = tn.distort(smaller, rng, formula=config["distortion"])
        net = smaller
    return cycles, snapshots, net


def _smaller(
    net: nn.Module,
    sets: Sets,
    config: Record,
    rng: np.random.Generator,
    removed: list[int] | None,
    guarded: dict[str, int],
) -> nn.Module:
    """The net without the channels that the criterion, or chance, names; itself if it names none.

    `guarded` gets, for each layer, how many channels stay only because one at least must.
    """
    seen = tn.observe(net, sets.train.batches(config["batch"], labels=False))

    def note(decision: Decision) -> None:
        if decision.guarded.any():
            guarded[decision.group.name] = int(decision.guarded.sum())

    if removed is None:
        score = importance.by_name(config["criterion"], rng)
        keep = select.bounds(config["bounds"], config["bounds_unit"], config["bounds_remove"])
        return prune.channels(
            net, seen, score, keep, fold="none", least=config["least"], report=note
        )
    layers = iter(zip(channels(net), removed, strict=True))

    def keep_number(scores: Array) -> Array:
        size, fewer = next(layers)
        assert size == len(scores)
        return select.number(size - fewer)(scores)

    return prune.channels(net, seen, importance.random(rng), keep_number, fold="none")


def _train(net: nn.Module, sets: Sets, config: Record, steps: int) -> None:
    penalty = {} if config["regulariser"] == "none" else {config["regulariser"]: config["penalty"]}
    optimizer = OPTIMIZERS[config["optimizer"]](
        net.parameters(), config["lr"], momentum=config["momentum"], **penalty
    )
    loss = tn.rmse if config["loss"] == "rmse" else tn.mse
    schedule = Cosine(steps, final=config["lr"] / 100)
    tn.fit(net, sets.batches, loss=loss, optimizer=optimizer, steps=steps, schedule=schedule)


def _errors(net: nn.Module, data: ImageBatches) -> Record:
    mse = tn.evaluate(net, data, tn.mse)
    return {"rmse": math.sqrt(mse), "mse": mse}


def _baselines(sets: Sets, code: int) -> Record:
    """Errors on the test images of what needs no net: RMSE of each.

    The mean image of the training set, and principal components, as many as the code has numbers
    (at most the 784 pixels, then without error).
    """
    train, test = (
        d.floats().reshape(len(d), -1).astype(np.float64) for d in (sets.train, sets.test)
    )
    mean = train.mean(axis=0)
    _, axes = np.linalg.eigh((train - mean).T @ (train - mean))
    kept = axes[:, ::-1][:, : POSITIONS * code]
    rest = (test - mean) - (test - mean) @ kept @ kept.T
    return {
        "mean_image": float(np.sqrt(np.mean((test - mean) ** 2))),
        "pca": float(np.sqrt(np.mean(rest**2))),
        "pca_components": kept.shape[1],
    }


def _sets(config: Record, rng: np.random.Generator, context: Context) -> Sets:
    train, test = tn.data.load(config["dataset"], context.data_dir)
    train = train.take(config["images"]) if config["images"] else train
    test = test.take(config["test_images"]) if config["test_images"] else test
    batches = train.batches(config["batch"], rng, labels=False, drop_last=True)
    return Sets(train, test, batches, test.batches(config["batch"], labels=False))


def _snapshot(net: nn.Module, sets: Sets, name: str) -> Record:
    outputs = tn.predict(net, sets.test.take(SHOWN).batches(SHOWN, labels=False))[0]
    filters = [p.numpy() for n, p in net.named_parameters() if n in ("0.weight", "9.weight")]
    return {
        "name": f"{name}, {'-'.join(map(str, channels(net)))}",
        "images": outputs,
        "first": filters[0],
        "last": filters[1],
        **_errors(net, sets.test_batches),
    }


def _cycle_line(c: Record, after: tuple[int, ...]) -> str:
    guard = f", guard kept {c['guarded']}" if c["guarded"] else ""
    shown = "-".join(map(str, c["channels"]))
    return f"  cycle {c['cycle']:2}: {shown}, RMSE {c['rmse']:.4f} -> {after}{guard}"


# --- what a person sees ----------------------------------------------------------------------


def _line(r: Record) -> str:
    shown = "-".join(map(str, r["channels"]))
    others = "".join(f", {n} {r[n]['rmse']:.4f}" for n in ("random", "scratch") if n in r)
    return (
        f"1-{shown}-1 after {len(r['cycles'])} cycles ({r['ended']}), RMSE {r['rmse']:.4f} (PCA of "
        f"{r['baselines']['pca_components']} numbers {r['baselines']['pca']:.4f}{others})"
    )


def _summary(runs: list[Record]) -> Record:
    summed = {}
    for cell, members in by_cell(runs).items():
        summed[cell] = {
            "runs": len(members),
            "channels": [list(r["channels"]) for r in members],
            "median_total_channels": float(np.median([sum(r["channels"]) for r in members])),
            "cycles": [len(r["cycles"]) for r in members],
            "published_size": sum(tuple(r["channels"]) == SIZE for r in members),
            "guard_acted": sum(r["guard_acted"] > 0 for r in members),
            "rmse": float(np.median([r["rmse"] for r in members])),
            "mse": float(np.median([r["mse"] for r in members])),
            "rmse_all": sorted(r["rmse"] for r in members),
        }
        for control in ("random", "scratch"):
            if all(control in r for r in members):
                errors = [r[control]["rmse"] for r in members]
                summed[cell][f"{control}_rmse"] = float(np.median(errors))
    return {"cells": summed, "verdict": _verdict(runs)}


def _verdict(runs: list[Record]) -> str:
    """What is to be said of "1-2-4-3-1 with loss very close to 0"."""
    same = [r for r in runs if tuple(r["channels"]) == SIZE]
    small = [r for r in runs if sum(r["channels"]) <= 2 * sum(SIZE)]
    said = f"{len(same)} of {len(runs)} runs end at 1-2-4-3-1"
    if not small:
        return f"{said}; none ends with at most 18 channels in all"
    best = min(small, key=lambda r: r["rmse"])
    return (
        f"{said}; {len(small)} end with at most 18 channels in all, the best of these is "
        f"1-{'-'.join(map(str, best['channels']))}-1 with RMSE {best['rmse']:.4f}, MSE "
        f"{best['mse']:.4f} (unpruned: {best['unpruned']['rmse']:.4f} and "
        f"{best['unpruned']['mse']:.5f}; mean image: {best['baselines']['mean_image']:.4f})"
    )


def _table(runs: list[Record], summary: Record) -> list[Row]:
    rows = []
    for cell, c in summary["cells"].items():
        sizes = ", ".join("-".join(map(str, s)) for s in c["channels"])
        rows.append(Row(f"{cell}: channels", "2-4-3", sizes, "-"))
        rows.append(
            Row(f"{cell}: cycles", "10 ± 4", f"{np.median(c['cycles']):g}", spread(c["cycles"]))
        )
        rows.append(Row(f"{cell}: RMSE", "close to 0", f"{c['rmse']:.4f}", spread(c["rmse_all"])))
        rows.append(Row(f"{cell}: MSE", "close to 0", f"{c['mse']:.5f}", "-"))
        rows.append(Row(f"{cell}: runs in which the guard acted", "?", str(c["guard_acted"]), "-"))
        for control in ("random", "scratch"):
            if f"{control}_rmse" in c:
                value = f"{c[f'{control}_rmse']:.4f}"
                rows.append(Row(f"{cell}: RMSE, {control}", "?", value, "-"))
    for name in ("mean_image", "pca"):
        values = [r["baselines"][name] for r in runs]
        rows.append(Row(f"baseline {name}: RMSE", "?", f"{np.median(values):.4f}", spread(values)))
    return rows


EXPERIMENT = Experiment(
    name="autoencoder_prune",
    source="Çallı, Faster and Lighter Convolutional Neural Networks (2017), 2.1.3 and 3.1.2; "
    "draft of April 2017, 2.2.3",
    description="Prune an auto-encoder of digits to a handful of channels.",
    published=PUBLISHED,
    arguments=arguments,
    cells=cells,
    run=run,
    line=_line,
    summary=_summary,
    table=_table,
    figures=figures.draw,
    transient=("snapshots",),
    remarks=lambda summary: [f"1-2-4-3-1 with a loss close to 0? {summary['verdict']}"],
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
