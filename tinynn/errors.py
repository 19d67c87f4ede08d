"""What can go wrong, by name. Each error says what was required and what came."""

from __future__ import annotations


class TinynnError(Exception):
    """The base of every error that tinynn raises on purpose."""


class ShapeError(TinynnError, ValueError):
    """Operands' shapes do not fit the op."""


class DTypeError(TinynnError, TypeError):
    """An operand has a dtype that the op does not take, or operands' dtypes differ."""


class StaleArrayError(TinynnError, RuntimeError):
    """An array that backward needs was changed in place after the forward pass saved it."""


class GraphError(TinynnError, RuntimeError):
    """Backward or a trace was asked of a computation that does not allow it."""


class NonFiniteError(TinynnError, ArithmeticError):
    """NaN or infinity where a finite number is needed."""


class DataError(TinynnError, ValueError):
    """A data set, a batch or a label is unusable."""


class DataNotFoundError(TinynnError, FileNotFoundError):
    """A data set is nowhere to be found and cannot be downloaded."""


class FileFormatError(TinynnError, ValueError):
    """A file is truncated, corrupted or hostile."""


class OutputError(TinynnError, OSError):
    """A file or directory could not be written; what stood there before is whole."""


class CompileError(TinynnError, ValueError):
    """A model that no plan can express."""


class PruneError(TinynnError, ValueError):
    """A pruning request that cannot be carried out exactly."""


class ConfigError(TinynnError, ValueError):
    """A hyper-parameter outside its range."""


class UnsupportedError(TinynnError, NotImplementedError):
    """Something that is well formed, but that tinynn or the file format has no counterpart for."""


class MissingPackageError(TinynnError, ImportError):
    """An optional package is needed that is not installed."""
