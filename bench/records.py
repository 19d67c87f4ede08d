"""From races to records, and from records to a summary: the content of the JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench.case import CaseError
from bench.libraries import DENSE, OURS
from bench.race import Race
from bench.suites import Work
from tinynn.roofline import Limits

Record = dict[str, Any]

BEST_PEER = "best peer"


def records_of(race: Race, work: Work, limits: Limits | None) -> list[Record]:
    """One record for each peer that was timed; one with peer None if there was none.

    `ratio` is the peer's time / ours; `roofline_share` attainable time / ours (None without limits,
    and for other dtypes than float32, whose peak is not measured). Empty if ours was not timed.
    """
    ours = race.timings.get(OURS)
    if ours is None:
        return []
    share = None
    if limits is not None and race.case.dtype == "float32":
        share = limits.attainable_seconds(work.flops, work.bytes, work.working_set) / ours.median
    common = {
        "case": str(race.case),
        "family": race.case.family,
        "variant": race.case.variant,
        "threads": race.case.threads,
        "seconds": ours.median,
        "spread": ours.spread,
        "gflops": work.flops / ours.median / 1e9,
        "roofline_share": share,
    }
    peers = [name for name in race.timings if name != OURS]
    if not peers:
        return [{**common, "peer": None, "peer_seconds": None, "ratio": None}]
    medians = {peer: race.timings[peer].median for peer in peers}
    return [
        {**common, "peer": peer, "peer_seconds": seconds, "ratio": seconds / ours.median}
        for peer, seconds in medians.items()
    ]


def summarize(records: Iterable[Record]) -> list[Record]:
    """The geometric mean and the lowest of the ratios, for each family, peer and thread count.

    The peer BEST_PEER stands for whichever other library is fastest in each case; each library's
    own time is already that of its fastest layout or form.
    """
    groups: dict[tuple[str, str, int], list[Record]] = {}
    compared = [record for record in records if record["peer"] is not None]
    for record in [*compared, *_best(compared)]:
        key = (record["family"], record["peer"], record["threads"])
        groups.setdefault(key, []).append(record)
    families = list(dict.fromkeys(family for family, _, _ in groups))
    order = sorted(groups, key=lambda key: (families.index(key[0]), key[2]))  # stable: best last
    summary = []
    for family, peer, threads in order:
        members = groups[family, peer, threads]
        worst = min(members, key=lambda record: record["ratio"])
        summary.append(
            {
                "family": family,
                "peer": peer,
                "threads": threads,
                "geomean": geometric_mean([record["ratio"] for record in members]),
                "worst": worst["ratio"],
                "worst_case": worst["case"],
            }
        )
    return summary


def _best(compared: Sequence[Record]) -> list[Record]:
    """The record of each case's fastest peer, as one of BEST_PEER."""
    best: dict[str, Record] = {}
    for record in compared:
        if record["peer"] == DENSE:
            continue
        known = best.setdefault(record["case"], record)
        if record["ratio"] < known["ratio"]:
            best[record["case"]] = record
    return [{**record, "peer": BEST_PEER} for record in best.values()]


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp(mean(log r)): as much above 1 for a ratio r as below 1 for 1 / r."""
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


# --- files of several runs ------------------------------------------------------------------------


def merge(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One file's content from those of several runs; of a case that is in several, the last counts.

    The environment is that of the first, `parts` say which commit and load each run had. Raises
    CaseError unless all ran on one kind of machine with the same versions of everything.
    """
    environments = [content["environment"] for content in contents]
    first = environments[0]
    for other in environments[1:]:
        for key in ("cpu", "versions", "python", "os"):
            if other[key] != first[key]:
                raise CaseError(f"merge: required the same {key}; came {first[key]}, {other[key]}")
    last = {r["case"]: i for i, content in enumerate(contents) for r in content["records"]}
    records = [
        record
        for i, content in enumerate(contents)
        for record in content["records"]
        if last[record["case"]] == i
    ]
    about_cases = {
        key: [e for i, env in enumerate(environments) for e in env[key] if _stays(e, last, i)]
        for key in ("choices", "failures")
    }
    limits = {entry["threads"]: entry for env in environments for entry in env["limits"]}
    parts = [{key: env[key] for key in ("commit", "load_average")} for env in environments]
    environment = {**first, **about_cases, "limits": list(limits.values()), "parts": parts}
    return {"environment": environment, "records": records, "summary": summarize(records)}


def _stays(entry: dict[str, Any], last: dict[str, int], place: int) -> bool:
    return last.get(entry["case"], place) == place
