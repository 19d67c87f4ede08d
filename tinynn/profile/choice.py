"""The model that a command line names, and the batch to run it on."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tinynn import onnx
from tinynn.deploy import Plan
from tinynn.errors import ConfigError
from tinynn.models import KNOWN
from tinynn.nn import Module, load
from tinynn.op import Shape
from tinynn.storage import read_tensors


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model and a batch for it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{', '.join(KNOWN)}, or a file: of tn.save, of a plan, or ONNX",
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="inputs a batch (default: as trained; 1)"
    )
    parser.add_argument(
        "--input", metavar="HxWxC", help="the shape of one input: for a model's file or ONNX"
    )
    parser.add_argument("--size", metavar="HxW", help="another height and width of the input")


def chosen(options: argparse.Namespace) -> tuple[Module | Plan, Shape]:
    """The model, and the shape of the batch to run it on.

    Raises ConfigError, and what reading a file raises.
    """
    command = options.command
    model: Module | Plan
    if options.model in KNOWN:
        published = KNOWN[options.model]
        model = published.build(np.random.default_rng(0))
        n, *shape = published.batch
    elif Path(options.model).is_file():
        model = _read(Path(options.model))
        n, shape = 1, list(model.input_shape) if isinstance(model, Plan) else []
        if options.input is None and not isinstance(model, Plan):
            raise ConfigError(f"{command}: a file does not say what its model takes: give --input")
    else:
        raise ConfigError(
            f"{command}: no model {options.model}; there are {', '.join(KNOWN)}, and files, of "
            "which none has this name"
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


def _read(file: Path) -> Module | Plan:
    """What is in the file, whatever its name."""
    with file.open("rb") as opened:
        text = opened.read(9)[8:]  # safetensors: a length, then JSON
    if text != b"{":
        return onnx.load(file)
    return load(file) if "model" in read_tensors(file)[1] else Plan.load(file)


def profiled(plan: Plan, batch: Shape, file: Path | None) -> str:
    """A plan's layers with their times.

    Raises ConfigError for inputs that it does not take, and where a `file` was asked for.
    """
    if file is not None:
        raise ConfigError(f"a plan's layers are printed only; {file} would not be written")
    if batch[1:] != plan.input_shape:
        raise ConfigError(f"required inputs {plan.input_shape} of this plan; came {batch[1:]}")
    x = np.random.default_rng(0).standard_normal(batch, np.float32)
    told = "a plan: its layers as they are (techniques need the model that it was made of)"
    return f"{told}\n{plan.profile(x)}"


def _shape(command: str, option: str, text: str) -> Shape:
    sizes = text.lower().split("x")
    if not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ConfigError(
            f"{command}: required {option} as positive numbers with x between; came {text}"
        )
    return tuple(map(int, sizes))
