"""The limits of the machine: float32 multiply-adds, and reads from each level of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.case import Case
from bench.suites import Built, Work

if TYPE_CHECKING:
    from tinynn.roofline import Probe

SUMMARY = "float32 FMA peak, and read bandwidth of L1, L2, L3 and memory"
FAMILIES = ("peak",)
LIBRARIES = ("tinynn",)


def cases(quick: bool) -> list[Case]:
    """The FMA peak, then a read from each level."""
    from tinynn.roofline import LEVELS

    return [Case.of("peak", of=of) for of in ("fma", *LEVELS)]


def work(case: Case) -> Work:
    """The arithmetic and the bytes of one call, all threads together."""
    probe = _probe(case)
    return Work(probe.flops, probe.nbytes, probe.working_set if probe.nbytes else None)


def build(library: str, case: Case) -> Built:
    """The probe; for reads the better of two loops."""
    return _probe(case).calls()


def _probe(case: Case) -> Probe:
    from tinynn.roofline import Probe

    return Probe(str(case["of"]), case.threads)
