"""Criteria for channels: the loss' gates, batch norm's scale, duplicates, the union of members."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn
from tinynn.compress import importance, merge, prune, saliency, select, union
from tinynn.errors import ConfigError, DataError, PruneError
from tinynn.observe import observe
from tinynn.tensor import Tensor

Array = np.ndarray


def net(seed: int = 0) -> nn.Sequential:
    """Residual, with batch norm everywhere but in the linear layer at its end."""
    rng = np.random.default_rng(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, rng=rng),
        nn.SeparableResidualBlock(4, 4, rng=rng),
        nn.SeparableResidualBlock(4, 6, stride=2, rng=rng),
        nn.BatchNorm(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 3, rng=rng),
    )
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.mutate()[...] = rng.normal(1.0 if name.endswith("gamma") else 0.0, 0.4, p.shape)
    return model


def images(rows: int = 6, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, 6, 6, 2)).astype(np.float32)


def batches(size: int = 1) -> tn.Batches:
    return tn.Batches(images(), np.array([0, 1, 2, 0, 1, 2]), size=size, shuffle=False)


# --- what the loss says ---------------------------------------------------------------------------


def test_a_gate_is_the_loss_gradient_by_a_factor_on_the_channel() -> None:
    model = net().astype(np.float64).eval()
    x, y = images().astype(np.float64), np.array([0, 1, 2, 0, 1, 2])
    data = tn.Batches(x, y, size=6, shuffle=False)
    seen = observe(model, [x])
    found = saliency.gates(model, data, tn.softmax_cross_entropy)
    parameters = dict(model.named_parameters())
    checked = 0
    for group in seen.graph.groups():
        if group.fixed:
            continue
        score = importance.taylor(found)(group, seen, model.state_dict())
        half = importance.fisher(found)(group, seen, model.state_dict())
        np.testing.assert_allclose(half, score**2 / 2)
        for channel in range(0, group.size, 3):

            def loss(factor: float, group: Any = group, channel: int = channel) -> float:
                before = {r.weight.name: parameters[r.weight.name].numpy() for r in group.readers}
                for r in group.readers:
                    rows = np.moveaxis(parameters[r.weight.name].mutate(), r.weight.axis, 0)
                    rows[r.weight.index == channel] *= factor
                value = tn.softmax_cross_entropy(model(Tensor(x)), y).item()
                for name, old in before.items():
                    parameters[name].mutate()[...] = old
                return value

            slope = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
            assert score[channel] == pytest.approx(abs(slope), rel=1e-4, abs=1e-8)
            checked += 1
    assert checked > 6


def test_channels_without_influence_go_first_by_taylor_and_fisher() -> None:
    model = net()
    model.parameters()[-2].mutate().reshape(9, 6, 3)[:, 5] = 0  # what nothing else reads
    seen = observe(model, [images()])
    found = saliency.gates(model, batches(), tn.softmax_cross_entropy)
    assert all(len(rows) == 6 for rows in found.rows.values())
    for score in (importance.taylor(found), importance.fisher(found)):
        small = prune.channels(
            model, seen, score, select.above(0), only=lambda g: bool(g.readers[-1].bias == "6.bias")
        )
        assert small.size() < model.size()
        x = Tensor(images())
        np.testing.assert_allclose(small.eval()(x).data, model.eval()(x).data, rtol=1e-4, atol=1e-5)
    with pytest.raises(PruneError, match="required gates for the"):
        importance.taylor(saliency.Gates({}))(seen.graph.groups()[1], seen, {})
    with pytest.raises(DataError):
        saliency.gates(model, [], tn.mse)


def test_gates_of_ef_layers_count_what_the_input_and_what_the_weights_say() -> None:
    rng = np.random.default_rng(2)
    conv, dense = nn.AdditiveConv2d(4, 5, 3, rng=rng), nn.AdditiveLinear(5, 3, rng=rng)
    first = nn.Conv2d(2, 4, 3, rng=rng)
    model = nn.Sequential(first, nn.ReLU(), conv, nn.ReLU(), nn.GlobalAvgPool2d(), dense)
    x, y = images(), np.array([0, 1, 2, 0, 1, 2])
    rows = saliency.gates(model, [(x, y)], tn.softmax_cross_entropy).rows
    assert sorted(rows) == ["0.weight", "2.weight", "5.weight"]

    def loss(factor: Array) -> float:
        # a factor on sign(x w) (|x| + |w|) is one on what one channel alone gives
        h = first(Tensor(x), relu=True).data
        each = [conv(Tensor(h * (np.arange(4) == c))).data - conv.bias.data for c in range(4)]
        out = nn.ReLU()(Tensor(np.tensordot(factor, each, 1).astype(np.float32) + conv.bias.data))
        return tn.softmax_cross_entropy(dense(nn.GlobalAvgPool2d()(out)), y).item()

    step = 1e-2 * np.eye(4)
    slopes = [(loss(1 + e) - loss(1 - e)) / 2e-2 for e in step]
    np.testing.assert_allclose(rows["2.weight"][0], slopes, rtol=0.02, atol=2e-4)


def test_the_scale_of_batch_norm() -> None:
    model = net()
    seen = observe(model, [images()])
    arrays = model.state_dict()
    groups = {g.name: g for g in seen.graph.groups() if not g.fixed}
    inner = groups["1.0.3"]  # between the halves of the first block
    np.testing.assert_array_equal(
        importance.batchnorm_scale(inner, seen, arrays), np.abs(arrays["1.0.4.gamma"])
    )
    trunk = groups["0"]
    read = [arrays["1.0.0.gamma"], arrays["2.0.0.gamma"], arrays["3.gamma"][1:5]]
    np.testing.assert_array_equal(
        importance.batchnorm_scale(trunk, seen, arrays), np.max(np.abs(read), axis=0)
    )
    plain = nn.Sequential(
        nn.Linear(2, 3, rng=np.random.default_rng(0)), nn.Linear(3, 1, rng=np.random.default_rng(0))
    )
    x = np.ones((2, 2), np.float32)
    with pytest.raises(PruneError, match="0 has no batch normalisation"):
        prune.channels(plain, observe(plain, [x]), importance.batchnorm_scale, select.share(0.5))


def test_only_some_groups_are_pruned() -> None:
    model = net()
    seen = observe(model, [images()])
    small = prune.channels(
        model, seen, importance.l1, select.share(0.5), only=lambda g: g.name == "1.0.3", fold="none"
    )
    changed = {k for k, v in small.state_dict().items() if v.shape != model.state_dict()[k].shape}
    assert changed == {
        "1.0.3.weight", "1.0.4.gamma", "1.0.4.beta", "1.0.4.mean", "1.0.4.variance",
        "1.0.6.weight", "1.0.7.weight",
    }  # fmt: skip
    with pytest.raises(PruneError, match="left out"):
        prune.channels(model, seen, importance.l1, select.share(0.5), only=lambda g: False)


# --- the union rule -------------------------------------------------------------------------------


def test_a_group_tied_by_additions_keeps_what_any_member_keeps() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, rng=rng), nn.ResidualBlock(4, 4, rng=rng),
        nn.ResidualBlock(4, 4, rng=rng), nn.GlobalAvgPool2d(), nn.Linear(4, 2, rng=rng),
    )  # fmt: skip
    makers = ["0.weight", "1.0.0.3.weight", "2.0.0.3.weight"]
    small_columns = {"0.weight": [0, 1, 2], "1.0.0.3.weight": [0, 1], "2.0.0.3.weight": [0, 1, 3]}
    parameters = dict(model.named_parameters())
    for name, columns in small_columns.items():
        parameters[name].mutate()[..., columns] *= 1e-3
    seen = observe(model, [images()])
    trunk = next(g for g in seen.graph.groups() if g.name == "0")
    parts = union.members(trunk, seen.graph)
    assert [m.writers[0].name for m in parts] == makers
    assert [len(m.readers) for m in parts] == [1, 0, 0]
    assert [{m.name for m in part.writers} for part in parts][1] == {
        "1.0.0.3.weight", "1.0.0.4.gamma", "1.0.0.4.beta", "1.0.0.4.mean", "1.0.0.4.variance"
    }  # fmt: skip
    decisions: list[prune.Decision] = []
    prune.channels(
        model, seen, importance.l1, select.above(0.1), union=True, fold="none", least=1,
        report=decisions.append,
    )  # fmt: skip
    kept = next(d for d in decisions if d.group.name == "0").keep
    np.testing.assert_array_equal(kept, [False, False, True, True])
    inner = next(g for g in seen.graph.groups() if g.name == "1.0.0.0")
    (alone,) = union.members(inner, seen.graph)
    assert alone.writers == inner.writers and alone.readers == inner.readers


def test_without_additions_the_union_changes_nothing() -> None:
    model = nn.Sequential(
        nn.Linear(2, 6, rng=np.random.default_rng(0)), nn.ReLU(),
        nn.Linear(6, 1, rng=np.random.default_rng(1)),
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    seen = observe(model, [x])
    one, other = (
        prune.channels(model, seen, importance.activation_rate, select.share(0.5), union=u)
        for u in (False, True)
    )
    for key, value in one.state_dict().items():
        np.testing.assert_array_equal(value, other.state_dict()[key])


# --- duplicates -----------------------------------------------------------------------------------


def test_duplicates_that_an_ef_layer_reads_stay() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, rng=rng), nn.ReLU(), nn.AdditiveConv2d(4, 5, 3, rng=rng), nn.ReLU(),
        nn.GlobalAvgPool2d(), nn.Linear(5, 4, rng=rng), nn.ReLU(), nn.AdditiveLinear(4, 2, rng=rng),
    )  # fmt: skip
    for path in ("0", "5"):
        layer: Any = dict(model.named_modules())[path]
        layer.weight.mutate()[..., 3] = 2 * layer.weight.data[..., 0]
    x = images(8)
    same = merge.duplicates(model, [x], similarity=0.999)
    assert [p.shape for p in same.parameters()] == [p.shape for p in model.parameters()]
    np.testing.assert_array_equal(same.eval()(Tensor(x)).data, model.eval()(Tensor(x)).data)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_duplicates_leave_without_changing_the_function(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    tail = data.draw(st.sampled_from(["pool", "flatten"]))
    last = [nn.GlobalAvgPool2d(), nn.Linear(5, 3, rng=rng)] if tail == "pool" else [
        nn.Flatten(), nn.Linear(5 * 36, 3, rng=rng)
    ]  # fmt: skip
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, rng=rng), nn.ReLU(), nn.Conv2d(5, 5, 3, rng=rng), nn.ReLU(), *last
    )
    copies: dict[str, list[int]] = {}
    for path in ("0", "2"):
        layer = dict(model.named_modules())[path]
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        layer.bias.mutate()[...] = rng.normal(0, 0.3, 5)
        copies[path] = data.draw(st.lists(st.integers(1, 4), unique=True, max_size=3))
        for j in copies[path]:
            factor = data.draw(st.sampled_from([0.5, 2.0, 1.0]))
            layer.weight.mutate()[..., j] = factor * layer.weight.data[..., 0]
            layer.bias.mutate()[j] = factor * layer.bias.data[0]
    x = images(8, seed)
    found: list[merge.Duplicate] = []
    small = merge.duplicates(model, [x], similarity=1 - 1e-6, report=found.append)
    for path, twins in copies.items():
        gone = {d.removed for d in found if d.group.name == path}
        alike = {0, *twins}
        assert len(gone & alike) >= len(twins)
        assert all(d.residual <= 1e-5 for d in found)
    expected = model(Tensor(x)).data
    np.testing.assert_allclose(
        small(Tensor(x)).data, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )


def test_the_fold_is_the_least_squares_factor() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Linear(3, 4, rng=rng, dtype=np.float64), nn.Linear(4, 2, rng=rng, dtype=np.float64)
    )
    model.parameters()[0].mutate()[:, 3] = model.parameters()[0].data[:, 1] * -2
    model.parameters()[1].mutate()[3] = 0.3
    x = rng.standard_normal((50, 3))
    hidden = model[0](Tensor(x)).data
    found: list[merge.Duplicate] = []
    small = merge.duplicates(model, [x[:20], x[20:]], similarity=0.95, report=found.append)
    (pair,) = found
    assert {pair.removed, pair.kept} == {1, 3}
    factor = np.linalg.lstsq(hidden[:, [pair.kept]], hidden[:, pair.removed], rcond=None)[0][0]
    old, new = model.parameters()[2].data, small.parameters()[2].data
    row = sorted({0, 1, 2, 3} - {pair.removed}).index(pair.kept)
    np.testing.assert_allclose(new[row], old[pair.kept] + factor * old[pair.removed])


def test_channels_that_nobody_can_tell_apart_stay_if_they_differ() -> None:
    model = net()
    same = merge.duplicates(model, [images()], similarity=1.0)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(same.state_dict()[key], value)
    with pytest.raises(ConfigError, match="similarity"):
        merge.duplicates(model, [images()], similarity=0)


def test_duplicates_in_a_residual_trunk_must_be_alike_for_every_reader() -> None:
    model = net()
    parameters = dict(model.named_parameters())

    def copy(name: str, axis: int, one: int, other: int) -> None:
        rows = np.moveaxis(parameters[name].mutate(), axis, 0)
        rows[other] = rows[one]

    def found() -> list[merge.Duplicate]:
        pairs: list[merge.Duplicate] = []
        merge.duplicates(model, [images()], similarity=1 - 1e-6, report=pairs.append)
        return [pair for pair in pairs if pair.group.name == "0"]

    for name in ("0", "1.0.7"):  # all that writes channels 0 and 2 of the trunk, and who reads them
        copy(f"{name}.weight", -1, 0, 2)
        copy(f"{name}.bias", 0, 0, 2) if f"{name}.bias" in parameters else None
    for name in ("1.0.0", "2.0.0"):
        copy(f"{name}.gamma", 0, 0, 2)
        copy(f"{name}.beta", 0, 0, 2)
    for name in ("1.0.2.weight", "2.0.2.weight"):
        copy(name, 2, 0, 2)
    assert not found()  # the second block's result, and the last batch norm, tell them apart
    copy("2.0.7.weight", -1, 1, 3)  # one more channel before them, from the shortcut
    copy("3.gamma", 0, 1, 3)
    copy("3.beta", 0, 1, 3)
    assert [{pair.removed, pair.kept} for pair in found()] == [{0, 2}]
    small = merge.duplicates(model, [images()], similarity=1 - 1e-6)
    x = Tensor(images(4, 9))
    expected = model.eval()(x).data
    assert small.size() < model.size()
    np.testing.assert_allclose(small.eval()(x).data, expected, rtol=1e-3, atol=1e-3)
