"""Datasets and augmented batches: against plain NumPy, resumed exactly, prefetched unchanged."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from kernels import augment as kernel
from tinynn.data import Augment, Dataset, ImageBatches
from tinynn.errors import ConfigError, DataError, DTypeError, ShapeError

FULL = Augment(crop=9, pad=2, flip=True, brightness=0.25, contrast=(0.2, 1.8), standardize=True)
SHIFT = Augment(shift=0.2, flip=True)
QUICK = settings(max_examples=40, deadline=None)


def dataset(n=23, h=11, w=10, c=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, h, w, c), np.uint8)
    return Dataset("random", images, rng.integers(0, 4, n), tuple("abcd"))


def plain_window(image, top, left, mirror, contrast, brightness, size, edge, standardize):
    """The kernel's definition in float64, step by step as the documents have it."""
    ys, xs = np.arange(top, top + size[0]), np.arange(left, left + size[1])
    if mirror:
        xs = xs[::-1]
    h, w = image.shape[:2]
    window = image[np.clip(ys, 0, h - 1)][:, np.clip(xs, 0, w - 1)].astype(np.float64)
    if not edge:
        window[(ys < 0) | (ys >= h)] = 0
        window[:, (xs < 0) | (xs >= w)] = 0
    window += brightness
    mean = window.mean((0, 1))
    window = contrast * (window - mean) + mean
    if not standardize:
        return window / 255
    return (window - window.mean()) / max(window.std(), 1 / np.sqrt(window.size))


