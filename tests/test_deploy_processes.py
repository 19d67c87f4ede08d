"""Plans go to other processes: pickled, copied, and in a process that was forked."""

from __future__ import annotations

import copy
import os
import pickle
import warnings

import numpy as np
import pytest

import tinynn as tn
from tinynn import nn
from tinynn.compress import cluster, quantize


def network() -> nn.Module:
    rng = np.random.default_rng(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, rng=rng), nn.ReLU(), nn.GlobalAvgPool2d(), nn.Linear(8, 3, rng=rng)
    ).eval()


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 8, 8, 3), np.float32)


@pytest.mark.parametrize("kind", ["float", "codebook", "int8"])
def test_a_pickled_plan_and_a_copy_give_the_same_bits(kind: str) -> None:
    x = images(40)
    plan = {
        "float": lambda: tn.compile(network(), x, choose="dense", threads=1),
        "codebook": lambda: tn.compile(cluster.kmeans(network(), 4), x, choose="dense"),
        "int8": lambda: tn.compile(quantize.int8(network(), [x]), x, choose="dense"),
    }[kind]()
    want = plan(x)
    for other in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan), copy.copy(plan)):
        np.testing.assert_array_equal(other(x), want)
        assert (other.threads, other.nbytes, str(other)) == (plan.threads, plan.nbytes, str(plan))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_gets_the_same_bits() -> None:
    """GNU OpenMP ends a process that was forked from one with threads, and then asks for some."""
    x = images(40)
    plan = tn.compile(network(), x, choose="dense")
    want = plan(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads are there: they are the point
        child = os.fork()
    if not child:
        equal = False
        try:
            equal = np.array_equal(plan(x), want) and np.array_equal(copy.copy(plan)(x), want)
        finally:
            os._exit(0 if equal else 1)
    assert os.waitpid(child, 0)[1] == 0
