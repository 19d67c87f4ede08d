"""Random generators as plain data, and back from data that nobody vouches for.

NumPy's own setters trust what they are given: a position beyond a buffer makes the generator read
memory that is not its own. Here every field is checked against its bounds before NumPy sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinynn.errors import ConfigError


@dataclass(frozen=True)
class _Below:
    """A whole number from 0 on and below `limit`, or `count` of them."""

    limit: int
    count: int = 0  #: 0: one number, not a list
    odd: bool = False


_Form = dict[str, Any]  # field -> _Below or a form

_U32, _U64, _U128 = (1 << bits for bits in (32, 64, 128))
_HALF: _Form = {"has_uint32": _Below(2), "uinteger": _Below(_U32)}  # half a 64-bit draw kept
_PCG: _Form = {"state": {"state": _Below(_U128), "inc": _Below(_U128, odd=True)}, **_HALF}

#: what the state of each of NumPy's bit generators consists of, besides the generator's name
_KINDS: dict[str, tuple[type[np.random.BitGenerator], _Form]] = {
    "PCG64": (np.random.PCG64, _PCG),
    "PCG64DXSM": (np.random.PCG64DXSM, _PCG),
    "Philox": (
        np.random.Philox,
        {
            "state": {"counter": _Below(_U64, 4), "key": _Below(_U64, 2)},
            "buffer": _Below(_U64, 4),
            "buffer_pos": _Below(5),
            **_HALF,
        },
    ),
    "SFC64": (np.random.SFC64, {"state": {"state": _Below(_U64, 4)}, **_HALF}),
    "MT19937": (
        np.random.MT19937,
        {"state": {"key": _Below(_U32, 624), "pos": _Below(625)}},
    ),
}


def generator_state(rng: np.random.Generator) -> dict[str, Any]:
    """The generator's state as numbers, texts, lists and dicts, fit for JSON.

    Raises ConfigError for anything but a Generator on one of NumPy's own bit generators.
    """
    _kind_of("generator_state", rng)
    state: dict[str, Any] = _plain(rng.bit_generator.state)
    return state


def from_state(state: Any) -> np.random.Generator:
    """A new generator in a state that `generator_state` gave.

    Raises ConfigError for an unknown bit generator, missing or unknown fields, or values of another
    kind, number or range.
    """
    name = state.get("bit_generator") if isinstance(state, Mapping) else None
    if not isinstance(name, str) or name not in _KINDS:
        raise ConfigError(
            f"from_state: required the state of one of {sorted(_KINDS)}; came {_short(name)}"
        )
    kind, form = _KINDS[name]
    checked = _checked(name, form, {k: v for k, v in state.items() if k != "bit_generator"})
    bits = kind()
    bits.state = {"bit_generator": name, **checked}
    return np.random.Generator(bits)


def set_state(rng: np.random.Generator, state: Any) -> None:
    """Bring `rng` to a state that `generator_state` gave.

    Raises ConfigError, and changes nothing, if the state is of another bit generator than `rng`'s
    or wrong in any way that `from_state` refuses.
    """
    name = _kind_of("set_state", rng)
    if isinstance(state, Mapping) and state.get("bit_generator") != name:
        raise ConfigError(
            f"set_state: required a state of {name}; came {_short(state.get('bit_generator'))}"
        )
    rng.bit_generator.state = from_state(state).bit_generator.state


def _kind_of(function: str, rng: np.random.Generator) -> str:
    bits = getattr(rng, "bit_generator", None)
    for name, (kind, _) in _KINDS.items():
        if isinstance(rng, np.random.Generator) and type(bits) is kind:
            return name
    raise ConfigError(
        f"{function}: required a numpy Generator on one of {sorted(_KINDS)}; came {rng!r}"
    )


def _checked(where: str, form: _Form, came: Any) -> dict[str, Any]:
    """The state with arrays where NumPy wants them, if it has the form to the letter."""
    if not isinstance(came, Mapping) or came.keys() != form.keys():
        fields = sorted(map(_short, came)) if isinstance(came, Mapping) else _short(came)
        raise ConfigError(f"{where}: required the fields {sorted(form)}; came {fields}")
    return {name: _field(f"{where}.{name}", rule, came[name]) for name, rule in form.items()}


def _field(where: str, rule: _Below | _Form, came: Any) -> Any:
    if not isinstance(rule, _Below):
        return _checked(where, rule, came)
    values = came if rule.count else [came]
    if not isinstance(values, list) or len(values) != (rule.count or 1):
        raise ConfigError(f"{where}: required a list of {rule.count}; came {_short(came)}")
    for value in values:
        fits = type(value) is int and 0 <= value < rule.limit  # a bool is no number here
        if not fits or (rule.odd and value % 2 == 0):
            raise ConfigError(
                f"{where}: required {'odd' if rule.odd else 'whole'} numbers >= 0 and below "
                f"{rule.limit}; came {_short(value)}"
            )
    dtype = np.uint32 if rule.limit == _U32 else np.uint64
    return np.array(values, dtype) if rule.count else came


def _plain(state: Any) -> Any:
    """Lists for arrays, Python's numbers for NumPy's."""
    if isinstance(state, Mapping):
        return {k: _plain(v) for k, v in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state


def _short(value: Any) -> str:
    """A value for a message; whole numbers of any length, whose text Python may refuse to make."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return type(value).__name__ if isinstance(value, Mapping | list) else repr(value)[:60]
