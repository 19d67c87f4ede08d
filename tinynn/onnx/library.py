"""The optional `onnx` package, imported when it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tinynn.errors import MissingPackageError


def library(what: str) -> Any:
    """The onnx package, for `what`; raises MissingPackageError where it is not installed."""
    try:
        onnx = import_module("onnx")
        for part in ("checker", "helper", "numpy_helper", "shape_inference"):
            import_module(f"onnx.{part}")
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs the onnx package: pip install 'tinynn[onnx]' (or: pip install onnx)"
        ) from error
    return onnx
