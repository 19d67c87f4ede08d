"""Learning rates as functions of the step: one interface, so that a training loop needs no cases.

    optimizer.lr = schedule.lr(step, base_lr)   # before every optimiser step, counted from 0
    schedule.observe(loss)                      # after every evaluation
    schedule.state_dict()                       # into the checkpoint

Only `Plateau` remembers anything; for the others `observe` does nothing and the state is empty.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

from tinynn.errors import ConfigError, NonFiniteError

_LARGEST = sys.float_info.max


class Schedule:
    """Base of all schedules."""

    def lr(self, step: int, base_lr: float) -> float:
        """The learning rate of optimiser step number `step`, which counts from 0."""
        raise NotImplementedError(f"{type(self).__name__}.lr")

    def observe(self, loss: float) -> None:
        """Take note of an evaluated loss."""

    def state_dict(self) -> dict[str, float]:
        """What a resumed run must know."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`; ConfigError if it is of another kind of schedule."""
        if state:
            raise ConfigError(
                f"{type(self).__name__}: required an empty state; came {sorted(state)}"
            )


class Constant(Schedule):
    """The base rate throughout."""

    def lr(self, step: int, base_lr: float) -> float:
        """See `Schedule.lr`."""
        return base_lr


class Step(Schedule):
    """The base rate times `factor` once more after every `every` steps."""

    def __init__(self, every: int, factor: float = 0.1) -> None:
        _require("Step", every >= 1, "every >= 1", every)
        _require("Step", 0 < factor < math.inf, "a finite factor > 0", factor)
        self.every = every
        self.factor = factor

    def lr(self, step: int, base_lr: float) -> float:
        """base_lr factor^floor(step / every)."""
        return base_lr * self.factor ** (step // self.every)


class MultiStep(Schedule):
    """A new rate from each milestone (a step number) on.

    Give either `values`, the absolute rates from each milestone on (the base rate holds before
    the first), or a `factor` by which every milestone multiplies.
    """

    def __init__(
        self,
        milestones: Sequence[int],
        values: Sequence[float] | None = None,
        factor: float | None = None,
    ) -> None:
        milestones = list(milestones)
        rising = all(a < b for a, b in pairwise(milestones))
        _require(
            "MultiStep",
            bool(milestones) and milestones[0] >= 0 and rising,
            "rising milestones >= 0",
            milestones,
        )
        if (values is None) == (factor is None):
            raise ConfigError(
                f"MultiStep: required values or a factor; came values={values}, factor={factor}"
            )
        if values is not None:
            fits = len(values) == len(milestones) and all(0 <= v < math.inf for v in values)
            _require("MultiStep", fits, f"{len(milestones)} finite values >= 0", values)
        if factor is not None:
            _require("MultiStep", 0 < factor < math.inf, "a finite factor > 0", factor)
        self.milestones = milestones
        self.values = None if values is None else list(values)
        self.factor = factor

    def lr(self, step: int, base_lr: float) -> float:
        """The rate that the last milestone at or before `step` set."""
        passed = bisect_right(self.milestones, step)
        if self.values is not None:
            return self.values[passed - 1] if passed else base_lr
        assert self.factor is not None
        return base_lr * self.factor**passed


class Cosine(Schedule):
    """From the base rate to `final` along half a cosine, over `total` steps; `final` from then on.

    Loshchilov & Hutter, SGDR (ICLR 2017), eq. 5, without restarts. During the first `warmup`
    steps, which `total` includes, the rate rises linearly: base_lr (step + 1) / warmup (Goyal et
    al., Accurate, Large Minibatch SGD, 2017, section 2.2).
    """

    def __init__(self, total: int, warmup: int = 0, final: float = 0.0) -> None:
        _require("Cosine", total >= 1, "total >= 1", total)
        _require("Cosine", 0 <= warmup < total, f"0 <= warmup < total = {total}", warmup)
        _require("Cosine", 0 <= final < math.inf, "a finite final rate >= 0", final)
        self.total = total
        self.warmup = warmup
        self.final = final

    def lr(self, step: int, base_lr: float) -> float:
        """final + (base_lr - final) (1 + cos(pi t)) / 2, t the share of the descent done."""
        if step < self.warmup:
            return base_lr * (step + 1) / self.warmup
        t = min(1.0, (step - self.warmup) / (self.total - self.warmup))
        return self.final + (base_lr - self.final) * (1 + math.cos(math.pi * t)) / 2


class OneCycle(Schedule):
    """Linearly from the base rate up to `peak`, back down, then on to `final`.

    Smith & Topin, Super-Convergence (2019), sections 1 and 3: one cycle somewhat shorter than the
    whole run, then annihilation far below the base rate. `rise` is the share of the steps that
    each of the two sides of the cycle takes. The cycling of the momentum that the paper mentions
    is left out.
    """

    def __init__(self, total: int, peak: float, final: float = 0.0, rise: float = 0.45) -> None:
        _require("OneCycle", 0 < peak < math.inf, "a finite peak rate > 0", peak)
        _require("OneCycle", 0 <= final < math.inf, "a finite final rate >= 0", final)
        _require("OneCycle", 0 < rise <= 0.5, "0 < rise <= 0.5", rise)
        _require("OneCycle", rise * total > 1, f"rise * total > 1 (rise = {rise})", total)
        self.total = total
        self.peak = peak
        self.final = final
        self.rise = rise

    def lr(self, step: int, base_lr: float) -> float:
        """`peak` is reached at step rise total - 1, base_lr again as many steps later."""
        top = self.rise * self.total - 1
        if step <= top:
            return base_lr + (self.peak - base_lr) * step / top
        if step <= 2 * top:
            return self.peak + (base_lr - self.peak) * (step - top) / top
        t = min(1.0, (step - 2 * top) / (self.total - 1 - 2 * top))
        return base_lr + (self.final - base_lr) * t


class Plateau(Schedule):
    """The rate times `factor` whenever the observed loss has stopped improving.

    An improvement is a loss below best - threshold |best|. After more than `patience` observations
    in a row without one, the rate shrinks, down to `min_lr`, and the count starts again.
    """

    def __init__(
        self,
        patience: int = 10,
        factor: float = 0.1,
        min_lr: float = 0.0,
        threshold: float = 1e-4,
    ) -> None:
        _require("Plateau", patience >= 0, "patience >= 0", patience)
        _require("Plateau", 0 < factor < 1, "0 < factor < 1", factor)
        _require("Plateau", 0 <= min_lr < math.inf, "a finite min_lr >= 0", min_lr)
        _require("Plateau", 0 <= threshold < 1, "0 <= threshold < 1", threshold)
        self.patience = patience
        self.factor = factor
        self.min_lr = min_lr
        self.threshold = threshold
        self._best: float | None = None
        self._waited = 0
        self._scale = 1.0

    def lr(self, step: int, base_lr: float) -> float:
        """The rate after what was observed so far; `step` does not matter."""
        return max(base_lr * self._scale, min(self.min_lr, base_lr))

    def observe(self, loss: float) -> None:
        """Count an observation; NonFiniteError for NaN or infinity."""
        if not math.isfinite(loss):
            raise NonFiniteError(f"Plateau: required a finite loss; came {loss}")
        if self._best is None or loss < self._best - self.threshold * abs(self._best):
            self._best = float(loss)
            self._waited = 0
            return
        self._waited += 1
        if self._waited > self.patience:
            self._scale *= self.factor
            self._waited = 0

    def state_dict(self) -> dict[str, float]:
        """`waited`, `scale`, and `best` once there is one."""
        state: dict[str, float] = {"waited": self._waited, "scale": self._scale}
        return state if self._best is None else {**state, "best": self._best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`; ConfigError if it is not one of a Plateau."""
        fits = set(state) | {"best"} == {"best", "scale", "waited"}
        plain = all(type(v) in (int, float) and abs(v) <= _LARGEST for v in state.values())
        if not fits or not plain or state["waited"] < 0 or not 0 <= state["scale"] <= 1:
            raise ConfigError(
                "Plateau: required a finite waited >= 0, a scale from 0 to 1 and maybe a finite "
                f"best; came {dict(state)}"
            )
        self._best = float(state["best"]) if "best" in state else None
        self._waited = int(state["waited"])
        self._scale = float(state["scale"])


def _require(schedule: str, fits: bool, required: str, came: object) -> None:
    if not fits:
        raise ConfigError(f"{schedule}: required {required}; came {came}")
