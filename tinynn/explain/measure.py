"""Run a model's layers by every technique, and set the bounds of each way from what it has to do.

Techniques change weights, on a model whose batch norms are folded as a plan folds them; then a plan
that takes the technique's kernels is timed layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import numpy.typing as npt

from kernels.timing import compare
from tinynn import nn, roofline
from tinynn.compress import cluster, factorize, fold_batchnorm, quantize, sparsify
from tinynn.deploy import Plan, compile
from tinynn.deploy.kernels import KERNELS, Stored
from tinynn.deploy.steps import Layer as Step
from tinynn.environment import cpu_features
from tinynn.errors import ConfigError, TinynnError
from tinynn.explain.parts import AS_IT_IS, DENSE, Bound, Explanation, Layer, Way
from tinynn.nn.module import Module
from tinynn.op import Array
from tinynn.roofline import Limits

_PASSES = 3  #: over all techniques, so that a disturbance does not hit one alone
_ROUNDS = 10  #: of a pass
_PLAN_ROUNDS = 7
_HARDLY = 1e-9  #: a density that leaves one weight or block a layer
_SPARSE = ("sparse", "sparse4x1")

#: Products of bytes that an instruction adds up in the place of one of float32.
_DOT = 4 if {"avx512vnni", "avxvnni", "dotprod", "i8mm"} & set(cpu_features()) else 2

Change = Callable[[Module, Array, "Settings"], Module]


@dataclass(frozen=True)
class Settings:
    """What the techniques are told: see `explain`."""

    density: float
    entries: int


# --- the techniques -------------------------------------------------------------------------------


def _same(model: Module, x: Array, told: Settings) -> Module:
    return model


def _thin(model: Module, x: Array, told: Settings) -> Module:
    keep = sparsify.share(told.density)
    return sparsify.weights(model, sparsify.magnitude, keep, only=_mixing(model))


def _thin_blocks(model: Module, x: Array, told: Settings) -> Module:
    keep = sparsify.blocks(told.density)
    return sparsify.weights(model, sparsify.magnitude, keep, only=_mixing(model))


def _share(model: Module, x: Array, told: Settings) -> Module:
    return cluster.kmeans(model, told.entries, only=_mixing(model))


def _factor(model: Module, x: Array, told: Settings) -> Module:
    return factorize.layers(model, x, _half)


def _bytes(model: Module, x: Array, told: Settings) -> Module:
    return quantize.int8(model, [x])


def _half(values: Array, size: int) -> int:
    """The rank at which two factors have half the weights of the whole, as K x K as one matrix."""
    inputs, outputs = len(values), size // len(values)
    return max(1, size // (2 * (inputs + outputs)))


def _mixing(model: Module) -> list[str]:
    """The weights of linear layers and convolutions that are not depthwise."""
    return [
        f"{path}.weight".lstrip(".")
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]


@dataclass(frozen=True)
class Technique:
    """How the model is changed, and which kernel the plan is told to take."""

    change: Change
    kernel: str


TECHNIQUES: dict[str, Technique] = {
    DENSE: Technique(_same, "dense"),
    "sparse": Technique(_thin, "sparse"),
    "sparse4x1": Technique(_thin_blocks, "sparse4x1"),
    "codebook": Technique(_share, "codebook"),
    "float16": Technique(_same, "float16"),
    "lowrank": Technique(_factor, "dense"),
    "int8": Technique(_bytes, "dense"),
}


# --- explain --------------------------------------------------------------------------------------


def explain(
    model: Module,
    example: npt.ArrayLike,
    *,
    density: float = 0.1,
    entries: int = 16,
    threads: int = 1,
    limits: Limits | None = None,
) -> Explanation:
    """Each layer of `model`, in eval mode, on a batch like `example`, dense and by every technique.

    Techniques change the floating weights, of a quantised model as `quantize.floating` gives them.
    A model that is quantised already, or whose weights a plan runs by another kernel than the dense
    one, is shown "as it is", too.

    Sparse layers keep the share `density` of their weights, or of blocks of 4 of them, with the
    largest magnitude; code books have `entries` values a layer; low rank is the one at which a
    layer has half its weights. `limits` are those of this machine unless given.

    Raises ConfigError for a density outside 0 < density <= 0.8, above which no plan takes sparse
    kernels, or entries outside 2 ... 256, and CompileError for what no plan can express.
    """
    if not 0 < density <= 0.8:
        raise ConfigError(f"explain: required 0 < density <= 0.8; came {density}")
    if entries not in range(2, 257):  # else every layer would lack a code book for no reason
        raise ConfigError(f"explain: required entries from 2 to 256; came {entries}")
    x, told = np.ascontiguousarray(example, np.float32), Settings(density, entries)
    limits = roofline.limits([threads])[0] if limits is None else limits
    folded = fold_batchnorm(quantize.floating(model), x).eval()
    plans = _plans(folded, x, told, threads)
    calls = {name: _smallest_call(name, told, threads) for name in plans}
    itself = _itself(model, x, threads)
    if itself is not None:
        plans = {DENSE: plans.pop(DENSE), AS_IT_IS: itself, **plans}
    bare = _plans(folded, x, replace(told, density=_HARDLY), threads, only=_SPARSE)
    names = [*list(plans)[: 1 + (AS_IT_IS in plans)], *list(TECHNIQUES)[1:]]  # dense is first
    seconds = _times({**plans, **{f"bare {name}": plan for name, plan in bare.items()}}, x)
    dense = plans[DENSE]
    chunks = -(-len(x) // dense.images_at_once(len(x)))
    layers = []
    for i, step in enumerate(dense.network.layers):
        rows = len(x) * math.prod(dense.network.shapes[step.output][:-1])
        costs = _Costs(limits, len(x), chunks, rows)
        ways = []
        for name in names:
            if name not in plans:
                ways.append(Way(name, None, 0, 0, 0, {}))
                continue
            plan = plans[name]
            mine = [i] if name == DENSE else _standing_for(plan, dense, i)
            way = costs.way(name, plan, mine, seconds[name], calls)
            if name in bare and way.seconds is not None:
                left = seconds[f"bare {name}"]
                way = replace(way, fixed=sum(left[k] for k in _standing_for(bare[name], dense, i)))
            ways.append(way)
        weight = step.arrays.get("weight")
        others = [way for way in ways[1:] if weight is not None or way.seconds is not None]
        layers.append(
            Layer(
                step.path or "-",
                step.step.kind,
                None if weight is None else weight.shape,
                dense.network.shapes[step.output],
                rows,
                ways[0],
                tuple(others),
            )
        )
    whole = compare(
        {name: lambda plan=plan: plan(x) for name, plan in plans.items()},  # type: ignore[misc]
        rounds=_PLAN_ROUNDS,
    )
    memory = {name: plan.resident_nbytes for name, plan in plans.items()}
    settings = {"density": density, "entries": entries, "threads": threads}
    return Explanation(tuple(layers), len(x), chunks, limits, whole, memory, settings)


def _plans(
    folded: Module,
    x: Array,
    told: Settings,
    threads: int,
    only: Collection[str] | None = None,
) -> dict[str, Plan]:
    """A plan for each technique, or for `only` some, that has a kernel for a layer of the model.

    Some refuse a model for one of its layers: they have no plan either.
    """
    plans: dict[str, Plan] = {}
    for name in TECHNIQUES if only is None else only:
        technique = TECHNIQUES[name]
        try:
            changed = technique.change(folded, x, told) if _mixing(folded) else folded
            plans[name] = compile(changed, x, threads=threads, choose=technique.kernel)
        except TinynnError:
            if name == DENSE:
                raise
    return plans


def _itself(model: Module, x: Array, threads: int) -> Plan | None:
    """The model's own plan, if there is one that is not the dense one."""
    try:
        plan = compile(model.copy().eval(), x, threads=threads)
    except TinynnError:  # of quantised layers: those of floating ones have been compiled
        return None
    return plan if any(_runs_by(step) != DENSE for step in plan.network.layers) else None


