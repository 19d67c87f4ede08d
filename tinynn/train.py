"""The training loop: one loop, readable from top to bottom, for every experiment."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tinynn.checkpoint import Progress, exists, load_checkpoint, save_checkpoint
from tinynn.diagnose import find_non_finite, require_finite
from tinynn.errors import ConfigError, DataError, NonFiniteError, OutputError, ShapeError
from tinynn.nn.module import Module, mode
from tinynn.nn.serialize import describe
from tinynn.op import Array
from tinynn.optim import Optimizer, clip_gradients
from tinynn.schedule import Constant, Schedule
from tinynn.storage import PathLike, plain, write_bytes
from tinynn.tensor import Tensor, no_grad

Loss = Callable[[Tensor, Any], Tensor]
#: What gives an array for a batch: a plan, for instance.
Runs = Callable[[Any], Array]


@dataclass
class History:
    """What happened in a training: one record an epoch, the last one last.

    Each record has `epoch` (from 1), `step` (optimiser steps so far), `loss` (mean over the epoch's
    batches), `lr` (of its last step), `seconds`, and `validation` if a validation set was given.
    """

    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The mean loss of every epoch."""
        return [r["loss"] for r in self.records]

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Converged:
    """True when the best loss of the last `window` epochs gained less than `tolerance` (a share)
    on the best loss before them."""

    window: int = 3
    tolerance: float = 0.01

    def __call__(self, history: History) -> bool:
        losses = history.losses
        if len(losses) <= self.window:
            return False
        before, recent = min(losses[: -self.window]), min(losses[-self.window :])
        return recent >= before - self.tolerance * abs(before)


#: The default test for "trained to convergence".
converged = Converged()


