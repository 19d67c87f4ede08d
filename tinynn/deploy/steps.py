"""The steps of a plan: what each computes from the shapes of one image, and how it is called.

A step is a frozen dataclass of plain attributes, registered by its kind, so that a file can name
it. Shapes leave out the batch: an image (H, W, C), a row of numbers (N,). Whatever a step is given,
from a model or from a file, passes `result` first, which raises ShapeError where it does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np

from kernels import prepack, prepack_int8
from kernels.geometry import Pair, Window
from kernels.prepack import Packed
from kernels.program import Program, Slot
from tinynn.deploy.origin import Origin
from tinynn.errors import ShapeError
from tinynn.op import Array, Shape

Arrays = Mapping[str, Array]
Sides = tuple[Pair, Pair]

#: What values consist of.
FLOAT, BYTE = np.dtype(np.float32), np.dtype(np.uint8)

#: The most elements of one value of one image, and of one axis of a window.
LARGEST = 1 << 28
LARGEST_WINDOW = 1 << 12


class Site(NamedTuple):
    """Where a step runs: the program to append to, and slots with the batch as their first axis."""

    program: Program
    packed: Packed
    arrays: Arrays
    inputs: Sequence[Slot]
    output: Slot
    scratch: Slot | None


class Step:
    """Base of the steps: subclass it under `@dataclass(frozen=True)`; fields are attributes."""

    kind: ClassVar[str]
    registry: ClassVar[dict[str, type[Step]]] = {}
    #: the arrays that it needs, and those that it takes
    weights: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    #: how many values it takes; 0: any number
    operands: ClassVar[int] = 1
    #: what arrays consist of, if not of float32
    dtypes: ClassVar[Mapping[str, Any]] = {}
    #: whether the result may lie where the first operand lies
    in_place: ClassVar[bool] = False
    #: whether its kernels are cut in tasks that threads can share
    in_tasks: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_") and cls.__name__ not in ("Moving", "Windowed"):
            cls.kind = cls.__name__.lower()
            Step.registry[cls.kind] = cls

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        """The shape of the result for operands of these shapes."""
        raise NotImplementedError

    def dtype(self, kinds: Sequence[Any]) -> Any:
        """What the result consists of, FLOAT or BYTE, for operands of these."""
        self.require_kinds(kinds, FLOAT)
        return FLOAT

    def require_kinds(self, kinds: Sequence[Any], kind: Any) -> None:
        """Raise the error for operands that do not all consist of this."""
        if any(k != kind for k in kinds):
            raise ShapeError(f"{self}: required {kind}; came {', '.join(map(str, kinds))}")

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        """Multiply-adds for one image."""
        return 0

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        """Elements of four bytes that it needs for one image while it runs."""
        return 0

    def room(self, at: Site) -> int:
        """Bytes that it needs for all images while it runs; `at` has no scratch yet."""
        shapes = [slot.shape[1:] for slot in at.inputs]
        return 4 * at.output.shape[0] * self.scratch(shapes, at.output.shape[1:])

    def emit(self, at: Site) -> None:
        """Append its kernel calls to a program."""
        raise NotImplementedError

    def refuse(self, required: str, inputs: Sequence[Shape], arrays: Arrays) -> NoReturn:
        """Raise the error for operands that do not fit."""
        came = [*inputs, *(f"{k} {a.shape}" for k, a in arrays.items())]
        raise ShapeError(
            f"{self}: required {required}; came {', '.join(map(str, came))} without the batch"
        )

    @property
    def onto_operand(self) -> bool:
        """Whether the last operand is what the result is added to, in its place."""
        return bool(getattr(self, "onto", False))


def _vector(arrays: Arrays, name: str, size: int) -> bool:
    return name not in arrays or arrays[name].shape == (size,)


# --- with weights ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear(Step):
    """x (K,) @ weight (K, N) + bias (N,); onto a second operand (N,); rectified if `relu`."""

    relu: bool = False
    onto: bool = False

    weights = ("weight",)
    optional = ("bias",)

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        w = arrays["weight"]
        out = w.shape[1:]
        fits = w.ndim == 2 and inputs[0] == w.shape[:1] and w.size and _vector(arrays, "bias", *out)
        if not fits or (self.onto and inputs[1] != out):
            self.refuse("x (K,), weight (K, N), bias (N,)", inputs, arrays)
        return out

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return arrays["weight"].size

    def emit(self, at: Site) -> None:
        w, b = at.arrays["weight"], at.arrays.get("bias")
        prepack.linear(at.program, at.packed, at.inputs[0], w, b, at.output, self.relu, self.onto)


class Moving(Step):
    """A step that only moves what its operands consist of."""

    def dtype(self, kinds: Sequence[Any]) -> Any:
        self.require_kinds(kinds, kinds[0])
        return kinds[0]


class Windowed(Step):
    """A step that slides a window over an image (H, W, C)."""

    stride: Pair
    padding: Sides
    dilation: Pair = (1, 1)
    #: the array with the window's rows and columns, if there is one
    sliding: ClassVar[str] = "weight"

    def _window(self, kernel: Pair, inputs: Sequence[Shape], arrays: Arrays) -> Window:
        sizes = (*kernel, *self.stride, *self.dilation, *(n + 1 for s in self.padding for n in s))
        if min(sizes) < 1 or max(sizes) > LARGEST_WINDOW:
            self.refuse(f"window sizes from 1 to {LARGEST_WINDOW}", inputs, arrays)
        return Window(kernel, self.stride, self.padding, self.dilation)

    def _slid(self, win: Window, inputs: Sequence[Shape], arrays: Arrays) -> Pair:
        if len(inputs[0]) != 3:
            self.refuse("an image (H, W, C)", inputs, arrays)
        try:
            return win.output(*inputs[0][:2])
        except ValueError:
            self.refuse("an image that the window fits in", inputs, arrays)


@dataclass(frozen=True)
class Conv(Windowed):
    """The convolution of x (H, W, C) with weight (KH, KW, C, N), bias (N,).

    onto a second operand (OH, OW, N), rectified if `relu`.
    """

    stride: Pair = (1, 1)
    padding: Sides = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    relu: bool = False
    onto: bool = False

    weights = ("weight",)
    optional = ("bias",)

    def _win(self, inputs: Sequence[Shape], arrays: Arrays) -> Window:
        w = arrays["weight"]
        if w.ndim != 4 or not w.size:
            self.refuse("weight (KH, KW, C, N)", inputs, arrays)
        return self._window((w.shape[0], w.shape[1]), inputs, arrays)

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        w = arrays["weight"]
        size = self._slid(self._win(inputs, arrays), inputs, arrays)
        out = (*size, w.shape[3])
        fits = inputs[0][2] == w.shape[2] and _vector(arrays, "bias", w.shape[3])
        if not fits or (self.onto and inputs[1] != out):
            self.refuse("x (H, W, C), weight (KH, KW, C, N), bias (N,)", inputs, arrays)
        return out

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return arrays["weight"].size * output[0] * output[1]

    def emit(self, at: Site) -> None:
        w, b = at.arrays["weight"], at.arrays.get("bias")
        win = Window(w.shape[:2], self.stride, self.padding, self.dilation)
        prepack.conv2d(
            at.program, at.packed, at.inputs[0], w, b, at.output, win, self.relu, self.onto
        )


@dataclass(frozen=True)
class ConvTranspose(Windowed):
    """The transposed convolution of x (OH, OW, C) with weight (KH, KW, C, N), bias (N,).

    The result has the rows and columns `size`, over which the window slides.
    """

    size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Sides = ((0, 0), (0, 0))
    relu: bool = False

    weights = ("weight",)
    optional = ("bias",)

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        w = arrays["weight"]
        if w.ndim != 4 or not w.size or not all(1 <= n <= LARGEST for n in self.size):
            self.refuse("weight (KH, KW, C, N) and sizes >= 1", inputs, arrays)
        win = self._window((w.shape[0], w.shape[1]), inputs, arrays)
        slid = self._slid(win, [(*self.size, 1)], arrays)
        if inputs[0] != (*slid, w.shape[2]) or not _vector(arrays, "bias", w.shape[3]):
            self.refuse(f"x {slid} of channels, weight (KH, KW, C, N)", inputs, arrays)
        return (*self.size, w.shape[3])

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return arrays["weight"].size * inputs[0][0] * inputs[0][1]

    def emit(self, at: Site) -> None:
        w, b = at.arrays["weight"], at.arrays.get("bias")
        win = Window(w.shape[:2], self.stride, self.padding)
        prepack.conv2d(
            at.program, at.packed, at.inputs[0], w, b, at.output, win, self.relu, transposed=True
        )


@dataclass(frozen=True)
class Depthwise(Windowed):
    """Each channel of x (H, W, C) with its own kernels, weight (KH, KW, C, R), bias (C R,)."""

    stride: Pair = (1, 1)
    padding: Sides = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    relu: bool = False

    weights = ("weight",)
    optional = ("bias",)

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        w = arrays["weight"]
        if w.ndim != 4 or not w.size:
            self.refuse("weight (KH, KW, C, R)", inputs, arrays)
        win = self._window((w.shape[0], w.shape[1]), inputs, arrays)
        size, channels = self._slid(win, inputs, arrays), w.shape[2] * w.shape[3]
        if inputs[0][2] != w.shape[2] or not _vector(arrays, "bias", channels):
            self.refuse("x (H, W, C), weight (KH, KW, C, R), bias (C R,)", inputs, arrays)
        return (*size, channels)

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return arrays["weight"].size * output[0] * output[1]

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        factor = output[2] // inputs[0][2]
        return math.prod(inputs[0]) * factor if factor > 1 else 0

    def emit(self, at: Site) -> None:
        w, b, x = at.arrays["weight"], at.arrays.get("bias"), at.inputs[0]
        if at.scratch is not None:  # R copies of each channel
            shape = (*x.shape[:3], x.shape[3] * w.shape[3])
            copies = at.scratch._replace(shape=shape, dtype=x.dtype)
            prepack.repeat(at.program, x, w.shape[3], copies)
            x = copies
        win = Window(w.shape[:2], self.stride, self.padding, self.dilation)
        flat = w.reshape(*w.shape[:2], -1)
        prepack.depthwise2d(at.program, at.packed, x, flat, b, at.output, win, self.relu)


@dataclass(frozen=True)
class ScaleShift(Step):
    """x (..., C) scale (C,) + shift (C,), rectified if `relu`."""

    relu: bool = False

    weights = ("scale", "shift")
    in_place = True

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        (x,) = inputs
        if not all(arrays[name].shape == x[-1:] for name in self.weights):
            self.refuse("x (..., C), scale and shift (C,)", inputs, arrays)
        return x

    def emit(self, at: Site) -> None:
        x, y = (s.reshape(-1, s.shape[-1]) for s in (at.inputs[0], at.output))
        scale, shift = at.arrays["scale"], at.arrays["shift"]
        prepack.scale_shift(at.program, at.packed, x, scale, shift, y, self.relu)


# --- without weights ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool(Windowed):
    """The maximum or the mean under each window of x (H, W, C); padding does not count."""

    mean: bool = False
    kernel: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Sides = ((0, 0), (0, 0))

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        win = self._window(self.kernel, inputs, arrays)
        return (*self._slid(win, inputs, arrays), inputs[0][2])

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        return 0 if self.mean else math.prod(output)  # the places of the maxima

    def emit(self, at: Site) -> None:
        win = Window(self.kernel, self.stride, self.padding)
        if at.scratch is None:
            prepack.avg_pool2d(at.program, at.inputs[0], at.output, win)
        else:
            places = at.scratch._replace(shape=at.output.shape, dtype=np.dtype(np.int32))
            prepack.max_pool2d(at.program, at.inputs[0], at.output, places, win)


@dataclass(frozen=True)
class GlobalSum(Step):
    """`scale` times the sum of x (H, W, C) over rows and columns: (C,)."""

    scale: float = 1.0

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if len(inputs[0]) != 3:
            self.refuse("an image (H, W, C)", inputs, arrays)
        return inputs[0][2:]

    def emit(self, at: Site) -> None:
        prepack.global_sum(at.program, at.packed, at.inputs[0], at.output, self.scale)


@dataclass(frozen=True)
class Add(Step):
    """The sum of two values of one shape, rectified if `relu`."""

    relu: bool = False

    operands = 2
    in_place = True

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if inputs[0] != inputs[1]:
            self.refuse("two values of one shape", inputs, arrays)
        return inputs[0]

    def emit(self, at: Site) -> None:
        a, b = at.inputs
        prepack.add(at.program, a, b, at.output, self.relu)


@dataclass(frozen=True)
class Activation(Step):
    """`function` of each element: relu, tanh, sigmoid, or softmax along the last axis."""

    function: str = "relu"

    in_place = True

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if self.function not in ("relu", "tanh", "sigmoid", "softmax"):
            self.refuse("a known function", inputs, arrays)
        return inputs[0]

    def emit(self, at: Site) -> None:
        if self.function == "softmax":
            prepack.softmax(at.program, at.inputs[0], at.output)
        else:
            prepack.activation(at.program, self.function, at.inputs[0], at.output)


@dataclass(frozen=True)
class Concat(Moving):
    """Values side by side along `axis` (0 is the first after the batch)."""

    axis: int = 0

    operands = 0

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        first, axis = inputs[0], self.axis
        rest = {s[:axis] + s[axis + 1 :] for s in inputs}
        if not 0 <= axis < len(first) or len(rest) != 1 or len({len(s) for s in inputs}) != 1:
            self.refuse(f"values that agree but for axis {axis}", inputs, arrays)
        return (*first[:axis], sum(s[axis] for s in inputs), *first[axis + 1 :])

    def emit(self, at: Site) -> None:
        def rows(slot: Slot) -> Slot:
            inner = math.prod(slot.shape[self.axis + 1 :])
            return slot.reshape(math.prod(slot.shape[: self.axis + 1]), inner)

        kernels: Any = prepack_int8 if at.output.dtype == BYTE else prepack
        kernels.concat(at.program, [rows(s) for s in at.inputs], rows(at.output))


@dataclass(frozen=True)
class Pad(Moving):
    """Elements `value` around x: widths[i] = (before, after) of axis i, on two axes at most."""

    widths: tuple[Pair, ...] = ()
    value: float = 0.0

    def dtype(self, kinds: Sequence[Any]) -> Any:
        if kinds[0] == BYTE and self.value not in range(256):
            raise ShapeError(f"{self}: required a byte as value; came {self.value}")
        return super().dtype(kinds)

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        (x,) = inputs
        framed = sum(max(pair) > 0 for pair in self.widths)
        sizes = [n for pair in self.widths for n in pair]
        if len(self.widths) != len(x) or framed > 2 or not all(0 <= n <= LARGEST for n in sizes):
            self.refuse("one pair of widths >= 0 for each axis, two of them not 0", inputs, arrays)
        return tuple(n + b + a for n, (b, a) in zip(x, self.widths, strict=True))

    def emit(self, at: Site) -> None:
        widths = ((0, 0), *self.widths)
        if at.output.dtype == BYTE:
            prepack_int8.frame(at.program, at.inputs[0], widths, int(self.value), at.output)
        else:
            prepack.frame(at.program, at.inputs[0], widths, self.value, at.output)


@dataclass(frozen=True)
class Scatter(Step):
    """x[..., c] at [..., places[c]] of (..., width); `value` elsewhere, or onto an operand."""

    width: int = 0
    value: float = 0.0
    onto: bool = False

    weights = ("places",)
    dtypes: ClassVar[Mapping[str, Any]] = {"places": np.dtype(np.int32)}

    def dtype(self, kinds: Sequence[Any]) -> Any:
        if kinds[0] == BYTE and (self.onto or self.value not in range(256)):
            raise ShapeError(f"{self}: required a byte as value, and no operand to add to")
        self.require_kinds(kinds, kinds[0])
        return kinds[0]

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        x, places = inputs[0], arrays["places"]
        out = (*x[:-1], self.width)
        fits = x and places.shape == x[-1:] and math.prod(out) <= LARGEST
        inside = fits and places.size and places.min() >= 0 and places.max() < self.width
        if not inside or len(np.unique(places)) < places.size or (self.onto and inputs[1] != out):
            self.refuse(f"x (..., C), C different places below {self.width}", inputs, arrays)
        return out

    def emit(self, at: Site) -> None:
        x, places = at.inputs[0], at.arrays["places"]
        if at.output.dtype == BYTE:
            prepack_int8.scatter(at.program, x, places, int(self.value), at.output)
            return
        prepack.scatter(at.program, x, places, self.value, at.output, self.onto)


@dataclass(frozen=True)
class Reshape(Moving):
    """The same elements under another shape: nothing is done."""

    shape: Shape = ()

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        sizes = self.shape
        if not all(1 <= n <= LARGEST for n in sizes) or math.prod(sizes) != math.prod(inputs[0]):
            self.refuse(f"{math.prod(inputs[0])} elements", inputs, arrays)
        return self.shape

    def emit(self, at: Site) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Layer:
    """A step in its place: the numbers of the values it reads and makes, and its arrays."""

    step: Step
    inputs: tuple[int, ...]
    output: int
    arrays: Arrays
    path: str = ""  #: the module whose op it was
    kernel: str = "dense"
    origin: Origin | None = None  #: what its weights were made of, if of fewer numbers
