"""Module: a tree of named parts. What is assigned as an attribute is found by the tree walk.

A Parameter is trained, an array is a buffer (saved, not trained), a Module is a child, and plain
values (numbers, text, a random generator) are the module's configuration.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from tinynn.errors import ConfigError, DTypeError, ShapeError
from tinynn.op import Array
from tinynn.tensor import Tensor

Self = TypeVar("Self", bound="Module")


class _Running(threading.local):
    """Modules whose forward is running in this thread, outermost first."""

    def __init__(self) -> None:
        self.modules: list[Module] = []


_running = _Running()


def running_module() -> Module | None:
    """The innermost module whose forward is running: a trace names the ops' places by it."""
    return _running.modules[-1] if _running.modules else None


class Parameter(Tensor):
    """A leaf that is trained.

    Where its `mask` is false it is zero, where its `codes` are equal its values are, and none is
    below `least`; optimisers keep all three so. What has a `least` is a scale, see `is_weight`.
    """

    __slots__ = ("_codes", "_first", "_mask", "least")

    def __init__(self, values: npt.ArrayLike, *, copy: bool = True) -> None:
        super().__init__(values, requires_grad=True, copy=copy)
        self._mask: Array | None = None
        self._codes: Array | None = None
        self._first = np.zeros(0, np.intp)  #: where each code's value stands in the flat array
        self.least: float | None = None

    @property
    def mask(self) -> Array | None:
        """Booleans of the parameter's shape, read-only, or None. Files do not hold masks."""
        return self._mask

    @mask.setter
    def mask(self, mask: npt.ArrayLike | None) -> None:
        self._mask = None if mask is None else self._constraint("mask", mask, "b")
        self._constrain()

    @property
    def codes(self) -> Array | None:
        """Numbers of the parameter's shape, read-only, or None. Files do not hold codes.

        Weights of one number have one value, that of their first, and move by the sum of their
        gradients, as entries of a code book do (Han et al. 2016, "Deep Compression", section 3.3);
        penalties act on each value once. Weights that are masked share nothing. Numbers lie between
        0 and the parameter's size.
        """
        return self._codes

    @codes.setter
    def codes(self, codes: npt.ArrayLike | None) -> None:
        self._codes = None if codes is None else self._constraint("codes", codes, "iu")
        self._constrain()

    def hold(self) -> None:
        """Make equal what shares a code, zero (a product would leave NaN) what is masked, and
        `least` what is below that."""
        if self._codes is not None:
            self.mutate()[...] = self._data.ravel()[self._first][self._codes]
        if self._mask is not None:
            np.copyto(self.mutate(), 0, where=~self._mask)
        if self.least is not None:
            np.maximum(self._data, self.least, out=self.mutate())

    def pooled(self, grad: Array) -> Array:
        """What moves each weight: `grad`, or its sum over all weights of the same code."""
        if self._codes is None:
            return grad
        single = grad if self._mask is None else np.where(self._mask, grad, 0)
        sums = np.bincount(self._codes.ravel(), single.ravel(), len(self._first))
        return sums[self._codes].astype(grad.dtype)

    def _constraint(self, name: str, values: npt.ArrayLike, kinds: str) -> Array:
        array = np.array(values)
        fits = array.shape == self.shape and array.dtype.kind in kinds
        if not fits or (
            kinds != "b" and array.size and not 0 <= array.min() <= array.max() < array.size
        ):
            required = "booleans" if kinds == "b" else f"integers from 0 to {self.size - 1}"
            raise ShapeError(
                f"Parameter.{name}: required {required} {self.shape}; came {array.dtype} "
                f"{array.shape}"
            )
        array = array if kinds == "b" else array.astype(np.intp)
        array.flags.writeable = False
        return array

    def _constrain(self) -> None:
        if self._codes is not None:
            self._first = np.zeros(int(self._codes.max(initial=-1)) + 1, np.intp)
            free = np.arange(self.size) if self._mask is None else np.flatnonzero(self._mask)
            used, first = np.unique(self._codes.ravel()[free], return_index=True)
            self._first[used] = free[first]
        self.hold()

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        return self.astype(self.dtype)

    def astype(self, dtype: npt.DTypeLike) -> Parameter:
        """A copy in a floating dtype, held by the same mask and codes."""
        out = self.like(self._data.astype(dtype, copy=False))
        out._mask, out._codes, out._first = self._mask, self._codes, self._first
        return out

    def like(self, values: npt.ArrayLike) -> Parameter:
        """A parameter with other values, trained or frozen and a scale or none as this one is."""
        out = Parameter(values)
        out.requires_grad, out.least = self.requires_grad, self.least
        return out


