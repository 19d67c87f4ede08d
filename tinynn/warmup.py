"""Compile what models need ahead of time, in several processes at once.

Kernels compile when they are first called, one after the other. Here a training step and an
inference are first run without computing anything, which tells which kernels they call with which
types; processes share the compiling and leave the results in the cache; then the model really runs.

Plans, if wanted, are made and run last, those in float32 by one process, those in int8 by another:
they have hardly a kernel in common, while the plans of different models have most.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import lru_cache

import numpy as np
from numba.core import event

from kernels._jit import Request, cache_directory, planning
from tinynn import deploy, ops
from tinynn.compress import quantize
from tinynn.environment import usable_cores
from tinynn.errors import ConfigError, OutputError
from tinynn.models import PUBLISHED, Published
from tinynn.nn.module import Module
from tinynn.optim import SGD
from tinynn.tensor import Tensor, no_grad

SUMMARY = "compile the kernels of models ahead of time"
Report = Callable[[str], object]


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what `python -m tinynn warmup` takes."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"{', '.join(PUBLISHED)} (default: all)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes that compile (default: one a core)"
    )
    parser.add_argument(
        "--plans", action="store_true", help="also what their plans call, in float32 and in int8"
    )


def run(options: argparse.Namespace) -> int:
    """Warm the models up, with a line for each."""
    names = options.models or list(PUBLISHED)
    warm_up(names, jobs=options.jobs, plans=options.plans, report=_say)
    return 0


def warm_up(
    names: Sequence[str],
    *,
    jobs: int | None = None,
    plans: bool = False,
    report: Report = lambda _: 0,
) -> int:
    """Compile and cache what training steps and inferences of these models call; how many kernels.

    A training step has the batch and the loss of `tinynn.models.PUBLISHED`, and SGD with momentum;
    inference that batch and a single input. With `plans` these run as plans, too, in float32 and in
    int8. `report` gets a line for each model, for the plans of each kind, and one at the end.
    Raises ConfigError for an unknown name, OutputError where no cache can be written.
    """
    unknown = [name for name in names if name not in PUBLISHED]
    if unknown:
        raise ConfigError(f"warmup: no model {', '.join(unknown)}; there are {list(PUBLISHED)}")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"warmup: required jobs >= 1; came {jobs}")
    if cache_directory() is None:
        raise OutputError("warmup: no directory for compiled kernels is writable: set TINYNN_CACHE")
    start = time.perf_counter()
    total = 0
    with _Compilers(tuple(dict.fromkeys(names)), jobs or usable_cores()) as compilers:
        for name, futures in compilers.work():
            for future in futures:
                future.result()
            _train_and_use(PUBLISHED[name])
            total += len(futures)
            report(f"{name:<20}{len(futures):>3} kernels  {time.perf_counter() - start:6.1f} s")
        for what, made in compilers.plans() if plans else []:
            count = made.result()
            total += count
            report(f"{what:<20}{count:>3} kernels  {time.perf_counter() - start:6.1f} s")
    report(f"{'all':<20}{total:>3} kernels  {time.perf_counter() - start:6.1f} s")
    return total


class _Compilers:
    """Processes that compile the requests that they are told."""

    def __init__(self, names: tuple[str, ...], jobs: int) -> None:
        self._names = names
        # A new process, not a copy: a copy of one whose threads run may hang.
        context = multiprocessing.get_context("spawn")
        self._executor: Executor = ProcessPoolExecutor(jobs, mp_context=context)

    def __enter__(self) -> _Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def work(self) -> Iterator[tuple[str, list[Future[None]]]]:
        """Each model and what is being compiled for it, beyond what those before it need."""
        pending = []
        for name, requests in _requests(self._names).items():
            # the longest compilations first: then the processes end together
            ordered = sorted(requests, key=lambda request: not request.parallel)
            futures = [self._executor.submit(_compile, self._names, r.name) for r in ordered]
            pending.append((name, futures))
        yield from pending

    def plans(self) -> list[tuple[str, Future[int]]]:
        """What makes and runs the plans of all models, in float32 and in int8."""
        return [
            (f"plans in {kind}", self._executor.submit(_plan_and_use, self._names, kind == "int8"))
            for kind in ("float32", "int8")
        ]


def _requests(names: tuple[str, ...]) -> dict[str, list[Request]]:
    """What each model calls and this process has not compiled, beyond what those before it call."""
    seen: set[Request] = set()
    found = {}
    for name in names:
        with planning() as requests, np.errstate(all="ignore"):
            _train_and_use(PUBLISHED[name])
        found[name] = [request for request in requests if request not in seen]
        seen.update(requests)
    return found


@lru_cache
def _by_name(names: tuple[str, ...]) -> dict[str, Request]:
    return {r.name: r for requests in _requests(names).values() for r in requests}


def _compile(names: tuple[str, ...], request: str) -> None:
    """In a process of its own: compile one of the requests, which it knows by making them, too."""
    _by_name(names)[request].compile()


def _train_and_use(published: Published) -> None:
    rng = np.random.default_rng(0)
    model = published.build(rng)
    train(model, published, rng)
    model.eval()
    x = rng.standard_normal(published.batch, np.float32)
    with no_grad():
        for inputs in (x, x[:1]):
            model(Tensor(inputs))


class _Counter(event.Listener):
    """Counts compilations."""

    def __init__(self) -> None:
        self.count = 0

    def on_start(self, event: object) -> None:
        """One more."""
        self.count += 1

    def on_end(self, event: object) -> None:
        """Nothing."""


def _plan_and_use(names: Sequence[str], integers: bool) -> int:
    """Make and run plans of these models; how many kernels were compiled for it."""
    counter = _Counter()
    with event.install_listener("numba:compile", counter):
        for published in (PUBLISHED[name] for name in names):
            rng = np.random.default_rng(0)
            model = published.build(rng).eval()
            x = rng.standard_normal(published.batch, np.float32)
            plan = deploy.compile(quantize.int8(model, [x]) if integers else model, x)
            for inputs in (x, x[:1]):
                plan(inputs)
    return counter.count


def train(model: Module, published: Published, rng: np.random.Generator) -> float:
    """One training step on random numbers; the loss."""
    x = rng.standard_normal(published.batch, np.float32)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    prediction = model(Tensor(x))
    target: np.ndarray
    if published.loss == "softmax_cross_entropy":
        target = rng.integers(0, prediction.shape[-1], len(x))
    else:
        target = rng.standard_normal(prediction.shape, np.float32)
    loss = getattr(ops, published.loss)(prediction, target)
    loss.backward()
    optimizer.step()
    return float(loss.item())


def _say(line: str) -> None:
    print(line, flush=True, file=sys.stdout)
