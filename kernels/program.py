"""Many kernel calls in one: a program of calls in memory, and the loop that makes them.

A call from Python costs a fraction of a microsecond for the kernel and more for the checks around
it; a small network makes dozens in a hundred. Here the calls are prepared once: what would be
decided from shapes is decided, and each call is written down as a row of 64-bit words,

    length, calls of the stage, code, kernel, argument words ...

`kernel` is the address of a compiled kernel and `code` that of a little function, made once for
each signature, which reads the words and calls it. An integer or a number takes one word; an array
takes its base, the offset of its first byte from there, and its shape. Arrays that are there for
good (weights, tables) have base NOWHERE, whose address is 0, so that their offset is their address.
What lies in the arena, in the input or in the output is addressed relative to these, so one program
serves every thread and every batch.

Calls that need nothing of each other form a stage. One thread makes the calls one after the other;
several threads can share each stage of a program, and meet at its end (`run_team`). Every call is
made by whoever claims it first: no thread waits for another that has not begun.

Nothing is compiled for a network: kernels are those that are used one by one, too.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels._jit import Variants, jit

#: What the offset of an array counts from.
NOWHERE, ARENA, INPUT, OUTPUT = range(4)

ALIGNMENT = 64

# Below this much work (see `Variants.choose`) waking the other threads costs more than they gain:
# what runs before and after a call in a program is as short as itself.
_PARALLEL_WORK = 4 << 20

# Below this a call is made by one thread of a team: passing its operands on costs more.
_TEAM_WORK = 8 << 10

_WORD = ir.IntType(64)
_intrinsic: Any = intrinsic(prefer_literal=True)


class Slot(NamedTuple):
    """An array that will lie at `offset` bytes from a base when the program runs."""

    base: int
    offset: int
    shape: tuple[int, ...]
    dtype: Any = np.dtype(np.float32)

    def reshape(self, *shape: int) -> Slot:
        """The same elements under another shape; one size may be -1."""
        if -1 in shape:
            known = -math.prod(shape)
            shape = tuple(math.prod(self.shape) // known if n == -1 else n for n in shape)
        return self._replace(shape=shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


# --- calls by address -----------------------------------------------------------------------------


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@_intrinsic
def _word(typing, address, index):
    """The word at `address` + 8 `index`."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(_pointer(builder, args[0], _WORD), [args[1]]))

    return types.int64(types.int64, types.int64), codegen


