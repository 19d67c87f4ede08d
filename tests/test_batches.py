"""Batches: every row once an epoch, the same order from the same seed, and exact resumption."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn.data import Batches
from tinynn.errors import ConfigError, DataError, DTypeError

ROWS = st.integers(1, 40)
SIZES = st.integers(1, 45)
SEEDS = st.integers(0, 2**32)


def numbered(rows, size, seed=0, **options):
    """Batches whose x rows are (i, i + 0.5) and whose labels are i."""
    x = np.stack([np.arange(rows), np.arange(rows) + 0.5], axis=1).astype(np.float32)
    return Batches(x, np.arange(rows), size, np.random.default_rng(seed), **options)


def labels(batches):
    return [y.tolist() for _, y in batches]


def flat(lists):
    return [i for part in lists for i in part]


@settings(deadline=None)
@given(ROWS, SIZES, SEEDS, st.booleans())
def test_every_row_exactly_once_an_epoch(rows, size, seed, shuffle):
    data = numbered(rows, size, seed, shuffle=shuffle)
    for _ in range(3):
        got = labels(data)
        assert sorted(flat(got)) == list(range(rows))
        assert len(got) == len(data) == -(-rows // size)
        assert all(len(part) == size for part in got[:-1])


@settings(deadline=None)
@given(ROWS, SIZES, SEEDS)
def test_drop_last_leaves_full_batches_of_distinct_rows(rows, size, seed):
    if size > rows:
        with pytest.raises(ConfigError, match="no batch"):
            numbered(rows, size, seed, drop_last=True)
        return
    data = numbered(rows, size, seed, drop_last=True)
    got = labels(data)
    assert [len(part) for part in got] == [size] * (rows // size)
    assert len(data) == len(got)
    assert len(set(flat(got))) == len(got) * size


@settings(deadline=None)
@given(ROWS, SIZES, SEEDS, st.integers(0, 100), st.booleans(), st.booleans())
def test_resumed_equals_uninterrupted(rows, size, seed, cut, shuffle, others_draw):
    # `others_draw`: something else, dropout for instance, draws from the same generator.
    def run(data, limit, out):
        while len(out) < limit:
            for x, y in data:
                noise = data.rng.random() if others_draw else 0
                out.append((x.tobytes(), y.tobytes(), noise))
                if len(out) == limit:
                    return data.state_dict()
        return data.state_dict()

    limit = 3 * len(numbered(rows, size))
    cut = cut % limit
    whole = []
    run(numbered(rows, size, seed, shuffle=shuffle), limit, whole)

    parts = []
    state = json.loads(json.dumps(run(numbered(rows, size, seed, shuffle=shuffle), cut, parts)))
    resumed = numbered(rows, size, seed + 1, shuffle=shuffle)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    run(resumed, limit, parts)
    assert parts == whole


def test_a_state_taken_after_the_last_batch_resumes_to_the_rest_of_that_epoch_which_is_empty():
    data = numbered(10, 5)
    for _ in data:
        inside = data.state_dict()
    after = data.state_dict()
    second = labels(data)

    resumed = numbered(10, 5, seed=9)
    resumed.load_state_dict(inside)
    assert labels(resumed) == []
    assert labels(resumed) == second
    resumed.load_state_dict(after)
    assert labels(resumed) == second


def test_epochs_differ_and_seeds_repeat():
    a, b, c = numbered(50, 7, seed=3), numbered(50, 7, seed=3), numbered(50, 7, seed=4)
    first, second = labels(a), labels(a)
    assert first != second
    assert [labels(b), labels(b)] == [first, second]
    assert labels(c) != first


def test_an_abandoned_epoch_is_not_continued():
    data = numbered(20, 4)
    next(iter(data))
    assert sorted(flat(labels(data))) == list(range(20))


def test_a_resumed_epoch_is_continued_once():
    data = numbered(20, 4)
    next(iter(data))
    data.load_state_dict(data.state_dict())
    next(iter(data))
    assert sorted(flat(labels(data))) == list(range(20))


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_contiguous_writable_copies_with_their_rows_together(shuffle):
    data = numbered(20, 6, shuffle=shuffle)
    for x, y in data:
        assert x.flags.c_contiguous
        assert x.flags.writeable
        assert x.dtype == np.float32
        assert np.array_equal(x, np.stack([y, y + 0.5], axis=1))
        x[...] = -1
        y[...] = -1
    assert data.x[3].tolist() == [3, 3.5]
    assert data.y[3] == 3


def test_images_and_double_precision_keep_shape_and_dtype():
    x = np.random.default_rng(0).random((5, 4, 3, 2))
    data = Batches(x, x.sum(axis=(1, 2, 3)), 2, np.random.default_rng(0))
    got = list(data)
    assert [b.shape for b, _ in got] == [(2, 4, 3, 2), (2, 4, 3, 2), (1, 4, 3, 2)]
    for bx, by in got:
        assert bx.dtype == by.dtype == np.float64
        np.testing.assert_array_equal(by, bx.sum(axis=(1, 2, 3)))


def test_without_targets_the_input_is_the_target():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    data = Batches(x, None, 2, np.random.default_rng(0))
    assert all(bx is by for bx, by in data)
    assert np.array_equal(data.y, x)


def test_arrays_are_exposed_read_only_and_not_copied():
    x = np.ones((4, 2), np.float32)
    data = Batches(x, None, 2, np.random.default_rng(0))
    assert np.shares_memory(data.x, x)
    with pytest.raises(ValueError, match="read-only"):
        data.x[0] = 0


def test_take_gives_the_first_rows_in_order_again_and_again():
    data = numbered(10, 3)
    part = data.take(2)
    before = data.rng.bit_generator.state
    assert labels(part) == labels(part) == [[0, 1, 2], [3, 4, 5]]
    assert len(part) == 2
    assert part.y.tolist() == list(range(6))
    assert part.x.shape == (6, 2)
    assert labels(data.take(99)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert labels(numbered(10, 3, drop_last=True).take(99)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert data.rng.bit_generator.state == before
    with pytest.raises(ConfigError, match="came 0"):
        data.take(0)


def test_take_knows_nothing_of_an_epoch_to_be_resumed():
    data = numbered(12, 3)
    next(iter(data))
    data.load_state_dict(data.state_dict())
    part = data.take(3)
    assert part.state_dict() == {"rows": 9, "size": 3, "shuffle": False, "drop_last": False}
    assert len(labels(part)) == 3
    assert len(labels(data)) == 3  # of four, one is done


def test_take_leaves_an_epoch_under_way_alone():
    data = numbered(12, 3)
    got = []
    for _, y in data:
        labels(data.take(1))
        got.append(y.tolist())
    assert sorted(flat(got)) == list(range(12))


def test_unshuffled_needs_no_generator():
    data = Batches(np.ones((3, 1), np.float32), None, 2, shuffle=False)
    next(iter(data))
    other = Batches(np.ones((3, 1), np.float32), None, 2, shuffle=False)
    other.load_state_dict(data.state_dict())
    assert [len(x) for x, _ in other] == [1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [10, 400_000])
def test_a_value_that_is_not_finite_is_named(value, rows):
    x = np.ones((rows, 2), np.float32)
    x[[rows // 2, rows - 1]] = value
    y = np.ones(rows, np.float64)
    with pytest.raises(DataError, match=rf"x; row {rows // 2} is the first of 2 \(of {rows}\)"):
        Batches(x, y, 5, np.random.default_rng(0))
    y[0] = value
    with pytest.raises(DataError, match=rf"y; row 0 is the first of 1 \(of {rows}\)"):
        Batches(np.ones((rows, 2), np.float32), y, 5, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (np.ones((3, 2), np.float32), np.ones(4, np.float32), DataError, r"x \(3, 2\), y \(4,\)"),
        (np.ones((0, 2), np.float32), None, DataError, r"\(0, 2\)"),
        (np.ones((3, 0), np.float32), None, DataError, r"\(3, 0\)"),
        (np.float32(1), None, DataError, r"\(\)"),
        (np.ones((3, 2), np.int64), None, DTypeError, "int64"),
        (np.ones((3, 2), np.float16), None, DTypeError, "float16"),
        (np.ones((3, 2), np.complex64), None, DTypeError, "complex64"),
        (np.ones((3, 2), np.float32), np.array(["a", "b", "c"]), DTypeError, "y of float32"),
        (np.ones((3, 2), np.float32), np.ones(3, bool), DTypeError, "bool"),
    ],
)
def test_unusable_data_is_refused(x, y, error, message):
    with pytest.raises(error, match=message):
        Batches(x, y, 2, np.random.default_rng(0))


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_unusable_sizes_are_refused(size):
    with pytest.raises(ConfigError, match=f"came {size}"):
        numbered(5, size)


def test_shuffling_needs_a_generator():
    with pytest.raises(DTypeError, match="came None"):
        Batches(np.ones((3, 2), np.float32), None, 2)


def spoil(**changes):
    def change(state):
        return {k: v for k, v in {**state, **changes}.items() if v is not ...}

    return change


@pytest.mark.parametrize(
    "change",
    [
        spoil(rows=11),
        spoil(size=4),
        spoil(shuffle=False),
        spoil(drop_last=True),
        spoil(rng=...),
        spoil(begun_from=...),
        spoil(done=5),
        spoil(done=-1),
        spoil(done="1"),
        spoil(rng={"bit_generator": "MT19937"}),
        spoil(rng=None),
        spoil(begun_from={"bit_generator": "PCG64"}),
        lambda state: {},
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change):
    data = numbered(10, 3)
    iterator = iter(data)
    next(iterator)
    before = data.state_dict()
    with pytest.raises(ConfigError, match="Batches"):
        data.load_state_dict(change(before))
    assert data.state_dict() == before
    assert len(list(iterator)) == 3


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_other_generators_resume_too(kind):
    def make(seed):
        x = np.arange(30, dtype=np.float32)
        return Batches(x, None, 4, np.random.Generator(kind(seed)))

    data = make(1)
    iterator = iter(data)
    next(iterator)
    state = json.loads(json.dumps(data.state_dict()))
    rest = [x.tolist() for x, _ in iterator] + [x.tolist() for x, _ in data]
    resumed = make(2)
    resumed.load_state_dict(state)
    assert [x.tolist() for x, _ in resumed] + [x.tolist() for x, _ in resumed] == rest


@pytest.mark.parametrize("size", [float("nan"), float("inf"), None, "3", True, [2]])
def test_sizes_that_are_no_whole_numbers_are_refused(size):
    with pytest.raises(ConfigError, match="whole size >= 1"):
        numbered(5, size)
    with pytest.raises(ConfigError, match="whole n >= 1"):
        numbered(5, 2).take(size)


def test_restart_forgets_an_epoch_that_was_to_be_continued():
    data = numbered(12, 3)
    iterator = iter(data)
    next(iterator)
    data.load_state_dict(data.state_dict())
    data.restart()
    assert "done" not in data.state_dict()
    assert sorted(flat(labels(data))) == list(range(12))
    assert len(list(iterator)) == 3  # who still iterates is not disturbed


def test_after_restart_a_saved_state_continues_like_the_run_itself():
    data, other = numbered(12, 3), numbered(12, 3, seed=5)
    next(iter(data))
    data.restart()
    other.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert labels(other) == labels(data)


def test_a_generator_whose_state_cannot_be_saved_is_refused():
    class Mine(np.random.PCG64):
        pass

    x = np.ones((3, 1), np.float32)
    with pytest.raises(ConfigError, match="numpy Generator on one of"):
        Batches(x, None, 2, np.random.Generator(Mine(0)))
    with pytest.raises(DTypeError, match="came 7"):
        Batches(x, None, 2, 7, shuffle=False)


@pytest.mark.parametrize("field", ["rng", "begun_from"])
def test_a_hostile_generator_state_never_reaches_numpy(field):
    x = np.arange(30, dtype=np.float32)
    data = Batches(x, None, 4, np.random.Generator(np.random.Philox(1)))
    next(iter(data))
    before = data.state_dict()
    state = json.loads(json.dumps(before))
    state[field]["buffer_pos"] = 10**6
    with pytest.raises(ConfigError, match=r"Batches: Philox\.buffer_pos"):
        data.load_state_dict(state)
    assert data.state_dict() == before
