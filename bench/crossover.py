"""The density below which a sparse layer is faster than a dense one, from the records of a run.

For each shape the speed-up over a dense layer is a curve over density; the crossover is where it
last passes 1, interpolated between the densities that were timed with the logarithm of the ratio
linear in the density. A curve that ends above 1 has the largest density timed, one that never
reaches 1 the smallest: bounds of a crossover that was not seen, and marked as such.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.libraries import DENSE, OURS
from bench.records import Record, geometric_mean
from bench.report import new_figure, save, shared_legend

SPARSE = ("sparse", "sparse4x1")
BEST_DENSE = "best dense peer"  #: in each case, of the peers in the family `dense`
CLAIM = 0.1  #: "dense is much faster than sparse unless it has less than 10 % non-zeros"
_FEW_ROWS = 2  # of a product: what limits it is reading the weights

#: (density, speed-up), the densities ascending
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Crossover:
    """Of one shape: sparse kernels of `library` against the dense ones of `against`."""

    family: str
    library: str
    against: str
    threads: int
    shape: str  #: the case without family, density and how it is run
    few_rows: bool
    density: float
    seen: bool  #: False: a bound, the curve does not pass 1
    curve: Curve


def crossovers(records: Iterable[Record]) -> list[Crossover]:
    """All that the records allow, in their order."""
    records = list(records)
    dense = _dense_peers(records)
    curves: dict[tuple[str, str, str, int, str], Curve] = {}
    for record in records:
        case = Case.parse(record["case"])
        if case.family not in SPARSE or record["peer"] is None:
            continue
        seconds = _times(records, record["case"])
        if DENSE not in seconds or record["peer"] != DENSE:
            continue
        shape, density = shape_of(case), float(case["density"])  # type: ignore[arg-type]
        peer = dense.get((shape, case.threads))
        for library in (name for name in seconds if name != DENSE):
            over_own = seconds[DENSE] / seconds[library]
            key = case.family, library, DENSE, case.threads, shape
            curves.setdefault(key, []).append((density, over_own))
            if peer is not None:
                key = case.family, library, BEST_DENSE, case.threads, shape
                curves.setdefault(key, []).append((density, over_own * peer))
    found = []
    for (family, library, against, threads, shape), points in curves.items():
        curve = sorted(points)
        density, seen = crossing(curve)
        few = _has_few_rows(shape)
        found.append(Crossover(family, library, against, threads, shape, few, density, seen, curve))
    return found


def crossing(curve: Sequence[tuple[float, float]]) -> tuple[float, bool]:
    """Where the curve last passes 1; else its end that bounds it, and False."""
    if curve[-1][1] >= 1:
        return curve[-1][0], False
    for (d0, r0), (d1, r1) in reversed(list(itertools.pairwise(curve))):
        if r0 >= 1 > r1:
            return d0 + (d1 - d0) * math.log(r0) / (math.log(r0) - math.log(r1)), True
    return curve[0][0], False


def shape_of(case: Case) -> str:
    """The case without its family, its density, and how it is run."""
    attributes = tuple(pair for pair in case.attributes if pair[0] != "density")
    return " ".join(str(Case("layer", case.shapes, attributes)).split()[1:-3])


def _has_few_rows(shape: str) -> bool:
    x = Case.parse(f"layer {shape}").shape("x")
    return math.prod(x[:-1]) <= _FEW_ROWS


def _dense_peers(records: Sequence[Record]) -> dict[tuple[str, int], float]:
    """For each shape and thread count: the fastest dense peer's time / our dense time."""
    best: dict[tuple[str, int], float] = {}
    for record in records:
        if record["family"] == "dense" and record["peer"] is not None:
            case = Case.parse(record["case"])
            key = shape_of(case), case.threads
            best[key] = min(best.get(key, math.inf), record["ratio"])
    return best


def _times(records: Sequence[Record], case: str) -> dict[str, float]:
    """Seconds of each library in one case."""
    mine = [record for record in records if record["case"] == case]
    times = {record["peer"]: record["peer_seconds"] for record in mine if record["peer"]}
    return {OURS: mine[0]["seconds"], **times}


def summarize(found: Iterable[Crossover]) -> list[dict[str, Any]]:
    """The geometric mean and the range for each family, library, rival and thread count.

    Products of few rows are summarised apart: they read every weight for hardly any arithmetic.
    """
    groups: dict[tuple[Any, ...], list[Crossover]] = {}
    for c in found:
        key = c.family, c.library, c.against, c.threads, c.few_rows
        groups.setdefault(key, []).append(c)
    names = ("family", "library", "against", "threads", "few_rows")
    return [
        {
            **dict(zip(names, key, strict=True)),
            "shapes": len(members),
            "geomean": geometric_mean([c.density for c in members]),
            "lowest": min(c.density for c in members),
            "highest": max(c.density for c in members),
            "bounds": sum(not c.seen for c in members),
        }
        for key, members in groups.items()
    ]


