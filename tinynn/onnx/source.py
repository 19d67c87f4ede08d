"""Read an ONNX file that nobody vouches for: sizes, references and data are checked here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinynn.errors import FileFormatError, UnsupportedError
from tinynn.op import Array
from tinynn.storage import PathLike

OLDEST, NEWEST = 7, 28  #: opsets; before 7 operators broadcast by other rules
_LARGEST = 2**31 - 1  #: bytes of one protobuf message
_MOST_AXES = 16
_EXTERNAL = 1
#: values of TensorProto.data_type that are read: float32, uint8, int8, int32, int64, bool, float64
_WIDTHS = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 11: 8}
_FIELDS = {1: "float_data", 7: "int64_data", 11: "double_data"}


def read(onnx: Any, path: PathLike) -> tuple[Any, int]:
    """The checked model of a file, and the version of its operators.

    Raises FileNotFoundError; FileFormatError for what is no whole and consistent ONNX file, or has
    its data in other files; UnsupportedError for operators of other domains or versions.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file")
    try:
        if source.stat().st_size > _LARGEST:
            raise FileFormatError(f"{source}: larger than {_LARGEST} bytes")
        content = source.read_bytes()
    except OSError as error:
        raise FileFormatError(f"{source}: cannot be read: {error}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own kinds differ between its versions
        raise FileFormatError(f"{source}: not an ONNX file: {error}") from error
    if not model.HasField("graph") or not model.ir_version:
        raise FileFormatError(f"{source}: not an ONNX file: no graph in it")
    for tensor in _tensors(model):
        if tensor.data_location == _EXTERNAL or tensor.external_data:
            raise FileFormatError(
                f"{source}: tensor {tensor.name!r} is kept in another file; required one file with "
                "everything in it"
            )
    return model, _version(model, source)


def check(onnx: Any, model: Any, path: PathLike) -> None:
    """Raise FileFormatError unless the ONNX checker accepts the model."""
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise FileFormatError(f"{path}: not a valid ONNX model: {error}") from error


def to_array(onnx: Any, tensor: Any) -> Array:
    """The values of an initialiser or attribute, as many as its shape says."""
    what = f"ONNX tensor {tensor.name!r}"
    dims = list(tensor.dims)
    width = _WIDTHS.get(tensor.data_type)
    if width is None:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type) if tensor.data_type else "no type"
        raise UnsupportedError(f"onnx.load: {what} is of {kind}")
    if len(dims) > _MOST_AXES or any(n < 0 for n in dims):
        raise FileFormatError(f"{what}: impossible shape {dims}")
    count = math.prod(dims)
    raw = tensor.HasField("raw_data")
    came = len(tensor.raw_data) if raw else len(_typed(tensor)) * width
    if came != count * width:
        raise FileFormatError(f"{what}: shape {dims} needs {count * width} bytes; came {came}")
    try:
        return onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{what}: {error}") from error


def _typed(tensor: Any) -> Any:
    return getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data"))


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a model, those of inner graphs and functions too."""
    graphs, nodes = [model.graph], [n for f in model.functions for n in f.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [g for g in (attribute.g, *attribute.graphs) if g.node or g.initializer]


def _version(model: Any, source: Path) -> int:
    versions = {o.domain: o.version for o in model.opset_import}
    version = versions.get("", versions.get("ai.onnx", 0))
    if not OLDEST <= version <= NEWEST:
        raise UnsupportedError(
            f"onnx.load: {source}: required opset {OLDEST} to {NEWEST}; came {version}"
        )
    return version
