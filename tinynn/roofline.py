"""The roofline: the least time in which this machine could do a given amount of work.

Model of Williams, Waterman and Patterson, "Roofline" (2009): the larger of arithmetic at the FMA
peak and bytes at the bandwidth of the level that holds them. The limits are measured by the loops
of `kernels.probes`, and kept in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from kernels import probes, simd
from kernels._jit import get_threads, set_threads, user_cache_dir
from kernels.timing import Timing, compare
from tinynn.environment import cache_sizes, environment
from tinynn.storage import write_json

LEVELS = ("L1", "L2", "L3", "memory")  #: that the probes read from, besides "fma"
_QUIET_SPREAD = 0.15
_CALL_FLOPS = 200e6  # a call lasts a few milliseconds
_CALL_BYTES = 100e6
_FMA_ELEMENTS = 1024

B = TypeVar("B", bound=str)


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
        return next(fitting, LEVELS[-1])

    def compute_seconds(self, flops: float) -> float:
        """The least time for so many floating-point operations."""
        return flops / self.flops

    def memory_seconds(self, nbytes: float, working_set: float | None = None) -> float:
        """The least time for moving so many bytes once, from the smallest level they fit.

        `working_set` is the number of different bytes, where some are moved several times.
        """
        return nbytes / self.bandwidths[self.level(nbytes if working_set is None else working_set)]

    def attainable_seconds(
        self, flops: float, nbytes: float, working_set: float | None = None
    ) -> float:
        """The least time for the arithmetic and the traffic together: the larger of the two."""
        return max(self.compute_seconds(flops), self.memory_seconds(nbytes, working_set))


class Bounded(Generic[B]):
    """Work beside its lower bounds: subclasses say both, in seconds."""

    seconds: float | None  #: measured
    bounds: dict[B, float]  #: the least time, by what sets it

    @property
    def bound(self) -> float:
        """The least time, in seconds: the largest of the bounds."""
        return max(self.bounds.values())

    @property
    def limited_by(self) -> B:
        """Which bound that is."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def share(self) -> float:
        """The least time as a share of the measured one: 1 is as fast as can be."""
        return self.bound / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Probe:
    """One limit's loop: `of` is "fma" or a level; every thread runs over its own elements."""

    of: str
    threads: int

    @property
    def elements(self) -> int:
        """float32 values that each thread runs over: inside the level, outside the one below."""
        caches = cache_sizes()
        n = {
            "fma": _FMA_ELEMENTS,
            "L1": caches["L1"] // 8,
            "L2": caches["L2"] // 8,
            "L3": max(caches["L3"] // 16 // self.threads, caches["L2"] // 2),
            "memory": max(caches["L3"], 64 << 20) // self.threads,
        }[self.of]
        return n // 64 * 64

    @property
    def repeats(self) -> int:
        """How often a call runs over them."""
        if self.of == "fma":
            return max(1, round(_CALL_FLOPS / (2 * probes.FMAS_PER_ELEMENT * self.elements)))
        return max(1, round(_CALL_BYTES / (4 * self.elements)))

    @property
    def flops(self) -> float:
        """Floating-point operations of a call, all threads together."""
        each = 2 * probes.FMAS_PER_ELEMENT if self.of == "fma" else 1
        return float(each * self.threads * self.elements * self.repeats)

    @property
    def nbytes(self) -> float:
        """Bytes that a call reads; none where arithmetic is what counts."""
        return 0.0 if self.of == "fma" else float(4 * self.threads * self.elements * self.repeats)

    @property
    def working_set(self) -> float:
        """The number of different bytes among them."""
        return float(4 * self.threads * self.elements)

    def calls(self) -> dict[str, Callable[[], object]]:
        """What to time: for reads the better of two loops is the limit."""
        # Page by page from NumPy, then written: untouched memory would all be one page of zeros.
        buffer = np.empty(self.threads * self.elements + 16, np.float32)
        start = -buffer.ctypes.data % 64 // 4
        a = buffer[start : start + self.threads * self.elements].reshape(self.threads, -1)
        a[:] = 0.5
        out = np.empty(self.threads, np.float32)
        repeats = self.repeats
        if self.of == "fma":
            return {"": lambda: probes.fma(a, np.float32(0.25), repeats, out)}
        return {
            "one stream": lambda: probes.read(a, repeats, out),
            "four streams": lambda: probes.read_in_four(a, repeats, out),
        }


def limits(
    threads: Sequence[int], *, remeasure: bool = False, cache: Path | None = None
) -> list[Limits]:
    """This machine's limits for each thread count: measured, or from the file `cache`.

    What is measured goes there, unless other work disturbed it: then it is only used.
    """
    cache = cache_file() if cache is None else cache
    known = _read(cache)
    found = {count: known[count] for count in threads if count in known and not remeasure}
    for count in threads:
        if count not in found:
            found[count] = _measure(count)
            if found[count].trustworthy():
                known[count] = found[count]
                with contextlib.suppress(OSError):  # then it is measured again next time
                    write_json(cache, [asdict(known[n]) for n in sorted(known)])
    return [found[count] for count in threads]


def cache_file() -> Path:
    """Where the limits of this machine are kept: the name is a hash of all they depend on."""
    facts = environment()
    keys = {k: facts["versions"].get(k) for k in ("numba", "llvmlite", "numpy")}
    source = Path(probes.__file__).read_bytes()
    facts_used = repr((facts["cpu"], keys, simd.LEVEL))
    digest = hashlib.sha256(facts_used.encode() + source).hexdigest()
    return user_cache_dir() / "roofline" / f"{digest[:20]}.json"


def _measure(threads: int) -> Limits:
    """The limits: each is what the best round reached, not the median one."""
    rates: dict[str, float] = {}
    spreads = []
    before = get_threads()
    set_threads(threads)
    try:
        for of in ("fma", *LEVELS):
            probe = Probe(of, threads)
            best: Timing = min(compare(probe.calls()).values(), key=lambda timing: timing.minimum)
            rates[of] = (probe.nbytes or probe.flops) / best.minimum
            spreads.append(best.spread)
    finally:
        set_threads(before)
    sizes = cache_sizes()
    caches = {"L1": threads * sizes["L1"], "L2": threads * sizes["L2"], "L3": sizes["L3"]}
    return Limits(threads, rates.pop("fma"), caches, rates, max(spreads))


def _read(cache: Path) -> dict[int, Limits]:
    try:
        found = [Limits(**entry) for entry in json.loads(cache.read_text())]
    except (OSError, ValueError, TypeError):
        return {}  # absent or damaged: measured again
    return {entry.threads: entry for entry in found}
