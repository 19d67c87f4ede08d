"""The array pool: never lends a block that anything still refers to."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import memory
from kernels.memory import POOL_FROM, Pool


def overlaps(a, b):
    start, other = a.ctypes.data, b.ctypes.data
    return start < other + b.nbytes and other < start + a.nbytes


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["make", "view", "drop", "clear"]),
            st.integers(0, 9),
            st.sampled_from([(POOL_FROM,), (257, 300), (40, 50, 60), (POOL_FROM + 8,)]),
            st.sampled_from([np.float32, np.float64, np.uint8, np.int64]),
        ),
        max_size=60,
    )
)
def test_lent_blocks_are_never_lent_again(actions):
    pool = Pool(limit=4_000_000)
    alive = []  # (array or a view of it, its mark)
    mark = 0
    for action, which, shape, dtype in actions:
        if action == "make":
            array = pool.empty(shape, dtype)
            assert not any(overlaps(array, other) for other, _ in alive)
            mark = mark % 200 + 1
            array.fill(mark)
            alive.append((array, mark))
            array = None
        elif action == "view" and alive:
            array, value = alive.pop(which % len(alive))
            alive.append((array[1:].T[..., ::2].view(), value))
            array = None
        elif action == "drop" and alive:
            del alive[which % len(alive)]
        elif action == "clear":
            pool.clear()
            assert pool.stats()["free"] == 0
        stats = pool.stats()
        assert 0 <= stats["free"] <= stats["held"] <= pool.limit
        assert all((other == value).all() for other, value in alive)
    alive.clear()
    assert pool.stats()["free"] == pool.stats()["held"]
    pool.clear()
    assert pool.stats() == {"held": 0, "free": 0, "blocks": 0}


def test_a_dropped_block_comes_back():
    pool = Pool()
    a = pool.empty((300, 300), np.float32)
    address = a.ctypes.data
    view = a[5:, 3:]
    del a
    b = pool.empty((300, 300), np.float32)
    assert b.ctypes.data != address
    del view
    c = pool.empty((300, 300), np.float32)
    assert c.ctypes.data == address
    assert pool.stats()["blocks"] == 2


def test_other_holders_keep_a_block():
    pool = Pool()
    a = pool.empty(POOL_FROM, np.uint8)
    address = a.ctypes.data
    holder = memoryview(a)
    del a
    assert pool.stats()["free"] == 0
    b = pool.empty(POOL_FROM, np.uint8)
    assert b.ctypes.data != address
    holder.release()
    c = pool.empty(POOL_FROM, np.uint8)
    assert c.ctypes.data == address


@pytest.mark.parametrize("shape", [(), 0, (0, 3), 7, (3, 5), 30000, (100, 200, 3), (2**17,)])
@pytest.mark.parametrize("dtype", ["float32", np.float64, np.dtype("int8")])
def test_shape_dtype_and_layout(shape, dtype):
    array = memory.empty(shape, dtype)
    like = np.empty(shape, dtype)
    assert array.shape == like.shape and array.dtype == like.dtype
    assert array.flags.carray
    if array.nbytes >= POOL_FROM:
        assert array.ctypes.data % memory.ALIGNMENT == 0


def test_blocks_start_apart_within_a_page():
    pool = Pool()
    arrays = [pool.empty(POOL_FROM, np.uint8) for _ in range(8)]
    bases = [a.ctypes.data - a.base.ctypes.data for a in arrays]
    assert len({b // memory.ALIGNMENT for b in bases}) == 8


def test_beyond_its_limit_the_pool_lends_but_does_not_keep():
    pool = Pool(limit=100_000)
    a, b = (pool.empty(80_000, np.uint8) for _ in range(2))
    assert not overlaps(a, b)
    assert pool.stats()["blocks"] == 1
    del a, b
    large = pool.empty(90_000, np.uint8)  # the free block of another size makes room
    assert large.nbytes == 90_000
    assert pool.stats()["held"] <= pool.limit


def test_arrays_outlive_clear_and_pool():
    pool = Pool()
    a = pool.empty(POOL_FROM, np.uint8)
    a.fill(7)
    pool.clear()
    assert pool.stats()["blocks"] == 1
    del pool
    assert (a == 7).all()


def test_impossible_shapes_raise():
    with pytest.raises(ValueError):
        memory.empty((-1,), np.float32)
    with pytest.raises(ValueError):
        memory.empty((-1000, -1000), np.float32)


def test_threads_share_the_pool():
    pool = Pool()
    failures = []

    def work(value):
        for _ in range(200):
            arrays = [pool.empty(POOL_FROM, np.uint8) for _ in range(3)]
            for a in arrays:
                a.fill(value)
            if any((a != value).any() for a in arrays):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
