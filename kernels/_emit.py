"""Writing LLVM instructions for tiles: what the primitives of `kernels.simd` share.

Nothing here depends on a processor. See `kernels.simd` for what a tile is.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import models, register_model

#: LLVM's type of the elements that a tile can have, and its name in the names of instructions.
SCALARS = {
    types.float32: (ir.FloatType(), "f32"),
    types.float64: (ir.DoubleType(), "f64"),
    types.int32: (ir.IntType(32), "i32"),
}

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))


class Tile(types.Type):
    """mr x nr vectors of `lanes` elements of a Numba scalar type."""

    def __init__(self, mr: int, nr: int, dtype: Any, lanes: int) -> None:
        self.mr, self.nr, self.dtype, self.lanes = mr, nr, dtype, lanes
        self.vector = ir.VectorType(SCALARS[dtype][0], lanes)
        super().__init__(f"Tile({mr} x {nr} vectors of {lanes} {dtype})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, tile: Tile) -> None:
        super().__init__(manager, tile, ir.ArrayType(tile.vector, tile.mr * tile.nr))


class Code:
    """Writes instructions at the place where a primitive is called.

    Values are LLVM's: scalars, vectors, pointers. A tile is a list of rows, each a list of vectors.
    """

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def unwrap(self, kind: Any, value: Any) -> Any:
        """A tile as rows of vectors, an array as a pointer to its first element."""
        if isinstance(kind, Tile):
            part = [self.builder.extract_value(value, e) for e in range(kind.mr * kind.nr)]
            return [part[i * kind.nr : (i + 1) * kind.nr] for i in range(kind.mr)]
        if isinstance(kind, types.Array):
            return self.context.make_array(kind)(self.context, self.builder, value).data
        return value

    def wrap(self, kind: Any, value: Any) -> Any:
        if not isinstance(kind, Tile):
            return self.context.get_dummy_value() if value is None else value
        whole = ir.Constant(self.context.get_value_type(kind), ir.Undefined)
        for e, v in enumerate(v for row in value for v in row):
            whole = self.builder.insert_value(whole, v, e)
        return whole

    def call(self, name: str, result: Any, *args: Any) -> Any:
        signature = ir.FunctionType(result, [a.type for a in args])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, args)

    def at(self, base: Any, offset: Any, rows: int = 0, ld: Any = None, extra: int = 0) -> Any:
        """The address of element offset + rows * ld + extra."""
        b = self.builder
        if rows:
            offset = b.add(offset, b.mul(ld, I64(rows)))
        if extra:
            offset = b.add(offset, I64(extra))
        return b.gep(base, [offset])

    def row_of(self, base: Any, offset: Any, row: int, ld: Any) -> Any:
        """As `at`, but LLVM cannot tell that row 4 follows row 3.

        It would reach each row from the one before, twelve additions that wait for each other.
        """
        if row >= 4:
            far = self.unrelated(self.builder.mul(ld, I64(row // 4 * 4)))
            offset = self.builder.add(offset, far)
        return self.at(base, offset, row % 4, ld)

    def unrelated(self, value: Any) -> Any:
        """The same int64, of which LLVM cannot tell how it was made."""
        same = ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0")
        return self.builder.call(same, [value], attrs=("readnone", "nounwind"))

    def splat(self, scalar: Any, lanes: int) -> Any:
        kind = ir.VectorType(scalar.type, lanes)
        unset = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(unset, scalar, I32(0))
        return self.shuffle(first, unset, [0] * lanes)

    def shuffle(self, x: Any, y: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def load(self, pointer: Any, kind: Any) -> Any:
        size = kind.element.get_abi_size(self.context.target_data)
        return self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()), align=size)

    def store(self, vector: Any, pointer: Any, align: int = 0) -> Any:
        align = align or vector.type.element.get_abi_size(self.context.target_data)
        pointer = self.builder.bitcast(pointer, vector.type.as_pointer())
        return self.builder.store(vector, pointer, align=align)

    def mask(self, count: Any, lanes: int) -> Any:
        """Lanes l < count, where count may be negative."""
        steps = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        return self.builder.icmp_signed("<", steps, self.splat(count, lanes))

    def masks(self, cols: Any, nr: int, lanes: int) -> list[Any]:
        """For each of nr vectors, which lanes lie within the first `cols` elements of the row."""
        return [self.mask(self.builder.sub(cols, I64(j * lanes)), lanes) for j in range(nr)]

    def masked(self, pointer: Any, kind: Any, mask: Any, store: Any = None) -> Any:
        """A load that gives 0 in lanes outside the mask, or a store of `store` that leaves them."""
        short = suffix(kind)
        pointer = self.builder.bitcast(pointer, kind.as_pointer())
        align = I32(kind.element.get_abi_size(self.context.target_data))
        if store is None:
            zero = ir.Constant(kind, None)
            return self.call(f"llvm.masked.load.{short}.p0", kind, pointer, align, mask, zero)
        name = f"llvm.masked.store.{short}.p0"
        return self.call(name, ir.VoidType(), store, pointer, align, mask)

    def rows_within(
        self,
        lo: Any,
        hi: Any,
        count: int,
        write: Callable[[int], list[Any]],
        old: list[list[Any]] | None = None,
    ) -> list[list[Any]]:
        """write(i) for rows lo <= i < hi, each behind a branch unless lo and hi are constants."""
        b, out = self.builder, []
        for i in range(count):
            if isinstance(lo, int) and isinstance(hi, int):
                out.append(write(i) if lo <= i < hi else old[i] if old else [])
                continue
            inside = b.and_(
                b.icmp_signed("<=", index(lo), I64(i)), b.icmp_signed("<", I64(i), index(hi))
            )
            before = b.block
            with b.if_then(inside):
                new = write(i)
                end = b.block
            row = []
            for v, kept in zip(new, old[i] if old else [], strict=bool(old)):
                phi = b.phi(v.type)
                phi.add_incoming(kept, before)
                phi.add_incoming(v, end)
                row.append(phi)
            out.append(row)
        return out


def suffix(kind: ir.VectorType) -> str:
    """The vector type in the name of an instruction: v16f32."""
    short = {str(t): name for t, name in SCALARS.values()}
    return f"v{kind.count}{short[str(kind.element)]}"


def index(value: Any) -> Any:
    """A bound as LLVM's value, whether it is constant or not."""
    return I64(value) if isinstance(value, int) else value


def constant(kind: Any) -> int:
    """The value of a compile-time constant. Raises TypingError for anything else."""
    if not isinstance(kind, types.IntegerLiteral):
        raise TypingError(f"simd: expected an integer constant or a bare name of one, got {kind}")
    return int(kind.literal_value)


def static_bounds(lo: Any, hi: Any) -> tuple[int, int] | None:
    """The bounds where both are compile-time constants."""
    if isinstance(lo, types.IntegerLiteral) and isinstance(hi, types.IntegerLiteral):
        return constant(lo), constant(hi)
    return None
