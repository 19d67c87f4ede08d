"""ONNX files: a float or quantised model to one, and a float model from one.

The `onnx` package is optional (`pip install 'tinynn[onnx]'`); it is imported when a file is written
or read, and MissingPackageError says so where it is absent.
"""

from tinynn.onnx.export import export
from tinynn.onnx.load import load
from tinynn.onnx.network import Network

__all__ = ["Network", "export", "load"]
