"""Find out which op first made a NaN or an infinity."""

from __future__ import annotations

import numpy as np

from tinynn.errors import NonFiniteError
from tinynn.tensor import Tensor, newest_first


def find_non_finite(result: Tensor) -> str | None:
    """Name the first op on the tape of `result` that made NaN or infinity; None if all is finite.

    A leaf that is not finite itself is reported as such: then no op is to blame.
    """
    for tensor in reversed(newest_first(result)):
        if tensor.dtype.kind == "f" and not np.isfinite(tensor._data).all():
            bad = int((~np.isfinite(tensor._data)).sum())
            if tensor._node is None:
                return f"an input or parameter of shape {tensor.shape} ({bad} of {tensor.size})"
            shapes = ", ".join(str(t.shape) for t in tensor._node.inputs)
            return f"op {tensor._node.op} on shapes {shapes} ({bad} of {tensor.size} results)"
    return None


def require_finite(result: Tensor, where: str) -> None:
    """Raise NonFiniteError, naming the first op that made it, unless `result` is finite."""
    if not np.isfinite(result._data).all():
        source = find_non_finite(result) or "an op outside the tape"
        raise NonFiniteError(f"{where}: not finite; first made by {source}")
