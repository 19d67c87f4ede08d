"""Register tiles: every primitive against NumPy, at every level that this processor can execute."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from borders import bordered
from numba import types

from kernels import _jit, _levels, product, simd, simd_int
from kernels._jit import jit

MR, NR = simd.TILE
DTYPES = [np.float32, np.float64, np.int32]
FLOATS = DTYPES[:2]
#: Only the function itself: no reference counts, no entry from Python.
BARE = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def lanes(dtype):
    return simd.LANES * 4 // np.dtype(dtype).itemsize


def numbers(shape, dtype, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 100).astype(dtype)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")


# --- tiles in and out -----------------------------------------------------------------------------


@jit
def _copy(X, ix, ldx, Y, iy, ldy):
    simd.store(simd.load(MR, NR, X, ix, ldx), Y, iy, ldy)


@jit
def _copy_part(X, ldx, Y, ldy, lo, hi, cols):
    simd.store_part(simd.load_part(MR, NR, X, 0, ldx, lo, hi, cols), Y, 0, ldy, lo, hi, cols)


@jit
def _copy_first_rows(X, ldx, Y, ldy, cols):
    simd.store_part(simd.load_part(MR, NR, X, 0, ldx, 0, 2, cols), Y, 0, ldy, 0, MR, cols)


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_and_store(dtype):
    width = NR * lanes(dtype)
    x, y = numbers((MR + 1, width + 3), dtype), np.full((MR + 1, width + 5), 7, dtype)
    _copy(x, 2, width + 3, y, 1, width + 5)
    rows = np.arange(MR)[:, None] * (width + 3)
    np.testing.assert_array_equal(y[:MR, 1:-4], x.ravel()[2 + rows + np.arange(width)])
    assert (y[:, 0] == 7).all() and (y[:, width + 1 :] == 7).all() and (y[MR] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_touch_nothing_else(dtype):
    width = NR * lanes(dtype)
    x = numbers((MR, width), dtype)
    for cols in (0, 1, lanes(dtype) - 1, lanes(dtype), width - 1, width, width + 9):
        for lo, hi in ((0, MR), (1, MR - 1), (2, 2), (-3, 1), (MR - 1, MR + 4)):
            y = np.full((MR, width), 7, dtype)
            expected = y.copy()
            rows = slice(max(lo, 0), hi)
            expected[rows, :cols] = x[rows, :cols]
            _copy_part(x, width, y, width, lo, hi, cols)
            np.testing.assert_array_equal(y, expected)
        _copy_first_rows(x, width, y, width, cols)
        np.testing.assert_array_equal(y[:2, :cols], x[:2, :cols])
        assert (y[2:, :cols] == 0).all()


@on_linux
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_stay_off_the_next_page(dtype):
    for cols in range(1, NR * lanes(dtype)):
        for rows in (1, MR - 1, MR):
            (x, _), (y, _) = (
                bordered(a) for a in (numbers((rows, cols), dtype), np.zeros((rows, cols), dtype))
            )
            _copy_part(x, cols, y, cols, 0, rows, cols)
            np.testing.assert_array_equal(x, y)


@jit
def _stream(X, Y, iy, ld):
    simd.stream(simd.load(MR, NR, X, 0, ld), Y, iy, ld)
    simd.fence()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stream_takes_any_address(dtype):
    width = NR * lanes(dtype)
    x = numbers((MR, width), dtype)
    for offset in range(lanes(dtype) + 1):
        y = np.zeros(x.size + offset, dtype)
        _stream(x, y, offset, width)
        np.testing.assert_array_equal(y[offset:].reshape(x.shape), x)


@jit
def _made(X, Y, W):
    simd.store(simd.fill(2, 1, X, X[1]), Y, 0, W)
    simd.store(simd.zeros(2, 1, X), Y, 2 * W, W)
    simd.store(simd.spread(3, X, 1, 2), Y, 4 * W, W)
    simd.store(simd.rows(simd.load(4, 1, X, 0, W), 1, 3), Y, 7 * W, W)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill_zeros_spread_rows(dtype):
    width = lanes(dtype)
    x, y = numbers(4 * width, dtype), np.full((9, width), 7, dtype)
    _made(x, y, width)
    assert (y[:2] == x[1]).all() and (y[2:4] == 0).all()
    np.testing.assert_array_equal(y[4:7], np.repeat(x[[1, 3, 5]][:, None], width, 1))
    np.testing.assert_array_equal(y[7:], x.reshape(4, width)[1:3])


@jit
def _lanes(X):
    return simd.lanes(X)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanes(dtype):
    assert _lanes(np.zeros(1, dtype)) == lanes(dtype)


# --- products -------------------------------------------------------------------------------------


@jit
def _products(A, ia, sm, sk, B, ib, K, C, W, lo, hi):
    acc = simd.load(MR, NR, C, 0, W)
    for k in range(K):
        simd.rolled()
        acc = simd.rank1(acc, A, ia + k * sk, sm, B, ib + k * W)
    for k in range(K):
        acc = simd.rank1_rows(acc, A, ia + k * sk, sm, B, ib + k * W, lo, hi)
        acc = simd.rank1_rows(acc, A, ia + k * sk, sm, B, ib + k * W, 1, 2)
    simd.store(acc, C, 0, W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_rank1(dtype, transposed):
    K, width = 5, NR * lanes(dtype)
    a, b, c = (numbers(s, dtype, 1) for s in ((MR, K), (K, width), (MR, width)))
    for lo, hi in ((0, MR), (2, MR - 1), (3, 3), (-1, 1)):
        weights = np.ones(MR)
        weights[max(lo, 0) : hi] += 1
        weights[1] += 1
        expected = c.astype(np.float64) + weights[:, None] * (a.astype(np.float64) @ b)
        got = c.copy()
        flat = np.ascontiguousarray(a.T if transposed else a)
        sm, sk = (1, MR) if transposed else (K, 1)
        _products(flat, 0, sm, sk, b, 0, K, got, width, lo, hi)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-2)


@on_linux
@pytest.mark.parametrize("dtype", FLOATS)
def test_rank1_rows_reads_only_its_rows(dtype):
    width = NR * lanes(dtype)
    (a, _), (b, _) = bordered(numbers(2, dtype)), bordered(numbers(width, dtype))
    c = np.zeros((MR, width), dtype)
    _only_rows(a, b, c, width, 0, 2)
    np.testing.assert_array_equal(c[:2], a[:, None] * b)
    assert (c[2:] == 0).all()


@jit
def _only_rows(A, B, C, W, lo, hi):
    acc = simd.rank1_rows(simd.zeros(MR, NR, C), A, 0, 1, B, 0, lo, hi)
    simd.store(acc, C, 0, W)


@jit
def _dots(A, B, C, K, W):
    acc = simd.zeros(MR, NR, C)
    for k in range(0, K, 4):
        simd.rolled()
        acc = simd_int.dot4(acc, A, k, K, B, k * W)
    acc = simd_int.dot4_rows(acc, A, 0, K, B, 0, 1, 3)
    simd.store(acc, C, 0, W)


def test_dot4_is_exact():
    K, width = 48, NR * simd.LANES
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (MR, K)).astype(np.uint8)
    b = rng.integers(-128, 128, (K // 4, width, 4)).astype(np.int8)
    a[0], b[:, 0], b[:, 1] = 255, -128, 127  # where 16-bit sums would saturate
    c = np.zeros((MR, width), np.int32)
    _dots(a, b, c, K, width)
    expected = np.einsum("mkt,knt->mn", a.reshape(MR, -1, 4).astype(np.int64), b)
    expected[1:3] += np.einsum("mt,nt->mn", a[1:3, :4].astype(np.int64), b[0])
    np.testing.assert_array_equal(c, expected)


# --- element by element ---------------------------------------------------------------------------


@jit
def _elementwise(X, Y, Z, out, W):
    x, y, z = (simd.load(MR, NR, X, 0, W), simd.load(MR, NR, Y, 0, W), simd.load(1, NR, Z, 0, W))
    s = MR * W
    simd.store(simd.add(x, y), out, 0, W)
    simd.store(simd.sub(x, z), out, s, W)
    simd.store(simd.mul(x, simd.spread(MR, Y, 0, W)), out, 2 * s, W)
    simd.store(simd.fma(z0(x, y), x, y), out, 3 * s, W)
    simd.store(simd.maximum(x, y), out, 4 * s, W)
    simd.store(simd.maximum(x, simd.zeros(1, 1, X)), out, 5 * s, W)
    simd.store(simd.gate(x, y), out, 6 * s, W)
    simd.store(simd.greater(x, y, x, simd.fill(1, 1, X, 3)), out, 7 * s, W)


@jit
def z0(x, y):
    return simd.sub(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [False, True])
def test_elementwise(dtype, special):
    width = NR * lanes(dtype)
    x, y, z = (numbers((n, width), dtype, n) for n in (MR, MR + 1, 1))
    y = y[:MR]
    if special and dtype != np.int32:
        values = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0]
        rng = np.random.default_rng(3)
        x, y, z = (rng.choice(values, v.shape).astype(dtype) for v in (x, y, z))
    out = np.zeros((8, MR, width), dtype)
    _elementwise(x, y, z, out, width)
    with np.errstate(all="ignore"):
        expected = [
            x + y, x - z, x * y[:, :1], (x - y) + x * y, np.where(x < y, y, x),
            np.where(x < 0, 0, x), np.where(y <= 0, 0, x), np.where(x > y, x, 3),
        ]  # fmt: skip
    for got, exact in zip(out, expected, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-2)


@jit
def _sums(X, out, W):
    x = simd.load(MR, NR, X, 0, W)
    out[0] = simd.row_sum(x, 0)
    out[1] = simd.row_sum(x, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_sum(dtype):
    width = NR * lanes(dtype)
    x, out = numbers((MR, width), dtype), np.zeros(2, dtype)
    _sums(x, out, width)
    np.testing.assert_allclose(out, x.astype(np.float64).sum(1)[[0, 2]], rtol=1e-4, atol=1e-2)


SQUARE, HALF = simd.LANES, simd.LANES // 2


@jit
def _transpose(X, Y):
    simd.store(simd.transpose(simd.load(SQUARE, 1, X, 0, SQUARE)), Y, 0, SQUARE)


@jit
def _transpose_half(X, Y):
    simd.store(simd.transpose(simd.load(HALF, 1, X, 0, HALF)), Y, 0, HALF)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transpose(dtype):
    x = numbers((lanes(dtype), lanes(dtype)), dtype)
    y = np.zeros_like(x)
    (_transpose_half if dtype == np.float64 else _transpose)(x, y)
    np.testing.assert_array_equal(y, x.T)


def test_wrong_use_is_named():
    @jit
    def mixed(X, Y):
        simd.store(simd.load(1, 1, X, 0, 0), Y, 0, 0)

    with pytest.raises(Exception, match=r"simd\.store: expected a C-contiguous array of float32"):
        mixed(np.zeros(99, np.float32), np.zeros(99))


# --- levels and machine code ----------------------------------------------------------------------


def run(level, *command):
    root = Path(simd.__file__).parents[1]
    path = os.pathsep.join(str(p) for p in (root, root / "tests"))
    environment = {**os.environ, "TINYNN_CPU": level, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=root
    )


@pytest.mark.parametrize("level", [name for name in simd.available() if name != simd.LEVEL])
@pytest.mark.skipif("TINYNN_CPU" in os.environ, reason="this is such a run")
def test_other_levels(level):
    """This file, and products of awkward sizes, as a processor of a lower level would run them.

    Products of floats only where vectors or registers are others than at the level just tested.
    """
    files = [__file__]
    shapes = {name: (known.vector_bytes, known.rows) for name, known in simd.LEVELS.items()}
    if shapes[level] != shapes[simd.LEVEL]:
        products = Path(__file__).with_name("test_kernels_pointwise.py")
        tests = ("linear", "general_product_stays_within_its_operands")
        files += [f"{products}::test_{name}" for name in tests]
    names = "not threads and not blocks and not parallel"
    done = run(level, "-m", "pytest", "-x", "-q", "-k", names, *files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "level", ["fast", next((n for n in simd.LEVELS if n not in simd.available()), "x")]
)
def test_impossible_level_is_refused(level):
    done = run(level, "-c", "import kernels.simd")
    assert done.returncode and f"ValueError: TINYNN_CPU={level}: " in done.stderr
    assert simd.available()[0] in done.stderr


def blocks(assembly):
    """The basic blocks of a function, as lists of lines."""
    return [b.splitlines() for b in re.split(r"^\.?[\w$]+:.*$", assembly, flags=re.M)]


def product_kernel(nr, dtype):
    """The kernel of the product for panels of nr vectors, compiled afresh: cached code hides."""
    floats = types.float32 if dtype == np.float32 else types.float64
    kernel = numba.njit(nogil=True, error_model="numpy", fastmath=set(_jit.FASTMATH), **BARE)(
        product._panels(simd.ROWS[nr], nr)
    )
    kernel.compile(
        (
            *[types.Array(floats, 2, "C"), *[types.intp] * 3],
            *[types.Array(floats, 2, "C"), *[types.intp] * 3],
            *[types.Array(floats, 1, "C"), floats, types.Array(floats, 3, "C")],
            *[types.intp] * 5,
            types.boolean,
        )
    )
    return kernel


@pytest.mark.skipif("avx" not in simd.LEVEL, reason="reads x86 assembly")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nr", range(NR + 1))
def test_no_register_of_the_main_loop_is_kept_in_memory(nr, dtype):
    (assembly,) = product_kernel(nr, dtype).inspect_asm().values()
    suffix = "ps" if dtype == np.float32 else "pd"
    pattern = re.compile(rf"vfmadd\w+{suffix}")
    inner = max(blocks(assembly), key=lambda b: sum(bool(pattern.search(line)) for line in b))
    count = sum(bool(pattern.search(line)) for line in inner)
    assert count % (simd.ROWS[nr] * max(nr, 1)) == 0  # all of the tile, unrolled or not
    vectors = [line for line in inner if re.search(r"%[xyz]mm", line)]
    stack = "rsp|rbp" if re.search(r"movq\s+%rsp, %rbp", assembly) else "rsp"
    assert not [line for line in vectors if re.search(rf"\(%({stack})", line)]
    if simd.LANES == 16 and nr:
        assert not [line for line in vectors if "%ymm" in line]


def print_neon_code():
    """Run in a process of its own: from here on tiles are NEON's."""
    _levels.CHOSEN, _levels.LEVEL = simd.LEVELS["neon"], "neon"
    simd.ROWS = (_levels.CHOSEN.rows[0], *_levels.CHOSEN.rows)
    print(*product_kernel(4, np.float32).inspect_llvm().values())


def test_neon_code_for_arm64():
    """The tile kernel as LLVM writes it for ARM64: multiply-adds and no detour through memory."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    script = "import test_kernels_simd as t; t.print_neon_code()"
    done = run("portable" if "portable" in simd.available() else simd.LEVEL, "-c", script)
    assert done.returncode == 0, done.stderr
    source = re.sub(r'target (triple|datalayout) = ".*"', "", done.stdout)
    source = re.sub(r'"(target-cpu|target-features|tune-cpu)"="[^"]*"', "", source)
    machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(
        cpu="generic", features="+neon", opt=3
    )
    assembly = machine.emit_assembly(llvm.parse_assembly(source))
    inner = max(blocks(assembly), key=lambda b: sum("fmla" in line for line in b))
    assert sum("fmla" in line for line in inner) == 6 * 4
    assert not [line for line in inner if re.search(r"\b(ldr|str|ldp|stp)\s+q.*\[sp", line)]
