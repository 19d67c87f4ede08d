"""Layers of low rank: exact at full rank, as good as the rank allows, cheaper where replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn
from tinynn.compress import factorize, reestimate, sparsify
from tinynn.errors import ConfigError, DataError
from tinynn.models import thesis
from tinynn.tensor import Tensor

Array = np.ndarray


def images(shape: tuple[int, ...] = (2, 9, 8, 3), seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(a: nn.Module, b: nn.Module, x: Array, tolerance: float = 1e-4) -> None:
    one, other = a.eval()(Tensor(x)).data, b.eval()(Tensor(x)).data
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


def net(seed: int = 0) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, rng=rng),
        nn.BatchNorm(8),
        nn.ReLU(),
        nn.DepthwiseConv2d(8, 3, rng=rng),
        nn.PointwiseConv2d(8, 16, rng=rng),
        nn.ReLU(),
        nn.GlobalAvgPool2d(),
        nn.Linear(16, 12, rng=rng),
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_full_rank_is_the_same_function(data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    padding: Any = draw(st.sampled_from(["same", "valid", 1, ((2, 0), (1, 3))]))
    layer = nn.Conv2d(
        draw(st.integers(1, 4)), draw(st.integers(1, 5)), kernel,
        stride=(draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        padding=padding, bias=draw(st.booleans()), rng=rng,
    )  # fmt: skip
    model = nn.Sequential(layer, nn.ReLU())
    x = images((2, 9, 8, layer.weight.shape[2]))
    cuts: list[factorize.Cut] = []
    form = draw(st.sampled_from(["matrix", "separable"]))
    cut = factorize.layers(model, x, factorize.error(0), form=form, always=True, report=cuts.append)
    assert [(c.rank, c.applied) for c in cuts] == [(cuts[0].full, True)]
    close(cut, model, x)
    wholes, parts = tn.count(model, x), tn.count(cut, x)
    assert (cuts[0].macs, cuts[0].macs_after) == (wholes.macs, parts.macs)
    assert (cuts[0].weights, cuts[0].weights_after) == (wholes.weights, parts.weights)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-4, 2.0), st.integers(0, 50))
def test_the_rank_is_the_lowest_that_keeps_the_error_below(
    m_in: int, m_out: int, threshold: float, seed: int
) -> None:
    model = nn.Sequential(nn.Linear(m_in, m_out, rng=np.random.default_rng(seed)))
    x = images((1, m_in))
    cuts: list[factorize.Cut] = []
    cut = factorize.layers(model, x, factorize.error(threshold), always=True, report=cuts.append)
    first, second, _ = cut.parameters()
    w = model.parameters()[0].data.astype(np.float64)
    found = np.mean((first.data.astype(np.float64) @ second.data - w) ** 2)
    assert found == pytest.approx(cuts[0].error, rel=1e-3, abs=1e-9)
    left, values, right = np.linalg.svd(w, full_matrices=False)
    errors = [np.mean(((left[:, :n] * values[:n]) @ right[:n] - w) ** 2) for n in range(13)]
    fits = [n for n in range(1, len(values) + 1) if errors[n] < threshold]
    assert cuts[0].rank == first.shape[1] == min(fits, default=len(values))


def test_energy_and_number() -> None:
    values = np.array([2.0, 1.0, 1.0, 0.0])
    assert [factorize.energy(s)(values, 16) for s in (0.5, 0.66, 0.7, 0.99, 1)] == [1, 1, 2, 3, 3]
    assert factorize.number(2)(values, 16) == 2 and factorize.number(9)(values, 16) == 4


def test_only_what_becomes_cheaper_is_replaced() -> None:
    model, x = net(), images()
    cuts: dict[str, factorize.Cut] = {}
    small = factorize.layers(
        model, x, factorize.number(5), report=lambda c: cuts.update({c.path: c})
    )
    # n < m_in m_out / (m_in + m_out): 600 / 83 = 7.2, 128 / 24 = 5.3, 192 / 28 = 6.9
    assert {p: c.applied for p, c in cuts.items()} == {"0": True, "4": True, "7": True}
    assert tn.count(small, x).macs < tn.count(model, x).macs
    cuts.clear()
    same = factorize.layers(
        model, x, factorize.number(6), report=lambda c: cuts.update({c.path: c})
    )
    assert {p: c.applied for p, c in cuts.items()} == {"0": True, "4": False, "7": True}
    saved = tn.count(model, x).macs - tn.count(same, x).macs
    assert saved == sum(c.macs - c.macs_after for c in cuts.values() if c.applied)
    assert "left as it is" in str(cuts["4"]) and "rank 6 of 8" in str(cuts["4"])
    whole = factorize.layers(model, x, factorize.error(0))
    assert whole.state_dict().keys() == model.state_dict().keys()
    close(whole, model, x, 0)


def test_the_cheapest_form_is_taken() -> None:
    model, x = net(), images()
    kinds = {}
    for form in ("matrix", "separable", "cheapest"):
        small = factorize.layers(model, x, factorize.number(4), form=form, only=["0"])
        kinds[form] = tn.count(small, x).macs
    assert kinds["cheapest"] == min(kinds.values()) and kinds["matrix"] != kinds["separable"]


def test_factors_are_trained_saved_loaded_and_cut_again(tmp_path: Path) -> None:
    model, x = net(), images()
    model.parameters()[0].requires_grad = False
    model.eval()
    pruned = sparsify.weights(model, sparsify.magnitude, sparsify.share(0.5))
    small = factorize.layers(pruned, x, factorize.number(4), form="separable")
    assert not any(m.training for _, m in small.named_modules())
    assert [p.requires_grad for p in small.parameters()][:3] == [False, False, True]
    before = small.state_dict()
    data = tn.Batches(x, np.array([0, 1]), size=2, shuffle=False)
    optimizer = tn.SGD([p for p in small.parameters() if p.requires_grad], lr=0.1)
    tn.fit(small, data, loss=tn.softmax_cross_entropy, optimizer=optimizer, steps=1)
    moved = {k for k, v in small.state_dict().items() if not np.array_equal(v, before[k])}
    assert {"4.0.weight", "4.1.weight", "4.1.bias", "7.0.weight"} <= moved
    assert not {"0.0.weight", "0.1.weight"} & moved
    tn.save(tmp_path / "small.safetensors", small)
    close(tn.load(tmp_path / "small.safetensors"), small, x, 0)
    again = factorize.layers(small, x, factorize.number(2))
    assert again.size() < small.size() < model.size()


def test_shared_and_foreign_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
            return super().forward(x, relu=relu) * 2

    rng = np.random.default_rng(0)
    twice = nn.Linear(8, 8, rng=rng)
    tied = nn.Linear(8, 8, rng=rng)
    other = nn.Linear(8, 8, rng=rng)
    other.weight = tied.weight
    model = nn.Sequential(twice, Own(8, 8, rng=rng), tied, twice, other)
    x = images((3, 8))
    cuts: list[factorize.Cut] = []
    small = factorize.layers(model, x, factorize.number(1), report=cuts.append)
    assert [(c.path, c.macs) for c in cuts] == [("0", 2 * 3 * 64)]
    assert small[0] is small[3] and isinstance(small[0], nn.Sequential)
    assert [type(m) for m in small][1:3] == [Own, nn.Linear]


def test_the_small_model_of_the_thesis() -> None:
    rng = np.random.default_rng(0)
    model = thesis.small_cifar(rng=rng)
    x = images((1, 8, 8, 3))
    cuts: list[factorize.Cut] = []
    small = factorize.layers(model, x, factorize.energy(0.5), form="cheapest", report=cuts.append)
    assert len(cuts) == 14 and any(c.applied for c in cuts)
    assert tn.count(small, x).macs == tn.count(model, x).macs - sum(
        c.macs - c.macs_after for c in cuts if c.applied
    )


def test_what_does_not_fit_is_refused() -> None:
    model, x = net(), images()
    with pytest.raises(ConfigError, match=r"no layers \['3'\]"):
        factorize.layers(model, x, factorize.number(1), only=["3"])
    with pytest.raises(ConfigError, match="form"):
        factorize.layers(model, x, factorize.number(1), form="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Sequential"):
        linear = nn.Linear(2, 2, rng=np.random.default_rng(0))
        factorize.layers(linear, images((1, 2)), factorize.number(1))
    for bad in (
        lambda: factorize.error(-1),
        lambda: factorize.energy(0),
        lambda: factorize.number(0),
    ):
        with pytest.raises(ConfigError):
            bad()


# --- the statistics of batch normalisation afterwards ---------------------------------------------


def test_reestimated_statistics_are_those_of_the_data() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Linear(4, 6, rng=rng),
        nn.BatchNorm(6, momentum=0.3),
        nn.Dropout(0.5, rng=rng),
        nn.Linear(6, 2, rng=rng),
    )
    first = model[0]
    batches = [images((n, 4), seed=n) for n in (5, 3)]
    before = model.state_dict()
    out = reestimate(model, batches)
    hidden = [first(Tensor(x)).data.astype(np.float64) for x in batches]
    mean = sum(h.mean(0) * len(h) for h in hidden) / 8
    variance = sum(h.var(0, ddof=1) * len(h) for h in hidden) / 8
    norm = out[1]
    assert isinstance(norm, nn.BatchNorm) and norm.momentum == 0.3
    np.testing.assert_allclose(norm.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.variance, variance, rtol=1e-5)
    listed = reestimate(model, [[x, np.zeros(len(x))] for x in batches]).state_dict()
    assert all(np.array_equal(v, listed[k]) for k, v in out.state_dict().items())
    changed = {k for k, v in out.state_dict().items() if not np.array_equal(v, before[k])}
    assert changed == {"1.mean", "1.variance"}
    assert all(np.array_equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for _, m in out.named_modules()] == [
        m.training for _, m in model.named_modules()
    ]
    with pytest.raises(DataError, match="at least one batch"):
        reestimate(model, [])
