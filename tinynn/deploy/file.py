"""Plans as files: arrays, and the list of layers as JSON; read without trust."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from tinynn.deploy.encode import decode, encode
from tinynn.deploy.kernels import KERNELS
from tinynn.deploy.layout import Network, network
from tinynn.deploy.steps import LARGEST, Layer, Step
from tinynn.errors import FileFormatError, ShapeError
from tinynn.op import Array, Shape
from tinynn.storage import parse_json

_FORMAT = "tinynn plan 1"
_MOST_LAYERS = 10_000


def to_file(net: Network) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays by name, each different one once, and the metadata."""
    arrays: dict[str, Array] = {}
    names: dict[tuple[Any, ...], str] = {}

    def store(array: Array) -> str:
        content = array.dtype.str, array.shape, array.tobytes()
        name = names.setdefault(content, str(len(names)))
        arrays[name] = array
        return name

    layers = []
    for layer in net.layers:
        own = {}
        for key, array in layer.arrays.items():
            head, parts = encode(array)
            own[key] = {**head, "parts": {part: store(a) for part, a in parts.items()}}
        layers.append(
            {
                "kind": layer.step.kind,
                "attributes": dataclasses.asdict(layer.step),  # type: ignore[call-overload]
                "inputs": layer.inputs,
                "output": layer.output,
                "arrays": own,
                "path": layer.path,
                "kernel": layer.kernel,
            }
        )
    plan = {"shapes": net.shapes, "layers": layers, "output": net.output}
    text = json.dumps(plan, separators=(",", ":"))
    return arrays, {"format": _FORMAT, "plan": text}


def from_file(arrays: Mapping[str, Array], metadata: Mapping[str, str], what: str) -> Network:
    """The network that `to_file` described. Raises FileFormatError for anything that does not fit.

    `what` names the file in errors. Shapes are computed again, not believed.
    """
    if metadata.get("format") != _FORMAT:
        raise FileFormatError(f"{what}: required a plan ({_FORMAT!r}); came {metadata.keys()}")
    reader = _Reader(arrays, what)
    try:
        return reader.network(parse_json(metadata.get("plan", ""), what))
    except (ShapeError, RecursionError) as error:
        raise FileFormatError(f"{what}: {error}") from error


class _Reader:
    def __init__(self, arrays: Mapping[str, Array], what: str) -> None:
        self._arrays, self._what = arrays, what
        self._shapes: dict[int, Shape] = {}

    def fail(self, required: str, came: Any) -> NoReturn:
        raise FileFormatError(f"{self._what}: required {required}; came {str(came)[:80]}")

    def network(self, plan: Any) -> Network:
        shapes, layers, output = self.fields(plan, "shapes", "layers", "output")
        if not isinstance(shapes, list) or not 1 <= len(shapes) <= 4 * _MOST_LAYERS:
            self.fail("a list of shapes", shapes)
        claimed = [self.shape(s) for s in shapes]
        if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
            self.fail(f"at most {_MOST_LAYERS} layers", layers)
        self._shapes[0] = claimed[0]
        read = [self.layer(entry, claimed) for entry in layers]
        if not isinstance(output, int) or output not in self._shapes:
            self.fail("an output that a layer makes", output)
        return network(claimed, read, output)

    def fields(self, entry: Any, *names: str) -> list[Any]:
        if not isinstance(entry, dict) or entry.keys() != set(names):
            self.fail(f"an object with {', '.join(names)}", entry)
        return [entry[name] for name in names]

    def shape(self, sizes: Any) -> Shape:
        fits = isinstance(sizes, list) and len(sizes) < 8
        if not fits or not all(type(n) is int and 1 <= n <= LARGEST for n in sizes):
            self.fail("a shape", sizes)
        if math.prod(sizes) > LARGEST:
            self.fail(f"at most {LARGEST} elements for one image", sizes)
        return tuple(sizes)

    def layer(self, entry: Any, claimed: list[Shape]) -> Layer:
        kind, attributes, inputs, output, arrays, path, kernel = self.fields(
            entry, "kind", "attributes", "inputs", "output", "arrays", "path", "kernel"
        )
        if not isinstance(kind, str) or kind not in Step.registry:
            self.fail(f"a kind of {sorted(Step.registry)}", kind)
        step = self.step(Step.registry[kind], attributes)
        wanted = step.operands + step.onto_operand if step.operands else None
        if not isinstance(inputs, list) or not inputs or wanted not in (None, len(inputs)):
            self.fail(f"{wanted} operands of {kind}", inputs)
        if not all(type(i) is int and i in self._shapes for i in inputs):
            self.fail("operands that were made before", inputs)
        new = type(output) is int and 0 <= output < len(claimed) and output not in self._shapes
        if not new:
            self.fail("a new value as result", output)
        if not isinstance(path, str) or not isinstance(kernel, str) or kernel not in KERNELS:
            self.fail(f"a path and a kernel of {sorted(KERNELS)}", (path, kernel))
        own = self.own_arrays(step, arrays)
        shape = step.result([self._shapes[i] for i in inputs], own)
        if shape != claimed[output]:
            self.fail(f"the result {shape} of {kind}", claimed[output])
        self._shapes[output] = shape
        layer = Layer(step, tuple(inputs), output, own, path, kernel)
        if not KERNELS[kernel].applies(layer):
            self.fail("a kernel that can run the layer", kernel)
        return layer

    def own_arrays(self, step: Step, names: Any) -> dict[str, Array]:
        if not isinstance(names, dict) or not (
            set(step.weights) <= names.keys() <= {*step.weights, *step.optional}
        ):
            self.fail(f"arrays {step.weights} of {step.kind}", names)
        return {key: self.array(head) for key, head in names.items()}

    def array(self, head: Any) -> Array:
        parts = head.get("parts") if isinstance(head, dict) else None
        if not isinstance(parts, dict) or not all(isinstance(n, str) for n in parts.values()):
            self.fail("the names of an array's parts", head)
        if not self._arrays.keys() >= set(parts.values()):
            self.fail("names of arrays in the file", parts)
        found = {part: self._arrays[name] for part, name in parts.items()}
        return np.array(decode(head, found), order="C")

    def step(self, kind: type[Step], attributes: Any) -> Step:
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        values = self.fields(attributes, *names)
        return kind(*(self.value(hints[n], v) for n, v in zip(names, values, strict=True)))

    def value(self, hint: Any, value: Any) -> Any:
        """A value of an attribute's type: bool, int, float, str or tuples of them."""
        if typing.get_origin(hint) is tuple:
            parts = typing.get_args(hint)
            if not isinstance(value, list) or len(value) > 8:
                self.fail("a short list", value)
            if len(parts) == 2 and parts[1] is Ellipsis:
                parts = parts[:1] * len(value)
            if len(parts) != len(value):
                self.fail(f"{len(parts)} values", value)
            return tuple(self.value(p, v) for p, v in zip(parts, value, strict=True))
        if hint is float and type(value) is int:
            value = float(value)
        if type(value) is not hint or (hint is int and abs(value) > LARGEST):
            self.fail(f"a {hint.__name__}", value)
        return value
