"""Checkpoints: everything a training needs to continue bit for bit, in one file.

The file holds the parameters and buffers, masks and codes of parameters (files of models have
neither), the optimiser's arrays, and as text the position in the data, the schedule, every random
generator of the model, and the history so far.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinynn.errors import ConfigError, FileFormatError, TinynnError
from tinynn.generators import generator_state, set_state
from tinynn.nn.module import Module
from tinynn.nn.serialize import describe
from tinynn.op import Array
from tinynn.optim import Optimizer
from tinynn.schedule import Schedule
from tinynn.storage import PathLike, parse_json, plain, read_tensors, write_tensors

_FORMAT = "1"


@dataclass
class Progress:
    """Where a training stands."""

    epoch: int = 0  #: finished epochs
    step: int = 0  #: optimiser steps so far
    total: float = 0.0  #: losses of the unfinished epoch, summed
    batches: int = 0  #: how many losses that were


def save_checkpoint(
    path: PathLike,
    model: Module,
    optimizer: Optimizer,
    schedule: Schedule,
    data: Any,
    progress: Progress,
    records: list[dict[str, Any]],
    validation: Any = None,
) -> None:
    """Write the state of a training to `path`, atomically; NaN in `records` becomes None."""
    tensors = {f"model/{name}": a for name, a in model.state_dict().items()}
    held = _held(model)
    tensors |= {f"{kind}/{name}": a for kind, of in held.items() for name, a in of.items()}
    numbers = {}
    for name, value in optimizer.state_dict().items():
        if isinstance(value, np.ndarray):
            tensors[f"optimizer/{name}"] = value
        else:
            numbers[name] = value
    state = {
        "progress": vars(progress),
        "records": records,
        "optimizer": numbers,
        "schedule": schedule.state_dict(),
        "data": _position(data),
        "validation": _position(validation),
        "generators": [generator_state(g) for g in _generators(model)],
        "held": {kind: sorted(of) for kind, of in held.items()},
    }
    header = {
        "tinynn-checkpoint": _FORMAT,
        "model": describe(model, states=False),
        "state": json.dumps(plain(state), allow_nan=False),
    }
    write_tensors(path, tensors, header)


def load_checkpoint(
    path: PathLike,
    model: Module,
    optimizer: Optimizer,
    schedule: Schedule,
    data: Any,
    validation: Any = None,
) -> tuple[Progress, list[dict[str, Any]]]:
    """Bring everything given to the state that `save_checkpoint` wrote, and return the rest.

    A file from before masks and codes were kept leaves those that the model has. Raises
    FileFormatError if the file is damaged, ConfigError if it belongs to another model, optimiser,
    data or validation set; the model is then as it was.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("tinynn-checkpoint") != _FORMAT:
        raise FileFormatError(f"{path}: holds no training checkpoint of format {_FORMAT}")
    if metadata.get("model") != describe(model, states=False):
        raise ConfigError(f"{path}: the checkpoint belongs to a model of another architecture")
    state = parse_json(metadata.get("state", ""), str(path))
    if state.get("data") is not None and not hasattr(data, "load_state_dict"):
        raise ConfigError(f"{path}: the checkpoint needs data that can resume; came {type(data)}")
    generators = _generators(model)
    before = (
        model.state_dict(),
        optimizer.state_dict(),
        schedule.state_dict(),
        [generator_state(g) for g in generators],
        _held(model),
        _position(validation) if hasattr(validation, "load_state_dict") else None,
    )
    try:
        held = before[4]
        if "held" in state:
            names = {kind: state["held"][kind] for kind in held}
            held = {kind: {n: tensors[f"{kind}/{n}"] for n in names[kind]} for kind in names}
        _restore(model, _part(tensors, "model/"), held)
        optimizer.load_state_dict({**state["optimizer"], **_part(tensors, "optimizer/")})
        schedule.load_state_dict(state["schedule"])
        for generator, bits in zip(generators, state["generators"], strict=True):
            set_state(generator, bits)
        progress, records = _progress(state["progress"]), _records(state["records"])
        if before[5] is not None and state.get("validation") is not None:
            validation.load_state_dict(state["validation"])
        if state["data"] is not None:
            data.load_state_dict(state["data"])  # changes nothing unless all of it fits
    except (TinynnError, LookupError, TypeError, AttributeError, ValueError) as error:
        _restore(model, before[0], before[4])
        optimizer.load_state_dict(before[1])
        schedule.load_state_dict(before[2])
        for generator, bits in zip(generators, before[3], strict=True):
            set_state(generator, bits)
        if before[5] is not None:
            validation.load_state_dict(before[5])
        if isinstance(error, TinynnError):
            raise
        raise FileFormatError(f"{path}: its training state cannot be read: {error!r}") from error
    return progress, records


def _position(data: Any) -> Any:
    """Where the batches are, of those that can say it."""
    return data.state_dict() if hasattr(data, "state_dict") else None


def _progress(came: dict[str, Any]) -> Progress:
    found = Progress(**came)
    counts = (found.epoch, found.step, found.batches)
    fits = all(type(n) is int and n >= 0 for n in counts) and math.isfinite(found.total)
    if not fits:
        raise ValueError(f"required counts >= 0 and a sum of losses; came {found}")
    return found


def _records(came: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not all(type(r["loss"]) is float and type(r["step"]) is int for r in came):
        raise ValueError("required a loss and a step of every epoch")
    return list(came)


def _held(model: Module) -> dict[str, dict[str, Array]]:
    """What holds parameters: "masks" and "codes", by dotted path."""
    masks, codes = {}, {}
    for name, p in model.named_parameters():
        if p.mask is not None:
            masks[name] = p.mask
        if p.codes is not None:
            codes[name] = p.codes.astype(np.min_scalar_type(p.codes.max(initial=0)))
    return {"masks": masks, "codes": codes}


def _restore(model: Module, values: dict[str, Array], held: dict[str, dict[str, Array]]) -> None:
    """Values, and masks and codes instead of the model's own, which would bend the values."""
    parameters = dict(model.named_parameters())
    if unknown := sorted({n for of in held.values() for n in of} - parameters.keys()):
        raise ConfigError(f"a checkpoint's masks and codes: unknown parameters {unknown}")
    for p in parameters.values():
        p.mask = p.codes = None
    model.load_state_dict(values)
    for name, mask in held["masks"].items():
        parameters[name].mask = mask
    for name, codes in held["codes"].items():
        parameters[name].codes = codes


def exists(path: PathLike | None) -> bool:
    """Whether there is a checkpoint to resume from."""
    return path is not None and Path(path).exists()


def _part(tensors: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _generators(model: Module) -> list[np.random.Generator]:
    """Every random generator in the module tree, in its order, shared ones once."""
    found = {
        id(v): v
        for _, m in model.named_modules()
        for v in vars(m).values()
        if isinstance(v, np.random.Generator)
    }
    return list(found.values())
