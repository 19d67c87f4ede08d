"""Where a window lies: output sizes and paddings of everything that slides over an image."""

from __future__ import annotations

from typing import Literal, NamedTuple

Pair = tuple[int, int]
#: "same": output = ceil(input / stride), the odd row or column of zeros at the end; "valid": none;
#: or ((top, bottom), (left, right)).
Padding = Literal["same", "valid"] | tuple[Pair, Pair]


class Window(NamedTuple):
    """A sliding window: everything about it but the image's size. Pairs are (rows, columns)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))  #: ((top, bottom), (left, right))
    dilation: Pair = (1, 1)

    def output(self, height: int, width: int) -> Pair:
        """The number of window positions along rows and columns of an image of this size.

        Raises ValueError if the window does not fit once.
        """
        sizes = []
        for n, k, s, (before, after), d in zip(
            (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            room = n + before + after - ((k - 1) * d + 1)
            if room < 0 or n < 1:
                raise ValueError(f"window {self} does not fit an image of {height} x {width}")
            sizes.append(room // s + 1)
        return sizes[0], sizes[1]


def window(
    height: int,
    width: int,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Padding = "valid",
    dilation: Pair = (1, 1),
) -> Window:
    """The window with its padding as numbers, for an image of height x width."""
    if padding == "valid":
        padding = ((0, 0), (0, 0))
    elif padding == "same":
        sides = []
        for n, k, s, d in zip((height, width), kernel, stride, dilation, strict=True):
            out = -(-n // s)
            total = max(0, (out - 1) * s + (k - 1) * d + 1 - n)
            sides.append((total // 2, total - total // 2))
        padding = (sides[0], sides[1])
    return Window(kernel, stride, padding, dilation)
