"""Compressed layers and networks beside dense ones; where sparse overtakes dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import compressed, compressed_networks
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "dense, sparse, int8, code book, float16, low rank: layers, networks, crossover density"
FAMILIES = (*compressed.FAMILIES, *compressed_networks.FAMILIES)
LIBRARIES = tuple(dict.fromkeys((*compressed.LIBRARIES, *compressed_networks.LIBRARIES)))


def _half(case: Case) -> Any:
    return compressed if case.family in compressed.FAMILIES else compressed_networks


def cases(quick: bool) -> list[Case]:
    """Layers, technique by technique, then networks."""
    return compressed.cases(quick) + compressed_networks.cases(quick)


def contestants(case: Case) -> Sequence[str]:
    """Who has the technique, and whom it is measured by."""
    return _half(case).contestants(case)


def work(case: Case) -> Work:
    """The least work with what the technique leaves of the weights."""
    return _half(case).work(case)


def build(library: str, case: Case) -> Built:
    """A layer or a network on numbers that are the same for all contestants of the case."""
    return _half(case).build(library, case)


def conclude(
    records: Sequence[dict[str, Any]], directory: Path | None
) -> tuple[list[str], dict[str, Any]]:
    """The crossover densities: as lines, as JSON, and as crossover.png in `directory` if given."""
    from bench import crossover  # here: workers need none of it

    found = crossover.crossovers(records)
    if directory is not None:
        crossover.plot(found, directory / "crossover.png")
    means = crossover.summarize(found)
    return crossover.lines(found), {"crossovers": crossover.as_json(found), "means": means}
