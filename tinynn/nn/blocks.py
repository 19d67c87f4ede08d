"""Blocks of layers: residual, bottleneck, separable residual and inception.

The shortcut of a residual block has no weights: where the block reduces the image it is a 2x2
average pool, and new channels are zeros, split front and back (Çallı 2017, section 2.4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinynn import ops
from tinynn.errors import ConfigError, ShapeError
from tinynn.nn.conv import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    DepthwiseConv2d,
    MaxPool2d,
    PointwiseConv2d,
)
from tinynn.nn.layers import ReLU
from tinynn.nn.module import Module, Sequential
from tinynn.tensor import Tensor


class Add(Module):
    """The sum of what its parts make of one input: `Add(body, shortcut)`."""

    def __init__(self, *parts: Module) -> None:
        _name_parts(self, parts)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (part(x) for _, part in self.named_children())
        for other in others:
            if other.shape != first.shape:
                raise ShapeError(f"Add: required equal shapes; came {first.shape}, {other.shape}")
            first = ops.add(first, other)
        return first


class Concat(Module):
    """What its parts make of one input, side by side along the channels."""

    def __init__(self, *parts: Module) -> None:
        _name_parts(self, parts)

    def forward(self, x: Tensor) -> Tensor:
        return ops.concat([part(x) for _, part in self.named_children()], axis=-1)


class Shortcut(Module):
    """The identity, with a smaller image (average pool) and more channels (zeros) where needed.

    The new channels lie before and after the old ones: `front` and `back` count them. Removing
    channels keeps the order, so that a pruned shortcut has smaller counts and nothing else.
    """

    channel_padding = ("front", "back")

    def __init__(self, m_in: int, m_out: int, *, stride: int = 1) -> None:
        if m_out < m_in:
            raise ConfigError(f"Shortcut: required m_out >= m_in; came {m_in} and {m_out}")
        self.pool = AvgPool2d(2, stride=stride, padding="same") if stride > 1 else None
        self.front = (m_out - m_in) // 2
        self.back = m_out - m_in - self.front

    def check(self) -> None:
        """Raise ConfigError unless both counts are whole numbers >= 0."""
        counts = [vars(self).get(name) for name in ("front", "back")]
        if not all(type(n) is int and n >= 0 for n in counts) or "pool" not in vars(self):
            raise ConfigError(
                f"Shortcut: required front and back >= 0, a pool or none; came {counts}"
            )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else self.pool(x)
        if not self.front and not self.back:
            return x
        return ops.pad(x, [(0, 0)] * 3 + [(self.front, self.back)])


class Scatter(Module):
    """Channels at their places among `width`, zeros elsewhere: the end of a thinned branch."""

    channel_padding = ("places", "width")

    def __init__(self, places: Sequence[int], width: int) -> None:
        self.places, self.width = tuple(int(p) for p in places), int(width)
        self.check()

    def check(self) -> None:
        """Raise ConfigError unless there are places, all different and within the width."""
        numbers = (*self.places, self.width) if isinstance(self.places, tuple) else ()
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        inside = whole and all(0 <= p < self.width for p in self.places)
        if not numbers[1:] or not inside or len(set(self.places)) < len(self.places):
            raise ConfigError(
                "Scatter: required one place or more, all different and below the width; came "
                f"{self.places!r:.60} and {self.width!r}"
            )

    def forward(self, x: Tensor) -> Tensor:
        return ops.scatter(x, self.places, self.width)

    def extra(self) -> str:
        """How many channels become how many."""
        return f"{len(self.places)} -> {self.width}"


class ResidualBlock(Sequential):
    """conv-BN-ReLU-conv-BN plus the shortcut, then ReLU (He et al. 2016)."""

    def __init__(self, m_in: int, m_out: int, *, stride: int = 1, rng: np.random.Generator) -> None:
        body = Sequential(
            Conv2d(m_in, m_out, 3, stride=stride, bias=False, rng=rng),
            BatchNorm(m_out),
            ReLU(),
            Conv2d(m_out, m_out, 3, bias=False, rng=rng),
            BatchNorm(m_out),
        )
        super().__init__(Add(body, Shortcut(m_in, m_out, stride=stride)), ReLU())


class BottleneckBlock(Sequential):
    """1x1 down to m_out / 4, 3x3, 1x1 up, plus the shortcut, then ReLU (He et al. 2016; Çallı's
    draft 2017, section 2.3.2)."""

    def __init__(self, m_in: int, m_out: int, *, stride: int = 1, rng: np.random.Generator) -> None:
        narrow = max(1, m_out // 4)
        body = Sequential(
            PointwiseConv2d(m_in, narrow, bias=False, rng=rng),
            BatchNorm(narrow),
            ReLU(),
            Conv2d(narrow, narrow, 3, stride=stride, bias=False, rng=rng),
            BatchNorm(narrow),
            ReLU(),
            PointwiseConv2d(narrow, m_out, bias=False, rng=rng),
            BatchNorm(m_out),
        )
        super().__init__(Add(body, Shortcut(m_in, m_out, stride=stride)), ReLU())


class SeparableResidualBlock(Add):
    """Full pre-activation with separable convolutions (Çallı 2017, section 2.4.1).

    BN-ReLU-depthwise 3x3-pointwise twice, plus the shortcut; the stride sits in the first
    depthwise, the first pointwise makes the new channels. `nonlinear` puts batch normalisation and
    ReLU between depthwise and pointwise too, `bias` gives each of them a bias.
    """

    def __init__(
        self,
        m_in: int,
        m_out: int,
        *,
        stride: int = 1,
        nonlinear: bool = False,
        bias: bool = False,
        rng: np.random.Generator,
    ) -> None:
        def half(m_in: int, stride: int) -> list[Module]:
            between = [BatchNorm(m_in), ReLU()] if nonlinear else []
            return [
                BatchNorm(m_in),
                ReLU(),
                DepthwiseConv2d(m_in, 3, stride=stride, bias=bias, rng=rng),
                *between,
                PointwiseConv2d(m_in, m_out, bias=bias, rng=rng),
            ]

        body = Sequential(*half(m_in, stride), *half(m_out, 1))
        super().__init__(body, Shortcut(m_in, m_out, stride=stride))


class InceptionBlock(Concat):
    """1x1, 1x1-3x3, 1x1-5x5 and pool-1x1 side by side (Szegedy et al. 2015, "Going Deeper").

    `widths` are the channels of the four branches' results; the 3x3 and 5x5 branches first reduce
    to half of theirs.
    """

    def __init__(
        self, m_in: int, widths: tuple[int, int, int, int], *, rng: np.random.Generator
    ) -> None:
        one, three, five, pooled = widths
        super().__init__(
            Sequential(*_unit(m_in, one, 1, rng)),
            Sequential(*_unit(m_in, _half(three), 1, rng), *_unit(_half(three), three, 3, rng)),
            Sequential(*_unit(m_in, _half(five), 1, rng), *_unit(_half(five), five, 5, rng)),
            Sequential(MaxPool2d(3, stride=1, padding="same"), *_unit(m_in, pooled, 1, rng)),
        )


def _unit(m_in: int, m_out: int, kernel: int, rng: np.random.Generator) -> list[Module]:
    return [Conv2d(m_in, m_out, kernel, bias=False, rng=rng), BatchNorm(m_out), ReLU()]


def _half(m: int) -> int:
    return max(1, m // 2)


def _name_parts(module: Module, parts: tuple[Module, ...]) -> None:
    if not parts or not all(isinstance(p, Module) for p in parts):
        raise ConfigError(f"{type(module).__name__}: required one module or more; came {parts}")
    for i, part in enumerate(parts):
        setattr(module, str(i), part)
