"""`python -m tinynn profile MODEL`: a table, and files where they are wanted."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kernels._jit import get_threads, max_threads, set_threads
from tinynn import roofline
from tinynn.deploy import Plan
from tinynn.errors import ConfigError
from tinynn.profile.choice import add_model, chosen, profiled
from tinynn.profile.clock import step
from tinynn.storage import write_json

SUMMARY = "time every layer of a model, beside the least time that it could take"


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what `python -m tinynn profile` takes."""
    add_model(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="time to measure for (default: 2)"
    )
    parser.add_argument(
        "--remeasure", action="store_true", help="measure the machine's limits anew"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write profile.png and profile.json"
    )


def run(options: argparse.Namespace) -> int:
    """Profile the model, print the table, and write the files asked for."""
    model, batch = chosen(options)
    threads = max_threads() if options.threads is None else options.threads
    if not 1 <= threads <= max_threads():
        raise ConfigError(f"profile: required 1 <= threads <= {max_threads()}; came {threads}")
    if not options.seconds > 0:
        raise ConfigError(f"profile: required seconds > 0; came {options.seconds}")
    if isinstance(model, Plan):
        model.threads = options.threads
        print(profiled(model, batch, options.out))
        return 0
    before = get_threads()
    set_threads(threads)
    try:
        limits = roofline.limits([threads], remeasure=options.remeasure)[0]
        x = np.random.default_rng(0).standard_normal(batch, np.float32)
        found = step(model, x, seconds=options.seconds, limits=limits)
    finally:
        set_threads(before)
    print(found)
    if options.out is not None:
        write_json(options.out / "profile.json", found.as_dict())
        found.draw(options.out / "profile.png")
    return 0
