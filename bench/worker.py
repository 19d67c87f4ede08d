"""A process that times one library: `python -m bench.worker LIBRARY THREADS`.

It reads one JSON request a line from its standard input and answers with one JSON line each, until
the input ends. Requests: `build` (a case: compile and warm up), `choose` (the library's fastest
variant and the calls a round), `round` (time one round), `drop` (forget the case). An answer with
`error` says what went wrong; the process goes on.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from bench.case import Case
from bench.libraries import LIBRARIES, OURS
from kernels.timing import calibrate, run_round

_WARM_UP_CALLS = 3
_CHOICE_ROUNDS = 5
_SLOW_CHOICE_ROUNDS = 2  # of calls that take longer than a round: layouts differ by more
_SELF_WARMING = 0.1  # seconds of a call beside which waking threads and caches is nothing


class _State:
    """What this worker holds between requests."""

    def __init__(self, library: str, threads: int) -> None:
        self.library = library
        self.threads = threads
        self.prepared = False
        self.candidates: dict[str, Callable[[], object]] = {}
        self.answers: dict[str, list[float] | None] = {}
        self.call: Callable[[], object] | None = None
        self.count = 0
        self.seconds = 0.0  # of a call, in the last round

    def build(self, suite: str, case: str) -> dict[str, Any]:
        self.drop()
        if not self.prepared:
            LIBRARIES[self.library].prepare(self.threads)
            self.prepared = True
        built = importlib.import_module(suite).build(self.library, Case.parse(case))
        self.candidates = dict(built) if isinstance(built, Mapping) else {"": built}
        for name, call in self.candidates.items():
            answer = None
            for _ in range(_WARM_UP_CALLS):
                answer = call()
            self.answers[name] = _fingerprint(answer)
        return {"layer": _threading_layer() if self.library == OURS else None}

    def choose(self, round_seconds: float) -> dict[str, Any]:
        counts = {name: calibrate(call, round_seconds) for name, call in self.candidates.items()}
        name = next(iter(counts))
        if len(counts) > 1:
            rounds = _CHOICE_ROUNDS if min(counts.values()) > 1 else _SLOW_CHOICE_ROUNDS
            seconds: dict[str, list[float]] = {name: [] for name in counts}
            for _ in range(rounds):
                for name, call in self.candidates.items():
                    seconds[name].append(run_round(call, counts[name]))
            name = min(seconds, key=lambda name: statistics.median(seconds[name]))
        self.call, self.count = self.candidates[name], counts[name]
        self.candidates = {}
        return {"choice": name, "repetitions": self.count, "answer": self.answers[name]}

    def round(self) -> dict[str, Any]:
        assert self.call is not None
        self.seconds = run_round(self.call, self.count, warm_up=self.seconds < _SELF_WARMING)
        return {"seconds": self.seconds}

    def drop(self) -> dict[str, Any]:
        self.candidates, self.answers, self.call, self.seconds = {}, {}, None, 0.0
        return {}


def _fingerprint(result: object) -> list[float] | None:
    """Size, mean and root mean square: the same for any layout of the same numbers."""
    if result is None:
        return None
    import numpy as np

    detached: Any = result.detach() if hasattr(result, "detach") else result
    array = np.asarray(detached, dtype=np.float64)
    return [float(array.size), float(array.mean()), float(np.sqrt(np.mean(array * array)))]


def _threading_layer() -> str | None:
    from tinynn.environment import threading_layer

    return threading_layer()


def _explain(error: BaseException) -> str:
    """The error in one line: its type and the first lines of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _private_stdout() -> TextIO:
    """The pipe to the parent; whatever a library prints from now on goes to standard error."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(pipe, "w", encoding="utf-8")


def _serve(state: _State, replies: TextIO) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        action = getattr(state, request.pop("do"))
        try:
            reply = action(**request)
        except Exception as error:  # whatever the library raises is the answer
            reply = {"error": _explain(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    _serve(_State(sys.argv[1], int(sys.argv[2])), _private_stdout())


if __name__ == "__main__":
    main()
