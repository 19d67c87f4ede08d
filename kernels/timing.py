"""How long a call takes: the median over rounds, contestants interleaved round by round.

The standard library alone: a process that times another library must not load ours.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]

ROUNDS = 15
ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds a call, from `rounds` rounds of `repetitions` calls each.

    `spread` is the interquartile range of the rounds divided by their median.
    """

    median: float
    spread: float
    minimum: float
    rounds: int
    repetitions: int

    @classmethod
    def of(cls, seconds: Sequence[float], repetitions: int) -> Timing:
        """Summarise one time a call for each round."""
        median = statistics.median(seconds)
        spread = 0.0
        if len(seconds) > 1 and median > 0:
            low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
            spread = (high - low) / median
        return cls(median, spread, min(seconds), len(seconds), repetitions)


def measure(
    function: Callable[..., object],
    *args: Any,
    rounds: int = ROUNDS,
    round_seconds: float = ROUND_SECONDS,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time `function(*args)`, compiled and warm: `bench.measure(plan, x).median` is in seconds.

    Each round calls it as often as fits into `round_seconds`, with garbage collection off.
    Raises ValueError unless `rounds` >= 1 and `round_seconds` > 0.
    """
    contestants = {"": lambda: function(*args)}
    return compare(contestants, rounds=rounds, round_seconds=round_seconds, clock=clock)[""]


def compare(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    round_seconds: float = ROUND_SECONDS,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time several callables of ONE library against each other, in turns within each round.

    Libraries with threads of their own disturb each other within one process: `python -m bench`
    gives each its own. Raises ValueError unless `rounds` >= 1 and `round_seconds` > 0.
    """
    if rounds < 1 or not round_seconds > 0:
        raise ValueError(f"measure: required rounds >= 1, seconds > 0; got {rounds, round_seconds}")
    counts = {name: calibrate(call, round_seconds, clock) for name, call in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            seconds[name].append(run_round(call, counts[name], clock))
    return {name: Timing.of(seconds[name], counts[name]) for name in contestants}


def calibrate(
    call: Callable[[], object], round_seconds: float, clock: Clock = time.perf_counter
) -> int:
    """How many calls fill `round_seconds`; warms the callable up, at least two calls."""
    call()
    count = 1
    while True:
        elapsed = run_round(call, count, clock) * count
        if elapsed >= round_seconds / 4 or count >= 1 << 30:
            return max(1, math.ceil(round_seconds * count / elapsed)) if elapsed else count
        count *= 4


def run_round(
    call: Callable[[], object],
    count: int,
    clock: Clock = time.perf_counter,
    *,
    warm_up: bool = True,
) -> float:
    """Seconds a call over `count` calls, after an untimed one that wakes threads and caches."""
    with _no_collection():
        if warm_up:
            call()
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
