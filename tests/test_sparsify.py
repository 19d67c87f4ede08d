"""Pruning of single weights: scores, selections, masks that hold, and what the loss says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn
from tinynn.compress import quantize, saliency, sparsify
from tinynn.errors import ConfigError, DataError, PruneError
from tinynn.nn.module import Parameter

Array = np.ndarray


def net(seed: int = 0) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, rng=rng),
        nn.BatchNorm(5),
        nn.ReLU(),
        nn.DepthwiseConv2d(5, 3, rng=rng),
        nn.GlobalAvgPool2d(),
        nn.Linear(5, 3, rng=rng),
    )


def batches(seed: int = 0, size: int = 4) -> tn.Batches:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, 6, 6, 2), dtype=np.float32)
    return tn.Batches(x, rng.integers(0, 3, 12), size=size, shuffle=False)


def weights(model: nn.Module) -> dict[str, Parameter]:
    return {n: p for n, p in model.named_parameters() if p.ndim >= 2}


def test_a_share_of_each_layer_stays_and_the_model_given_is_not_touched() -> None:
    model = net()
    before = model.state_dict()
    slim = sparsify.weights(model, sparsify.magnitude, sparsify.share(0.25))
    for name, p in weights(slim).items():
        old = before[name]
        assert np.count_nonzero(p.data) == round(0.25 * p.size)
        kept = np.abs(old[p.data != 0])
        assert kept.min() >= np.abs(old[p.data == 0]).max()
        np.testing.assert_array_equal(p.data[p.data != 0], old[p.data != 0])
    assert all(np.array_equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_global_share_takes_from_the_layers_with_small_weights() -> None:
    model = net()
    model.parameters()[0].mutate()[...] *= 1e-3
    slim = sparsify.weights(model, sparsify.magnitude, sparsify.share(0.4, "global"))
    first, *others = weights(slim).values()
    assert np.count_nonzero(first.data) == 1  # its last one: a layer never ends empty
    assert sum(np.count_nonzero(p.data) for p in others) > 0.9 * 0.4 * (90 + 45 + 15) / 2


def test_lamp_compares_layers_whatever_their_scale() -> None:
    row = np.float32([[3.0, -1.0], [0.0, 2.0]])
    np.testing.assert_allclose(sparsify.lamp("", row), [[1, 1 / 14], [0, 4 / 13]])
    np.testing.assert_array_equal(sparsify.lamp("", np.zeros((2, 2), np.float32)), 0)
    model, scaled = net(), net()
    scaled.parameters()[0].mutate()[...] *= np.float32(2.0**-7)
    first, second = (
        weights(sparsify.weights(m, sparsify.lamp, sparsify.share(0.4, "global")))
        for m in (model, scaled)
    )
    for name in first:
        np.testing.assert_array_equal(first[name].mask, second[name].mask)


def test_masks_hold_in_training_and_are_not_saved(tmp_path: Path) -> None:
    slim = sparsify.weights(net(), sparsify.magnitude, sparsify.share(0.3))
    zero = {n: p.data == 0 for n, p in weights(slim).items()}
    optimizer = tn.SGD(slim.parameters(), lr=0.1, momentum=0.9)
    tn.fit(slim, batches(), loss=tn.softmax_cross_entropy, optimizer=optimizer, epochs=3)
    for name, p in weights(slim).items():
        np.testing.assert_array_equal(p.data == 0, zero[name])
    tn.save(tmp_path / "slim.safetensors", slim)
    loaded = tn.load(tmp_path / "slim.safetensors")
    assert all(p.mask is None for p in loaded.parameters())
    assert loaded.state_dict().keys() == net().state_dict().keys()
    sparsify.freeze_zeros(loaded)
    for name, p in weights(loaded).items():
        np.testing.assert_array_equal(~np.asarray(p.mask), zero[name])


def test_a_second_round_takes_from_what_is_left() -> None:
    rng = np.random.default_rng(3)
    slim = sparsify.weights(net(), sparsify.random(rng), sparsify.share(0.5))
    slimmer = sparsify.weights(slim, sparsify.random(rng), sparsify.share(0.2))
    for name, p in weights(slimmer).items():
        assert not (p.data != 0)[weights(slim)[name].data == 0].any()
        assert np.count_nonzero(p.data) == round(0.2 * p.size)
    again = sparsify.weights(slim, sparsify.magnitude, sparsify.deviation(0.0))
    assert 0 < sparsify.density(again) < sparsify.density(slim)


@given(inputs=st.integers(1, 17), outputs=st.integers(1, 9), m=st.integers(1, 6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_n_of_m_keeps_the_largest_of_every_group(
    inputs: int, outputs: int, m: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m))
    scores = np.random.default_rng(inputs).random((inputs, outputs))
    mask = sparsify.n_of_m(n, m)({"w": scores})["w"]
    for start in range(0, inputs, m):
        group, kept = scores[start : start + m], mask[start : start + m]
        size = len(group)
        expected = -(-n * size // m)
        assert (kept.sum(axis=0) == expected).all()
        for column in range(outputs):
            chosen = set(np.flatnonzero(kept[:, column]))
            assert chosen == set(np.argsort(-group[:, column])[:expected])


@pytest.mark.parametrize("multiplier", [1, 2])
def test_the_inputs_of_a_depthwise_output_are_its_taps(multiplier: int) -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.DepthwiseConv2d(6, 3, multiplier=multiplier, rng=rng),
        nn.PointwiseConv2d(6 * multiplier, 5, rng=rng),
    )
    whole = weights(model)["0.weight"].data.reshape(9, -1)
    wanted = sparsify.n_of_m(2, 4)({"w": np.abs(whole)})["w"]
    slim = sparsify.weights(model, sparsify.magnitude, sparsify.n_of_m(2, 4))
    found = weights(slim)["0.weight"].mask
    assert found is not None and found.shape == (3, 3, 6, multiplier)
    np.testing.assert_array_equal(found.reshape(9, -1), wanted)
    assert (wanted.sum(axis=0) == 2 + 2 + 1).all()
    slimmer = sparsify.weights(slim, sparsify.magnitude, sparsify.n_of_m(1, 4))
    assert (np.count_nonzero(weights(slimmer)["0.weight"].data, axis=(0, 1)) == 3).all()
    blocks = sparsify.weights(model, sparsify.magnitude, sparsify.blocks(0.5, 3))
    kept = np.asarray(weights(blocks)["0.weight"].mask).reshape(9, -1, 3)
    assert (kept.all(axis=2) | ~kept.any(axis=2)).all()


@given(outputs=st.integers(1, 13), size=st.integers(1, 5), kept=st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_blocks_go_or_stay_whole(outputs: int, size: int, kept: float) -> None:
    scores = np.random.default_rng(outputs).random((2, 3, outputs))
    mask = sparsify.blocks(kept, size)({"w": scores})["w"].reshape(6, outputs)
    for start in range(0, outputs, size):
        block = mask[:, start : start + size]
        assert (block.all(axis=1) | ~block.any(axis=1)).all()
    blocks = 6 * -(-outputs // size)
    assert mask[:, ::size].sum() == max(1, round(kept * blocks))


def test_the_gradients_score_is_the_change_of_the_loss() -> None:
    model, data = net(), batches(size=12)
    seen = saliency.gradients(model, data, tn.softmax_cross_entropy)
    x, y = next(iter(data))
    model.eval()

    def loss() -> float:
        return tn.softmax_cross_entropy(model(tn.Tensor(x)), y).item()

    w = model.parameters()[0]
    place, step = (1, 1, 0, 2), 1e-2
    w.mutate()[place] += step
    up = loss()
    w.mutate()[place] -= 2 * step
    down = loss()
    w.mutate()[place] += step
    assert seen.mean["0.weight"][place] == pytest.approx((up - down) / (2 * step), rel=0.02)
    score = sparsify.taylor(seen)("0.weight", w.data)
    np.testing.assert_allclose(score, np.abs(w.data * seen.mean["0.weight"]))
    assert all(p.grad is None for p in model.parameters())


def test_fisher_is_the_mean_square_over_rows() -> None:
    model = net()
    rows = saliency.gradients(model, batches(size=1), tn.softmax_cross_entropy)
    whole = saliency.gradients(model, batches(size=12), tn.softmax_cross_entropy)
    for name, value in whole.mean.items():
        np.testing.assert_allclose(rows.mean[name], value, rtol=1e-3, atol=1e-6)
        assert (rows.square[name] >= np.square(rows.mean[name]) - 1e-12).all()


def test_the_diagonal_of_the_hessian_of_a_quadratic_loss_is_found() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(3, 2, rng=rng, dtype=np.float64))
    x = rng.standard_normal((40, 3))
    data = tn.Batches(x, rng.standard_normal((40, 2)), size=40, shuffle=False)
    found = saliency.hessian_diagonal(model, data, tn.mse, rng, probes=400)
    expected = np.repeat(2 * np.mean(x**2, axis=0)[:, None] / 2, 2, axis=1)
    np.testing.assert_allclose(found["0.weight"], expected, rtol=0.2)
    score = sparsify.brain_damage(found)("0.weight", model.parameters()[0].data)
    assert score.shape == (3, 2) and (score >= 0).all()


def test_masked_weights_and_learned_scales_stay_where_they_are() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False, rng=rng, dtype=np.float64))
    slim = sparsify.weights(model, sparsify.magnitude, sparsify.share(0.1))  # one stays
    x = rng.standard_normal((40, 3))
    data = [(x, rng.standard_normal((40, 2)))]
    found = saliency.hessian_diagonal(slim, data, tn.mse, rng, probes=1)["0.weight"]
    expected = np.repeat(np.mean(x**2, axis=0)[:, None], 2, axis=1)
    np.testing.assert_allclose(found, expected * slim.parameters()[0].mask, rtol=1e-6)
    small = x * 1e-3  # and so are its scales, less than the step
    tuned = quantize.trainable(quantize.int8(model, [small]), "learned")
    diagonal = saliency.hessian_diagonal(tuned, [(small, data[0][1])], tn.mse, rng, probes=1)
    assert list(diagonal) == ["layer.0.layer.weight"]


def test_a_weight_without_influence_goes_first() -> None:
    model, data = net(), batches(size=1)
    model.parameters()[-2].mutate()[4] = 0  # the linear layer does not read channel 4
    seen = saliency.gradients(model, data, tn.softmax_cross_entropy)
    for score in (sparsify.taylor(seen), sparsify.fisher(seen)):
        slim = sparsify.weights(model, score, sparsify.above(0), only=["3.weight"])
        kept = slim.parameters()[4].data.reshape(9, 5)
        assert not kept[:, 4].any() and kept[:, :4].all()


def test_schedules() -> None:
    rounds = sparsify.equal_shares(0.95, 6)
    np.testing.assert_allclose(rounds, [0.393, 0.632, 0.776, 0.864, 0.918, 0.95], atol=1e-3)
    left = [1 - s for s in [0, *rounds]]
    np.testing.assert_allclose(np.divide(left[1:], left[:-1]), left[1])
    assert sparsify.cubic(0, 100, 0.9) == 0 and sparsify.cubic(100, 100, 0.9) == 0.9
    assert sparsify.cubic(50, 100, 0.8) == pytest.approx(0.7)


def test_gradual_pruning_ends_at_its_sparsity() -> None:
    model = net()
    seen = []
    gradual = sparsify.Gradual(model, total=10, sparsity=0.8, every=3)

    def each_step(step: int) -> None:
        gradual(step)
        seen.append(sparsify.density(model))

    tn.fit(
        model,
        batches(),
        loss=tn.softmax_cross_entropy,
        optimizer=tn.Adam(model.parameters(), lr=0.01),
        steps=12,
        each_step=each_step,
    )
    assert seen == sorted(seen, reverse=True) and seen[0] == 1
    assert seen[-1] == pytest.approx(0.2, abs=0.02) and seen[9] == seen[-1]


def test_what_does_not_fit_is_refused() -> None:
    model = net()
    with pytest.raises(PruneError, match=r"no weights \['7.weight'\]"):
        sparsify.weights(model, sparsify.magnitude, sparsify.share(0.5), only=["7.weight"])
    with pytest.raises(PruneError, match=r"all 90 weights of 0\.weight would go"):
        sparsify.weights(model, sparsify.magnitude, sparsify.above(1e9))
    with pytest.raises(PruneError, match="none of them NaN"):
        sparsify.weights(model, lambda n, w: w * np.nan, sparsify.share(0.5))
    with pytest.raises(PruneError, match=r"required values \(3, 3, 2, 5\)"):
        sparsify.weights(model, sparsify.brain_damage({}), sparsify.share(0.5))
    with pytest.raises(PruneError, match=r"list of names; came the text '0\.weight'"):
        sparsify.weights(model, sparsify.magnitude, sparsify.share(0.5), only="0.weight")
    for bad in (
        lambda: sparsify.share(0),
        lambda: sparsify.n_of_m(3, 2),
        lambda: sparsify.n_of_m(2.5, 4),  # type: ignore[arg-type]
        lambda: sparsify.n_of_m(2, 4.5),  # type: ignore[arg-type]
        lambda: sparsify.blocks(0.5, 2.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            bad()
    with pytest.raises(DataError):
        saliency.gradients(model, [], tn.mse)
    x = np.zeros((2, 6, 6, 2), np.float32)  # whose two rows are no x and y
    for watch in (saliency.gradients, saliency.gates):
        with pytest.raises(DataError, match=r"required batches \(x, y\); came ndarray"):
            watch(model, [x], tn.mse)
