"""The recipes of the summation experiment: every setting, default and published, and the table."""

from __future__ import annotations

import argparse

import tinynn as tn
from experiments.runner import OPTIMIZERS, Option, Record, add_options, written

NORM = 0.5  #: incoming weights of the table's cell by norm; they start at about 1.1

OPTIONS = {
    "nodes": Option(1000, 1000, "hidden nodes at the start", least=1),
    "samples": Option(
        100_000, 100_000, "training samples (published: 1,000,000, see --full)", least=2
    ),
    "batch": Option(1000, 1000, "samples a step", least=1),
    "inputs": Option("uniform", "uniform", "distribution of the inputs", ("uniform", "normal")),
    "loss": Option("rmse", "rmse", "loss (thesis: rmse, draft: mse)", ("rmse", "mse")),
    "optimizer": Option("sgd", "sgd", "optimiser, made anew each cycle", tuple(OPTIMIZERS)),
    "lr": Option(0.1, 0.01, "learning rate", above=0),
    "momentum": Option(0.9, 0.9, "momentum (draft: 0.3)", least=0, below=1),
    "init": Option(
        "truncated_normal", "truncated_normal", "initialiser", tuple(sorted(tn.init.by_name))
    ),
    "steps": Option(300, 0, "steps a cycle; 0, or --epochs alone: by epochs", least=0),
    "decay": Option("cosine", "none", "learning rate within a cycle", ("none", "cosine")),
    "epochs": Option(
        10, 10, "epochs a cycle if --steps is 0; 0: until the loss has converged", least=0
    ),
    "regulariser": Option("none", "none", "penalty on the weights", ("none", "l1", "l2")),
    "penalty": Option(1e-4, 1e-4, "factor of the regulariser", least=0),
    "criterion": Option(
        "rate",
        "count",
        "what a node is judged by: activation rate or count, variance, weight norm, random "
        "(the control: as many nodes a cycle as the recipe's own criterion removes)",
        ("rate", "count", "variance", "l1", "l2", "random"),
    ),
    "threshold": Option(1e-5, 0.0, "remove nodes whose score is at most this", least=0),
    "bounds": Option(
        0.0, 0.0, "> 0: remove by mean +- this many units of the scores instead", least=0
    ),
    "bounds_unit": Option("std", "std", "unit of the bounds", ("std", "variance")),
    "bounds_remove": Option("outside", "outside", "side removed", ("outside", "inside")),
    "distortion": Option(
        "clamped",
        "published",
        "amplitude of U[0,1) added to the hidden weights and biases; none: no lift either",
        ("none", "published", "clamped", "constant"),
    ),
    "distortion_scale": Option(1.0, 1.0, "factor of the distortion, in the lift too"),
    "merge": Option(True, False, "merge nodes that are always on"),
    "lift": Option(
        True, False, "distort biases alone once nothing more is removed, by U[0,1) times the scale"
    ),
    "lift_lr": Option(0.01, 0.01, "learning rate while lifting", above=0),
    "roll_back": Option(True, False, "undo a distortion after which the net died"),
    "patience": Option(20, 0, "idle cycles in a row after which to give up", least=0),
    "cycles": Option(100, 100, "cycles at the most", least=1),
    "fine_tune": Option(2000, 0, "steps of fine-tuning at the end, if one node is left", least=0),
    "fine_tune_lr": Option(0.05, 0.05, "its learning rate (inputs normal: a tenth)", above=0),
}

QUICK = {"nodes": 200, "samples": 20_000}
FULL = {"samples": 1_000_000, "steps": 0}

#: cells of the table beside the grid: what follows "default" in their names, what they change
OTHER_CRITERIA: dict[str, Record] = {
    f", l2 norm > {NORM:g}": {"criterion": "l2", "threshold": NORM},
    ", rate beyond mean ± 2 std removed": {"bounds": 2.0, "bounds_remove": "outside"},
    ", rate within mean ± 2 std removed": {"bounds": 2.0, "bounds_remove": "inside"},
}
#: one addition to the published recipe off at a time
WITHOUT: dict[str, Record] = {
    " without merge": {"merge": False},
    " without lift": {"lift": False},
    " without roll-back": {"roll_back": False},
    " without fine-tune": {"fine_tune": 0},
    " without decay": {"decay": "none"},
    " without larger rate": {"lr": 0.01},
    " without clamp": {"distortion": "published"},
}


def random_control(config: Record) -> Record:
    """The control of a recipe: random nodes, as many a cycle as its own criterion removes."""
    own = {"twin_criterion": config["criterion"], "twin_threshold": config["threshold"]}
    return {**config, "criterion": "random", **own}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add every setting as a flag."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--literal", action="store_true", help="the recipe as published, with none of the additions"
    )
    group.add_argument(
        "--table",
        action="store_true",
        help="criteria x distortion x regularisers x runs, published and default recipe, controls",
    )
    add_options(group, OPTIONS)


def recipe(args: argparse.Namespace, literal: bool) -> Record:
    """The literal or the default recipe, with what the command line says otherwise."""
    config = {k: o.literal if literal else o.default for k, o in OPTIONS.items()}
    config |= QUICK if args.quick else FULL if args.full else {}
    changes = written(args, OPTIONS)
    if "epochs" in changes and "steps" not in changes:
        changes["steps"] = 0
    criterion = changes.pop("criterion", config["criterion"])
    if criterion == "random":
        return random_control(config | changes)
    if criterion != config["criterion"]:
        config["threshold"] = 0.0
    return config | {"criterion": criterion} | changes


def cells(args: argparse.Namespace) -> dict[str, Record]:
    """The configurations to run, by name.

    In the table, the cell "literal, count, distortion, none" is the literal recipe itself, and
    "default, count, distortion, none" is the default recipe without its share as threshold.
    """
    if not args.table:
        return {"literal" if args.literal else "default": recipe(args, args.literal)}
    made: dict[str, Record] = {"default": recipe(args, False)}  # first: the figures show it
    for name in ("literal", "default"):
        base = recipe(args, name == "literal")
        for criterion in ("count", "variance"):
            for distorted in (True, False):
                for regulariser in ("none", "l1", "l2"):
                    how = "distortion" if distorted else "no distortion"
                    made[f"{name}, {criterion}, {how}, {regulariser}"] = {
                        **base,
                        "criterion": criterion,
                        "threshold": 0.0,
                        "distortion": base["distortion"] if distorted else "none",
                        "lift": base["lift"] and distorted,
                        "regulariser": regulariser,
                    }
        control = base if base["criterion"] == "random" else random_control(base)
        made[f"{name}, random pruning"] = control
    base = made["default"]
    for name, changes in {**OTHER_CRITERIA, **WITHOUT}.items():
        made[f"default{name}"] = base | changes
    made["2-1-1 net from scratch"] = {**base, "control": "scratch", "scratch_cycles": 20}
    return made