def is_weight(p: Tensor) -> bool:
    """Whether these are a layer's weights: two axes or more, and no scale.

    What prunes, shares, penalises or counts weights asks here: biases and batch norm's vectors are
    none, nor are learned scales of quantisers, whatever their shape.
    """
    return p.ndim >= 2 and not is_scale(p)


def is_scale(p: Tensor) -> bool:
    """Whether it is a factor that has to stay positive: see `Parameter.least`."""
    return isinstance(p, Parameter) and p.least is not None


class Module:
    """Base of layers and models: assign parts in `__init__`, compute in `forward`."""

    #: every Module class by name, so that a saved model can be built again: see `kind`
    registry: ClassVar[dict[str, type[Module]]] = {}
    #: whether `forward` takes `relu=True` and then applies a ReLU in the same pass
    rectifies: ClassVar[bool] = False
    #: whether `forward` is a ReLU and nothing else, so that a module before it may take it over
    is_relu: ClassVar[bool] = False
    #: the names of the two attributes that say how `forward` makes more channels: how many it pads
    #: before and after, or the places of those it has and the number of all
    channel_padding: ClassVar[tuple[str, ...]] = ()

    training: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Module.registry[cls.kind()] = cls

    @classmethod
    def kind(cls) -> str:
        """The name in saved files: the class's own for tinynn's, with its module for others'."""
        own = cls.__module__.split(".")[0] == "tinynn"
        return cls.__qualname__ if own else f"{cls.__module__}.{cls.__qualname__}"

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """What the module computes."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def check(self) -> None:
        """Raise unless the parts fit together; called for whatever is loaded from a file."""

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        _running.modules.append(self)
        try:
            return self.forward(*inputs, **kwargs)
        finally:
            _running.modules.pop()

    def __setattr__(self, name: str, value: Any) -> None:
        if _hides_parts(value):
            raise ConfigError(
                f"{type(self).__name__}.{name}: modules and parameters in a {type(value).__name__} "
                "are not found by the tree walk; put them in a Sequential or give each a name"
            )
        if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, Parameter):
            raise ConfigError(
                f"{type(self).__name__}.{name}: a Tensor that requires a gradient is trained only "
                "as a Parameter"
            )
        if isinstance(value, Module | Tensor) and hasattr(Module, name):
            raise ConfigError(
                f"{type(self).__name__}.{name}: required a name for the part that Module does not "
                "use itself"
            )
        super().__setattr__(name, value)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the direct parts, in the order of assignment."""
        yield from ((k, v) for k, v in vars(self).items() if isinstance(v, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(dotted path, module) of this module (path "") and all below it, each once."""
        seen: set[int] = set()
        stack: list[tuple[str, Module]] = [(prefix, self)]
        while stack:
            path, module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield path, module
            children = [(f"{path}.{k}" if path else k, m) for k, m in module.named_children()]
            stack.extend(reversed(children))

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(dotted path, parameter) of all below, each once even if it is shared."""
        seen: set[int] = set()
        for path, value in self._named_values(Parameter):
            if id(value) not in seen:
                seen.add(id(value))
                yield path, value

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """(dotted path, array) of what is saved but not trained."""
        yield from self._named_values(np.ndarray)

    def parameters(self) -> list[Parameter]:
        """All parameters, each once."""
        return [p for _, p in self.named_parameters()]

    def _named_values(self, kind: type) -> Iterator[tuple[str, Any]]:
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, kind):
                    yield f"{path}.{name}" if path else name, value

    def size(self) -> int:
        """The number of trained values."""
        return sum(p.size for p in self.parameters())

    def train(self: Self, mode: bool = True) -> Self:
        """Behave as in training (dropout drops); returns self."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self: Self) -> Self:
        """Behave as in use: deterministic; returns self."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget all accumulated gradients."""
        for p in self.parameters():
            p.grad = None

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and buffers by dotted path."""
        values = {k: p.numpy() for k, p in self.named_parameters()}
        return values | {k: b.copy() for k, b in self.named_buffers()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take over values by path; nothing is changed unless every name, shape and dtype fits.

        Raises ConfigError for missing or unknown names, ShapeError and DTypeError for misfits.
        """
        own: dict[str, Any] = dict(self.named_parameters()) | dict(self.named_buffers())
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ConfigError(f"load_state_dict: missing {missing}, unknown {unknown}")
        for name, value in own.items():
            came = np.asarray(state[name])
            if came.shape != value.shape:
                raise ShapeError(f"{name}: required shape {value.shape}; came {came.shape}")
            if came.dtype != value.dtype:
                raise DTypeError(f"{name}: required {value.dtype}; came {came.dtype}")
        for name, value in own.items():
            target = value.mutate() if isinstance(value, Tensor) else value
            target[...] = state[name]
            if isinstance(value, Parameter):
                value.hold()

    def copy(self: Self) -> Self:
        """An independent model with the same values; gradients and history stay behind."""
        return copy.deepcopy(self)

    def astype(self: Self, dtype: npt.DTypeLike) -> Self:
        """A copy in another floating dtype, for instance float64 for gradient checks."""
        out = self.copy()
        new = {id(p): p.astype(dtype) for p in out.parameters()}
        for _, module in out.named_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Parameter):
                    setattr(module, name, new[id(value)])
                elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    setattr(module, name, value.astype(dtype))
        return out

    def extra(self) -> str:
        """What `repr` shows of a layer besides its class."""
        shown = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str)}
        return ", ".join(f"{k}={v}" for k, v in shown.items() if k != "training")

    def __repr__(self) -> str:
        lines = []
        for path, module in self.named_modules():
            depth = path.count(".") + 1 if path else 0
            label = f"{path.rsplit('.', 1)[-1]}: " if path else ""
            lines.append("  " * depth + f"{label}{type(module).__name__}({module.extra()})")
        return "\n".join(lines) + f"\n{self.size():,} parameters"


