"""Save a model with its architecture, load it without being told its sizes.

The header of the safetensors file holds the module tree as JSON: kinds, configuration, and which
tensor is which. Kinds are looked up among the Module classes that are already imported; nothing in
a file is imported, called or evaluated.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tinynn.errors import ConfigError, FileFormatError, TinynnError
from tinynn.generators import from_state, generator_state
from tinynn.nn.module import Module, Parameter
from tinynn.op import Array
from tinynn.storage import PathLike, parse_json, read_tensors, write_tensors

_FORMAT = "1"
_DEEPEST = 64  #: levels of modules; real models have fewer than ten


def save(path: PathLike, model: Module) -> None:
    """Write parameters, buffers and architecture to one safetensors file, atomically."""
    write_tensors(path, model.state_dict(), {"tinynn": _FORMAT, "model": describe(model)})


def load(path: PathLike) -> Module:
    """Build the model that `save` wrote, with the sizes it had then, in eval mode.

    Raises FileFormatError for anything that is not a whole file of ours, or that names a module
    class which is not imported.
    """
    arrays, metadata = read_tensors(path)
    if metadata.get("tinynn") != _FORMAT or "model" not in metadata:
        raise FileFormatError(f"{path}: holds no model of format {_FORMAT}")
    return build(metadata["model"], arrays, str(path))


def describe(model: Module, *, states: bool = True) -> str:
    """The module tree as JSON; without `states`, random generators are only named.

    Raises ConfigError for an attribute that is none of module, parameter, array of numbers,
    generator, number, text, None or tuple of those, for a module inside itself, and, with `states`,
    for an attribute of a name that `build` refuses.
    """
    try:
        return json.dumps(_describe(model, "", {}, states))
    except RecursionError:
        raise ConfigError(f"{type(model).__name__}: a module contains itself") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, TinynnError):
            raise
        raise ConfigError(f"{type(model).__name__}: cannot save: {error}") from error


def build(description: str, arrays: dict[str, Array], where: str) -> Module:
    """The module tree that `describe` wrote, with `arrays` by dotted path as its values."""
    builder = _Builder(arrays, where)
    try:
        model = builder.module(parse_json(description, where), 0)
    except FileFormatError:
        raise
    except (TinynnError, LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as e:
        raise FileFormatError(f"{where}: its architecture cannot be built: {e!r}") from e
    if unclaimed := sorted(arrays.keys() - builder.values.keys()):
        raise FileFormatError(f"{where}: tensors that belong to no module: {unclaimed}")
    return model.eval()


def _describe(module: Module, path: str, names: dict[int, str], states: bool) -> dict[str, Any]:
    """`names` maps shared parameters, buffers and generators to the path where they came first."""
    parts: list[list[Any]] = []
    for name, value in vars(module).items():
        full = f"{path}.{name}" if path else name
        if name == "training":
            continue
        if states and _is_reserved(type(module), name):
            raise ConfigError(
                f"{type(module).__name__}.{name}: cannot save an attribute of this name: it begins "
                "with an underscore, or is one of the class's own; rename it"
            )
        if isinstance(value, Module):
            parts.append([name, "module", _describe(value, full, names, states)])
        elif isinstance(value, Parameter):
            what = "parameter" if value.requires_grad else "frozen"
            parts.append([name, what, names.setdefault(id(value), full)])
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            parts.append([name, "buffer", names.setdefault(id(value), full)])
        elif isinstance(value, np.random.Generator):
            state = generator_state(value) if states else None
            parts.append([name, "generator", [names.setdefault(id(value), full), state]])
        elif value is None or isinstance(value, bool | int | float | str):
            parts.append([name, "value", value])
        elif isinstance(value, tuple):
            parts.append([name, "tuple", list(value)])
        else:
            raise ConfigError(f"{type(module).__name__}.{name}: cannot save {type(value).__name__}")
    return {"kind": type(module).kind(), "parts": parts}


class _Builder:
    """Turns an untrusted description into modules; every step refuses what it does not know."""

    def __init__(self, arrays: dict[str, Array], where: str) -> None:
        self.arrays = arrays
        self.where = where
        self.values: dict[str, Parameter | Array] = {}
        self.generators: dict[str, np.random.Generator] = {}

    def module(self, tree: Any, depth: int) -> Module:
        if depth > _DEEPEST:
            raise FileFormatError(f"{self.where}: modules nested deeper than {_DEEPEST}")
        kind = Module.registry.get(tree["kind"])
        if kind is None:
            raise FileFormatError(
                f"{self.where}: module class {tree['kind']!r} is not known; import it first"
            )
        module = kind.__new__(kind)
        for name, what, value in tree["parts"]:
            if not isinstance(name, str) or not (name.isidentifier() or name.isdigit()):
                raise FileFormatError(f"{self.where}: {name!r} is no attribute name")
            if _is_reserved(kind, name):
                raise FileFormatError(f"{self.where}: {tree['kind']}.{name} is reserved")
            setattr(module, name, self.part(what, value, depth))
        module.check()
        return module

    def part(self, what: str, value: Any, depth: int) -> Any:
        if what == "module":
            return self.module(value, depth + 1)
        if what in ("parameter", "frozen"):
            parameter = self.values.setdefault(value, Parameter(self.array(value)))
            if not isinstance(parameter, Parameter):
                raise FileFormatError(f"{self.where}: {value!r} is a parameter and a buffer")
            parameter.requires_grad = what == "parameter"
            return parameter
        if what == "buffer":
            return self.values.setdefault(value, self.array(value))
        if what == "generator":
            path, state = value
            return self.generators.setdefault(path, from_state(state))
        if what == "tuple" and isinstance(value, list):
            return _as_tuple(value)
        if what == "value" and (value is None or isinstance(value, bool | int | float | str)):
            return value
        raise FileFormatError(f"{self.where}: unknown part {what!r}")

    def array(self, name: str) -> Array:
        if name not in self.arrays:
            raise FileFormatError(f"{self.where}: tensor {name!r} is missing")
        return self.arrays[name]


def _is_reserved(kind: type[Module], name: str) -> bool:
    """Whether a file must not set this attribute: private, or hiding what the class has."""
    shadows = hasattr(Module, name) or callable(getattr(kind, name, None))
    return name.startswith("_") or shadows or isinstance(vars(kind).get(name), property)


def _as_tuple(values: list[Any]) -> tuple[Any, ...]:
    return tuple(_as_tuple(v) if isinstance(v, list) else v for v in values)
