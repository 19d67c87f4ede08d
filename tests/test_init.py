"""Initialisers: distribution, fans, dtype, determinism and refusals."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from tinynn import init
from tinynn.errors import ConfigError, DTypeError, ShapeError

EVERY = {**init.by_name, "constant": init.constant(3.0), "uniform(-1, 2)": init.uniform(-1, 2)}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("he_normal", lambda m_in, m_out: 2 / m_in),
        ("he_uniform", lambda m_in, m_out: 2 / m_in),
        ("xavier_normal", lambda m_in, m_out: 2 / (m_in + m_out)),
        ("xavier_uniform", lambda m_in, m_out: 2 / (m_in + m_out)),
    ],
)
@pytest.mark.parametrize("shape", [(300, 200), (3, 5, 40, 60)])
def test_variance_follows_the_fans(name, variance, shape, rng):
    w = init.by_name[name](shape, rng)
    positions = math.prod(shape[:-2])
    expected = variance(positions * shape[-2], positions * shape[-1])
    assert w.shape == shape
    assert w.var() == pytest.approx(expected, rel=0.05)
    assert abs(w.mean()) < 5 * math.sqrt(expected / w.size)
    if "uniform" in name:
        assert np.abs(w).max() <= math.sqrt(3 * expected) * (1 + 1e-6)
        assert np.abs(w).max() > math.sqrt(3 * expected) * 0.99
    else:
        assert np.abs(w).max() > 3 * math.sqrt(expected)


def test_uniform_stays_within_its_interval_after_rounding(rng):
    # Between 1 and 1 + 2^-22 float32 has one number: without care most draws round to an end.
    low, high = 1.0, 1.0 + 2.0**-22
    w = init.uniform(low, high)((1000,), rng)
    assert set(w.tolist()) == {1.0, 1.0 + 2.0**-23}
    wide = init.uniform(-3, 5)((20_000,), rng)
    assert -3 <= wide.min() < -2.99
    assert 4.99 < wide.max() < 5


def test_normal_has_its_mean_and_deviation(rng):
    w = init.normal(2.0, 0.5)((50_000,), rng)
    assert w.mean() == pytest.approx(2.0, abs=0.02)
    assert w.std() == pytest.approx(0.5, rel=0.02)


def test_truncated_normal_redraws_the_tails(rng):
    w = init.truncated_normal(1.0, 0.5)((50_000,), rng, np.float64)
    z = (w - 1.0) / 0.5
    assert np.abs(z).max() <= 2
    # Variance of N(0, 1) truncated to +-2: 1 - 4 phi(2) / (2 Phi(2) - 1). Clipping instead of
    # redrawing would give 0.92 and pile up values at the ends.
    phi = math.exp(-2) / math.sqrt(2 * math.pi)
    expected = 1 - 4 * phi / math.erf(math.sqrt(2))
    assert z.var() == pytest.approx(expected, rel=0.02)
    assert np.unique(w).size == w.size


def test_constants_draw_nothing(rng):
    before = rng.bit_generator.state
    assert np.array_equal(init.zeros((2, 3), rng), np.zeros((2, 3), np.float32))
    assert np.array_equal(init.constant(-1.5)((4,), rng), np.full(4, -1.5, np.float32))
    assert rng.bit_generator.state == before


@pytest.mark.parametrize("name", EVERY)
def test_one_seed_gives_one_weight_in_every_dtype(name):
    def draw(dtype, function=EVERY[name]):
        return function((5, 7), np.random.default_rng(1), dtype)

    single, double = draw(np.float32), draw(np.float64)
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(single, double, rtol=1e-6)
    assert np.array_equal(single, draw(np.float32))
    assert single.flags.c_contiguous
    assert single.flags.writeable
    if name not in ("zeros", "constant"):
        assert not np.array_equal(single, EVERY[name]((5, 7), np.random.default_rng(2)))


@pytest.mark.parametrize("name", EVERY)
def test_initialisers_survive_a_process_boundary(name):
    again = pickle.loads(pickle.dumps(EVERY[name]))
    a, b = np.random.default_rng(3), np.random.default_rng(3)
    assert np.array_equal(EVERY[name]((4, 4), a), again((4, 4), b))


@pytest.mark.parametrize("name", EVERY)
def test_a_generator_is_required(name):
    for wrong in (None, 7, np.random, np.random.RandomState(0)):
        with pytest.raises(DTypeError, match=r"numpy\.random\.Generator"):
            EVERY[name]((2, 2), wrong)


@pytest.mark.parametrize("name", EVERY)
def test_wrong_dtypes_and_shapes_are_refused(name, rng):
    with pytest.raises(DTypeError, match="int32"):
        EVERY[name]((2, 2), rng, np.int32)
    with pytest.raises(ShapeError, match="-2"):
        EVERY[name]((3, -2), rng)


@pytest.mark.parametrize("name", ["he_normal", "he_uniform", "xavier_normal", "xavier_uniform"])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 3, 2, 0)])
def test_fans_need_two_axes(name, shape, rng):
    with pytest.raises(ShapeError, match=name):
        init.by_name[name](shape, rng)


@pytest.mark.parametrize(
    "make",
    [
        lambda: init.uniform(1, 1),
        lambda: init.uniform(0, math.inf),
        lambda: init.normal(0, -1),
        lambda: init.normal(math.nan, 1),
        lambda: init.truncated_normal(0, -0.1),
        lambda: init.constant(math.nan),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ConfigError, match="came"):
        make()
