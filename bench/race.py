"""Contestants in processes of their own, timed in turns: one round each, then the next round.

Thread pools that spin while they wait for work disturb whatever else runs. So each library lives
in its own process, only one process works at a time, and a pause lets its threads go to sleep.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.libraries import LIBRARIES, thread_environment
from bench.suites import Suite
from kernels.timing import ROUND_SECONDS, ROUNDS, Timing

_ROOT = Path(__file__).resolve().parent.parent
_AGREEMENT = 1e-3  # of the answers' root mean square; enough to tell other work from rounding


class ContestantError(Exception):
    """Why a contestant could not be timed."""


class TooSlowError(ContestantError):
    """The contestant gave no answer in time."""


@dataclass(frozen=True)
class Settings:
    """How long a race may take: seconds, except `rounds`."""

    rounds: int = ROUNDS
    round_seconds: float = ROUND_SECONDS
    pause: float = 0.05
    build_timeout: float = 300.0
    round_timeout: float = 60.0


# Building is not timed, and may have to compile every kernel of a network: no shorter limit there.
QUICK = Settings(rounds=5, round_seconds=0.01)


@dataclass
class Race:
    """What one case gave: a timing for each contestant, or the reason why there is none."""

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)  # which variant a library was fastest in
    failures: dict[str, str] = field(default_factory=dict)
    layer: str | None = None  # our threading layer


class Worker:
    """The parent's end of one `bench.worker` process."""

    def __init__(self, library: str, threads: int) -> None:
        environment = thread_environment(threads)
        paths = [str(_ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by kill)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", library, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent, which ends the whole group
        )
        # A thread reads, so that waiting can time out on every system.
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put(None)

    def send(self, action: str, **arguments: Any) -> None:
        """Start a request; `receive` waits for its answer. Raises ContestantError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": action, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise ContestantError(self._obituary()) from None

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to the last request. Raises ContestantError; kills the process on timeout."""
        try:
            line = self._replies.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self.kill()
            raise TooSlowError("no answer in time; stopped") from None
        if line is None:
            raise ContestantError(self._obituary())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ContestantError(reply["error"])
        return reply

    def alive(self) -> bool:
        """Whether the process can take a request."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process and whatever it started."""
        if self.alive():
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a request that could no longer be flushed
            self._process.stdin.close()
        self._stderr.close()

    def _obituary(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return f"its process ended ({how})" + (f": {said[-1][:300]}" if said else "")


class Team:
    """The worker processes of a run: one for each library and thread count, kept between cases."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._workers: dict[tuple[str, int], Worker] = {}
        self._given_up: set[str] = set()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()

    def race(self, suite: Suite, case: Case, libraries: Sequence[str]) -> Race:
        """Time `libraries` on `case`, interleaved. Never raises for what a library does wrong."""
        race = Race(case)
        racing = self._build(suite, race, libraries)
        counts: dict[str, int] = {}
        answers: dict[str, list[float] | None] = {}
        for name in list(racing):
            reply = self._ask(
                race, racing, name, "choose", round_seconds=self.settings.round_seconds
            )
            if reply:
                counts[name], answers[name] = reply["repetitions"], reply["answer"]
                if reply["choice"]:
                    race.choices[name] = reply["choice"]
        self._disqualify(race, racing, answers)
        seconds: dict[str, list[float]] = {name: [] for name in racing}
        for number in range(self.settings.rounds):
            for name in _rotated(list(racing), number):
                reply = self._ask(race, racing, name, "round")
                if reply:
                    seconds[name].append(reply["seconds"])
        for name in list(racing):
            race.timings[name] = Timing.of(seconds[name], counts[name])
            self._ask(race, racing, name, "drop")
        return race

    def _build(self, suite: Suite, race: Race, libraries: Sequence[str]) -> dict[str, Worker]:
        """Let all load and compile at once; nothing is timed meanwhile."""
        racing: dict[str, Worker] = {}
        for name in libraries:
            if not LIBRARIES[name].installed():
                race.failures[name] = f"not installed ({LIBRARIES[name].module})"
                continue
            if name in self._given_up:
                race.failures[name] = "took too long in an earlier case; not tried again"
                continue
            worker = self._worker(name, race.case.threads)
            try:
                worker.send("build", suite=suite.__name__, case=str(race.case))
                racing[name] = worker
            except ContestantError as error:
                race.failures[name] = str(error)
        limit = time.monotonic() + self.settings.build_timeout
        for name in list(racing):
            reply = self._receive(race, racing, name, limit - time.monotonic())
            if reply:
                race.layer = reply["layer"] or race.layer
        return racing

    def _worker(self, library: str, threads: int) -> Worker:
        known = self._workers.get((library, threads))
        if known is not None and known.alive():
            return known
        if known is not None:
            known.kill()
        self._workers[library, threads] = Worker(library, threads)
        return self._workers[library, threads]

    def _ask(
        self, race: Race, racing: dict[str, Worker], name: str, action: str, **arguments: Any
    ) -> dict[str, Any] | None:
        """The answer of `name`; None if it failed, now (the reason is noted) or before."""
        if name not in racing:
            return None
        time.sleep(self.settings.pause)
        try:
            racing[name].send(action, **arguments)
        except ContestantError as error:
            race.failures[name] = str(error)
            del racing[name]
            return None
        return self._receive(race, racing, name, self.settings.round_timeout)

    def _receive(
        self, race: Race, racing: dict[str, Worker], name: str, timeout: float
    ) -> dict[str, Any] | None:
        """The answer of `name`; None, with the reason noted and out of the race, if it failed."""
        try:
            return racing[name].receive(timeout)
        except ContestantError as error:
            race.failures[name] = str(error)
            del racing[name]
            if isinstance(error, TooSlowError):
                self._given_up.add(name)
            return None

    def _disqualify(
        self, race: Race, racing: dict[str, Worker], answers: dict[str, list[float] | None]
    ) -> None:
        """Do not time who computed something else than the first contestant."""
        first, *others = [name for name in racing if answers.get(name)] or [""]
        for name in others:
            ours, theirs = answers[first], answers[name]
            assert ours is not None and theirs is not None
            if not _agree(ours, theirs):
                racing.pop(name)
                race.failures[name] = (
                    "its answer differs (size, mean, root mean square): "
                    f"{_numbers(theirs)}; {first}: {_numbers(ours)}"
                )


def _agree(ours: list[float], theirs: list[float]) -> bool:
    tolerance = _AGREEMENT * max(ours[2], theirs[2])
    close = all(
        math.isfinite(b) and abs(a - b) <= tolerance for a, b in zip(ours, theirs, strict=True)
    )
    return close and ours[0] == theirs[0]


def _rotated(names: list[str], by: int) -> list[str]:
    """Each in turn goes first, so that none always follows the same other."""
    by %= max(len(names), 1)
    return names[by:] + names[:by]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
