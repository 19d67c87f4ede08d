"""Ranges for few bits: histograms, calibrations against brute force and known distributions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn
from tinynn.compress import calibrate, quantize
from tinynn.errors import ConfigError, DataError
from tinynn.observe import Histogram, observe

Array = np.ndarray


def histogram(*parts: Array, bins: int = 2048) -> Histogram:
    out = Histogram(bins)
    for part in parts:
        out.add(np.asarray(part, np.float32))
    return out


def rounded(x: Array, least: float, most: float, steps: int) -> Array:
    scale = (most - least) / steps
    low = np.rint(least / scale)
    return np.clip(np.rint(x / scale), low, low + steps) * scale


def laplace(n: int = 200_000, seed: int = 0) -> Array:
    return np.random.default_rng(seed).laplace(0, 1, n).astype(np.float32)


# --- histograms -----------------------------------------------------------------------------------

arrays = st.lists(
    st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=20),
    min_size=1,
    max_size=5,
)


@given(parts=arrays, bins=st.sampled_from([1, 4, 64]))
@settings(max_examples=200, deadline=None)
def test_parts_count_as_the_whole_does(parts: list[list[float]], bins: int) -> None:
    whole = np.concatenate(parts).astype(np.float32)
    one, many = histogram(whole, bins=bins), histogram(*map(np.array, parts), bins=bins)
    pooled = Histogram(bins)
    for part in parts:
        pooled.merge(histogram(np.array(part), bins=bins))
    for seen in (one, many, pooled):
        assert (seen.low, seen.high) == (whole.min(), whole.max())
        assert seen.zeros == (whole == 0).sum()
        assert seen.counts.sum() + seen.zeros == whole.size
        top = np.abs(whole).max()
        assert seen.reach == one.reach and (top == 0 or seen.reach / 2 <= top < seen.reach)
        np.testing.assert_array_equal(seen.counts, one.counts)
    if one.reach:
        edges = np.arange(-bins, bins + 1) * one.width
        expected, _ = np.histogram(whole[whole != 0], edges)
        np.testing.assert_array_equal(one.counts, expected)


def test_an_observer_counts_what_its_model_computes() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(3, 4, rng=rng), nn.ReLU()).eval()
    x = rng.standard_normal((50, 3), dtype=np.float32)
    seen = observe(model, [x[:20], x[20:]], bins=64)
    with tn.no_grad():
        y = model(tn.Tensor(x)).data
    expected, got = histogram(y, bins=64), seen.histogram(seen.graph.output)
    np.testing.assert_array_equal(got.counts, expected.counts)
    assert got.zeros == expected.zeros > 0
    with pytest.raises(DataError, match="power of two"):
        observe(model, [x], bins=63)


# --- activations ----------------------------------------------------------------------------------


def test_minmax_reaches_over_zero() -> None:
    assert calibrate.minmax(histogram(np.array([1.0, 3.0])), 255) == (0, 3)
    assert calibrate.minmax(histogram(np.array([-2.0, -1.0])), 255) == (-2, 0)


@pytest.mark.parametrize("share", [99.0, 99.9, 99.99, 100.0])
def test_percentiles_are_those_of_the_numbers(share: float) -> None:
    rng = np.random.default_rng(0)
    for x in (laplace(), rng.exponential(1, 100_000), np.maximum(laplace(seed=1), 0)):
        seen = histogram(x)
        least, most = calibrate.percentile(share)(seen, 255)
        outside = (1 - share / 100) * len(x)
        assert (x > most + seen.width).sum() <= outside + 1 <= (x > most - seen.width).sum() + 2
        if least < 0:
            assert (x < least - seen.width).sum() <= outside + 1
            assert outside <= (x < least + seen.width).sum() + 1
        else:
            assert (x < 0).sum() <= outside


@pytest.mark.parametrize("steps", [15, 63, 255])
def test_mse_is_as_good_as_brute_force(steps: int) -> None:
    rng = np.random.default_rng(0)
    for x in (laplace(20_000), np.maximum(laplace(20_000), 0), rng.normal(0.5, 1, 20_000)):
        x = np.asarray(x, np.float32)
        least, most = calibrate.mse(histogram(x), steps)

        def error(t: float, x: Array = x) -> float:
            ends = max(min(x.min(), 0), -t), min(max(x.max(), 0), t)
            return float(np.mean((x - rounded(x, *ends, steps)) ** 2))

        best = min(error(t) for t in np.linspace(0.02, 1, 200) * np.abs(x).max())
        got = float(np.mean((x - rounded(x, least, most, steps)) ** 2))
        assert got < (1.06 if steps == 15 else 1.03) * best
        assert got <= 1.001 * error(np.abs(x).max())


def literal_kl(sizes: list[int], n: int, levels: int) -> float:
    """Migacz's procedure, word for word."""
    p = [float(s) for s in sizes[:n]]
    p[-1] += sum(sizes[n:])
    q = [0.0] * n
    for part in range(levels):
        # bin j belongs to part floor(j levels / n)
        inside = [j for j in range(n) if j * levels // n == part]
        filled = [j for j in inside if sizes[j] > 0]
        for j in filled:
            q[j] = sum(sizes[j] for j in inside) / len(filled)
    total_p, total_q = sum(p), sum(q)
    divergence = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            divergence += a / total_p * np.log(a / total_p / max(b / max(total_q, 1), 1e-12))
    return divergence


@pytest.mark.parametrize("one_sided", [True, False])
def test_kl_is_that_of_the_procedure_word_for_word(one_sided: bool) -> None:
    x = laplace(3000)
    x = np.abs(x) if one_sided else x
    seen, steps = histogram(x, bins=128), 15
    sizes = seen.counts[128:] + seen.counts[:128][::-1]
    last = int(np.flatnonzero(sizes)[-1]) + 1
    levels = 16 if one_sided else 8
    found = {n: literal_kl(sizes[:last].tolist(), n, levels) for n in range(levels, last + 1)}
    least, most = calibrate.kl(seen, steps)
    n = round(most / seen.width) if most < seen.high else last
    assert found[n] == pytest.approx(min(found.values()), abs=1e-12)
    assert least == (0 if one_sided else pytest.approx(max(-most, seen.low)))


def test_kl_cuts_a_few_far_numbers_off() -> None:
    x = np.concatenate([np.random.default_rng(0).normal(0, 1, 100_000), [60.0]])
    assert calibrate.kl(histogram(x), 255)[1] < 10
    few = histogram(np.array([0.5, 1.0]))
    assert calibrate.kl(few, 255)[1] <= 1.0
    assert calibrate.kl(histogram(np.zeros(4)), 255) == (0, 0)


def test_the_analytic_cuts_are_the_published_ones_and_optimal() -> None:
    published = {"laplace": [2.83, 3.89, 5.03], "gauss": [1.71, 2.15, 2.55]}
    rng = np.random.default_rng(0)
    samples = {"laplace": laplace(400_000), "gauss": rng.standard_normal(400_000)}
    for kind, cuts in published.items():
        for bits, cut in zip((2, 3, 4), cuts, strict=True):
            t = calibrate.clipping(kind, 2**bits)
            assert t == pytest.approx(cut, abs=0.012)
        x = samples[kind]

        def error(t: float, x: Array = x) -> float:
            # 16 intervals, each number in the middle of its own
            step = 2 * t / 16
            y = (np.floor(np.clip(x, -t, t * (1 - 1e-9)) / step) + 0.5) * step
            return float(np.mean((x - y) ** 2))

        tried = np.arange(1.5, 8, 0.1)
        best = tried[np.argmin([error(t) for t in tried])]
        assert calibrate.clipping(kind, 16) == pytest.approx(best, rel=0.1)


def test_aciq_knows_which_distribution_it_sees_and_halves_of_them() -> None:
    rng = np.random.default_rng(0)
    for x in (laplace(), rng.standard_normal(200_000), np.maximum(laplace(), 0)):
        seen = histogram(x)
        error = {
            kind: calibrate.squared_error(seen, *calibrate.aciq(kind)(seen, 15), 15)  # type: ignore
            for kind in ("laplace", "gauss", "best")
        }
        assert error["best"] == min(error.values())
        best = calibrate.squared_error(seen, *calibrate.mse(seen, 15), 15)
        assert error["best"] < 1.1 * best
        assert error["best"] < 0.6 * calibrate.squared_error(seen, seen.low, seen.high, 15)
    half = histogram(np.maximum(laplace(), 0))
    least, most = calibrate.aciq("laplace")(half, 15)
    assert least == 0 and most == pytest.approx(calibrate.clipping("laplace", 30), rel=0.02)
    for bad in (lambda: calibrate.aciq("cauchy"), lambda: calibrate.percentile(10)):  # type: ignore
        with pytest.raises(ConfigError):
            bad()


def test_the_error_of_a_histogram_is_that_of_its_numbers() -> None:
    x = laplace(50_000)
    seen = histogram(x)
    for least, most in ((-3.0, 3.0), (-9.0, 12.0), (-0.5, 2.0)):
        exact = float(np.mean((x - rounded(x, least, most, 15)) ** 2))
        assert calibrate.squared_error(seen, least, most, 15) == pytest.approx(exact, rel=0.01)


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_cut_column_by_column() -> None:
    rng = np.random.default_rng(0)
    weights = np.stack([laplace(500), rng.standard_normal(500) * 0.1, np.zeros(500)], axis=1)
    steps = np.array([7.0, 7.0, 7.0])
    whole = calibrate.largest(weights, steps)
    np.testing.assert_array_equal(whole, np.abs(weights).max(axis=0))

    def error(cut: Array) -> Array:
        scale = np.where(cut > 0, cut / steps, 1)
        return ((weights - np.clip(np.rint(weights / scale), -7, 7) * scale) ** 2).sum(axis=0)

    mmse, aciq = calibrate.weights_mmse(weights, steps), calibrate.weights_aciq()(weights, steps)
    assert (error(mmse)[:2] < error(whole)[:2]).all()
    assert (error(aciq)[:2] < error(whole)[:2]).all()
    assert (error(aciq)[:2] < 1.25 * error(mmse)[:2]).all()
    assert mmse[2] == aciq[2] == 0
    tried = [whole * f for f in np.linspace(0.1, 1, 91)]
    best = np.min([error(c) for c in tried], axis=0)
    assert (error(mmse) <= 1.02 * best).all()


def test_bits_go_where_the_range_is_and_their_levels_are_shared() -> None:
    widths = np.array([1.0, 8.0, 1.0, 0.125])
    bits = calibrate.allocate(widths, 4)
    assert bits.tolist() == [4, 6, 4, 2] or (bits[1] > bits[0] == bits[2] > bits[3])
    ratio = 2.0 ** (bits[1] - bits[0])
    assert ratio == 4  # 8^(2/3)
    np.testing.assert_array_equal(calibrate.allocate(np.ones(7), 5), 5)
    np.testing.assert_array_equal(calibrate.allocate(np.zeros(3), 4), 4)
    assert calibrate.allocate(np.array([1e9, 1e-9]), 4).tolist() == [5, 2]


def test_allocated_bits_lower_the_error_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    widths = rng.uniform(0.05, 2, 64)
    weights = rng.uniform(-1, 1, (400, 64)) * widths

    def error(bits: Array) -> float:
        steps = 2.0 ** (bits - 1) - 1
        scale = np.abs(weights).max(axis=0) / steps
        return float(((weights - np.rint(weights / scale) * scale) ** 2).sum())

    bits = calibrate.allocate(np.abs(weights).max(axis=0), 4)
    assert (2.0**bits).sum() <= 64 * 16 * 1.2
    assert error(bits) < error(np.full(64, 4))


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_shared_scales_are_few_and_cut_nothing(scales: list[float], count: int) -> None:
    before = np.array(scales)
    after = calibrate.shared(before, count)
    assert len(np.unique(after)) <= count
    assert (after >= before * (1 - 1e-12)).all() and after.max() == before.max()
    widest = (before.max() / before.min()) ** (1 / count)
    assert (after <= before * widest * (1 + 1e-9)).all()


def test_whole_numbers_have_a_histogram_too() -> None:
    numbers = np.array([[0, 3], [-2, 3]])
    seen = Histogram(8)
    seen.add(numbers)
    np.testing.assert_array_equal(seen.counts, histogram(numbers, bins=8).counts)


def test_a_list_of_arrays_is_a_batch_as_a_tuple_is() -> None:
    model = nn.Sequential(nn.Linear(3, 2, rng=np.random.default_rng(0)))
    x = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    for batch in ([x, x], [x, np.zeros(5)], [*map(tn.Tensor, (x, x))]):
        seen = observe(model, [batch])
        assert seen[seen.graph.input].samples == 5


def test_a_double_model_stays_double() -> None:
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(4, 5, rng=rng), nn.Tanh(), nn.Linear(5, 2, rng=rng)).eval()
    x = rng.standard_normal((20, 4), np.float32)
    single = quantize.int8(net, [x]).eval()(tn.Tensor(x)).data
    double = quantize.int8(net.astype(np.float64), [x.astype(np.float64)]).eval()
    y = double(tn.Tensor(x.astype(np.float64))).data
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, single, rtol=0, atol=0.05)
