"""What an explanation holds: each layer, each way of running it, predicted and measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kernels.timing import Timing
from tinynn.explain.rules import sentence
from tinynn.explain.show import table
from tinynn.op import Shape
from tinynn.roofline import Bounded, Limits

Bound = Literal["compute", "memory", "index", "overhead"]

DENSE = "dense"
AS_IT_IS = "as it is"  #: the model without a change, by the kernels that a plan chooses


@dataclass(frozen=True)
class Way(Bounded[Bound]):
    """A layer run by one technique, on the whole batch."""

    technique: str
    seconds: float | None  #: measured; None where no kernel runs the layer so
    macs: float  #: multiply-adds that it makes
    weight_bytes: float  #: read, once for each chunk of images
    activation_bytes: float  #: read and written
    bounds: dict[Bound, float]  #: lower bounds in seconds, from these
    rank: int | None = None  #: of factors that stand for the layer
    fixed: float | None = None  #: seconds that remain with hardly a weight left; sparse ways only


@dataclass(frozen=True)
class Layer:
    """A layer of the plan: `dense`, and the other ways to run it if it mixes channels."""

    path: str  #: of the module that it was
    kind: str  #: the step: conv, linear, depthwise, ...
    weight: Shape | None
    output: Shape  #: without the batch
    rows: int  #: pixels of all images, or the batch: each takes every weight
    dense: Way
    others: tuple[Way, ...]

    @property
    def mixes(self) -> bool:
        """Whether every output is a sum over all channels: not so depthwise."""
        return self.kind in ("conv", "linear")

    @property
    def inputs(self) -> int:
        """How many numbers each output is a sum of."""
        taps = (self.weight or ())[: -1 if self.mixes else -2]
        return math.prod(taps)

    @property
    def channels(self) -> int:
        """How many channels the result has."""
        return self.output[-1] if self.output else 0

    def gain(self, way: Way) -> float | None:
        """The dense time / the time of this way; None where it cannot be run."""
        if way.seconds is None or self.dense.seconds is None:
            return None
        return self.dense.seconds / way.seconds if way.seconds else None

    def why(self, way: Way) -> str:
        """In a sentence, whether the technique helps here and what decides that."""
        return sentence(self, way)


@dataclass(frozen=True)
class Explanation:
    """All layers of a model: `print` it."""

    layers: tuple[Layer, ...]
    batch: int
    chunks: int  #: of images, which pass through the network one after the other
    limits: Limits
    plans: dict[str, Timing]  #: of whole networks, by technique
    memory: dict[str, int]  #: bytes of weights that whole networks keep, by technique
    settings: dict[str, float]  #: what the techniques were told

    def __str__(self) -> str:
        return "\n".join(table(self))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: times in seconds, limits in FLOP/s and bytes/s."""
        layers = []
        for layer in self.layers:
            ways = [
                asdict(way) | {"gain": layer.gain(way), "why": layer.why(way)}
                for way in layer.others
            ]
            entry = asdict(layer) | {"dense": asdict(layer.dense), "others": ways}
            layers.append(entry)
        facts = {"batch": self.batch, "chunks": self.chunks, "settings": self.settings}
        plans = {name: asdict(timing) for name, timing in self.plans.items()}
        plans = {name: plan | {"memory": self.memory[name]} for name, plan in plans.items()}
        return {**facts, "limits": asdict(self.limits), "plans": plans, "layers": layers}
