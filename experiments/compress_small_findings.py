"""What the compressed models say: a row for each, the published claims judged, aims met or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from experiments.classify import by_cell
from experiments.runner import Record, Row, spread

TIMES = "times"
EQUAL = 0.5  #: points of accuracy that count as none lost
DATA = "cifar10"  #: what published claims and aims are about
TRAINED = 48  #: epochs of the model that is compressed
LONG = 24  #: epochs from which on a network from scratch is set against it
FASTER = 1.05  #: a ratio of times that counts as faster

_SAME = (
    "executed_as", "bytes", "content_bytes", "deflated_bytes", "parameters", "non_zeros",
    "multiply_adds", "executed_multiply_adds", "tuning_epochs", "test_images",
)  # fmt: skip


def summary(runs: list[Record]) -> Record:
    """Of every recipe: mean accuracy, costs, and milliseconds where plans were timed."""
    timed = [r for r in runs if r["group"] == TIMES]
    cells: dict[str, Record] = {}
    for name, members in by_cell([r for r in runs if r["group"] != TIMES]).items():
        accuracies = [r["accuracy"] for r in members]
        entry = {
            "group": members[0]["group"],
            "runs": len(members),
            "accuracy_mean": float(np.mean(accuracies)),
            "accuracy_min": min(accuracies),
            "accuracy_max": max(accuracies),
            "dataset": members[0].get("dataset", DATA),
            **{key: members[0][key] for key in _SAME},
            "energy_joules": sum(members[0]["energy_joules"].values()),
            "kernels": members[0]["kernels"],
        }
        for batch in timed[0]["batches"] if timed else ():
            entry |= _milliseconds(name, batch, timed)
        if timed and name in timed[0]["executed_multiply_adds"]:  # of the kernels that were timed
            now, then = timed[0]["executed_multiply_adds"][name], entry["executed_multiply_adds"]
            arithmetic = members[0]["energy_joules"]["arithmetic"]
            entry["energy_joules"] += arithmetic * (now / then - 1)
            entry["executed_multiply_adds"] = now
        cells[name] = entry
    return {"threads_of_times": timed[0]["threads"] if timed else None, "cells": cells}


def _milliseconds(name: str, batch: str, timed: list[Record]) -> Record:
    found = [r["batches"][batch][name] for r in timed if name in r["batches"][batch]]
    if not found:
        return {}
    dense = [f["dense_seconds"] for f in found if f["dense_seconds"] is not None]
    return {
        f"ms_{batch}": 1e3 * float(np.median([f["seconds"] for f in found])),
        f"ms_{batch}_spread": max(f["spread"] for f in found),
        f"ms_{batch}_dense_kernels": 1e3 * float(np.median(dense)) if dense else None,
    }


def table(runs: list[Record], summary: Record) -> list[Row]:
    """Accuracy and costs of each recipe, in short; table.csv has all of it."""
    rows = []
    published = {"dense": "91.1"}
    for name, c in summary["cells"].items():
        if c["group"] == "sweep":
            continue
        values = [100 * r["accuracy"] for r in runs if r["cell"] == name]
        shown = f"{100 * c['accuracy_mean']:.2f} %, {c['bytes'] / 1e3:.1f} kB, "
        shown += f"{c['executed_multiply_adds'] / 1e6:.2f} M"
        if c.get("ms_1"):
            shown += f", {c['ms_1']:.3f} / {c['ms_64']:.2f} ms"
        rows.append(Row(name, published.get(name, "?"), shown, spread(values, 4)))
    return rows


# --- findings -------------------------------------------------------------------------------------


def findings(summary: Record) -> list[str]:
    """The published claims and the aims, each with the numbers that decide it."""
    cells = {n: c for n, c in summary["cells"].items() if c["group"] != "sweep"}
    dense = cells.get("dense")
    if dense is None or "ms_1" not in dense:
        return ["No verdicts: they need the dense recipe and times (--group dense, --jobs 1)"]
    if dense.get("dataset", DATA) != DATA:
        return [f"No verdicts: they are about {DATA}; this run was on {dense['dataset']}"]
    claims = [judge(cells, dense) for judge in (_pruning, _low_rank, _int8, _sparse, _designed)]
    aims = [line for make in (_joint_aims, _aims) for line in make(cells, dense)]
    return [line for line in (*claims, *aims) if line]


def _lost(cell: Record, dense: Record) -> float:
    """Points of accuracy, without what a difference of two floats adds to it."""
    return round(100 * (dense["accuracy_mean"] - cell["accuracy_mean"]), 6)


def _faster(cell: Record, dense: Record) -> float:
    """How many times as fast as the dense plan it is, at batch 1."""
    return dense["ms_1"] / cell["ms_1"]


def _of(cells: dict[str, Record], group: str) -> dict[str, Record]:
    return {n: c for n, c in cells.items() if c["group"] == group and "ms_1" in c}


def _pruning(cells: dict[str, Record], dense: Record) -> str:
    found = {
        n: c for n, c in _of(cells, "weights").items()
        if c["tuning_epochs"] and c["non_zeros"] < 0.5 * dense["non_zeros"]
    }  # fmt: skip
    if not found:
        return ""
    name = min(found, key=lambda n: _lost(found[n], dense))
    best = found[name]
    trained = {n: c for n, c in _of(cells, "dense").items() if c["tuning_epochs"]}
    control = min(trained, key=lambda n: _lost(trained[n], dense), default=None)
    also = f"; {control!r} loses {_lost(trained[control], dense):+.2f}" if control else ""
    share = best["non_zeros"] / dense["non_zeros"]
    return _verdict(
        "pruning the small model cannot be recovered by retraining",
        _lost(best, dense) > EQUAL,
        f"{name!r} leaves {share:.0%} of the numbers and loses {_lost(best, dense):+.2f} points"
        f" after {best['tuning_epochs']:g} epochs{also}",
    )


def _low_rank(cells: dict[str, Record], dense: Record) -> str:
    found = _of(cells, "low rank")
    equal = {n: c for n, c in found.items() if _lost(c, dense) <= EQUAL}
    if not found:
        return ""
    told = "; ".join(
        f"{n!r} loses {_lost(c, dense):+.2f} points, {_faster(c, dense):.2f} times as fast"
        for n, c in found.items()
    )
    holds = not any(_faster(c, dense) > FASTER for c in equal.values())
    return _verdict("no factorisation is faster at equal accuracy", holds, told)


def _int8(cells: dict[str, Record], dense: Record) -> str:
    found = {n: c for n, c in _of(cells, "bits").items() if n.startswith("int8, ")}
    if not found:
        return "int8 at half the speed: not judged; no integer plan ran"
    name = min(found, key=lambda n: _lost(found[n], dense))
    best = found[name]
    return _verdict(
        "8 bits keep the accuracy at half the speed",
        _lost(best, dense) <= EQUAL and _faster(best, dense) < 0.75,
        f"{name!r} loses {_lost(best, dense):+.2f} points and is {_faster(best, dense):.2f} times "
        "as fast as float32",
    )


def _sparse(cells: dict[str, Record], dense: Record) -> str:
    found = {
        n: c for n, c in _of(cells, "weights").items() if c.get("ms_1_dense_kernels") is not None
    }  # fmt: skip
    if not found:
        return ""
    gains = {n: c["ms_1_dense_kernels"] / c["ms_1"] for n, c in found.items()}
    share = {n: c["non_zeros"] / dense["non_zeros"] for n, c in found.items()}
    told = "; ".join(
        f"{n!r} ({share[n]:.0%} of the numbers) {gains[n]:.2f} times as fast as on dense kernels"
        for n in found
    )
    holds = not any(gains[n] > FASTER and share[n] > 0.1 for n in found)
    return _verdict("dense is faster unless fewer than 10 % are not zero", holds, told)


def _designed(cells: dict[str, Record], dense: Record) -> str:
    """Each narrow network against the most accurate compressed one with no larger file."""
    told, better = [], []
    compressed = {n: c for n, c in cells.items() if c["group"] not in ("designed small", "dense")}
    for name, small in _of(cells, "designed small").items():
        rivals = {n: c for n, c in compressed.items() if c["bytes"] <= small["bytes"]}
        if not rivals:
            continue
        best = max(rivals, key=lambda n: rivals[n]["accuracy_mean"])
        gain = 100 * (rivals[best]["accuracy_mean"] - small["accuracy_mean"])
        better.append(gain > 0)
        told.append(
            f"{name!r} ({small['tuning_epochs']:g} epochs, {small['bytes'] / 1e3:.0f} kB) is "
            f"{gain:.2f} points below {best!r} ({rivals[best]['bytes'] / 1e3:.0f} kB)"
        )
    if not told:
        return ""
    longest = max(c["tuning_epochs"] for c in _of(cells, "designed small").values())
    claim = "compressing beats designing small"
    if longest < TRAINED:
        claim += f", at {longest:g} epochs from scratch against the {TRAINED} of what is compressed"
    if longest < LONG:
        return f"NOT JUDGED: {claim}; required {LONG} epochs of training.\n  {'; '.join(told)}"
    return _verdict(claim, all(better), "; ".join(told))


def _verdict(claim: str, holds: bool, told: str) -> str:
    return f"{'HOLDS' if holds else 'REFUTED'}: {claim}.\n  {told}"


# --- aims -----------------------------------------------------------------------------------------


def _joint_aims(cells: dict[str, Record], dense: Record) -> Iterable[str]:
    """Accuracy and bytes of one and the same recipe: the one that is furthest within both aims."""
    for what, pattern, points, share in (
        ("fixed-point int8", r"int8, (?!dynamic|tuned).*", 0.3, 0.26),
        ("4 bits", r"4 bits.*", 2.0, 0.14),
    ):
        found = {
            n: (round(_lost(c, dense), 3), round(c["bytes"] / dense["bytes"], 3))
            for n, c in cells.items()
            if re.fullmatch(pattern, n) and _is_plan(c)
        }
        if found:
            best = min(
                found, key=lambda n: (max(found[n][0] / points, found[n][1] / share), found[n])
            )
            lost, size = found[best]
            yield (
                f"{_met(lost <= points and size <= share)}: {what}: points lost {lost:.3f}, aim "
                f"{points}, in a file of {size:.3f} of float32's, aim {share} ({best})"
            )


def _aims(cells: dict[str, Record], dense: Record) -> Iterable[str]:
    def ratio(c: Record) -> float:
        return c["bytes"] / dense["bytes"]

    def overhead(c: Record) -> float:
        return c["bytes"] / c["content_bytes"] - 1

    def lost(c: Record) -> float:
        return _lost(c, dense)

    aims: tuple[tuple[str, str, Callable[[Record], float], float], ...] = (
        ("70 % of the weights pruned: points lost", "weights 70 %.*", lost, 0.5),
        ("90 % sparse file, of float32's", "weights 90 %, gradual", ratio, 0.14),
        ("code book file beyond its content", "16 values", overhead, 0.03),
    )
    for what, pattern, value, most in aims:
        found = {n: value(c) for n, c in cells.items() if re.fullmatch(pattern, n) and _is_plan(c)}
        if found:
            best = min(found, key=lambda n: found[n])
            shown, cell = round(found[best], 3), cells[best]
            told = f"{best}, {cell['bytes'] / 1e3:.1f} kB, loses {lost(cell):+.2f} points"
            yield f"{_met(shown <= most)}: {what}: {shown:.3f}, aim {most} ({told})"


def _is_plan(cell: Record) -> bool:
    return cell["executed_as"] == "plan"


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"
