"""Which channels stay: scores -> a mask. Each function here returns such a selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from tinynn.errors import ConfigError
from tinynn.op import Array

Selection = Callable[[Array], Array]


def above(threshold: float) -> Selection:
    """Keep scores above `threshold`, which may be infinite."""
    if not _is_number(threshold) or math.isnan(threshold):
        raise ConfigError(f"select.above: required a number; came {threshold!r}")
    return lambda scores: scores > threshold


def share(kept: float) -> Selection:
    """Keep this share of the channels (at least one), those with the largest scores."""
    if not _is_number(kept) or not 0 < kept <= 1:
        raise ConfigError(f"select.share: required 0 < kept <= 1; came {kept!r}")
    return lambda scores: number(max(1, round(kept * len(scores))))(scores)


def number(kept: int) -> Selection:
    """Keep this many channels, those with the largest scores; of equals, the first."""
    if not isinstance(kept, int | np.integer) or isinstance(kept, bool) or kept < 1:
        raise ConfigError(f"select.number: required a whole number >= 1; came {kept!r}")

    def keep(scores: Array) -> Array:
        mask = np.zeros(len(scores), bool)
        mask[np.argsort(-scores, kind="stable")[:kept]] = True
        return mask

    return keep


def bounds(
    width: float,
    unit: Literal["std", "variance"] = "std",
    remove: Literal["outside", "inside"] = "outside",
) -> Selection:
    """Remove scores outside (or inside) mean +- width times the unit, taken over the scores.

    Çallı 2017, section 3.1.2 writes the bounds with the variance of the scores, his draft with
    their standard deviation, and leaves open which side goes: hence both options.
    """
    fits = _is_number(width) and 0 <= width < math.inf
    if not fits or unit not in ("std", "variance") or remove not in ("outside", "inside"):
        raise ConfigError(
            "select.bounds: required a finite width >= 0, unit 'std' or 'variance', remove "
            f"'outside' or 'inside'; came {width!r}, {unit!r}, {remove!r}"
        )

    def keep(scores: Array) -> Array:
        spread = width * (scores.std() if unit == "std" else scores.var())
        inside = np.abs(scores - scores.mean()) <= spread
        return inside if remove == "outside" else ~inside

    return keep


def _is_number(value: object) -> bool:
    kinds = int | float | np.integer | np.floating
    return isinstance(value, kinds) and not isinstance(value, bool)