@QUICK
@given(st.data())
def test_the_kernel_equals_plain_numpy(data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    h, w, c = integers(1, 9), integers(1, 9), integers(1, 4)
    size = integers(1, 12), integers(1, 12)
    n, b = integers(1, 4), integers(1, 6)
    edge, standardize, change = (data.draw(st.booleans()) for _ in range(3))
    rng = np.random.default_rng(integers(0, 2**32))
    images = rng.integers(0, 256, (n, h, w, c), np.uint8)
    rows, tops, lefts = rng.integers(0, n, b), rng.integers(-9, 9, b), rng.integers(-9, 9, b)
    mirror = rng.random(b) < 0.5
    contrast = rng.uniform(0.2, 1.8, b) if change else np.ones(b)
    brightness = rng.uniform(-63, 63, b) if change else np.zeros(b)
    got = kernel.windows(
        images, rows, tops, lefts, mirror, contrast, brightness, size, edge, standardize
    )
    assert got.dtype == np.float32 and got.shape == (b, *size, c)
    for i in range(b):
        each = tops[i], lefts[i], mirror[i], contrast[i], brightness[i]
        expected = plain_window(images[rows[i]], *each, size, edge, standardize)
        np.testing.assert_allclose(got[i], expected, atol=2e-4, rtol=2e-5)


def test_the_kernel_refuses_rows_that_are_not_there():
    images = np.zeros((2, 3, 3, 1), np.uint8)
    zeros, none = np.zeros(1, np.int64), np.zeros(1, np.bool_)
    rest = (zeros, zeros, none, np.ones(1), np.zeros(1), (3, 3), False, False)
    for row in (-1, 2):
        with pytest.raises(ValueError, match="rows"):
            kernel.windows(images, np.array([row]), *rest)


def test_constant_images_are_not_divided_by_zero():
    images = np.full((2, 8, 8, 3), 200, np.uint8)
    np.testing.assert_allclose(Augment(standardize=True)(images), 0, atol=1e-4)


def test_crops_reach_every_place_equally_often_and_flips_are_half():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * 10
    out = Augment(crop=3, flip=True)(image, np.random.default_rng(0), np.zeros(8000, np.int64))
    seen, counts = np.unique(np.rint(out[:, 1, :, 0] * 255), axis=0, return_counts=True)
    assert len(seen) == 8  # four places, two ways round
    assert counts.min() > 850 and counts.max() < 1150


def test_shift_repeats_the_border_and_reaches_both_ways():
    image = np.array([[10, 20, 30, 40, 50]], np.uint8).reshape(1, 1, 5, 1)
    out = Augment(shift=0.4)(image, np.random.default_rng(0), np.zeros(500, np.int64))
    rows = {tuple(r) for r in np.rint(out[:, 0, :, 0] * 255).astype(int).tolist()}
    assert rows == {
        (10, 20, 30, 40, 50),
        (20, 30, 40, 50, 50),
        (30, 40, 50, 50, 50),
        (10, 10, 20, 30, 40),
        (10, 10, 10, 20, 30),
    }


def test_evaluation_is_the_middle_without_chance():
    data = dataset()
    out = Augment(crop=5, flip=True, contrast=(0.5, 2.0), brightness=0.1).evaluation()(data.images)
    np.testing.assert_allclose(out, data.images[:, 3:8, 2:7].astype(np.float32) / 255, rtol=1e-6)
    whole = Augment(crop=11, pad=4).evaluation()(dataset(w=11).images)
    np.testing.assert_allclose(whole, dataset(w=11).images.astype(np.float32) / 255, rtol=1e-6)


@pytest.mark.parametrize("augment", [FULL, SHIFT, Augment()])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetch_and_threads_change_no_bit(augment, prefetch):
    data = dataset()

    def run(ahead):
        batches = data.batches(4, np.random.default_rng(3), augment, prefetch=ahead)
        return [(x.tobytes(), y.tobytes()) for _ in range(3) for x, y in batches]

    expected = run(0)
    assert len(set(expected)) == 18
    before = tn.get_threads()
    tn.set_threads(tn.max_threads())
    try:
        assert run(prefetch) == expected
    finally:
        tn.set_threads(before)


@QUICK
@given(st.integers(0, 17), st.integers(1, 9), st.integers(0, 2), st.sampled_from([FULL, SHIFT]))
def test_resumed_equals_uninterrupted(cut, size, prefetch, augment):
    data = dataset()

    def collect(batches, limit, out):
        while len(out) < limit:
            for x, y in batches:
                out.append((x.tobytes(), y.tobytes(), batches.rng.random()))
                if len(out) == limit:
                    break
        return batches.state_dict()

    def fresh(seed):
        return data.batches(size, np.random.default_rng(seed), augment, prefetch=prefetch)

    limit = 3 * len(fresh(5))
    whole, parts = [], []
    collect(fresh(5), limit, whole)
    state = json.loads(json.dumps(collect(fresh(5), min(cut, limit), parts)))
    resumed = fresh(99)
    resumed.load_state_dict(state)
    collect(resumed, limit, parts)
    assert parts == whole


def test_a_state_of_another_augmentation_is_refused():
    data, rng = dataset(), np.random.default_rng(0)
    state = data.batches(4, rng, FULL).state_dict()
    with pytest.raises(ConfigError, match="augment"):
        data.batches(4, rng, SHIFT).load_state_dict(state)


def test_every_image_once_an_epoch_with_its_own_label():
    data = Dataset(
        "n",
        np.arange(200, dtype=np.uint8)[:, None, None, None],
        np.arange(200) % 7,
        tuple("abcdefg"),
    )
    seen = []
    for x, y in data.batches(16, np.random.default_rng(0)):
        numbers = np.rint(x.ravel() * 255).astype(int)
        np.testing.assert_array_equal(numbers % 7, y)
        seen += numbers.tolist()
    assert sorted(seen) == list(range(200)) and seen != sorted(seen)


def test_an_abandoned_epoch_leaves_no_thread():
    before = set(threading.enumerate())
    for _ in dataset().batches(2, np.random.default_rng(0), FULL):
        assert set(threading.enumerate()) != before
        break
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_time_without_a_batch_is_counted(prefetch):
    batches = dataset().batches(4, np.random.default_rng(0), FULL, prefetch=prefetch)
    assert batches.waited == 0
    for _ in batches:
        before = batches.waited
    assert 0 < before <= batches.waited


def test_batches_never_change_what_was_handed_out():
    batches = dataset().batches(4, np.random.default_rng(0), FULL)
    kept = [(x, x.copy()) for x, _ in batches]
    for x, copy in kept:
        np.testing.assert_array_equal(x, copy)
        assert x.flags.writeable and x.flags.c_contiguous


def test_without_a_generator_images_come_in_order_and_unchanged():
    data = dataset()
    x = np.concatenate([x for x, _ in data.batches(5, augment=FULL)])
    np.testing.assert_array_equal(x, FULL.evaluation()(data.images))
    looking = data.batches(5, np.random.default_rng(0), FULL).take(2)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in looking]), x[:10])


