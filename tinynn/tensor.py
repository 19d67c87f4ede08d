"""A Tensor is an array that remembers how it was made; `backward` walks that memory once.

Arrays inside Tensors are read-only to the outside: `data` and `grad` are read-only views. Whoever
must write, an optimiser for instance, asks for `mutate()`, which marks everything computed from the
old values as stale, so that a later `backward` refuses instead of using the wrong numbers.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tinynn.errors import DTypeError, GraphError, ShapeError, StaleArrayError
from tinynn.op import Array, Op, Saved, Shape, check_dtypes, registry

#: Called after every op applied, with (op, inputs, output): see `recording`.
Recorder = Callable[[Op, "tuple[Tensor, ...]", "Tensor"], None]

#: The public functions of `tinynn.ops` by name; that package fills it when it is imported.
functions: dict[str, Callable[..., Tensor]] = {}

_ages = itertools.count(1)  # an op is always younger than those that made its inputs


class _Mode(threading.local):
    """Each thread's own switches: see `no_grad` and `recording`."""

    grad = True
    recorder: Recorder | None = None


_mode = _Mode()


class Node:
    """One op application on the tape: what made a Tensor, and what its backward rule needs."""

    __slots__ = ("index", "inputs", "op", "saved", "versions")

    def __init__(self, op: Op, inputs: tuple[Tensor, ...], output: Tensor, saved: Saved) -> None:
        self.index = next(_ages)
        self.op = op
        self.inputs = inputs
        self.saved: Saved | None = saved
        # The counter alone is kept, not the output: a node must not keep its own result alive.
        kept = {id(_owner(a)) for a in saved if isinstance(a, np.ndarray)}
        self.versions = [
            (t._version, t._version[0]) for t in (*inputs, output) if id(_owner(t._data)) in kept
        ]

    def gradients(self, grad: Array) -> tuple[Array | None, ...]:
        """Apply the op's backward rule, after checking that its saved arrays are untouched."""
        if self.saved is None:
            raise GraphError(
                f"{self.op}: backward was already run through here and its arrays were released; "
                "pass retain=True to the first backward to run it again"
            )
        if any(version[0] != then for version, then in self.versions):
            raise StaleArrayError(
                f"{self.op}: an array that its gradient needs was changed in place after the "
                "forward pass (by an optimiser step or mutate()); run the forward pass again"
            )
        if self.op.selective:
            needs = tuple(t.requires_grad for t in self.inputs)
            return self.op.backward(grad, self.saved, needs)  # type: ignore[call-arg]
        return self.op.backward(grad, self.saved)


def _method(name: str, *, swap: bool = False) -> Callable[..., Any]:
    """A Tensor method that is the function of that name in `tinynn.ops`."""

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        operands = (*args, self) if swap else (self, *args)
        return functions[name](*operands, **kwargs)

    return method