def _smallest_call(name: str, told: Settings, threads: int) -> float:
    """The seconds of the technique's kernel on next to nothing: what its set-up takes."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False, rng=rng))
    x = np.ones((1, 4), np.float32)
    if name == "lowrank":
        net = nn.Sequential(net[0], nn.Linear(8, 4, bias=False, rng=rng))
        plan = compile(net, x, threads=threads, choose="dense")
    else:
        plan = _plans(net, x, told, threads, only=[name])[name]
    return min(plan.profile(x, rounds=50).seconds for _ in range(_PASSES))


def _times(plans: Mapping[str, Plan], x: Array) -> dict[str, list[float]]:
    """The seconds of each layer of each plan: the median over passes of medians over rounds."""
    passes: dict[str, list[list[float]]] = {name: [] for name in plans}
    for _ in range(_PASSES):
        for name, plan in plans.items():
            found = plan.profile(x, rounds=_ROUNDS)
            passes[name].append([layer.seconds for layer in found.layers])
    return {name: [median(s) for s in zip(*rows, strict=True)] for name, rows in passes.items()}


def _standing_for(plan: Plan, dense: Plan, i: int) -> list[int]:
    """The layers of a plan that stand for layer i of the dense one: of its path, or two factors
    below it; of a module that is used several times, those of the same use."""
    step = dense.network.layers[i]
    if "weight" not in step.arrays:
        return []
    path = _path(step)
    found = _of_paths(plan, path, *(f"{path}.{k}".lstrip(".") for k in (0, 1)))
    uses = _of_paths(dense, path)
    ends = [len(found) * k // len(uses) for k in (uses.index(i), uses.index(i) + 1)]
    return found[slice(*ends)]


def _of_paths(plan: Plan, *paths: str) -> list[int]:
    """The layers with weights of the modules at these paths."""
    return [
        i
        for i, layer in enumerate(plan.network.layers)
        if "weight" in layer.arrays and _path(layer) in paths
    ]


def _path(step: Step) -> str:
    """The layer's path in the model that was not quantised: that puts `layer` around modules."""
    return ".".join(name for name in step.path.split(".") if name != "layer")


