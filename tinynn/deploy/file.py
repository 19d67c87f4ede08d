"""Plans as files: the list of layers as JSON, compressed, and all arrays one after the other.

Read without trust. A file holds two arrays of bytes, so that its header does not grow with the
network: "plan", and "data", in which each part of an array has its place, [dtype, offset, count].
With a third, "streams", data was deflated: see `tinynn.deploy.deflate`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from tinynn.deploy.deflate import deflate, inflate
from tinynn.deploy.encode import decode, encode, origin_of
from tinynn.deploy.kernels import KERNELS
from tinynn.deploy.layout import Network, network
from tinynn.deploy.origin import Origin
from tinynn.deploy.steps import FLOAT, LARGEST, Layer, Step
from tinynn.errors import FileFormatError, ShapeError
from tinynn.op import Array, Shape
from tinynn.storage import parse_json, tensor_bytes

_FORMAT = "tinynn plan 3"
_READ = ("tinynn plan 2", _FORMAT)  # the older one has no form with a width or a book a channel
_MOST_LAYERS = 10_000
_MOST_TEXT = 1 << 26
_DTYPES = ("float32", "float16", "uint8")

Stored = dict[str, Array]


def to_file(net: Network, deflated: bool = False) -> tuple[Stored, dict[str, str]]:
    """The arrays and the metadata of the file that `storage.write_tensors` is to write.

    `deflated` if that makes it smaller: a small network's list of streams may take more.
    """
    text, data = describe(net)
    kind, ways = {"format": _FORMAT}, [wrapped(text, data)]
    if deflated:
        ways.append(wrapped(text, *deflate(data, json.loads(text))))
    return min(ways, key=lambda arrays: len(tensor_bytes(arrays, kind))), kind


def wrapped(text: str, data: bytes, streams: Any = None) -> Stored:
    """The arrays of a file with this description, these bytes, and how they were deflated."""
    parts = {"plan": zlib.compress(text.encode(), 9), "data": data}
    if streams is not None:
        rows = json.dumps(streams, separators=(",", ":"))
        parts["streams"] = zlib.compress(rows.encode(), 9)
    return {name: np.frombuffer(part, np.uint8) for name, part in parts.items()}


def describe(net: Network) -> tuple[str, bytes]:
    """The network as JSON, and the bytes of its arrays, each different one once."""
    data = bytearray()
    places: dict[tuple[str, bytes], list[Any]] = {}

    def store(array: Array) -> list[Any]:
        content = array.dtype.name, array.tobytes()
        if content not in places:
            places[content] = [array.dtype.name, len(data), array.size]
            data.extend(content[1])
        return places[content]

    layers = []
    for layer in net.layers:
        own = {}
        for key, array in layer.arrays.items():
            origin = layer.origin if key == "weight" else None
            head, parts = encode(np.asarray(array), origin)
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
    return json.dumps(plan, separators=(",", ":")), bytes(data)


def from_file(arrays: Mapping[str, Array], metadata: Mapping[str, str], what: str) -> Network:
    """The network that `to_file` described. Raises FileFormatError for anything that does not fit.

    `what` names the file in errors. Shapes are computed again, not believed.
    """
    if metadata.get("format") not in _READ:
        raise FileFormatError(f"{what}: required a plan ({_FORMAT!r}); came {metadata.keys()}")
    fits = {"plan", "data"} <= arrays.keys() <= {"plan", "data", "streams"}
    if not fits or any(a.dtype != np.uint8 or a.ndim != 1 for a in arrays.values()):
        raise FileFormatError(f"{what}: required bytes plan and data; came {list(arrays)}")
    text, data = (arrays[name].tobytes() for name in ("plan", "data"))
    if "streams" in arrays:
        rows = parse_json(_unpacked(arrays["streams"].tobytes(), what), what)
        data = inflate(data, rows, what)
    try:
        plan = parse_json(_unpacked(text, what), what)
        return _Reader(data, what).network(plan)
    except (ShapeError, RecursionError) as error:
        raise FileFormatError(f"{what}: {error}") from error


def _unpacked(content: bytes, what: str) -> str:
    """The text that was compressed. What would grow without bounds is refused."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(content, _MOST_TEXT)
        if unpacker.eof and not unpacker.unused_data:
            return text.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise FileFormatError(f"{what}: its description cannot be read: {error}") from error
    raise FileFormatError(f"{what}: required a description of at most {_MOST_TEXT} bytes")


class _Reader:
    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._what = data, what
        self._shapes: dict[int, Shape] = {}
        self._dtypes: dict[int, Any] = {0: FLOAT}

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
        self._dtypes[output] = step.dtype([self._dtypes[i] for i in inputs])
        shape = step.result([self._shapes[i] for i in inputs], own)
        if shape != claimed[output]:
            self.fail(f"the result {shape} of {kind}", claimed[output])
        self._shapes[output] = shape
        layer = Layer(step, tuple(inputs), output, own, path, origin=self.origin(arrays))
        taken = KERNELS[kernel].take(layer)
        if taken is None:
            self.fail("a kernel that can run the layer", kernel)
        return taken

    def own_arrays(self, step: Step, names: Any) -> dict[str, Array]:
        if not isinstance(names, dict) or not (
            set(step.weights) <= names.keys() <= {*step.weights, *step.optional}
        ):
            self.fail(f"arrays {step.weights} of {step.kind}", names)
        found = {key: self.array(head) for key, head in names.items()}
        for key, array in found.items():
            if array.dtype != step.dtypes.get(key, FLOAT):
                self.fail(f"{key} of {step.dtypes.get(key, FLOAT)}", array.dtype)
        return found

    def array(self, head: Any) -> Array:
        parts = head.get("parts") if isinstance(head, dict) else None
        if not isinstance(parts, dict):
            self.fail("the places of an array's parts", head)
        return np.array(decode(head, self.parts(parts)), order="C")

    def origin(self, heads: dict[str, Any]) -> Origin | None:
        """What a layer's weights were made of; `heads` of arrays that were read already."""
        head = heads.get("weight")
        return None if head is None else origin_of(head, self.parts(head["parts"]))

    def parts(self, places: dict[str, Any]) -> dict[str, Array]:
        return {part: self.part(place) for part, place in places.items()}

    def part(self, place: Any) -> Array:
        fits = isinstance(place, list) and len(place) == 3 and place[0] in _DTYPES
        if not fits or not all(type(n) is int and n >= 0 for n in place[1:]):
            self.fail(f"a place [dtype of {_DTYPES}, offset, count]", place)
        dtype, start, count = place
        if start + count * np.dtype(dtype).itemsize > len(self._data):
            self.fail(f"a place within {len(self._data)} bytes", place)
        return np.frombuffer(self._data, dtype, count, start) if count else np.empty(0, dtype)

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
