"""The limits of the machine: float32 multiply-adds, and reads from each level of memory."""

from __future__ import annotations

from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "float32 FMA peak, and read bandwidth of L1, L2, L3 and memory"
FAMILIES = ("peak",)
LIBRARIES = ("tinynn",)

LEVELS = ("L1", "L2", "L3", "memory")
_CALL_FLOPS = 200e6  # a call lasts a few milliseconds
_CALL_BYTES = 100e6
_FMA_ELEMENTS = 1024


def cases(quick: bool) -> list[Case]:
    """The FMA peak, then a read from each level."""
    return [Case.of("peak", of="fma"), *(Case.of("peak", of=level) for level in LEVELS)]


def work(case: Case) -> Work:
    """The arithmetic and the bytes of one call, all threads together."""
    elements = case.threads * _elements(case) * _repeats(case)
    if case["of"] == "fma":
        from bench.probes import FMAS_PER_ELEMENT

        return Work(flops=2 * FMAS_PER_ELEMENT * elements, bytes=0)
    return Work(elements, 4 * elements, working_set=4 * case.threads * _elements(case))


def build(library: str, case: Case) -> Built:
    """The probe; for reads the better of two loops."""
    import numpy as np

    from bench import probes

    n, repeats = _elements(case), _repeats(case)
    # Page by page from NumPy, then written: untouched memory would all be one page of zeros.
    buffer = np.empty(case.threads * n + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    a = buffer[start : start + case.threads * n].reshape(case.threads, n)
    a[:] = 0.5
    out = np.empty(case.threads, np.float32)
    if case["of"] == "fma":
        return lambda: probes.fma(a, np.float32(0.25), repeats, out)
    return {
        "one stream": lambda: probes.read(a, repeats, out),
        "four streams": lambda: probes.read_in_four(a, repeats, out),
    }


def _elements(case: Case) -> int:
    """float32 values that each thread runs over: inside the level, outside the one below."""
    from tinynn.environment import cache_sizes

    caches = cache_sizes()
    n = {
        "fma": _FMA_ELEMENTS,
        "L1": caches["L1"] // 8,
        "L2": caches["L2"] // 8,
        "L3": max(caches["L3"] // 16 // case.threads, caches["L2"] // 2),
        "memory": max(caches["L3"], 64 << 20) // case.threads,
    }[str(case["of"])]
    return n // 64 * 64


def _repeats(case: Case) -> int:
    if case["of"] == "fma":
        from bench.probes import FMAS_PER_ELEMENT

        return max(1, round(_CALL_FLOPS / (2 * FMAS_PER_ELEMENT * _elements(case))))
    return max(1, round(_CALL_BYTES / (4 * _elements(case))))
