"""Where the ops of a graph lie in a drawing: rows by depth, lanes for branches, columns of rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from tinynn.graph.parts import Node, Value


class Place(NamedTuple):
    """A cell of the drawing: column of rows, row within the column, lane within the row."""

    column: int
    row: int
    lane: int


def layout(nodes: Sequence[Node], source: Value, rows: int) -> dict[int, Place]:
    """The place of each value that an op makes, and of the input, by the value's index.

    An op lies one row below the lowest of its operands. The longest way through the net is lane 0;
    branches lie beside it for as long as they last. After about `rows` rows a new column begins,
    where possible at a row that only one value crosses.
    """
    parents = {n.output.index: [v.index for v in n.inputs if v.is_data] for n in nodes}
    order = [source.index, *parents]
    depth = {source.index: 0}
    for index in parents:
        depth[index] = 1 + max((depth[p] for p in parents[index]), default=0)
    children = defaultdict(list)
    for index, above in parents.items():
        for p in dict.fromkeys(above):
            children[p].append(index)
    lanes = _lanes(order, parents, children, depth)
    starts = _column_starts(order, children, depth, rows)
    places = {}
    for index in order:
        column = max(i for i, start in enumerate(starts) if start <= depth[index])
        places[index] = Place(column, depth[index] - starts[column], lanes[index])
    return places


def _lanes(
    order: Sequence[int],
    parents: dict[int, list[int]],
    children: dict[int, list[int]],
    depth: dict[int, int],
) -> dict[int, int]:
    """Chains of ops, the longest first; each gets the first lane that is free along all of it."""
    height: dict[int, int] = {}
    for index in reversed(order):
        height[index] = 1 + max((height[c] for c in children[index]), default=0)
    chains: list[list[int]] = []
    chain_of: dict[int, list[int]] = {}
    for index in order:
        above = parents.get(index, [])
        lowest = max(above, key=lambda p: depth[p], default=None)
        first = None if lowest is None else max(children[lowest], key=lambda c: height[c])
        if lowest is not None and first == index:
            chain_of[index] = chain_of[lowest]
        else:
            chain_of[index] = []
            chains.append(chain_of[index])
        chain_of[index].append(index)
    lanes: dict[int, int] = {}
    taken: set[tuple[int, int]] = set()
    for chain in sorted(chains, key=lambda c: (-len(c), order.index(c[0]))):
        last = max([depth[chain[-1]], *(depth[c] - 1 for c in children[chain[-1]])])
        span = range(depth[chain[0]], last + 1)
        lane = next(i for i in range(len(order)) if not any((i, row) in taken for row in span))
        taken.update((lane, row) for row in span)
        lanes.update(dict.fromkeys(chain, lane))
    return lanes


def _column_starts(
    order: Sequence[int], children: dict[int, list[int]], depth: dict[int, int], rows: int
) -> list[int]:
    bottom = max(depth.values())
    crossing = [0] * (bottom + 2)  # how many values are needed on both sides of each row's top
    for index in order:
        last = max((depth[c] for c in children[index]), default=depth[index])
        for row in range(depth[index] + 1, last + 1):
            crossing[row] += 1
    starts = [0]
    while bottom - starts[-1] >= rows:
        near = range(starts[-1] + max(2, rows * 2 // 3), starts[-1] + rows + 1)
        starts.append(min(near, key=lambda row: (crossing[row], -row)))
    return starts
