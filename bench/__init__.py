"""One harness for every timing: `python -m bench SUITE`, and `bench.measure` in user code.

    timing = bench.measure(plan, x)
    print(timing.median)  # seconds a call

This module and what it imports use the standard library alone, since a worker process that times
one library must not load another.
"""

from bench.case import Case, CaseError
from kernels.timing import Timing, compare, measure

__all__ = ["Case", "CaseError", "Timing", "compare", "measure"]
