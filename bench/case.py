"""A benchmark problem that prints itself as a string which runs it again."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

Shape = tuple[int, ...]
Attribute = int | float | str

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.+-]*")
_INTEGER = re.compile(r"-?\d+")
_FLOAT = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
_SHAPE = re.compile(r"\d+(x\d+)+|\d+x")  # a single axis is written "1000x"

_OWN_FIELDS = ("variant", "dtype", "threads")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64")


class CaseError(ValueError):
    """A case that cannot be written or read."""


@dataclass(frozen=True)
class Case:
    """One benchmark problem: which computation, on which shapes, how.

    `shapes` and `attributes` are pairs (name, value); `Case.of` takes them as keywords and
    `case["x"]` looks up either. Raises CaseError for what its string could not say.
    """

    family: str
    shapes: tuple[tuple[str, Shape], ...] = ()
    attributes: tuple[tuple[str, Attribute], ...] = ()
    variant: str = "default"
    dtype: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.family):
            raise CaseError(f"family: required a name of letters, digits, _; got {self.family!r}")
        if not _WORD.fullmatch(self.variant):
            raise CaseError(f"variant: required one word; got {self.variant!r}")
        if self.dtype not in _DTYPES:
            raise CaseError(f"dtype: required one of {', '.join(_DTYPES)}; got {self.dtype!r}")
        if type(self.threads) is not int or self.threads < 1:
            raise CaseError(f"threads: required an integer from 1 on; got {self.threads!r}")
        names = [name for name, _ in (*self.shapes, *self.attributes)]
        for name in names:
            if not _NAME.fullmatch(name) or name in _OWN_FIELDS or names.count(name) > 1:
                raise CaseError(f"{self.family}: bad or repeated name {name!r}")
        for name, value in (*self.shapes, *self.attributes):
            if _parse_value(_format_value(value)) != value:
                raise CaseError(f"{self.family}: {name}={value!r} cannot be written in a case")

    @classmethod
    def of(
        cls,
        family: str,
        *,
        variant: str = "default",
        dtype: str = "float32",
        threads: int = 1,
        **problem: Shape | Attribute,
    ) -> Case:
        """A case from keywords: tuples are shapes, single values are attributes."""
        shapes = tuple((k, v) for k, v in problem.items() if isinstance(v, tuple))
        attributes = tuple((k, v) for k, v in problem.items() if not isinstance(v, tuple))
        return cls(family, shapes, attributes, variant, dtype, threads)

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that `text` was printed from. Raises CaseError."""
        family, *words = text.split() or [""]
        problem: dict[str, Shape | Attribute] = {}
        own: dict[str, str] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name in problem or name in own:
                raise CaseError(f"case {text!r}: required NAME=VALUE, each once; got {word!r}")
            if name in _OWN_FIELDS:
                own[name] = value
            else:
                problem[name] = _parse_value(value)
        threads = own.get("threads", "1")
        if not _INTEGER.fullmatch(threads):
            raise CaseError(f"case {text!r}: threads={threads!r} is no integer")
        variant, dtype = own.get("variant", "default"), own.get("dtype", "float32")
        shapes = tuple((k, v) for k, v in problem.items() if isinstance(v, tuple))
        attributes = tuple((k, v) for k, v in problem.items() if not isinstance(v, tuple))
        return cls(family, shapes, attributes, variant, dtype, int(threads))

    def __str__(self) -> str:
        problem = [f"{k}={_format_value(v)}" for k, v in (*self.shapes, *self.attributes)]
        how = [f"{name}={getattr(self, name)}" for name in _OWN_FIELDS]
        return " ".join([self.family, *problem, *how])

    def __getitem__(self, name: str) -> Shape | Attribute:
        for key, value in (*self.shapes, *self.attributes):
            if key == name:
                return value
        raise KeyError(f"{self}: no {name!r}")

    def shape(self, name: str) -> Shape:
        """The shape of that name; KeyError if there is none."""
        return dict(self.shapes)[name]

    def integer(self, name: str) -> int:
        """The integer attribute of that name; KeyError if absent, CaseError if no integer."""
        value = dict(self.attributes)[name]
        if not isinstance(value, int):
            raise CaseError(f"{self}: required an integer for {name}; got {value!r}")
        return value

    def on(self, threads: int) -> Case:
        """The same problem on so many threads."""
        return dataclasses.replace(self, threads=threads)


def _format_value(value: Shape | Attribute) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) if len(value) > 1 else "".join(f"{n}x" for n in value)
    return repr(value) if isinstance(value, float) else str(value)


def _parse_value(text: str) -> Shape | Attribute:
    if _INTEGER.fullmatch(text):
        return int(text)
    if _SHAPE.fullmatch(text):
        return tuple(int(n) for n in text.split("x") if n)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _WORD.fullmatch(text):
        return text
    raise CaseError(f"value {text!r}: required an integer, a float, a shape (2x3) or one word")