def lines(found: Sequence[Crossover]) -> list[str]:
    """A table of each shape against our dense kernels, then the means of all."""
    own = [c for c in found if c.library == OURS]
    if not own:
        return []
    shapes = list(dict.fromkeys((c.shape, c.threads) for c in own))
    head = ["", "crossover density: sparse is faster below it (<, >: outside what was timed)"]
    columns = [(f, a) for f in SPARSE for a in (DENSE, BEST_DENSE)]
    head.append("".join(f"{f'{f} / {a}':>28}" for f, a in columns) + "  shape")
    rows = []
    for shape, threads in shapes:
        known = {(c.family, c.against): c for c in own if (c.shape, c.threads) == (shape, threads)}
        cells = [_cell(known[key]) if key in known else "" for key in columns]
        rows.append("".join(f"{cell:>28}" for cell in cells) + f"  {shape} {threads}T")
    means = [
        f"{s['family']} by {s['library']} against {s['against']}, {s['threads']}T, "
        f"{'one or two rows' if s['few_rows'] else 'batches'}: geometric mean {s['geomean']:.2f} "
        f"({s['lowest']:.2f} to {s['highest']:.2f}, {s['shapes']} shapes, {s['bounds']} bounds)"
        for s in summarize(found)
    ]
    return [*head, *rows, *means]


def _cell(c: Crossover) -> str:
    if c.seen:
        return f"{c.density:.2f}"
    return f"{'>' if c.curve[-1][1] >= 1 else '<'}{c.density:.2f}"


def as_json(found: Iterable[Crossover]) -> list[dict[str, Any]]:
    """The crossovers as they are written to a file, without the curves: those are the records."""
    return [{k: v for k, v in asdict(c).items() if k != "curve"} for c in found]


def plot(found: Sequence[Crossover], path: Path) -> None:
    """Speed-up over density, a panel for each family and rival, a line for each shape.

    Raises OutputError.
    """
    panels = [
        (family, library, against)
        for library, against in ((OURS, DENSE), (OURS, BEST_DENSE), ("scipy", DENSE))
        for family in SPARSE
        if any(
            (c.family, c.library, c.against) == (family, library, against) and len(c.curve) > 1
            for c in found
        )
    ]
    if not panels:
        return
    columns = 2
    rows = -(-len(panels) // columns)
    shapes = list(dict.fromkeys((c.shape, c.threads) for c in found))
    picture = new_figure(11, 3.6 * rows)
    for number, (family, library, against) in enumerate(panels, 1):
        axes = picture.add_subplot(rows, columns, number)
        mine = [c for c in found if (c.family, c.library, c.against) == (family, library, against)]
        for c in mine:
            i = shapes.index((c.shape, c.threads))
            style = f"{'-' if c.threads == 1 else '--'}{'osD^v<>P'[i // 10 % 8]}"
            label = f"{_name(c.shape)} {c.threads}T"
            axes.plot(*zip(*c.curve, strict=True), style, color=f"C{i % 10}", markersize=3,
                      linewidth=1, label=label)  # fmt: skip
        axes.axhline(1.0, color="black", linewidth=1)
        axes.axvline(CLAIM, color="grey", linewidth=1, linestyle=":")
        axes.set_yscale("log")
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        axes.set_xlim(0, 1.02)
        rival = "our dense kernels" if against == DENSE else "the fastest dense library"
        batches = [c for c in mine if not c.few_rows]
        mean = ""
        if batches:
            mean = f"\ncrossover {geometric_mean([c.density for c in batches]):.2f}"
            unseen = sum(not c.seen for c in batches)
            mean += f" ({unseen} of {len(batches)} only bounded)" if unseen else ""
        axes.set_title(f"{family} by {library} against {rival}{mean}", fontsize=9)
        axes.set_xlabel("share of weights that are not zero", fontsize=8)
        axes.set_ylabel("dense time / sparse time", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(linewidth=0.3)
    shared_legend(picture, 4)
    save(picture, path)


def _name(shape: str) -> str:
    """The layer's name if the shape has one."""
    words = dict(word.split("=") for word in shape.split())
    return words.get("layer", shape)