@_intrinsic
def _address(typing, array):
    """The address of an array's first element."""

    def codegen(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.ptrtoint(data, _WORD)

    return types.int64(array), codegen


def _atomic(ordering: str) -> Any:
    """Of an address and a value: what stood there, which becomes or grows by the value."""

    @_intrinsic
    def change(typing, address, value):
        def codegen(context, builder, signature, args):
            at = _pointer(builder, args[0], _WORD)
            return builder.atomic_rmw(ordering, at, args[1], "acq_rel")

        return types.int64(types.int64, types.int64), codegen

    return change


_exchange, _increase = _atomic("xchg"), _atomic("add")


@_intrinsic
def _watched(typing, address):
    """The word at an address, which other threads change."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0], _WORD), "acquire", 8)

    return types.int64(types.int64), codegen


@_intrinsic
def _call(typing, code, row, bases):
    """Run the code at an address on a row of words and the addresses of the bases."""

    def codegen(context, builder, signature, args):
        result = context.get_value_type(types.none)
        kind = ir.FunctionType(result, [_WORD, _WORD])
        builder.call(_pointer(builder, args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _kinds(names: str) -> list[Any]:
    """The Numba types that names such as "int64", "float32:4" (of four axes), "( ... )" mean."""
    open_: list[list[Any]] = [[]]
    for name in names.split():
        if name == "(":
            open_.append([])
        elif name == ")":
            parts = open_.pop()
            open_[-1].append(types.BaseTuple.from_types(parts))
        else:
            scalar, _, axes = name.partition(":")
            kind = types.boolean if scalar == "bool" else getattr(types, scalar)
            open_[-1].append(types.Array(kind, int(axes), "C") if axes else kind)
    return open_[0]


@_intrinsic
def _invoke(typing, row, bases, names):
    """Read arguments of the kinds `names` from a row of words and call its kernel with them."""
    kinds = _kinds(names.literal_value)

    def codegen(context, builder, signature, args):
        words = _pointer(builder, args[0], _WORD)
        origins = _pointer(builder, args[1], _WORD)
        place = 3  # after the length, the stage and this code

        def word() -> Any:
            nonlocal place
            place += 1
            return builder.load(builder.gep(words, [_WORD(place - 1)]))

        def array(kind: Any) -> Any:
            origin = builder.load(builder.gep(origins, [word()]))
            data = context.get_value_type(kind.dtype).as_pointer()
            first = builder.inttoptr(builder.add(origin, word()), data)
            shape = [word() for _ in range(kind.ndim)]
            size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
            strides: list[Any] = []
            step = _WORD(size)
            for n in reversed(shape):
                strides.insert(0, step)
                step = builder.mul(step, n)
            out = context.make_array(kind)(context, builder)
            context.populate_array(
                out,
                data=first,
                shape=cgutils.pack_array(builder, shape),
                strides=cgutils.pack_array(builder, strides),
                itemsize=_WORD(size),
                meminfo=None,
            )
            return out._getvalue()

        def value(kind: Any) -> Any:
            if isinstance(kind, types.Array):
                return array(kind)
            if isinstance(kind, types.BaseTuple):
                parts: Any = kind
                return context.make_tuple(builder, kind, [value(part) for part in parts.types])
            bits = word()
            if kind == types.boolean:
                return builder.trunc(bits, ir.IntType(1))
            if kind == types.float32:
                return builder.bitcast(builder.trunc(bits, ir.IntType(32)), ir.FloatType())
            if kind == types.float64:
                return builder.bitcast(bits, ir.DoubleType())
            return bits

        kernel = word()
        values = [value(kind) for kind in kinds]
        result = context.get_value_type(types.none)
        called = ir.FunctionType(result, [context.get_value_type(kind) for kind in kinds])
        builder.call(_pointer(builder, kernel, called), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, names), codegen


def _code(names: str) -> Any:
    def code(row, bases):
        _invoke(row, bases, names)

    return code


def _entry(dispatcher: Any, kinds: Sequence[Any]) -> int:
    """The address at which C code would call the kernel for arguments of these types."""
    dispatcher.compile(tuple(kinds))  # the cache knows it as other callers do, by these alone
    result = dispatcher.get_compile_result(types.void(*kinds))
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))


@cache
def _code_entry(names: str) -> int:
    return _entry(_code_of(names), (types.int64, types.int64))


@cache
def _code_of(names: str) -> Any:
    return jit(_code(names))


@cache
def _kernel_entry(dispatcher: Any, names: str) -> int:
    return _entry(dispatcher, _kinds(names))


# --- programs -------------------------------------------------------------------------------------


class Program:
    """Kernel calls in the order in which they will be made.

    `threads`: whether kernels may use all threads, because the program will be run by itself and
    not in one thread of several. `team`: how many threads will run it together, see `run_team`.
    """

    def __init__(self, threads: bool = False, team: int = 1) -> None:
        self.threads, self.team = threads, team
        self.calls = 0
        self._stage: list[int] | None = None  # the words that say how many calls it has
        self._words: list[int] = []
        self._kept: list[Any] = []  # what the program has the addresses of

    def add(self, kernel: Variants, work: int, *args: Any, tasks: int = 0) -> None:
        """Append a call: `kernel` on slots, C-contiguous arrays, numbers and tuples of these.

        `work`: see `Variants.choose`. A kernel with `tasks` takes the first and the end of a range
        of them as its last arguments: a team makes several calls of it.

        The arrays must stay as they are. Integers are int64, floats those of their NumPy type.
        """
        if tasks:
            shares = min(tasks, self.team) if work >= _TEAM_WORK else 1
            ends = [tasks * (i + 1) // shares for i in range(shares)]
            for i, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                self._add(kernel, work, 0 if i else shares, (*args, first, end))
        else:
            self._add(kernel, work, 1, args)

    def _add(self, kernel: Variants, work: int, stage: int, args: Sequence[Any]) -> None:
        many = self.threads and work >= _PARALLEL_WORK
        dispatcher = kernel.parallel if many else kernel.serial
        names, words = [], []
        for arg in args:
            name, values = self._argument(arg)
            names.append(name)
            words += values
        signature = " ".join(names)
        code, entry = _code_entry(signature), _kernel_entry(dispatcher, signature)
        self._row(stage, code, [entry, *words])

    def _argument(self, arg: Any) -> tuple[str, list[int]]:
        if isinstance(arg, Slot):
            return f"{arg.dtype}:{len(arg.shape)}", [arg.base, arg.offset, *arg.shape]
        if isinstance(arg, np.ndarray):
            if not arg.flags.carray:
                raise ValueError("Program.add: expected C-contiguous, writable, aligned arrays")
            self._kept.append(arg)
            return f"{arg.dtype}:{arg.ndim}", [NOWHERE, arg.ctypes.data, *arg.shape]
        if isinstance(arg, tuple):
            parts = [self._argument(part) for part in arg]
            names = " ".join(name for name, _ in parts)
            return f"( {names} )", [word for _, words in parts for word in words]
        if isinstance(arg, bool | np.bool_):
            return "bool", [int(arg)]
        if isinstance(arg, np.float32):
            return "float32", [struct.unpack("<i", struct.pack("<f", arg))[0]]
        if isinstance(arg, float | np.float64):
            return "float64", [struct.unpack("<q", struct.pack("<d", arg))[0]]
        if isinstance(arg, int | np.integer):
            return "int64", [int(arg)]
        raise TypeError(f"Program.add: expected an array, a slot or a number, got {arg!r}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """The calls appended inside need nothing of each other: they form one stage."""
        self._stage = []
        try:
            yield
        finally:
            for i, at in enumerate(self._stage):
                self._words[at] = 0 if i else len(self._stage)
            self._stage = None

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """The calls appended inside count as one: whoever makes it makes them one by one."""
        outer = self._words, self._stage, self.team, self.calls
        self._words, self._stage, self.team = [], None, 1
        try:
            yield
        finally:
            inner, count = self._words, self.calls - outer[3]
            self._words, self._stage, self.team, self.calls = outer
            self._row(1, _entry(_several, (types.int64, types.int64)), [count, *inner])

    def _row(self, stage: int, code: int, words: list[int]) -> None:
        if self._stage is not None:
            self._stage.append(len(self._words) + 1)
        self._words += [3 + len(words), stage, code, *words]
        self.calls += 1

    def words(self) -> np.ndarray:
        """The number of calls, and their rows."""
        return np.array([self.calls, *self._words], np.int64)

    def __len__(self) -> int:
        """The words so far: where the next call will begin."""
        return 1 + len(self._words)


@jit
def _execute(at, count, bases):
    # The `count` calls whose rows lie at address `at` one after the other.
    for _ in range(count):
        _call(_word(at, 2), at, bases)
        at += 8 * _word(at, 0)


@jit
def _several(row, bases):
    # A call that stands for several, whose number and rows are its words.
    _execute(row + 32, _word(row, 3), bases)


@jit
def _execute_shared(at, count, bases, marks, worker, workers):
    # As above, together with others that run the same. marks (2 count,), zeros at first: whether
    # somebody has claimed a call; at the first call of a stage behind these, how many are done.
    call = 0
    while call < count:
        stage = _word(at, 1)
        done = marks + 8 * (count + call)
        mine = worker * stage // workers  # the same share of each stage: it lies in this cache
        for i in range(stage):
            chosen = (mine + i) % stage
            if _exchange(marks + 8 * (call + chosen), 1) == 0:
                row = at
                for _ in range(chosen):
                    row += 8 * _word(row, 0)
                _call(_word(row, 2), row, bases)
                _increase(done, 1)
        for _ in range(stage):
            at += 8 * _word(at, 0)
        while _watched(done) < stage:
            pass
        call += stage


def _run_loop(chunks, x_bytes, y_bytes, X, Y, arenas, bases):
    # chunks[i] = (address of the words of a program, first image that it is for)
    # X, Y: images of x_bytes and y_bytes each; arenas (workers, bytes), bases (workers, 4)
    workers, count = arenas.shape[0], chunks.shape[0]
    for w in prange(workers):
        bases[w, NOWHERE] = 0
        bases[w, ARENA] = _address(arenas) + w * arenas.shape[1]
        for i in range(count * w // workers, count * (w + 1) // workers):
            bases[w, INPUT] = _address(X) + chunks[i, 1] * x_bytes
            bases[w, OUTPUT] = _address(Y) + chunks[i, 1] * y_bytes
            words = chunks[i, 0]
            _execute(words + 8, _word(words, 0), _address(bases) + w * 8 * bases.shape[1])


def _team_loop(words, marks, X, Y, arena, bases):
    # One program for all images of X; bases (threads, 8), marks as above
    workers = bases.shape[0]
    marks[:] = 0
    for w in prange(workers):
        bases[w, NOWHERE] = 0
        bases[w, ARENA] = _address(arena)
        bases[w, INPUT] = _address(X)
        bases[w, OUTPUT] = _address(Y)
        at = _address(bases) + w * 8 * bases.shape[1]
        _execute_shared(_address(words) + 8, words[0], at, _address(marks), w, workers)


_run = Variants(_run_loop)
_team = Variants(_team_loop)


def aligned(workers: int, nbytes: int) -> np.ndarray:
    """(workers, bytes) of memory in which every row begins at a cache line of its own."""
    row = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
    raw = np.zeros(workers * row + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + workers * row].reshape(workers, row)


def run(
    chunks: np.ndarray,
    images: tuple[int, int],
    x: np.ndarray,
    y: np.ndarray,
    arenas: np.ndarray,
    bases: np.ndarray,
) -> None:
    """Run a program for each chunk of images, as many at once as there are arenas.

    chunks (n, 2): the address of a program's words, the number of its first image. `images`: the
    bytes of one image of x and of y. arenas (workers, bytes) as `aligned` gives them, bases
    (workers, 8) int64 scratch.
    """
    kernel = _run.parallel if len(arenas) > 1 else _run.serial
    kernel(chunks, images[0], images[1], x, y, arenas, bases)


def run_team(
    words: np.ndarray,
    marks: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    arena: np.ndarray,
    bases: np.ndarray,
) -> None:
    """Run a program for all images by as many threads together as `bases` has rows.

    arena: a row of `aligned`; bases (threads, 8) int64, marks (twice the calls,) int64: scratch.
    """
    _team.parallel(words, marks, x, y, arena, bases)


def execute(words: np.ndarray, at: int, count: int, bases: np.ndarray) -> None:
    """`count` calls of a program, from the row at word `at` on; bases (4,) addresses."""
    _execute(words.ctypes.data + 8 * at, count, bases.ctypes.data)


def threads() -> int:
    """How many threads `run` can use now."""
    return int(numba.get_num_threads())
