"""Whole training steps: forward, loss, backward and optimiser, of every published network."""

from __future__ import annotations

from bench import image_step, summation_step
from bench.case import Case
from bench.suites import Built, Work

SUMMARY = "training steps: the summation network, the CNNs of the thesis, its auto-encoder"
FAMILIES = ("train_step", *image_step.FAMILIES)
LIBRARIES = ("tinynn", "numpy", "torch", "torch_compile")
SLOW_TO_BUILD = ("torch_compile",)


def cases(quick: bool) -> list[Case]:
    """The summation network in the sizes it has while it is pruned, then networks of images."""
    hidden = (1000,) if quick else (1000, 50, 1)
    summation = [Case.of("train_step", x=(summation_step.BATCH, 2), hidden=h) for h in hidden]
    return summation + image_step.cases(quick)


def contestants(case: Case) -> tuple[str, ...]:
    """NumPy by hand does the summation network only."""
    return tuple(n for n in LIBRARIES if n != "numpy" or case.family == "train_step")


def work(case: Case) -> Work:
    """The least arithmetic of the step, and the bytes that have to be read and written."""
    return (summation_step if case.family == "train_step" else image_step).work(case)


def build(library: str, case: Case) -> Built:
    """The step, which returns the loss; every library starts from the same parameters."""
    return (summation_step if case.family == "train_step" else image_step).build(library, case)