def test_images_are_their_own_targets_without_labels():
    for x, y in dataset().batches(5, np.random.default_rng(0), SHIFT, labels=False):
        assert x is y


def test_take_and_floats():
    data = dataset()
    assert len(data.take(5)) == 5 and len(data.take(500)) == len(data) == 23
    np.testing.assert_allclose(data.floats(), data.images / np.float32(255), rtol=1e-6)
    assert not data.images.flags.writeable and not data.labels.flags.writeable
    with pytest.raises(ConfigError):
        data.take(0)


def test_fit_resumes_an_augmented_training_bit_for_bit(tmp_path):
    data = dataset(40)

    def train(steps, resume):
        rng = np.random.default_rng(1)
        net = tn.nn.Sequential(tn.nn.Flatten(), tn.nn.Linear(243, 4, rng=rng))
        batches = data.batches(8, rng, FULL)
        tn.fit(
            net,
            batches,
            loss=tn.softmax_cross_entropy,
            optimizer=tn.SGD(net.parameters(), lr=0.01),
            steps=steps,
            checkpoint=tmp_path / f"{resume}.ckpt",
            resume=resume,
            progress=False,
        )
        return [p.data.tobytes() for p in net.parameters()]

    whole = train(13, False)
    train(7, True)
    assert train(13, True) == whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": 0},
        {"crop": 2.5},
        {"pad": -1},
        {"shift": 1.0},
        {"shift": float("nan")},
        {"shift": 0.1, "pad": 1},
        {"brightness": -0.1},
        {"brightness": float("inf")},
        {"contrast": (1.5, 0.5)},
        {"contrast": (0.5, float("nan"))},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="Augment"):
        Augment(**wrong)


def test_wrong_uses_are_refused():
    data = dataset()
    with pytest.raises(ShapeError, match="at least 20"):
        data.batches(4, augment=Augment(crop=20))
    with pytest.raises(ShapeError):
        Augment()(data.images[0])
    with pytest.raises(ConfigError, match="generator"):
        FULL(data.images)
    with pytest.raises(ConfigError, match="generator"):
        ImageBatches(data.images, None, 4, augment=FULL, shuffle=False)
    with pytest.raises(ConfigError, match="prefetch"):
        data.batches(4, prefetch=-1)
    with pytest.raises(DTypeError, match="uint8"):
        ImageBatches(data.floats(), None, 4, shuffle=False)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 3, 3), np.uint8), np.zeros(2, np.int64)),
        (np.zeros((2, 3, 3, 1), np.float32), np.zeros(2, np.int64)),
        (np.zeros((0, 3, 3, 1), np.uint8), np.zeros(0, np.int64)),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, np.int64)),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2, np.uint8)),
        (np.zeros((2, 3, 3, 1), np.uint8), np.array([0, 2])),
        (np.zeros((2, 3, 3, 1), np.uint8), np.array([0, -1])),
    ],
)
def test_wrong_datasets_are_refused(images, labels):
    with pytest.raises(DataError, match="wrong"):
        Dataset("wrong", images, labels, ("a", "b"))
