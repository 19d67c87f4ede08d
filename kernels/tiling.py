"""How the channels of a result are shared out to register tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from kernels import simd


class Part(NamedTuple):
    """Channels first <= n < first + cols, in panels of nr vectors, tiles of mr rows."""

    mr: int
    nr: int
    first: int
    cols: int
    width: int  # of a panel, in elements
    panels: int


FEW_REGISTERS = simd.TILE[1] <= 2  # 16, of which 12 hold sums
_SUMS = simd.TILE[0] * simd.TILE[1]  # vectors of sums that registers hold

_HEIGHTS = (16, 15, 14, 12, 9, 8, 7, 6, *((5,) if FEW_REGISTERS else ()), 4, 3, 2, 1)
#: For tiles of one vector, of several: above these, LLVM keeps some of the sums in memory.
MOST = (9, 6) if FEW_REGISTERS else (16, 8)


def cuts(
    channels: int, lanes: int, most: tuple[int, int], tiles: Callable[[int, float], float]
) -> tuple[float, tuple[Part, ...]]:
    """The tiles over all channels that cost least, and how much that is.

    `most`: rows of a tile of one vector, of several; tiles(h, vectors): what the tiles of h rows
    and so many vectors cost together.
    """

    def height(nr: int) -> tuple[float, int]:
        """Cost of one panel a step, and the tile's height."""
        limit = min(most[nr > 1], _SUMS // max(1, nr))
        return min((tiles(h, nr or 0.5), -h) for h in _HEIGHTS if h <= limit)

    halves = simd.LANES >= 8
    best: tuple[float, list[tuple[int, int, int]]] = (math.inf, [])
    for nr in range(1, simd.TILE[1] + 1):
        whole = channels // (nr * lanes)
        rest = channels - whole * nr * lanes
        tails: list[list[int]] = [[]]
        if rest:
            tails = [[-(-rest // lanes)]]
            if halves and 0 < rest % lanes <= lanes // 2:
                tails.append([rest // lanes, 0] if rest >= lanes else [0])
        for tail in tails:
            cuts, first = [], 0
            if whole:
                cuts, first = [(nr, 0, channels - rest)], channels - rest
            for t in tail:
                cols = min(t * lanes or lanes // 2, channels - first)
                cuts.append((t, first, cols))
                first += cols
            cost = sum(height(n)[0] * -(-c // (n * lanes or lanes // 2)) for n, _, c in cuts)
            cost *= 1 + 0.04 * len(cuts)
            if cost < best[0]:
                best = (cost, cuts)
    parts = []
    for n, first, cols in best[1]:
        width = n * lanes or lanes // 2
        parts.append(Part(-height(n)[1], n, first, cols, width, -(-cols // width)))
    return best[0], tuple(parts)
