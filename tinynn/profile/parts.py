"""What a profile holds: the passes of each op, their work, their time and their bounds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kernels.timing import Timing
from tinynn.op import Shape
from tinynn.profile.show import picture, table
from tinynn.roofline import Bounded, Limits
from tinynn.storage import PathLike, write_bytes

Bound = Literal["compute", "memory", "overhead"]
BOUNDS: tuple[Bound, ...] = ("compute", "memory", "overhead")


@dataclass(frozen=True)
class Pass(Bounded[Bound]):
    """An op in one direction: its work, its time, and its lower bounds, in seconds."""

    seconds: float  #: median over the rounds
    macs: int  #: multiply-adds
    nbytes: int  #: read and written, each array once; nothing for an op that only gives a view
    bounds: dict[Bound, float]

    @classmethod
    def of(
        cls, seconds: float, macs: int, nbytes: int, overhead: float, limits: Limits, itemsize: int
    ) -> Pass:
        """Set the bounds by the machine's limits; `overhead` is the time of a call by itself."""
        bounds: dict[Bound, float] = {
            "compute": limits.compute_seconds(2 * macs * itemsize / 4),
            "memory": limits.memory_seconds(nbytes),
            "overhead": overhead,
        }
        return cls(seconds, macs, nbytes, bounds)

    @property
    def intensity(self) -> float:
        """Floating-point operations (two a multiply-add) for each byte."""
        return 2 * self.macs / self.nbytes if self.nbytes else 0.0

    @property
    def gflops(self) -> float:
        """10^9 floating-point operations a second."""
        return 2e-9 * self.macs / self.seconds if self.seconds else 0.0

    @property
    def gbytes(self) -> float:
        """10^9 bytes a second."""
        return 1e-9 * self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Layer:
    """One op of the model; `backward` is None where nothing before it is trained."""

    path: str  #: of the module that applied it
    op: str
    output: Shape
    forward: Pass
    backward: Pass | None

    @property
    def passes(self) -> dict[str, Pass]:
        """Both directions, or the one that there is."""
        both = {"forward": self.forward, "backward": self.backward}
        return {name: p for name, p in both.items() if p is not None}


@dataclass(frozen=True)
class Profile:
    """A training step of a model, op by op, without loss and optimiser: `print` it, `draw` it."""

    layers: tuple[Layer, ...]
    batch: Shape
    timing: Timing  #: of the whole step
    limits: Limits

    @property
    def passes(self) -> list[Pass]:
        """Those of all layers."""
        return [p for layer in self.layers for p in layer.passes.values()]

    def seconds_by_bound(self) -> dict[Bound, float]:
        """How much of the time is limited by what."""
        return {
            name: math.fsum(p.seconds for p in self.passes if p.limited_by == name)
            for name in BOUNDS
        }

    def __str__(self) -> str:
        return "\n".join(table(self))

    def draw(self, path: PathLike) -> None:
        """Write a PNG: a bar for each op and direction, and where its bound lies.

        Raises OutputError if it cannot be written.
        """
        write_bytes(path, picture(self))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: times in seconds, limits in FLOP/s and bytes/s."""
        layers = []
        for layer in self.layers:
            entry: dict[str, Any] = {"path": layer.path, "op": layer.op, "output": layer.output}
            for name, p in layer.passes.items():
                entry[name] = asdict(p) | {"limited_by": p.limited_by, "share": p.share}
            layers.append(entry)
        facts = {"batch": self.batch, "timing": asdict(self.timing)}
        return {**facts, "limits": asdict(self.limits), "layers": layers}
