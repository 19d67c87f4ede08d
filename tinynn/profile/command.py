"""`python -m tinynn profile MODEL`: a table, and files where they are wanted."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kernels._jit import get_threads, max_threads, set_threads
from tinynn import roofline
from tinynn.errors import ConfigError
from tinynn.models import PUBLISHED
from tinynn.nn import Module, load
from tinynn.op import Shape
from tinynn.profile.clock import step
from tinynn.storage import write_json

SUMMARY = "time every layer of a model, beside the least time that it could take"


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what `python -m tinynn profile` takes."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"{', '.join(PUBLISHED)}, or a file that tn.save wrote"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="inputs a batch (default: as trained; 1)"
    )
    parser.add_argument(
        "--input", metavar="HxWxC", help="the shape of one input: for a file, which does not say it"
    )
    parser.add_argument("--size", metavar="HxW", help="another height and width of the input")
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
    model, batch = _chosen(options)
    threads = max_threads() if options.threads is None else options.threads
    if not 1 <= threads <= max_threads():
        raise ConfigError(f"profile: required 1 <= threads <= {max_threads()}; came {threads}")
    if not options.seconds > 0:
        raise ConfigError(f"profile: required seconds > 0; came {options.seconds}")
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


def _chosen(options: argparse.Namespace) -> tuple[Module, Shape]:
    """The model, and the shape of the batch to run it on."""
    if options.model in PUBLISHED:
        published = PUBLISHED[options.model]
        model = published.build(np.random.default_rng(0))
        n, *shape = published.batch
    elif options.model.endswith(".safetensors"):
        if not Path(options.model).is_file():
            raise ConfigError(f"profile: there is no file {options.model}")
        model = load(options.model)
        n, shape = 1, []
        if options.input is None:
            raise ConfigError("profile: a file does not say what its model takes: give --input")
    else:
        raise ConfigError(
            f"profile: no model {options.model}; there are {', '.join(PUBLISHED)}, and files that "
            "end in .safetensors"
        )
    if options.input is not None:
        shape = list(_shape("--input", options.input))
    if options.size is not None:
        size = _shape("--size", options.size)
        if len(size) != 2 or len(shape) != 3:
            raise ConfigError(f"profile: --size needs HxW and inputs HxWxC; came {options.size}")
        shape[:2] = size
    n = n if options.batch is None else options.batch
    if n < 1:
        raise ConfigError(f"profile: required --batch >= 1; came {n}")
    return model, (n, *shape)


def _shape(option: str, text: str) -> Shape:
    sizes = text.lower().split("x")
    if not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ConfigError(
            f"profile: required {option} as positive numbers with x between; came {text}"
        )
    return tuple(map(int, sizes))
