"""Distort a model between pruning cycles, so that training finds nodes to prune again."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from tinynn.errors import ConfigError
from tinynn.nn.module import Module, is_scale
from tinynn.op import Array

Amplitude = Callable[[Array], float]


def published(values: Array) -> float:
    """1 - var(values): Çallı's draft of April 2017, section 2.2.2. Negative when var > 1."""
    return 1.0 - float(np.var(values, dtype=np.float64))


def clamped(values: Array) -> float:
    """1 - var(values), but within [0, 1]: a parameter that has spread out is left alone."""
    return min(1.0, max(0.0, published(values)))


def constant(values: Array) -> float:
    """1, whatever the values."""
    return 1.0


FORMULAS: dict[str, Amplitude] = {
    "published": published,
    "clamped": clamped,
    "constant": constant,
}


def distort(
    model: Module,
    rng: np.random.Generator,
    *,
    scale: float = 1.0,
    formula: str = "published",
    low: float = 0.0,
    high: float = 1.0,
    only: Collection[str] | None = None,
) -> Module:
    """A new model with w + scale * U[low, high) * amplitude(w) for every parameter w.

    `formula` names the amplitude: see FORMULAS. `only` names the parameters to distort, by dotted
    path; the others stay, and without it learned scales. Masked weights stay zero, those that share
    a value move together. The defaults are the published distortion, whose random numbers are
    never negative, so that it pushes all parameters up.
    Raises ConfigError for an unknown formula or parameter, or a scale or range that is no number.
    """
    if formula not in FORMULAS:
        raise ConfigError(f"distort: required one of {sorted(FORMULAS)}; came {formula!r}")
    if not np.isfinite([scale, low, high]).all() or low > high:
        raise ConfigError(
            f"distort: required finite scale and low <= high; came {scale}, {low}, {high}"
        )
    if isinstance(only, str):
        raise ConfigError(f"distort: `only` is a list of names; came the text {only!r}")
    out = model.copy()
    parameters = dict(out.named_parameters())
    chosen = {n for n, p in parameters.items() if not is_scale(p)} if only is None else only
    if unknown := sorted(set(chosen) - parameters.keys()):
        raise ConfigError(f"distort: no parameters {unknown}; there are {sorted(parameters)}")
    for p in (parameters[name] for name in parameters if name in chosen):
        amplitude = scale * FORMULAS[formula](p.data)
        noise = rng.uniform(low, high, p.shape) * amplitude
        p.mutate()[...] += noise.astype(p.dtype)
        p.hold()
    return out