class Sequential(Module):
    """Modules one after the other: `Sequential(a, b)` names them "0", "1"; keywords name them."""

    def __init__(self, *modules: Module, **named: Module) -> None:
        for name, module in [*((str(i), m) for i, m in enumerate(modules)), *named.items()]:
            if not isinstance(module, Module) or name in vars(self):
                raise ConfigError(
                    f"Sequential: required modules of different names; came {module!r} as {name!r}"
                )
            setattr(self, name, module)

    def check(self) -> None:
        """Raise ConfigError unless every part is a module."""
        if wrong := {k for k, v in vars(self).items() if not isinstance(v, Module)} - {"training"}:
            raise ConfigError(f"Sequential: parts that are no modules: {sorted(wrong)}")

    def forward(self, x: Any) -> Any:
        layers: list[Module | None] = [*self, None]
        skip = False
        for layer, following in pairwise(layers):
            if skip:
                skip = False
            elif _says(layer, "rectifies") and _says(following, "is_relu"):
                x, skip = layer(x, relu=True), True  # type: ignore[misc]
            elif layer is not None:
                x = layer(x)
        return x

    def __iter__(self) -> Iterator[Module]:
        return (m for _, m in self.named_children())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, position: int | slice) -> Module:
        """The module there; of a slice, a Sequential of the same modules under their names."""
        if isinstance(position, slice):
            return Sequential(**dict(list(self.named_children())[position]))
        return list(self)[position]


@contextmanager
def mode(model: Module, training: bool) -> Iterator[None]:
    """The model in training or eval mode; every module has its own mode back afterwards."""
    before = [(m, m.training) for _, m in model.named_modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def rectifying(module: Module) -> bool:
    """Whether the module's forward takes `relu=True`: see `Module.rectifies`."""
    return _says(module, "rectifies")


def _says(module: Module | None, flag: str) -> bool:
    """Whether the class that defines the module's forward sets this flag.

    A subclass with a forward of its own, or an instance with a hook in its place, does not inherit
    what the flag says of the original.
    """
    if module is None or "forward" in vars(module):
        return False
    return _class_says(type(module), flag)  # type: ignore[arg-type]


@cache
def _class_says(kind: type[Module], flag: str) -> bool:
    owner = next(c for c in kind.__mro__ if "forward" in vars(c))
    return bool(vars(owner).get(flag, False))


def _hides_parts(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple | set):
        return False
    return any(isinstance(v, Module | Tensor) or _hides_parts(v) for v in value)
