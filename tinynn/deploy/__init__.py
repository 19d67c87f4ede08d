"""Plans: networks that run without Tensors and Modules, in one call."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tinynn.deploy.choose import choose_kernels
from tinynn.deploy.fuse import fuse
from tinynn.deploy.layout import network
from tinynn.deploy.lower import lower
from tinynn.deploy.plan import LayerTime, Plan, Profile
from tinynn.deploy.unread import blank_unread
from tinynn.errors import CompileError
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
    that is exact; what only training does, and weights whose results nothing reads, are left out.
    A model of fixed ranges (`quantize.int8`, `quantize.low_bit`) runs on integer kernels and gives
    the bits that `compress.integers` says: see `tinynn.deploy.quantized`. One whose ranges are
    found at run time (`quantize.dynamic`) sums integers, too, and equals the model but for the
    rounding of its floating sums, which can take a number to the next step of a later grid; an
    image that is not finite gives NaN.

    `threads`: as many as `set_threads` allows at each call, unless given. `choose`: "measure", the
    name of a kernel ("dense", "sparse", "sparse4x1", "codebook", "float16", "separable"), or one
    for some paths: see `choose_kernels`. "codebook" and "float16" keep weights packed in memory.
    Where kernels are as fast, measuring may choose another one the next time, which rounds
    differently; a plan, once made or loaded, gives the same bits at every call and for any number
    of threads.

    Raises CompileError, which names the op, for what no plan can express, ConfigError for kernels
    that cannot be chosen, DTypeError unless the model is of float32.
    """
    shape = np.shape(example._data if isinstance(example, Tensor) else example)
    if not shape or 0 in shape:
        raise CompileError(f"compile: required a batch as example, not empty; came {shape}")
    graph = trace(model, example)
    sketch = blank_unread(fuse(lower(graph)))
    whole = network(sketch.shapes, sketch.layers, sketch.output)
    images = Plan(whole, threads).images_at_once(graph.input.shape[0])
    return Plan(choose_kernels(whole, choose, images), threads)
