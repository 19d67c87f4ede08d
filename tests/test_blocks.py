"""Whole residual blocks, and branches that are thinned by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn
from tinynn.compress import blocks, cluster, importance, prune, select, sparsify
from tinynn.errors import ConfigError, PruneError
from tinynn.models import thesis
from tinynn.observe import observe
from tinynn.tensor import Tensor

Array = np.ndarray
SIDE = 6


def images(rows: int = 3, m: int = 3, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, SIDE, SIDE, m)).astype(np.float32)


Make = Callable[..., nn.Module]
KINDS: dict[str, Make] = {
    "residual": nn.ResidualBlock,
    "bottleneck": nn.BottleneckBlock,
    "separable": nn.SeparableResidualBlock,
}


def net(kind: str = "separable", seed: int = 0) -> nn.Sequential:
    """A stem of 4 channels, a block of 4, one of 8 with stride 2, and the end; nothing is zero."""
    rng = np.random.default_rng(seed)
    make = KINDS[kind]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, rng=rng), make(4, 4, rng=rng), make(4, 8, stride=2, rng=rng),
        nn.GlobalAvgPool2d(), nn.Linear(8, 3, rng=rng),
    )  # fmt: skip
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.mutate()[...] = rng.normal(1.0 if name.endswith("gamma") else 0.0, 0.4, p.shape)
    for name, b in model.named_buffers():
        b[...] = rng.uniform(0.5, 1.5, b.shape) if name.endswith("variance") else 0.1
    return model.eval()


def batches() -> tn.Batches:
    return tn.Batches(images(6), np.array([0, 1, 2, 0, 1, 2]), size=3, shuffle=False)


def close(a: nn.Module, b: nn.Module, x: Array) -> None:
    one, other = a.eval()(Tensor(x)).data, b.eval()(Tensor(x)).data
    scale = max(1.0, float(np.abs(other).max()))
    np.testing.assert_allclose(one / scale, other / scale, rtol=1e-4, atol=1e-5)


# --- whole blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_block_is_its_shortcut(kind: str) -> None:
    model = net(kind)
    paths = blocks.residual(model)
    assert paths == (["1", "2"] if kind == "separable" else ["1.0", "2.0"])
    x = Tensor(images())
    for path in paths:
        small = blocks.drop(model, [path])
        expected = model.copy()
        body = next(p for _, p in dict(expected.named_modules())[path].named_children())
        for p in body.parameters():
            p.mutate()[...] = 0  # the branch adds nothing
        assert small.size() < model.size()
        close(small, expected, x.data)
        assert blocks.residual(small) == [p for p in paths if p != path]
    none = blocks.drop(model, paths)
    assert none.size() == 4 * 28 + 8 * 3 + 3
    with pytest.raises(ConfigError, match=r"no residual blocks \['0'\]"):
        blocks.drop(model, ["0"])


def test_the_block_that_the_loss_misses_least_goes_first() -> None:
    model = net()
    dict(model.named_parameters())["1.0.7.weight"].mutate()[...] *= 1e-4  # its last layer
    rises = blocks.losses(model, batches(), tn.softmax_cross_entropy)
    assert abs(rises["1"]) < 1e-3 < abs(rises["2"])
    whole = tn.evaluate(model, batches(), tn.softmax_cross_entropy)
    after = tn.evaluate(blocks.drop(model, ["2"]), batches(), tn.softmax_cross_entropy)
    assert rises["2"] == pytest.approx(after - whole)
    order = blocks.weakest(model, batches(), tn.softmax_cross_entropy, 2)
    assert sorted(order) == ["1", "2"]
    assert order[0] == min(rises, key=lambda path: rises[path])
    assert blocks.weakest(model, batches(), tn.softmax_cross_entropy, 0) == []
    with pytest.raises(ConfigError, match="0 to 2"):
        blocks.weakest(model, batches(), tn.softmax_cross_entropy, 3)


# --- thinner branches -----------------------------------------------------------------------------


def silenced(model: nn.Module, decisions: list[prune.Decision]) -> nn.Module:
    """A copy whose branches make zeros of the channels that go."""
    out = model.copy()
    parameters = dict(out.named_parameters())
    for d in decisions:
        for member in d.group.writers:
            if member.name in parameters:
                np.moveaxis(parameters[member.name].mutate(), member.axis, 0)[~d.keep] = 0
    return out


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(list(KINDS)), st.integers(0, 99))
def test_a_thinned_branch_adds_zeros_and_computes_less(kind: str, seed: int) -> None:
    model = net(kind)
    x = images(seed=seed)
    seen = observe(model, [x])
    decisions: list[prune.Decision] = []
    small = blocks.thin(
        model, seen, importance.random(np.random.default_rng(seed)), lambda s: s > 0.5,
        report=decisions.append,
    )  # fmt: skip
    assert [d.group.size for d in decisions] == [4, 8]
    close(small, silenced(model, decisions), x)
    gone = sum(int((~d.keep).sum()) for d in decisions)
    fewer = tn.count(model, x).macs - tn.count(small, x).macs
    assert (fewer > 0) == (small.size() < model.size()) == (gone > 0)


def test_nothing_dropped_is_the_same_model() -> None:
    model = net()
    same = blocks.thin(model, observe(model, [images()]), importance.l1, select.share(1.0))
    assert repr(same) == repr(model)
    close(same, model, images())


@pytest.mark.parametrize("kind", KINDS)
def test_thinned_models_are_saved_trained_and_thinned_again(kind: str, tmp_path: Path) -> None:
    model = sparsify.weights(net(kind), sparsify.magnitude, sparsify.share(0.9))
    x = images()
    small = blocks.thin(model, observe(model, [x]), importance.l2, select.share(0.75))
    tn.save(tmp_path / "thin.safetensors", small)
    loaded = tn.load(tmp_path / "thin.safetensors")
    np.testing.assert_array_equal(loaded(Tensor(x)).data, small.eval()(Tensor(x)).data)
    before = small.state_dict()
    tn.fit(
        small, batches(), loss=tn.softmax_cross_entropy, steps=2,
        optimizer=tn.SGD(small.parameters(), lr=0.01, momentum=0.9),
    )  # fmt: skip
    assert any(not np.array_equal(v, before[k]) for k, v in small.state_dict().items())
    decisions: list[prune.Decision] = []
    smaller = blocks.thin(
        small, observe(small, [x]), importance.l2, select.share(0.5), report=decisions.append
    )
    assert [d.group.size for d in decisions] == [3, 6]
    close(smaller, silenced(small, decisions), x)
    scatters = [m for _, m in smaller.named_modules() if isinstance(m, nn.Scatter)]
    assert [(len(s.places), s.width) for s in scatters] == [(2, 4), (3, 8)]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(list(KINDS)), st.integers(0, 999))
def test_channels_of_a_thinned_model_are_pruned_like_any(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, x = net(kind), images()
    thin = blocks.thin(model, observe(model, [x]), importance.random(rng), select.share(0.75))
    seen = observe(thin, [x])
    decisions: list[prune.Decision] = []
    try:
        small = prune.channels(
            thin, seen, importance.random(rng), lambda s: s > 0.3, fold="none", least=1,
            report=decisions.append,
        )  # fmt: skip
    except PruneError as error:
        assert "keeps at least one" in str(error)
        return
    masked = thin.copy()
    parameters = dict(masked.named_parameters())
    for d in decisions:
        for reader in d.group.readers:
            index = reader.weight.index
            rows = np.moveaxis(parameters[reader.weight.name].mutate(), reader.weight.axis, 0)
            rows[(index >= 0) & ~d.keep[index]] = 0
    close(small, masked, x)
    assert (small.size() < thin.size()) == any(not d.keep.all() for d in decisions)


def test_the_small_model_of_the_thesis_is_thinned() -> None:
    model = thesis.small_cifar(rng=np.random.default_rng(0))
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    seen = observe(model, [x])
    small = blocks.thin(model, seen, importance.activation_variance, select.share(0.5))
    lost = sum(m * (m // 2) for m in (64, 64, 64, 128, 128, 128))
    assert tn.count(model, x).weights - tn.count(small, x).weights == lost
    shared = cluster.kmeans(small, 16)
    close(shared.copy(), shared, x)


def test_branches_that_end_in_nothing_of_their_own_are_refused() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, rng=rng),
        nn.Add(nn.Sequential(nn.Conv2d(4, 4, 3, rng=rng), nn.Softmax()), nn.Shortcut(4, 4)),
        nn.Add(nn.Sequential(nn.BatchNorm(4), nn.ReLU()), nn.Shortcut(4, 4)),
        nn.GlobalAvgPool2d(),
        nn.Linear(4, 2, rng=rng),
    )
    seen = observe(model, [images()])
    with pytest.raises(PruneError, match=r"the branch of 1 does not end.*softmax"):
        blocks.thin(model, seen, importance.l1, select.share(0.5))
    good = net()
    seen = observe(good, [images()])
    with pytest.raises(ConfigError, match="blocks of"):
        blocks.thin(good, seen, importance.l1, select.share(0.5), only=["0"])
    with pytest.raises(PruneError, match="another model"):
        blocks.thin(net(seed=1), seen, importance.l1, select.share(0.5))


@pytest.mark.parametrize("places", [(), (1, 1), (0, 4), (-1,)])
def test_places_must_be_different_and_inside(places: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="Scatter"):
        nn.Scatter(places, 4)