def fit(
    model: Module,
    data: Iterable[Any],
    *,
    loss: Loss,
    optimizer: Optimizer,
    epochs: int | None = None,
    steps: int | None = None,
    until: Callable[[History], bool] | None = None,
    schedule: Schedule | None = None,
    validation: Iterable[Any] | None = None,
    each_step: Callable[[int], None] | None = None,
    each_epoch: Callable[[dict[str, Any]], None] | None = None,
    clip_norm: float | None = None,
    log: PathLike | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    progress: bool | None = None,
) -> History:
    """Train `model` on `data` and return what happened.

    `data` yields (x, y) batches and may be iterated once an epoch. Training ends after `epochs`
    epochs or `steps` optimiser steps in all (then the last epoch is a part of one), or when
    `until(history)` is true at the end of an epoch; one of the three must be given. `schedule`
    gives each step's learning rate from the optimiser's own. `each_step` is called after every
    update with the number of steps so far, `each_epoch` with every epoch's record, to which it may
    add entries (numbers, text, arrays). `log` is a file that is begun anew, unless a training is
    resumed, and gets each epoch's record as a line of JSON, where NaN is null. `progress` shows a
    bar: by default only on a terminal.

    With `checkpoint`, the state is saved after every epoch, at least every `checkpoint_seconds`,
    and on Ctrl-C, which then ends the training after the step under way; `resume=True` continues
    from that file, if it exists, and gives the same bits as a training that was never interrupted;
    masks and codes of parameters come from it, too, whatever the model given has.

    Raises NonFiniteError with the step and the first op that made it when the loss is NaN or
    infinite, or when an update made a parameter so; nothing of that goes into the checkpoint.
    Raises ConfigError for an optimiser of other parameters than the model's or a model that no file
    can hold, DataError for data without batches, OutputError where a file cannot be written.
    """
    if epochs is None and steps is None and until is None:
        raise ConfigError("fit: required epochs, steps or until; came none of them")
    if not all(isinstance(n, int | np.integer) and n >= 0 for n in (epochs or 0, steps or 0)):
        raise ConfigError(
            f"fit: required whole epochs and steps >= 0; came {epochs!r} and {steps!r}"
        )
    _require_pairs("fit", data)
    if resume and checkpoint is None:
        raise ConfigError("fit: resume=True requires the checkpoint to resume from; came none")
    if not {id(p) for p in optimizer.params} <= {id(p) for p in model.parameters()}:
        raise ConfigError(
            "fit: the optimiser holds parameters that are not the model's; make a new one from "
            "model.parameters() (pruning and copying give new parameters)"
        )
    last_epoch = math.inf if epochs is None else epochs
    last_step = math.inf if steps is None else steps
    schedule = schedule or Constant()
    base_lr = optimizer.lr
    at, history, resumed = Progress(), History(), False
    if resume and exists(checkpoint):
        assert checkpoint is not None
        at, history.records = load_checkpoint(
            checkpoint, model, optimizer, schedule, data, validation
        )
        resumed = True
    elif checkpoint is not None:
        describe(model, states=False)  # what cannot be saved is refused before it is trained
    if log is not None:
        write_bytes(log, "".join(map(_line, history.records)).encode())

    def save() -> None:
        _require_finite_parameters(model, at.step)
        if checkpoint is not None:
            now, optimizer.lr = optimizer.lr, base_lr
            save_checkpoint(
                checkpoint, model, optimizer, schedule, data, at, history.records, validation
            )
            optimizer.lr = now

    optimizer.zero_grad()
    finished = bool(history.records) and until is not None and at.batches == 0 and until(history)
    with mode(model, True), _interruptible(checkpoint is not None) as interrupted:
        saved = time.monotonic()
        try:
            while not finished and at.epoch < last_epoch and at.step < last_step:
                began = time.monotonic()
                for x, y in _bar(_rest(data, at), at, history, progress):
                    optimizer.lr = schedule.lr(at.step, base_lr)
                    value = _step(model, x, y, loss, optimizer, clip_norm, at.step)
                    at.step, at.batches, at.total = at.step + 1, at.batches + 1, at.total + value
                    if each_step is not None:
                        each_step(at.step)
                    if interrupted() or time.monotonic() - saved > checkpoint_seconds:
                        save()
                        saved = time.monotonic()
                    if interrupted() or at.step >= last_step:
                        break
                if interrupted():
                    break
                if resumed and not at.batches:  # `steps` had ended where an epoch does
                    resumed = False
                    continue
                record = _close_epoch(at, optimizer.lr, time.monotonic() - began)
                if validation is not None:
                    record["validation"] = evaluate(model, validation, loss)
                schedule.observe(record.get("validation", record["loss"]))
                if each_epoch is not None:
                    each_epoch(record)
                line = _line(record)
                history.records.append(record)
                finished = until is not None and until(history)
                save()
                if log is not None:
                    _append(Path(log), line)
        finally:
            optimizer.lr = base_lr
            if hasattr(data, "restart"):
                data.restart()
        if interrupted():
            raise KeyboardInterrupt(f"stopped by the user at step {at.step}")
    return history


def evaluate(model: Module | Runs, data: Iterable[Any], loss: Loss) -> float:
    """The mean loss of a model or plan over all rows of `data`, in eval mode and without a tape."""
    _require_pairs("evaluate", data)
    total, rows = 0.0, 0
    with _in_use(model) as run:
        for x, y in data:
            result = loss(run(x), target(y))
            require_finite(result, "evaluate: the loss")
            total, rows = total + result.item() * len(x), rows + len(x)
    if not rows:
        raise DataError("evaluate: required at least one row; came none")
    return total / rows


def predict(model: Module | Runs, data: Iterable[Any]) -> tuple[Array, Array]:
    """(outputs, targets) of a model or plan for all rows of `data`, in its order.

    In eval mode and without a tape.
    """
    _require_pairs("predict", data)
    outputs, targets = [], []
    with _in_use(model) as run:
        for x, y in data:
            outputs.append(run(x).numpy())
            targets.append(np.array(y))
    if not outputs:
        raise DataError("predict: required at least one batch; came none")
    return np.concatenate(outputs), np.concatenate(targets)


@contextmanager
def _in_use(model: Module | Runs) -> Iterator[Callable[[Any], Tensor]]:
    """What gives the results for a batch, without a tape: of a model in eval mode."""
    with no_grad():
        if not isinstance(model, Module):
            yield lambda x: Tensor(model(x), copy=False)
            return
        with mode(model, False):
            yield lambda x: model(Tensor(x, copy=False))


