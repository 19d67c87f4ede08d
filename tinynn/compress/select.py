"""Which channels stay: scores -> a mask. Each function here returns such a selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from tinynn.errors import ConfigError
from tinynn.op import Array

Selection = Callable[[Array], Array]


def above(threshold: float) -> Selection:
    """Keep scores above `threshold`."""
    return lambda scores: scores > threshold


def share(kept: float) -> Selection:
    """Keep this share of the channels (at least one), those with the largest scores."""
    if not 0 < kept <= 1:
        raise ConfigError(f"select.share: required 0 < kept <= 1; came {kept}")
    return lambda scores: number(max(1, round(kept * len(scores))))(scores)


def number(kept: int) -> Selection:
    """Keep this many channels, those with the largest scores; of equals, the first."""
    if kept < 1:
        raise ConfigError(f"select.number: required at least 1; came {kept}")

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
    if width < 0 or unit not in ("std", "variance") or remove not in ("outside", "inside"):
        raise ConfigError(
            "select.bounds: required width >= 0, unit 'std' or 'variance', remove 'outside' or "
            f"'inside'; came {width}, {unit!r}, {remove!r}"
        )

    def keep(scores: Array) -> Array:
        spread = width * (scores.std() if unit == "std" else scores.var())
        inside = np.abs(scores - scores.mean()) <= spread
        return inside if remove == "outside" else ~inside

    return keep
