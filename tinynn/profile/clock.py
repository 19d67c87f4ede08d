"""Time the ops of a training step as it runs, and find out what each has to do."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels._jit import get_threads
from kernels.timing import Timing
from tinynn import roofline
from tinynn.errors import GraphError
from tinynn.nn.module import Module, mode, running_module
from tinynn.op import Array, Op, Shape
from tinynn.profile.parts import Layer, Pass, Profile
from tinynn.roofline import Limits
from tinynn.tensor import Tensor, apply, gradients, recording

_WARM_UP = 2
_ROUNDS = (5, 300)  #: at the least, and at the most


def step(
    model: Module,
    example: npt.ArrayLike,
    *,
    seconds: float = 2.0,
    limits: Limits | None = None,
) -> Profile:
    """Profile the forward and backward pass of a copy of `model`, in training mode, on a batch.

    As many rounds as fit into `seconds` (5 to 300), after two that compile and warm up, on as many
    threads as kernels use now. `limits` are those of this machine unless given: then they are
    measured, or found where an earlier measurement left them.
    Raises GraphError if the model does not give one Tensor, or not by the same ops every time.
    """
    x = Tensor(example)
    limits = roofline.limits([get_threads()])[0] if limits is None else limits
    model = model.copy()
    rng = np.random.default_rng(0)
    with mode(model, training=True):
        works = _study(model, x, rng)
        times, total = _rounds(lambda: model(x), seconds, rng)
    if [w.op.name for w in works] != [t.op for t in times]:
        raise GraphError("profile: the model computed other ops the second time")
    calls: dict[str, _Time] = {}
    layers = []
    for work, t in zip(works, times, strict=True):
        if t.op not in calls:
            calls[t.op] = _smallest_call(type(work.op), work.dtype)
        call, size = calls[t.op], work.dtype.itemsize
        forward = Pass.of(t.forward, work.macs, work.nbytes, call.forward, limits, size)
        back = None
        if work.gradient_nbytes is not None:
            amount = (work.gradient_macs, work.gradient_nbytes)
            back = Pass.of(t.backward, *amount, call.backward, limits, size)
        name = t.op + ("+relu" if getattr(work.op, "relu", False) else "")
        layers.append(Layer(work.path, name, work.output, forward, back))
    return Profile(tuple(layers), x.shape, Timing.of(total, 1), limits)


@dataclass
class _Work:
    """What an op has to do on the traced batch."""

    op: Op
    path: str
    output: Shape
    dtype: np.dtype[Any]  #: of the output
    macs: int
    nbytes: int
    gradient_macs: int = 0
    gradient_nbytes: int | None = None


def _study(model: Module, x: Tensor, rng: np.random.Generator) -> list[_Work]:
    """The work of every op of a step, forward and backward; compiles on the way."""
    paths = {id(m): path for path, m in model.named_modules()}
    works: list[_Work] = []
    made: list[Tensor] = []  # they stay alive: their ids are keys

    def record(op: Op, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read = [t._data for t in inputs]
        nbytes = _moved(read, [output._data])
        path = paths.get(id(running_module()), "")
        macs = op.macs(*(t.shape for t in inputs))
        works.append(_Work(op, path, output.shape, output.dtype, macs, nbytes))
        made.append(output)

    with recording(record):
        result = model(x)
    work_of = {id(t): work for t, work in zip(made, works, strict=True)}
    for tensor, upstream in gradients(_single(result), _seed(result, rng), False):
        node = tensor._node
        if node is None:
            continue
        wanted = [t.requires_grad for t in node.inputs]
        saved = [a for a in node.saved or () if isinstance(a, np.ndarray)]
        found = zip(wanted, node.gradients(upstream), strict=True)
        written = [np.asarray(g) for want, g in found if want and g is not None]
        work = work_of[id(tensor)]
        # a product has as many gradients with as many multiply-adds: by data, by weights
        work.gradient_macs = work.macs * sum(wanted[:2])
        work.gradient_nbytes = _moved([upstream, *saved], written)
    return works


def _moved(read: Sequence[Array], written: Sequence[Array]) -> int:
    """The bytes of all different arrays, or 0 where what is written is a view of what is read."""
    new = [w for w in written if not any(np.may_share_memory(w, r) for r in read)]
    if not new:
        return 0
    different = {(a.ctypes.data, a.nbytes): a for a in [*read, *new]}
    return sum(a.nbytes for a in different.values())


@dataclass
class _Time:
    """Seconds of an op."""

    op: str
    forward: float
    backward: float


def _rounds(
    run: Callable[[], Tensor],
    seconds: float,
    rng: np.random.Generator,
    middle: Callable[[Sequence[float]], float] = median,
) -> tuple[list[_Time], list[float]]:
    """Times of the ops that `run` applies, and of the whole; engine and modules included."""
    ops: list[str] = []
    forward: list[list[float]] = []
    backward: list[list[float]] = []
    total: list[float] = []
    warm = 0
    seed = _seed(run(), rng)
    least, most = _ROUNDS
    end = 0.0
    enabled = gc.isenabled()
    gc.disable()
    try:
        while len(total) < least or (len(total) < most and time.perf_counter() < end):
            names, ahead, back, whole = _one_round(run, seed, time.perf_counter)
            ops = ops or names
            if names != ops:
                raise GraphError("profile: the model's ops must not depend on the round")
            warm += 1
            if warm == _WARM_UP:
                end = time.perf_counter() + seconds
            if warm > _WARM_UP:
                forward.append(ahead)
                backward.append(back)
                total.append(whole)
    finally:
        if enabled:
            gc.enable()
    columns = zip(ops, zip(*forward, strict=True), zip(*backward, strict=True), strict=True)
    return [_Time(op, middle(f), middle(b)) for op, f, b in columns], total


def _one_round(
    run: Callable[[], Tensor], seed: Array, clock: Callable[[], float]
) -> tuple[list[str], list[float], list[float], float]:
    names: list[str] = []
    forward: list[float] = []
    made: list[Tensor] = []
    start = last = clock()

    def record(op: Op, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal last
        forward.append(clock() - last)
        names.append(op.name)
        made.append(output)
        last = clock()

    with recording(record):
        result = run()
    position = {id(t): i for i, t in enumerate(made)}
    backward = [0.0] * len(made)
    running = None
    last = clock()
    for tensor, _ in gradients(result, seed, False):
        # the rule of the tensor handed out before has run between then and now
        if running is not None:
            backward[running] = clock() - last
        running = position.get(id(tensor))
        last = clock()
    return names, forward, backward, clock() - start


def _smallest_call(op: type[Op], dtype: np.dtype[Any]) -> _Time:
    """The time of such an op on the smallest of its samples: next to nothing but the call.

    As it bounds others from below, what the best round reached; nothing of an op without samples.
    """
    samples = op.samples()
    if not samples:
        return _Time(op.name, 0.0, 0.0)
    sample = min(samples, key=lambda s: sum(math.prod(shape) for shape in s.shapes))
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(sample.low, sample.high, shape).astype(dtype) for shape in sample.shapes]
    if sample.labels is not None:
        arrays[-1] = rng.integers(0, sample.labels, sample.shapes[-1])
    operands = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    return _rounds(lambda: apply(sample.op, *operands), 0.05, rng, min)[0][0]


def _single(result: object) -> Tensor:
    if not isinstance(result, Tensor) or not result.requires_grad:
        came = "one without gradient" if isinstance(result, Tensor) else type(result).__name__
        raise GraphError(f"profile: required a model that gives one trained Tensor; came {came}")
    return result


def _seed(result: Tensor, rng: np.random.Generator) -> Array:
    """A gradient by the model's result, as a loss would give one."""
    return np.asarray(rng.standard_normal(result.shape), result.dtype)