def _step(
    model: Module,
    x: Any,
    y: Any,
    loss: Loss,
    optimizer: Optimizer,
    clip_norm: float | None,
    step: int,
) -> float:
    """One step of training: forward, backward, update. Returns the loss before the update."""
    result = loss(model(Tensor(x, copy=False)), target(y))
    if not isinstance(result, Tensor):
        raise ConfigError(f"fit: required a loss that gives a Tensor; came {type(result).__name__}")
    if result.size != 1:
        raise ShapeError(f"fit: required a loss of one number; came shape {result.shape}")
    value = result.item()
    if not math.isfinite(value):
        _require_finite_parameters(model, step)
        source = find_non_finite(result)
        raise NonFiniteError(f"fit: step {step}: the loss is {value}; first made by {source}")
    result.backward()
    if clip_norm is not None:
        clip_gradients(optimizer.params, norm=clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return value


def _require_pairs(what: str, data: Any) -> None:
    """Raise DataError for arrays, whose rows would be taken for batches (x, y)."""
    several = data if isinstance(data, tuple | list) else [data]
    if any(isinstance(a, np.ndarray | Tensor) for a in several):
        raise DataError(
            f"{what}: required an iterable of batches (x, y); came arrays, of which Batches(x, y, "
            "size) makes batches"
        )


def target(y: Any) -> Any:
    """Targets as losses take them: floats become Tensors, class numbers stay as they are."""
    return Tensor(y, copy=False) if isinstance(y, np.ndarray) and y.dtype.kind == "f" else y


def _require_finite_parameters(model: Module, step: int) -> None:
    for name, p in model.named_parameters():
        if not np.isfinite(p._data).all():
            raise NonFiniteError(
                f"fit: step {step}: parameter {name} was made NaN or infinite by the update of "
                f"step {step - 1} (is the learning rate too large?)"
            )


def _rest(data: Iterable[Any], at: Progress) -> Iterable[Any]:
    """What is left of the epoch: Batches know it themselves, from others the head is skipped."""
    if at.batches and not hasattr(data, "load_state_dict"):
        return islice(data, at.batches, None)
    return data


def _close_epoch(at: Progress, lr: float, seconds: float) -> dict[str, Any]:
    if not at.batches:
        raise DataError("fit: required at least one batch an epoch; came none")
    mean = at.total / at.batches
    at.epoch, at.batches, at.total = at.epoch + 1, 0, 0.0
    return {
        "epoch": at.epoch,
        "step": at.step,
        "loss": mean,
        "lr": lr,
        "seconds": round(seconds, 6),
    }


def _bar(
    data: Iterable[Any], at: Progress, history: History, progress: bool | None
) -> Iterator[Any]:
    """The batches of one epoch behind a progress bar."""
    if progress is False:
        return iter(data)
    total = len(data) if isinstance(data, Sized) else None
    last = f" loss {history.losses[-1]:.4g}" if history.records else ""
    disable = None if progress is None else not progress  # None: only on a terminal
    return iter(
        tqdm(
            data,
            desc=f"epoch {at.epoch + 1}{last}",
            total=total,
            initial=at.batches,
            leave=False,
            disable=disable,
        )
    )


@contextmanager
def _interruptible(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads between steps; the second is as usual.

    Only the main thread may handle signals; elsewhere, and without a checkpoint, nothing changes.
    """
    pressed = False

    def note(signum: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    usable = enabled and threading.current_thread() is threading.main_thread()
    if not usable:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _line(record: dict[str, Any]) -> str:
    try:
        return json.dumps(plain(record), allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"fit: each_epoch: required entries of numbers, text or arrays; came {error}"
        ) from error


def _append(log: Path, line: str) -> None:
    try:
        with log.open("a") as file:
            file.write(line)
    except OSError as error:
        raise OutputError(error.errno, f"cannot append to {log} ({error.strerror})") from error
