"""Pickled arrays read without pickle: nothing named in a file is ever looked up or called.

A pickle is a program for a stack machine (Lib/pickletools.py describes its instructions). This
machine knows the instructions of protocols 2 to 5 that build dicts, lists, tuples, strings, bytes
and numbers, and the few names with which NumPy describes an array. Whatever else a file asks for
is refused, with the offset of the instruction.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tinynn.data.files import Reader, fail
from tinynn.errors import FileFormatError

#: what NumPy and Python write for arrays, in all their versions, and what it stands for here
_NAMES = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy.core.numeric _frombuffer": "frombuffer",
    "numpy._core.numeric _frombuffer": "frombuffer",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}
_TYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f4", "f8"}
_MOST_DIMENSIONS = 8
_MOST_STEPS = 2_000_000  # the published files need a tenth


class _Name(NamedTuple):
    meaning: str


class _Type:
    """A dtype, whose byte order comes after it is made."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype


class _Array:
    """An array that has been announced and whose values come later."""

    def __init__(self) -> None:
        self.memos: list[int] = []  # where it was noted, to be replaced there


class _Mark:
    pass


class _Machine:
    """Runs a pickle. Each instruction is a method; `at` is the offset of the one under way."""

    def __init__(self, data: bytes, path: object) -> None:
        self.data, self.path = data, path
        self.at = self.next = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_STEPS):
            self.at = self.next
            code = self.take(1)
            if code == b".":
                if self.next < len(self.data):
                    self.at = self.next
                    self.fail("required the end of the file; came more bytes")
                return self.pop()
            if code not in _INSTRUCTIONS:
                self.fail(f"required an instruction that builds plain data; came {code!r}")
            _INSTRUCTIONS[code](self)
        return self.fail(f"required at most {_MOST_STEPS} instructions; came more")

    def fail(self, problem: str) -> NoReturn:
        fail(self.path, self.at, problem)

    def take(self, size: int) -> bytes:
        part = self.data[self.next : self.next + size]
        if len(part) < size:
            self.fail(f"truncated: required {size} more bytes; came {len(part)}")
        self.next += size
        return part

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> str:
        end = self.data.find(b"\n", self.next, self.next + 200)
        if end < 0:
            self.fail("required a name that ends with a new line")
        text = self.data[self.next : end].decode("ascii", "replace")
        self.next = end + 1
        return text

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            self.fail(f"a string is not UTF-8: {error}")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, kind: type | tuple[type, ...] = object) -> Any:
        """The topmost value, which must be of a kind."""
        if not self.stack or isinstance(self.stack[-1], _Mark):
            self.fail("required a value on the stack; came none")
        if not isinstance(self.stack[-1], kind):
            self.fail(f"required {kind} on the stack; came {type(self.stack[-1]).__name__}")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[i], _Mark):
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        return self.fail("required a mark on the stack; came none")

    def pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def put(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        if isinstance(value, _Array):
            value.memos.append(index)
        self.memo[index] = value

    def get(self, index: int) -> None:
        if index not in self.memo:
            self.fail(f"required a value noted as {index}; came none")
        self.push(self.memo[index])

    def extend(self, values: list[Any]) -> None:
        result = self.pop(list)
        result.extend(values)
        self.push(result)

    def update(self, values: list[Any]) -> None:
        result = self.pop(dict)
        if len(values) % 2:
            self.fail("required a value for every key of a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | bytes | int):
                self.fail(f"required keys of text or numbers; came {type(key).__name__}")
            result[key] = value
        self.push(result)

    def name(self, module: str, name: str) -> None:
        meaning = _NAMES.get(f"{module} {name}")
        if meaning is None:
            self.fail(f"required the name of a plain array; came {f'{module}.{name}'[:100]!r}")
        self.push(_Name(meaning))

    def reduce(self) -> None:
        arguments, name = self.pop(tuple), self.pop(_Name)
        match (name.meaning, *arguments):
            case ("reconstruct", _Name("ndarray"), tuple(), bytes() | str()):
                self.push(_Array())
            case ("dtype", str() | bytes() as code, *_):
                self.push(_Type(self.dtype(code)))
            case ("encode", str() as text, str() as codec) if codec in ("latin1", "latin-1"):
                self.push(self.encode(text))
            case (
                "frombuffer",
                bytes() as values,
                _Type() as kind,
                tuple() as shape,
                str() as order,
            ):
                self.push(self.array(values, kind, shape, order == "F"))
            case _:
                self.fail(f"required what describes a plain array; came other arguments of {name}")

    def build(self) -> None:
        state, target = self.pop(tuple), self.pop((_Array, _Type))
        match target, state:
            case _Type(), (int(), str() | bytes() as order, None, None, None, *_):
                target.dtype = self.ordered(target.dtype, order)
                self.push(target)
            case (
                _Array(),
                (int(), tuple() as shape, _Type() as kind, int() as fortran, bytes() as values),
            ):
                array = self.array(values, kind, shape, bool(fortran))
                for index in target.memos:
                    if self.memo.get(index) is target:
                        self.memo[index] = array
                self.push(array)
            case _:
                self.fail("required the state of a plain array; came another")

    def dtype(self, code: str | bytes) -> np.dtype[Any]:
        text = code.decode("ascii", "replace") if isinstance(code, bytes) else code
        if text not in _TYPES:
            self.fail(f"required numbers of {sorted(_TYPES)}; came {text[:20]!r}")
        return np.dtype(text)

    def ordered(self, dtype: np.dtype[Any], order: str | bytes) -> np.dtype[Any]:
        mark = order.decode("latin-1") if isinstance(order, bytes) else order
        if mark not in ("<", ">", "|", "="):
            self.fail(f"required a byte order; came {mark[:20]!r}")
        return dtype.newbyteorder(mark)  # type: ignore[arg-type]

    def encode(self, text: str) -> bytes:
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            self.fail("required bytes written as Latin-1 text; came other characters")

    def array(self, values: bytes, kind: _Type, shape: tuple[Any, ...], fortran: bool) -> Any:
        whole = all(type(n) is int and n >= 0 for n in shape)
        if not whole or len(shape) > _MOST_DIMENSIONS:
            self.fail(f"required up to {_MOST_DIMENSIONS} sizes >= 0 of an array; came others")
        size = math.prod(shape) * kind.dtype.itemsize
        if size != len(values):
            self.fail(f"required the {size} bytes of an array; came {len(values)}")
        return np.frombuffer(values, kind.dtype).reshape(shape, order="F" if fortran else "C")


_INSTRUCTIONS: dict[bytes, Any] = {
    b"\x80": lambda m: m.take(1),  # protocol
    b"\x95": lambda m: m.take(8),  # frame
    b"(": lambda m: m.push(_Mark()),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.push(m.number(4, signed=True)),
    b"\x8a": lambda m: m.push(m.number(m.number(1), signed=True)),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"U": lambda m: m.push(m.take(m.number(1))),
    b"T": lambda m: m.push(m.take(m.number(4))),
    b"C": lambda m: m.push(m.take(m.number(1))),
    b"B": lambda m: m.push(m.take(m.number(4))),
    b"\x8e": lambda m: m.push(m.take(m.number(8))),
    b"\x96": lambda m: m.push(m.take(m.number(8))),
    b"\x8c": lambda m: m.push(m.text(m.number(1))),
    b"X": lambda m: m.push(m.text(m.number(4))),
    b"\x8d": lambda m: m.push(m.text(m.number(8))),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.get(m.number(1)),
    b"j": lambda m: m.get(m.number(4)),
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.pop_to_mark()),
    b"s": lambda m: m.update(list(m.pop_many(2))),
    b"u": lambda m: m.update(m.pop_to_mark()),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.push(m.pop_many(1)),
    b"\x86": lambda m: m.push(m.pop_many(2)),
    b"\x87": lambda m: m.push(m.pop_many(3)),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.name(*(m.pop(str), m.pop(str))[::-1]),
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle file; keys that are bytes become text.

    Raises FileFormatError with the offset for anything but plain data and arrays of numbers.
    """
    with Reader(path) as file:
        return parse_pickle(file.read(file.limit), path)


def parse_pickle(data: bytes, path: object) -> dict[str, Any]:
    """The same from the content of a file; `path` is for errors."""
    result = _Machine(data, path).run()
    if not isinstance(result, dict):
        raise FileFormatError(f"{path}: required a pickled dict; came {type(result).__name__}")
    return {
        k.decode("latin-1") if isinstance(k, bytes) else k: v
        for k, v in result.items()
        if isinstance(k, str | bytes)
    }
