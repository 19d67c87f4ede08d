"""What a primitive on tiles is made from: checks of types, and the way from `emit` to Numba.

See `kernels.simd` for what a tile is and how a primitive works.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from kernels import _levels
from kernels._emit import Tile, constant, static_bounds
from kernels._levels import LevelCode

#: The type of offsets and counts.
OFFSET = types.intp

#: Makes a primitive of a function of types; constants arrive as such.
tile_intrinsic: Any = intrinsic(prefer_literal=True)


def check_tile(name: str, *kinds: Any) -> None:
    """Raises TypingError, which names the primitive, unless all are tiles."""
    for kind in kinds:
        if not isinstance(kind, Tile):
            raise TypingError(f"simd.{name}: expected a Tile, got {kind}")


def check_array(name: str, kind: Any, *dtypes: Any) -> None:
    """Raises TypingError, which names the primitive, unless it is an array as primitives take."""
    fits = isinstance(kind, types.Array) and kind.layout == "C" and kind.dtype in dtypes
    if not fits:
        wanted = ", ".join(map(str, dtypes))
        raise TypingError(f"simd.{name}: expected a C-contiguous array of {wanted}, got {kind}")


def primitive(result: Any, kinds: tuple[Any, ...], emit: Callable[..., Any]) -> Any:
    """What Numba wants of an intrinsic, from `emit(code, *arguments)`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code = LevelCode(context, builder)
        args = [code.unwrap(k, v) for k, v in zip(signature.args, values, strict=True)]
        return code.wrap(signature.return_type, emit(code, *args))

    return result(*kinds), codegen


def bound_types(lo: Any, hi: Any) -> tuple[Any, Any]:
    """Their types. Numba keeps one code for each signature: constants must show in it."""
    return (lo, hi) if static_bounds(lo, hi) else (OFFSET, OFFSET)


def lanes_of(array: Any) -> int:
    """Elements of a vector of the array's dtype."""
    return int(_levels.CHOSEN.vector_bytes * 8 // array.dtype.bitwidth)


def new_tile(mr: Any, nr: Any, array: Any) -> Tile:
    """The type of a tile of the array's dtype; nr = 0 is one vector of half the lanes."""
    vectors = constant(nr)
    lanes = lanes_of(array) if vectors else lanes_of(array) // 2
    return Tile(constant(mr), max(vectors, 1), array.dtype, lanes)
