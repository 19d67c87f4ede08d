"""The suites: a module each, which lists cases and builds every contestant's callable.

To add one, write a module here with the members of `Suite`; `python -m bench --list` finds it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from bench.case import Case

#: A callable to time, or several of which the library's fastest is timed, by name.
Built = Callable[[], object] | Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """What one call has to do at the least: arithmetic, and bytes moved if all is moved once.

    `working_set` is the number of different bytes, where the call goes over them several times.
    """

    flops: float
    bytes: float
    working_set: float | None = None


class Suite(Protocol):
    """What a suite module provides. Nothing but the standard library may be imported at its top."""

    __name__: str

    @property
    def SUMMARY(self) -> str:
        """One line for --list."""
        ...

    @property
    def FAMILIES(self) -> Sequence[str]:
        """The families of the cases that this suite can build."""
        ...

    @property
    def LIBRARIES(self) -> Sequence[str]:
        """Names in `bench.libraries`, ours first."""
        ...

    def cases(self, quick: bool) -> list[Case]:
        """The problems, for one thread; the harness repeats them for each thread count."""
        ...

    def work(self, case: Case) -> Work:
        """The least work that solves the case."""
        ...

    def build(self, library: str, case: Case) -> Built:
        """Prepare `library` for the case. Runs in a worker process that loads that library only.

        What the callable returns (a number, an array or a tensor; on its third call, the first
        two warm up) must agree between libraries, or the contestant is not timed.
        """
        ...


#: What `python -m bench` takes for several suites at once.
GROUPS = {
    "kernels": (
        "matmul",
        "conv",
        "depthwise",
        "deconv",
        "batchnorm",
        "pool",
        "train_step",
        "roofline",
    ),
}


def contestants(suite: Suite, case: Case) -> Sequence[str]:
    """Who can build this case: `suite.contestants(case)` where a suite has it, else LIBRARIES."""
    chosen = getattr(suite, "contestants", None)
    return suite.LIBRARIES if chosen is None else cast("Sequence[str]", chosen(case))


def slow_to_build(suite: Suite) -> Sequence[str]:
    """Libraries that `--quick` leaves out since they compile for minutes: SLOW_TO_BUILD, if any."""
    return cast("Sequence[str]", getattr(suite, "SLOW_TO_BUILD", ()))


def conclude(
    suites: Iterable[Suite], records: Sequence[dict[str, Any]], directory: Path | None
) -> tuple[list[str], dict[str, Any]]:
    """What suites with a function `conclude(records, directory)` make of the records of a run.

    Lines to print, and entries for the JSON file; figures go into `directory` if there is one.
    """
    lines: list[str] = []
    entries: dict[str, Any] = {}
    for suite in dict.fromkeys(suites):
        function = getattr(suite, "conclude", None)
        if function is not None:
            found = function([r for r in records if r["family"] in suite.FAMILIES], directory)
            lines += found[0]
            entries |= found[1]
    return lines, entries


def names() -> list[str]:
    """The suites that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Suite:
    """The suite of that name; KeyError if there is none."""
    if name not in names():
        raise KeyError(name)
    return cast(Suite, importlib.import_module(f"{__name__}.{name}"))


def suite_of(case: Case) -> Suite:
    """The suite that can build the case; KeyError if none has its family."""
    for name in names():
        suite = load(name)
        if case.family in suite.FAMILIES:
            return suite
    raise KeyError(case.family)
