"""The roofline: the least time in which this machine could do a given amount of work.

Model of Williams, Waterman and Patterson, "Roofline" (2009): the larger of arithmetic at the FMA
peak and bytes at the bandwidth of the level that holds them. The limits are measured, by the
suite `roofline`, and kept in the user's cache directory until `--remeasure`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.libraries import OURS
from bench.race import ContestantError, Team
from bench.suites import Work, roofline
from tinynn.storage import write_json

_QUIET_SPREAD = 0.15


@dataclass(frozen=True)
class Limits:
    """What so many threads reach together: float32 FLOP/s, and bytes/s of each level."""

    threads: int
    flops: float
    caches: dict[str, int]  # capacities in bytes, all threads together, the smallest first
    bandwidths: dict[str, float]  # of the caches and of memory
    spread: float  # the largest among the probes' rounds

    def trustworthy(self) -> bool:
        """Whether nothing disturbed the measurement."""
        return self.spread <= _QUIET_SPREAD

    def level(self, nbytes: float) -> str:
        """The smallest level that holds so many bytes."""
        fitting = (name for name, capacity in self.caches.items() if nbytes <= capacity)
        return next(fitting, roofline.LEVELS[-1])

    def attainable_seconds(self, work: Work) -> float:
        """The least time for `work`, its bytes moved once from the smallest level they fit."""
        touched = work.bytes if work.working_set is None else work.working_set
        bandwidth = self.bandwidths[self.level(touched)]
        return max(work.flops / self.flops, work.bytes / bandwidth)


def limits(team: Team, threads: Sequence[int], cache: Path, *, remeasure: bool) -> list[Limits]:
    """The limits for each thread count, from `cache` or measured and written there.

    What was measured while other work disturbed it is used, and not kept. Raises ContestantError
    if a probe fails.
    """
    known = _read(cache)
    found = {count: known[count] for count in threads if count in known and not remeasure}
    for count in threads:
        if count not in found:
            found[count] = _measure(team, count)
            if found[count].trustworthy():
                known[count] = found[count]
                with contextlib.suppress(OSError):  # then it is measured again next time
                    write_json(cache, [asdict(known[n]) for n in sorted(known)])
    return [found[count] for count in threads]


def cache_file() -> Path:
    """Where the limits of this machine are kept: the name is a hash of all they depend on."""
    from kernels._jit import user_cache_dir
    from tinynn.environment import environment

    facts = environment()
    keys = {k: facts["versions"].get(k) for k in ("numba", "llvmlite", "numpy")}
    source = Path(__file__).with_name("probes.py").read_bytes()
    digest = hashlib.sha256(repr((facts["cpu"], keys)).encode() + source).hexdigest()
    return user_cache_dir() / "roofline" / f"{digest[:20]}.json"


def _measure(team: Team, threads: int) -> Limits:
    """The limits: each is what the best round reached, not the median one."""
    from tinynn.environment import cache_sizes

    rates: dict[str, float] = {}
    spreads = []
    for problem in roofline.cases(quick=False):
        case = problem.on(threads)
        race = team.race(roofline, case, roofline.LIBRARIES)
        if OURS not in race.timings:
            raise ContestantError(f"{case}: {race.failures[OURS]}")
        work = roofline.work(case)
        rates[str(case["of"])] = (work.bytes or work.flops) / race.timings[OURS].minimum
        spreads.append(race.timings[OURS].spread)
    sizes = cache_sizes()
    caches = {"L1": threads * sizes["L1"], "L2": threads * sizes["L2"], "L3": sizes["L3"]}
    return Limits(threads, rates.pop("fma"), caches, rates, max(spreads))


def _read(cache: Path) -> dict[int, Limits]:
    try:
        found = [Limits(**entry) for entry in json.loads(cache.read_text())]
    except (OSError, ValueError, TypeError):
        return {}  # absent or damaged: measured again
    return {entry.threads: entry for entry in found}
