"""The model that a command line names, and the batch to run it on."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tinynn.errors import ConfigError
from tinynn.models import KNOWN
from tinynn.nn import Module, load
from tinynn.op import Shape


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model and a batch for it."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"{', '.join(KNOWN)}, or a file that tn.save wrote"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="inputs a batch (default: as trained; 1)"
    )
    parser.add_argument(
        "--input", metavar="HxWxC", help="the shape of one input: for a file, which does not say it"
    )
    parser.add_argument("--size", metavar="HxW", help="another height and width of the input")


def chosen(options: argparse.Namespace) -> tuple[Module, Shape]:
    """The model, and the shape of the batch to run it on. Raises ConfigError."""
    command = options.command
    if options.model in KNOWN:
        published = KNOWN[options.model]
        model = published.build(np.random.default_rng(0))
        n, *shape = published.batch
    elif options.model.endswith(".safetensors"):
        if not Path(options.model).is_file():
            raise ConfigError(f"{command}: there is no file {options.model}")
        model = load(options.model)
        n, shape = 1, []
        if options.input is None:
            raise ConfigError(f"{command}: a file does not say what its model takes: give --input")
    else:
        raise ConfigError(
            f"{command}: no model {options.model}; there are {', '.join(KNOWN)}, and files "
            "that end in .safetensors"
        )
    if options.input is not None:
        shape = list(_shape(command, "--input", options.input))
    if options.size is not None:
        size = _shape(command, "--size", options.size)
        if len(size) != 2 or len(shape) != 3:
            raise ConfigError(f"{command}: --size needs HxW and inputs HxWxC; came {options.size}")
        shape[:2] = size
    n = n if options.batch is None else options.batch
    if n < 1:
        raise ConfigError(f"{command}: required --batch >= 1; came {n}")
    return model, (n, *shape)


def _shape(command: str, option: str, text: str) -> Shape:
    sizes = text.lower().split("x")
    if not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ConfigError(
            f"{command}: required {option} as positive numbers with x between; came {text}"
        )
    return tuple(map(int, sizes))