class Tensor:
    """An array, its gradient, and the op that made it.

    `Tensor(values)` copies; with `copy=False` it adopts the array, which the caller must then not
    change. Python numbers and lists become float32; a floating array keeps its dtype.
    """

    __slots__ = ("__weakref__", "_data", "_grad", "_node", "_version", "requires_grad")
    __array_priority__ = 100  # NumPy leaves `array * tensor` to us

    def __init__(
        self, values: npt.ArrayLike, *, requires_grad: bool = False, copy: bool = True
    ) -> None:
        array = np.asarray(values)
        if not isinstance(values, np.ndarray | np.generic) and array.dtype.kind in "fiub":
            array = array.astype(np.float32)
        if array.dtype.kind not in "fiub":
            raise DTypeError(f"Tensor: required numbers; came dtype {array.dtype}")
        if requires_grad and array.dtype.kind != "f":
            raise DTypeError(f"Tensor: only floating dtypes have gradients; came {array.dtype}")
        self._data: Array = np.array(array, order="C") if copy else array
        self._grad: Array | None = None
        self._node: Node | None = None
        self._version = [0]  # shared by all Tensors that are views of one array
        self.requires_grad = requires_grad

    @property
    def data(self) -> Array:
        """The values, read-only. To change them in place use `mutate()`."""
        return _read_only(self._data)

    @property
    def grad(self) -> Array | None:
        """The accumulated gradient of the values' shape, read-only, or None before `backward`."""
        return None if self._grad is None else _read_only(self._grad)

    @grad.setter
    def grad(self, value: Array | None) -> None:
        if value is not None:
            value = np.array(value)
            if (value.shape, value.dtype) != (self.shape, self.dtype):
                raise ShapeError(
                    f"grad: required {self.dtype} of shape {self.shape}; came {value.dtype} of "
                    f"shape {value.shape}"
                )
        self._grad = value

    @property
    def shape(self) -> Shape:
        """The array's shape."""
        return self._data.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._data.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(self._data.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's dtype."""
        return self._data.dtype

    def __len__(self) -> int:
        if not self._data.ndim:
            raise TypeError("len() of a Tensor without axes")
        return len(self._data)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self._data, dtype=dtype) if copy else np.asarray(self.data, dtype=dtype)

    def item(self) -> float:
        """The value of a Tensor with one element."""
        return self._data.item()

    def numpy(self) -> Array:
        """A copy of the values."""
        return self._data.copy()

    def detach(self) -> Tensor:
        """The same array without its history; a later `mutate()` of either marks both stale."""
        out = Tensor(self._data, copy=False)
        out._version = self._version
        return out

    def mutate(self) -> Array:
        """The array itself, to write into at once: graphs that need its old values become stale.

        Ask again for every change: what is written later through a kept array goes unnoticed.
        """
        self._version[0] += 1
        return self._data

    def backward(self, grad: npt.ArrayLike | None = None, *, retain: bool = False) -> None:
        """Add d(self)/d(leaf), weighted by `grad`, to `leaf.grad` of every leaf behind this Tensor.

        `grad` may be left out for a single number. The saved arrays are released on the way
        unless `retain` is true.
        """
        if not self.requires_grad:
            raise GraphError("backward: nothing behind this Tensor requires a gradient")
        if grad is None and self.size != 1:
            raise ShapeError(f"backward: shape {self.shape} needs an explicit grad of that shape")
        seed = np.ones(self.shape, self.dtype) if grad is None else np.array(grad, self.dtype)
        if seed.shape != self.shape:
            raise ShapeError(f"backward: required grad of shape {self.shape}; came {seed.shape}")

        for tensor, upstream in gradients(self, seed, retain):
            if tensor._node is None:
                tensor._accumulate(upstream)

    def _accumulate(self, grad: Array) -> None:
        if grad.shape != self.shape:
            raise ShapeError(f"gradient of shape {grad.shape} reached a leaf of {self.shape}")
        self._grad = _sum(self._grad, grad)

    __add__, __radd__ = _method("add"), _method("add", swap=True)
    __sub__, __rsub__ = _method("sub"), _method("sub", swap=True)
    __mul__, __rmul__ = _method("mul"), _method("mul", swap=True)
    __truediv__, __rtruediv__ = _method("div"), _method("div", swap=True)
    __matmul__, __rmatmul__ = _method("matmul"), _method("matmul", swap=True)
    __pow__, __rpow__, __neg__ = _method("power"), _method("power", swap=True), _method("neg")
    __abs__, __getitem__ = _method("absolute"), _method("index")
    exp, log, sqrt, tanh = _method("exp"), _method("log"), _method("sqrt"), _method("tanh")
    relu, sigmoid, softmax = _method("relu"), _method("sigmoid"), _method("softmax")
    sum, mean, var, max = _method("sum"), _method("mean"), _method("var"), _method("max")
    reshape, transpose = _method("reshape"), _method("transpose")

    def __bool__(self) -> bool:
        return bool(self._data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """The values without their history, as a leaf."""
        return Tensor(self._data, requires_grad=self.requires_grad)

    def __repr__(self) -> str:
        made = f", made by {self._node.op}" if self._node else ""
        return f"Tensor({np.array2string(self._data, threshold=8)}, {self.dtype}{made})"


def apply(op: Op, *inputs: Tensor) -> Tensor:
    """Run an op on Tensors and put it on the tape if any operand requires a gradient."""
    return run(op, *inputs)[0]


def run(op: Op, *inputs: Tensor) -> tuple[Tensor, Saved]:
    """`apply`, and also what the op saved, for the few whose saved values are of use elsewhere."""
    arrays = tuple(t._data for t in inputs)
    check_dtypes(op, arrays)
    result, saved = op.forward(*arrays)
    if id(result) in map(id, arrays):  # traces tell values apart by their arrays
        result = result.view()
    out = Tensor(result, copy=False)
    if result.base is not None:  # a view shares the fate of what it looks at
        for t in inputs:
            if _owner(result) is _owner(t._data):
                out._version = t._version
    if _mode.grad and any(t.requires_grad for t in inputs):
        out.requires_grad = True
        out._node = Node(op, inputs, out, saved)
    if _mode.recorder is not None:
        _mode.recorder(op, inputs, out)
    return out, saved


@contextmanager
def no_grad() -> Iterator[None]:
    """Compute without a tape, in this thread: nothing is saved, results need no gradient."""
    before, _mode.grad = _mode.grad, False
    try:
        yield
    finally:
        _mode.grad = before


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Call `recorder(op, inputs, output)` after every op that this thread applies in the block."""
    before, _mode.recorder = _mode.recorder, recorder
    try:
        yield
    finally:
        _mode.recorder = before


def newest_first(root: Tensor) -> list[Tensor]:
    """Every Tensor behind `root`, each before those that it was made from; leaves come last."""
    found = {id(root): root}
    stack = [root]
    while stack:
        node = stack.pop()._node
        for t in node.inputs if node else ():
            if id(t) not in found:
                found[id(t)] = t
                stack.append(t)
    return sorted(found.values(), key=lambda t: t._node.index if t._node else 0, reverse=True)


def gradients(root: Tensor, seed: Array, retain: bool) -> Iterator[tuple[Tensor, Array]]:
    """Every Tensor that `seed` reaches from `root`, newest first, with its gradient."""
    pending = {id(root): seed}
    for tensor in newest_first(root):
        upstream, node = pending.pop(id(tensor), None), tensor._node
        if upstream is None:
            continue
        yield tensor, upstream
        if node is None:
            continue
        for operand, g in zip(node.inputs, node.gradients(upstream), strict=True):
            if g is not None and operand.requires_grad:
                pending[id(operand)] = _sum(pending.get(id(operand)), np.asarray(g))
        if not retain:
            node.saved = None


def _sum(so_far: Array | None, grad: Array) -> Array:
    """Both gradients added, by the kernel of the op `add` that is in force."""
    return grad if so_far is None else cast(Array, registry["add"]().kernel()(so_far, grad))


def _owner(array: Array) -> object:
    """The object that owns an array's memory: two arrays may overlap only if they share it."""
    return array if array.base is None else array.base


def _read_only(array: Array) -> Array:
    # through a memoryview: a plain view could be made writable again
    return np.asarray(memoryview(array).toreadonly())  # type: ignore[arg-type]
