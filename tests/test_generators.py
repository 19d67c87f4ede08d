"""Generators survive JSON, and no state that was tampered with reaches NumPy."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn.errors import ConfigError
from tinynn.generators import from_state, generator_state, set_state

KINDS = [
    np.random.PCG64,
    np.random.PCG64DXSM,
    np.random.Philox,
    np.random.SFC64,
    np.random.MT19937,
]


def used(kind: Any, seed: int = 1, draws: int = 3) -> np.random.Generator:
    """A generator in the midst of its work, half of a 64-bit draw still in hand."""
    rng = np.random.Generator(kind(seed))
    rng.random(draws)
    rng.integers(0, 9, dtype=np.uint32)
    return rng


def draws(rng: np.random.Generator) -> list[list[float]]:
    half = rng.integers(0, 1 << 32, 5, dtype=np.uint32)
    return [half.tolist(), rng.random(700).tolist(), rng.standard_normal(9).tolist()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 5, 700])
def test_a_state_goes_through_json_and_continues(kind: Any, count: int) -> None:
    rng, other = used(kind, draws=count), used(kind, seed=2)
    state = json.loads(json.dumps(generator_state(rng)))
    restored = from_state(state)
    set_state(other, state)
    expected = draws(rng)
    assert draws(restored) == expected
    assert draws(other) == expected


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields, lists and numbers in a state."""
    below = []
    if isinstance(tree, dict):
        below = [p for k, v in tree.items() for p in leaves(v, (*path, k))]
    elif isinstance(tree, list):
        below = leaves(tree[0], (*path, 0)) + leaves(tree[-1], (*path, len(tree) - 1))
    return [path, *below]


def spoilt(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    out = copy.deepcopy(state)
    if not path:
        return value
    place = out
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_checked(kind: Any) -> None:
    rng = used(kind)
    before = generator_state(rng)
    wrong = [None, -1, 1 << 128, 10**5000, 1.0, float("nan"), "0", True, [], [0], {}, {"a": 1}, b""]
    for path in leaves(before):
        for value in wrong:
            state = spoilt(before, path, value)
            with pytest.raises(ConfigError):
                from_state(state)
            with pytest.raises(ConfigError):
                set_state(rng, state)
    assert generator_state(rng) == before


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_neither_added_nor_left_out(kind: Any) -> None:
    state = generator_state(used(kind))
    with pytest.raises(ConfigError, match="required the fields"):
        from_state({**state, "more": 1})
    for name in state:
        with pytest.raises(ConfigError):
            from_state({k: v for k, v in state.items() if k != name})


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        (np.random.Philox, ("buffer_pos",), 5),
        (np.random.MT19937, ("state", "pos"), 625),
        (np.random.MT19937, ("state", "key", 0), 1 << 32),
        (np.random.SFC64, ("state", "state", 3), 1 << 64),
        (np.random.PCG64, ("has_uint32",), 2),
        (np.random.PCG64, ("uinteger",), 1 << 32),
        (np.random.PCG64DXSM, ("state", "inc"), 2),  # an even increment is no PCG
    ],
)
def test_the_bounds_are_exact(kind: Any, path: tuple[Any, ...], value: int) -> None:
    state = generator_state(used(kind))
    with pytest.raises(ConfigError, match="required"):
        from_state(spoilt(state, path, value))
    from_state(spoilt(state, path, value - 1))


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=8,
    ),
    st.sampled_from([k.__name__ for k in KINDS] + ["Generator", "__class__", ""]),
)
def test_nonsense_is_a_config_error(value: Any, name: str) -> None:
    for state in (value, {"bit_generator": name, "state": value}, {"bit_generator": value}):
        with pytest.raises(ConfigError):
            from_state(state)


def test_another_kind_of_generator_is_refused() -> None:
    rng = used(np.random.PCG64)
    before = generator_state(rng)
    with pytest.raises(ConfigError, match="required a state of PCG64; came 'PCG64DXSM'"):
        set_state(rng, generator_state(used(np.random.PCG64DXSM)))
    assert generator_state(rng) == before


def test_only_numpys_own_generators_are_known() -> None:
    class Mine(np.random.PCG64):
        pass

    for rng in (np.random.Generator(Mine(0)), np.random.RandomState(0), None):
        with pytest.raises(ConfigError, match="required a numpy Generator"):
            generator_state(rng)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="required a numpy Generator"):
            set_state(rng, {})  # type: ignore[arg-type]
