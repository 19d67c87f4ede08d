"""`python -m tinynn explain MODEL`: a table, and a file where it is wanted."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kernels._jit import max_threads
from tinynn import roofline
from tinynn.deploy import Plan
from tinynn.errors import ConfigError
from tinynn.explain.measure import explain
from tinynn.profile.choice import add_model, chosen, profiled
from tinynn.storage import write_json

SUMMARY = "say of every layer which compression makes it faster, and why or why not"


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what `python -m tinynn explain` takes."""
    add_model(parser)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads (default: 1)")
    parser.add_argument(
        "--density",
        type=float,
        default=0.1,
        metavar="D",
        help="the share of weights that sparse layers keep (default: 0.1)",
    )
    parser.add_argument(
        "--entries",
        type=int,
        default=16,
        metavar="N",
        help="the values in a layer's code book (default: 16)",
    )
    parser.add_argument(
        "--remeasure", action="store_true", help="measure the machine's limits anew"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")


def run(options: argparse.Namespace) -> int:
    """Explain the model, print the table, and write the file asked for."""
    model, batch = chosen(options)
    if not 1 <= options.threads <= max_threads():
        raise ConfigError(
            f"explain: required 1 <= threads <= {max_threads()}; came {options.threads}"
        )
    if isinstance(model, Plan):
        model.threads = options.threads
        print(profiled(model, batch, options.json))
        return 0
    limits = roofline.limits([options.threads], remeasure=options.remeasure)[0]
    found = explain(
        model,
        np.random.default_rng(0).standard_normal(batch, np.float32),
        density=options.density,
        entries=options.entries,
        threads=options.threads,
        limits=limits,
    )
    print(found)
    if options.json is not None:
        write_json(options.json, found.as_dict())
    return 0