class _Costs:
    """What ways of running a layer have to do, and the bounds that follow from that."""

    def __init__(self, limits: Limits, batch: int, chunks: int, rows: int) -> None:
        self._limits, self._batch, self._chunks, self._rows = limits, batch, chunks, rows

    def way(
        self,
        name: str,
        plan: Plan,
        places: list[int],
        seconds: list[float],
        calls: Mapping[str, float],
    ) -> Way:
        """The layers at `places` of a plan as one way of running a layer."""
        network = plan.network
        steps = [network.layers[i] for i in places]
        macs = weights = moved = loads = 0.0
        for step in steps:
            values = (*step.inputs, step.output)
            left, nbytes, per_weight = _stored(step)
            shapes = [network.shapes[v] for v in values]
            full = self._batch * step.step.macs(shapes[:-1], step.arrays, shapes[-1]) * left
            macs += full
            weights += self._chunks * nbytes
            sizes = [math.prod(network.shapes[v]) * network.dtypes[v].itemsize for v in values]
            moved += self._batch * sum(sizes)
            loads += full * per_weight
        runs = bool(steps) and _has_kernel(name, steps)
        by = {_runs_by(step) for step in steps} if name == AS_IT_IS else {name}
        products = _DOT if by == {"int8"} else 1
        bounds: dict[Bound, float] = {
            "compute": self._limits.compute_seconds(2 * macs / products),
            "memory": self._limits.memory_seconds(weights + moved, self._set(weights, moved)),
            "index": loads / self._limits.bandwidths["L1"],
            "overhead": max((calls[k] for k in by if k in calls), default=0.0),
        }
        taken = sum(seconds[i] for i in places) if runs else None
        rank = steps[0].arrays["weight"].shape[-1] if name == "lowrank" and steps else None
        return Way(name, taken, macs, weights, moved, bounds, rank)

    def _set(self, weights: float, moved: float) -> float:
        """The bytes that one chunk of images needs: what has to fit a cache."""
        return (weights + moved) / self._chunks


def _runs_by(step: Step) -> str:
    """The technique whose kernel runs the layer."""
    weight = step.arrays.get("weight")
    if weight is not None and weight.dtype == np.int8:
        return "int8"
    return step.kernel


def _has_kernel(name: str, steps: list[Step]) -> bool:
    if name == AS_IT_IS:
        return True
    if name == "lowrank":
        return len(steps) == 2
    if name == "int8":
        return all(step.arrays["weight"].dtype == np.int8 for step in steps)
    return all(step.kernel == TECHNIQUES[name].kernel for step in steps)


def _stored(step: Step) -> Stored:
    if "weight" not in step.arrays:
        return Stored(1.0, float(sum(a.nbytes for a in step.arrays.values())), 0.0)
    return KERNELS[step.kernel].stored(step)
