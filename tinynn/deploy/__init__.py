"""Plans: networks that run without Tensors and Modules, in one call."""

from __future__ import annotations

from collections.abc import Mapping

import numpy.typing as npt

from tinynn.deploy.fuse import fuse
from tinynn.deploy.layout import network
from tinynn.deploy.lower import lower
from tinynn.deploy.plan import LayerTime, Plan, Profile
from tinynn.graph import trace
from tinynn.nn.module import Module
from tinynn.tensor import Tensor

__all__ = ["LayerTime", "Plan", "Profile", "compile"]


def compile(
    model: Module,
    example: npt.ArrayLike | Tensor,
    *,
    threads: int | None = None,
    choose: str | Mapping[str, str] = "measure",
) -> Plan:
    """Make a plan of `model` in eval mode, for batches of images like those of `example`.

    Batch normalisation, biases, ReLU and residual additions go into the layers before them where
    that is exact; what only training does is left out. `threads`: as many as `set_threads` allows
    at each call, unless given.

    Raises CompileError, which names the op, for what no plan can express, DTypeError unless the
    model is of float32.
    """
    sketch = fuse(lower(trace(model, example)))
    return Plan(network(sketch.shapes, sketch.layers, sketch.output), threads)
