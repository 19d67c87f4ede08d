"""Instruction sets: what each offers to tiles, and the instructions that differ between them.

All knowledge of processors is here. `LEVEL` is the best level of this processor, or the one named
by the environment variable TINYNN_CPU. Floating point may round differently from level to level,
integers never differ. See `kernels.simd` for what a tile is.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import os
import platform
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
from llvmlite import ir

from kernels._emit import I16, Code, suffix


class Level(NamedTuple):
    """What a set of vector instructions offers, and how LLVM is told to use no more than it."""

    needs: frozenset[str]  # features of the processor, by LLVM's names
    vector_bytes: int
    rows: tuple[int, ...]  # rows of the tallest tile of 1, 2, ... vectors that fits the registers
    dot4: str  # how a product of bytes is summed: "vpdpbusd", "pmaddwd" or "plain"
    cpu: tuple[str, str]  # LLVM's processor name and extra features, when the level is forced


_AVX2 = frozenset({"avx2", "fma"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}) | _AVX2
REGISTERS_32, REGISTERS_16 = (12, 12, 8, 6), (12, 6)

#: By name, best first.
LEVELS = {
    "avx512vnni": Level(
        _AVX512 | {"avx512vnni"}, 64, REGISTERS_32, "vpdpbusd", ("x86-64-v4", "+avx512vnni")
    ),
    "avx512": Level(_AVX512, 64, REGISTERS_32, "pmaddwd", ("x86-64-v4", "")),
    "avx2vnni": Level(_AVX2 | {"avxvnni"}, 32, REGISTERS_16, "vpdpbusd", ("x86-64-v3", "+avxvnni")),
    "avx2": Level(_AVX2, 32, REGISTERS_16, "pmaddwd", ("x86-64-v3", "")),
    "neon": Level(frozenset({"neon"}), 16, REGISTERS_32, "plain", ("generic", "+neon")),
    "portable": Level(frozenset(), 16, REGISTERS_16, "plain", ("", "")),
}


def _features() -> set[str]:
    """The processor's features, as far as Numba is allowed to use them."""
    flags = _config.CPU_FEATURES
    if flags is None:
        try:
            flags = llvm.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM does not know this processor
            flags = ""
    found = {f[1:] for f in flags.split(",") if f.startswith("+")}
    if platform.machine().lower() in ("arm64", "aarch64"):
        found.add("neon")  # part of the architecture
    return found


def available() -> list[str]:
    """The levels that this processor can execute, best first."""
    return [name for name, level in LEVELS.items() if level.needs <= _FEATURES]


def _choose() -> str:
    possible = available()
    asked = os.environ.get("TINYNN_CPU")
    if not asked:
        return possible[0]
    if asked not in possible:
        known = "unknown" if asked not in LEVELS else "not executable on this processor"
        raise ValueError(f"TINYNN_CPU={asked}: {known}; expected one of {', '.join(possible)}")
    if asked != possible[0]:
        # Instructions of higher levels must not slip in, neither here nor in plain loops.
        name, features = LEVELS[asked].cpu
        _config.CPU_NAME = name or ("x86-64" if "x86" in llvm.get_default_triple() else "")
        _config.CPU_FEATURES = features
    return asked


_config: Any = numba.config
_FEATURES = _features()
LEVEL = _choose()
CHOSEN = LEVELS[LEVEL]

#: Elements of a float32 or int32 vector; float64 has half as many.
LANES = CHOSEN.vector_bytes // 4
#: The preferred tile is TILE = (mr, nr); ROWS[nr] is the height that suits nr vectors.
ROWS = (CHOSEN.rows[0], *CHOSEN.rows)
TILE = (ROWS[-1], len(ROWS) - 1)
#: Whether bytes are multiplied as int16, and so are better widened once than in each product.
WIDENS = CHOSEN.dot4 == "pmaddwd"
#: Whether whole images are, too, and rows of depthwise windows put together as pairs of int16, not
#: as four bytes: measured where vectors have 32 bytes only.
WIDENS_IMAGES = WIDENS and CHOSEN.vector_bytes == 32
#: Whether there are loads and stores of some bytes of a vector: elsewhere a branch for each byte.
MASKS_BYTES = CHOSEN.vector_bytes == 64


class LevelCode(Code):
    """Adds the instructions that depend on the level."""

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z, rounded once where the processor can."""
        if isinstance(x.type.element, ir.IntType):
            return self.builder.add(self.builder.mul(x, y), z)
        name = "fmuladd" if LEVEL == "portable" else "fma"
        return self.call(f"llvm.{name}.{suffix(x.type)}", x.type, x, y, z)

    def dot2(self, z: Any, p: Any, q: Any) -> Any:
        """z + the dot product of 2 int16 of p and of q, in each int32 lane; WIDENS only."""
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[z.type.count]
        half = ir.VectorType(I16, 2 * z.type.count)
        p, q = (self.builder.bitcast(v, half) for v in (p, q))
        return self.builder.add(z, self.call(f"llvm.x86.{name}", z.type, p, q))

    def dot4(self, z: Any, u: Any, s: Any) -> Any:
        """z + the dot product of 4 unsigned bytes of u and 4 signed of s, in each int32 lane."""
        b, kind = self.builder, z.type
        bits = kind.count * 32
        if CHOSEN.dot4 == "vpdpbusd":
            # Takes vectors of int32 up to LLVM 21; later versions convert this form.
            return self.call(f"llvm.x86.avx512.vpdpbusd.{bits}", kind, z, u, s)
        if CHOSEN.dot4 == "pmaddwd":
            # Even and odd bytes as int16, whose products pmaddwd sums in pairs, exactly.
            half = ir.VectorType(I16, kind.count * 2)
            eight = ir.Constant(half, [8] * half.count)
            u, s = b.bitcast(u, half), b.bitcast(s, half)
            pairs = (
                (b.and_(u, ir.Constant(half, [255] * half.count)), b.ashr(b.shl(s, eight), eight)),
                (b.lshr(u, eight), b.ashr(s, eight)),
            )
            for p, q in pairs:
                z = self.dot2(z, p, q)
            return z
        for byte in range(4):
            low, high = (ir.Constant(kind, [n] * kind.count) for n in (8 * byte, 24 - 8 * byte))
            p = b.and_(b.lshr(u, low), ir.Constant(kind, [255] * kind.count))
            q = b.ashr(b.shl(s, high), ir.Constant(kind, [24] * kind.count))
            z = b.add(z, b.mul(p, q))
        return z
