"""The graph, what is observed on it, and surgery: removal equals masking."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn import nn, ops
from tinynn.compress import importance, prune, select
from tinynn.errors import ConfigError, DataError, GraphError, NonFiniteError, PruneError
from tinynn.graph import trace
from tinynn.observe import Statistics, observe
from tinynn.tensor import Tensor


def mlp(*sizes: int, seed: int = 0, bias: bool = True) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layer = nn.Linear(a, b, bias=bias, rng=rng)
        if bias and layer.bias is not None:
            layer.bias.mutate()[...] = rng.standard_normal(b) * 0.3
        layers += [layer] + ([nn.ReLU()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


def batches(features: int = 3, count: int = 4, size: int = 50) -> list[tuple[np.ndarray, None]]:
    rng = np.random.default_rng(9)
    return [(rng.standard_normal((size, features)).astype(np.float32), None) for _ in range(count)]


class Residual(nn.Module):
    """Two branches tied by an addition, a per-channel scale, and a private layer inside one."""

    def __init__(self, rng: np.random.Generator, inner: int = 4) -> None:
        self.stem = nn.Linear(3, 6, rng=rng)
        self.down = nn.Linear(6, inner, rng=rng)
        self.up = nn.Linear(inner, 6, rng=rng)
        self.scale = nn.Parameter(rng.standard_normal(6).astype(np.float32))
        self.head = nn.Linear(6, 2, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        h = ops.relu(self.stem(x))
        h = h + ops.tanh(self.up(ops.relu(self.down(h)))) * self.scale
        return self.head(h)


def keep_these(mask: list[bool]) -> Any:
    return lambda scores: np.array(mask) if len(scores) == len(mask) else np.ones(len(scores), bool)


def test_trace_names_ops_paths_and_parameters() -> None:
    graph = trace(mlp(3, 5, 2), np.ones((1, 3), np.float32))
    assert [n.op.name for n in graph.nodes] == ["linear", "linear"]
    assert [v.name for v in graph.nodes[0].inputs] == ["", "0.weight", "0.bias"]
    assert [n.path for n in graph.nodes] == ["0", "2"]
    assert graph.output == graph.nodes[-1].output


def test_trace_needs_one_tensor_made_from_the_example() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x

    with pytest.raises(GraphError, match="one Tensor"):
        trace(Pair(), np.ones((1, 3)))


def test_groups_of_a_plain_net() -> None:
    groups = trace(mlp(3, 5, 4, 2), np.ones((1, 3), np.float32)).groups()
    assert [g.size for g in groups] == [3, 5, 4, 2]
    assert [bool(g.fixed) for g in groups] == [True, False, False, True]
    first = groups[1]
    assert {(m.name, m.axis) for m in first.writers} == {("0.weight", 1), ("0.bias", 0)}
    assert [(r.weight.name, r.weight.axis, r.bias) for r in first.readers] == [
        ("2.weight", 0, "2.bias")
    ]


def test_groups_tied_by_an_addition() -> None:
    net = Residual(np.random.default_rng(0))
    groups = {g.name: g for g in trace(net, np.ones((1, 3), np.float32)).groups()}
    tied = groups["stem"]
    assert {m.name for m in tied.writers} == {
        "stem.weight", "stem.bias", "up.weight", "up.bias", "scale"
    }  # fmt: skip
    assert {r.weight.name for r in tied.readers} == {"down.weight", "head.weight"}
    assert not tied.fixed and not groups["down"].fixed


def test_an_op_without_a_channel_rule_fixes_its_group_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self.a, self.b = nn.Linear(3, 4, rng=rng), nn.Linear(4, 2, rng=rng)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(ops.softmax(self.a(x)))

    net = Odd()
    seen = observe(net, batches())
    with pytest.raises(PruneError, match="softmax has no channel rule"):
        prune.channels(net, seen, importance.l1, select.share(0.5))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 5))
def test_streamed_statistics_equal_those_of_the_whole(sizes: list[int], channels: int) -> None:
    rng = np.random.default_rng(sum(sizes))
    parts = [rng.normal(3, 2, (n, 2, channels)) for n in sizes]
    for p in parts:
        p[..., 0] = -1.5  # a constant channel
    seen, whole = Statistics(channels), np.concatenate(parts).reshape(-1, channels)
    for p in parts:
        seen.add(p)
    assert seen.samples == len(whole)
    np.testing.assert_array_equal(seen.count, (whole > 0).sum(0))
    np.testing.assert_array_equal(seen.low, whole.min(0))
    np.testing.assert_array_equal(seen.high, whole.max(0))
    np.testing.assert_allclose(seen.mean, whole.mean(0), rtol=1e-10)
    np.testing.assert_allclose(seen.variance[1:], whole.var(0)[1:], rtol=1e-9)
    assert seen.variance[0] == 0 and seen.constant[0]


def test_observe_leaves_the_model_as_it_was_and_wants_data() -> None:
    net = mlp(3, 5, 2).train()
    observe(net, batches())
    assert net.training
    with pytest.raises(DataError, match="at least one batch"):
        observe(net, [])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_removal_equals_masking(data: st.DataObject) -> None:
    residual = data.draw(st.booleans())
    inner = data.draw(st.integers(2, 6))
    net: nn.Module = (
        Residual(np.random.default_rng(inner), inner)
        if residual
        else mlp(3, *data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3)), 2)
    )
    seen = observe(net, batches())
    group = data.draw(st.sampled_from([g for g in seen.graph.groups() if not g.fixed]))
    mask = data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size).filter(any))

    def only_this(g: Any, observer: Any, parameters: Any) -> np.ndarray:
        same = g.name == group.name
        return np.array(mask, float) if same else np.ones(g.size)

    smaller = prune.channels(net, seen, only_this, select.above(0.5), fold="none")
    masked = net.copy()
    parameters = dict(masked.named_parameters())
    for reader in group.readers:  # a reader that multiplies a channel by zero does not see it
        rows = np.moveaxis(parameters[reader.weight.name].mutate(), reader.weight.axis, 0)
        rows[~np.array(mask)] = 0
    x = Tensor(batches()[0][0])
    np.testing.assert_allclose(smaller(x).data, masked(x).data, rtol=2e-5, atol=2e-6)
    removed = len(mask) - sum(mask)
    sizes = {
        m.name: p.shape[m.axis]
        for m in group.writers
        for n, p in smaller.named_parameters()
        if n == m.name
    }
    assert all(size == group.size - removed for size in sizes.values())


def test_dead_and_constant_nodes_leave_without_changing_the_function() -> None:
    net = mlp(3, 6, 2)
    first = net[0]
    assert isinstance(first, nn.Linear) and first.bias is not None
    weight, bias = first.weight.mutate(), first.bias.mutate()
    weight[:, 1], bias[1] = 0, -1  # dead
    weight[:, 4], bias[4] = 0, 2.5  # constant
    before = net.state_dict()
    seen = observe(net, batches())
    smaller = prune.channels(net, seen, importance.activation_variance, select.above(0))
    assert [p.shape for p in smaller.parameters()] == [(3, 4), (4,), (4, 2), (2,)]
    x = Tensor(batches()[0][0])
    np.testing.assert_allclose(smaller(x).data, net(x).data, rtol=1e-5, atol=1e-6)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_mean_folding_keeps_the_mean_of_the_output() -> None:
    net = mlp(3, 6, 2)
    seen = observe(net, batches())
    smaller = prune.channels(net, seen, importance.l1, select.number(3), fold="mean")
    x = Tensor(np.concatenate([b[0] for b in batches()]))
    np.testing.assert_allclose(smaller(x).data.mean(0), net(x).data.mean(0), rtol=1e-4, atol=1e-5)


def test_a_constant_without_a_bias_to_go_to_is_refused() -> None:
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(3, 2, rng=rng), nn.ReLU(), nn.Linear(2, 1, bias=False, rng=rng))
    first = net[0]
    assert isinstance(first, nn.Linear) and first.bias is not None
    first.weight.mutate()[:, 0] = 0
    first.bias.mutate()[0] = 1
    seen = observe(net, batches())
    with pytest.raises(PruneError, match="no bias"):
        prune.channels(net, seen, importance.activation_variance, select.above(0))


def test_a_layer_is_never_pruned_to_nothing() -> None:
    net = mlp(3, 6, 2)
    seen = observe(net, batches())
    with pytest.raises(PruneError, match=r"all 6 channels of 0 would go.*keeps at least one"):
        prune.channels(net, seen, importance.l1, select.above(1e9))


def test_observations_of_another_model_are_refused() -> None:
    seen = observe(mlp(3, 6, 2), batches())
    with pytest.raises(PruneError, match="observe it again"):
        prune.channels(mlp(3, 5, 2), seen, importance.l1, select.number(2))


def test_bounds_have_two_units_and_two_sides() -> None:
    scores = np.array([0.0, 4.0, 5.0, 6.0, 10.0])  # mean 5, std 3.22, variance 10.4
    keep = {
        (u, r): select.bounds(0.5, u, r)(scores).tolist()  # type: ignore[arg-type]
        for u in ("std", "variance")
        for r in ("outside", "inside")
    }
    assert keep["std", "outside"] == [False, True, True, True, False]
    assert keep["std", "inside"] == [True, False, False, False, True]
    assert keep["variance", "outside"] == [True] * 5
    assert keep["variance", "inside"] == [False] * 5


def test_selections_by_share_and_number() -> None:
    scores = np.array([3.0, 1.0, 2.0, 2.0])
    assert select.share(0.5)(scores).tolist() == [True, False, True, False]
    assert select.share(0.01)(scores).sum() == 1
    assert select.number(9)(scores).all()
    for bad in (lambda: select.share(0), lambda: select.number(0), lambda: select.bounds(-1)):
        with pytest.raises(ConfigError):
            bad()


def test_criteria_score_what_they_say() -> None:
    net = mlp(3, 4, 2)
    seen = observe(net, batches())
    group = next(g for g in seen.graph.groups() if not g.fixed)
    parameters = {n: p.numpy() for n, p in net.named_parameters()}
    x = np.concatenate([b[0] for b in batches()])
    h = np.maximum(x @ parameters["0.weight"] + parameters["0.bias"], 0)
    score = {
        name: importance.by_name(name, np.random.default_rng(0))(group, seen, parameters)
        for name in ("count", "rate", "variance", "l1", "l2", "random")
    }
    np.testing.assert_array_equal(score["count"], (h > 0).sum(0))
    np.testing.assert_allclose(score["rate"], (h > 0).mean(0))
    np.testing.assert_allclose(score["variance"], h.var(0), rtol=1e-4)
    np.testing.assert_allclose(score["l1"], np.abs(parameters["0.weight"]).sum(0), rtol=1e-6)
    np.testing.assert_allclose(
        score["l2"], np.sqrt((parameters["0.weight"] ** 2).sum(0)), rtol=1e-6
    )
    assert len(set(score["random"])) == 4
    with pytest.raises(ConfigError, match="required one of"):
        importance.by_name("magic", np.random.default_rng(0))


# --- what must not be pruned ---------------------------------------------------------------------


class Made(nn.Module):
    """A model whose forward is a function of itself and x; layers a to d are 3 -> 6 -> ... -> 2."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        rng = np.random.default_rng(1)
        self.a, self.b = nn.Linear(3, 6, rng=rng), nn.Linear(6, 6, rng=rng)
        self.c, self.d = nn.Linear(6, 6, rng=rng), nn.Linear(6, 2, rng=rng)
        for layer in (self.a, self.b, self.c, self.d):
            assert layer.bias is not None
            layer.bias.mutate()[...] = rng.standard_normal(layer.bias.shape) * 0.3
        for name, value in parts.items():
            setattr(self, name, value)
        object.__setattr__(self, "compute", compute)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)

    def __deepcopy__(self, memo: Any) -> Made:
        out = Made(self.compute)
        kept = {k: v for k, v in vars(self).items() if k != "compute"}
        vars(out).update(copy.deepcopy(kept, memo))
        return out


def fixed(model: nn.Module) -> dict[str, str]:
    return {g.name: g.fixed for g in trace(model, np.ones((2, 3), np.float32)).groups()}


def tied(model: Made) -> Made:
    model.c.weight = model.b.weight
    return model


def vector(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(6).astype(np.float32)


TWICE, DEAD = "used more than once", "nothing reads it"

#: name: model, {group: part of the reason}; all groups not named here but the ends are prunable
AWKWARD: dict[str, tuple[Callable[[], Made], dict[str, str]]] = {
    "a layer used twice": (
        lambda: Made(lambda m, x: m.d(m.b(m.b(m.a(x).relu()).relu()).relu())),
        {"a": TWICE, "b": TWICE},
    ),
    "tied weights": (
        lambda: tied(Made(lambda m, x: m.d(m.c(m.b(m.a(x).relu()).relu()).relu()))),
        {"a": TWICE, "b": TWICE},
    ),
    "one layer on both sides of an addition": (
        lambda: Made(lambda m, x: m.d(m.b((m.a(x) + m.a(x * 2.0)).relu()).relu())),
        {"a": TWICE},
    ),
    "weights used detached": (
        lambda: Made(
            lambda m, x: m.d(m.b(m.a(x).relu()).relu() @ m.b.weight.detach())
        ),
        {"a": TWICE, "b": TWICE},
    ),
    "transposed weights": (
        lambda: Made(lambda m, x: m.d(m.b(m.a(x)).relu() @ m.b.weight.transpose())),
        {"a": TWICE, "b": "other than data"},
    ),
    "a bias that is no parameter": (
        lambda: Made(
            lambda m, x: m.d(m.c(ops.linear(m.a(x), m.b.weight, Tensor(m.k)).relu())),
            k=vector(),
        ),
        {"b": "bias that is no parameter"},
    ),
    "a computed bias": (
        lambda: Made(
            lambda m, x: m.d(ops.linear(m.a(x), m.b.weight, m.k * 2.0).relu()),
            k=nn.Parameter(vector()),
        ),
        {"b": "bias that is no parameter"},
    ),
    "a constant on the channels": (
        lambda: Made(lambda m, x: m.d(m.b(m.a(x) * Tensor(m.k)).relu()), k=vector()),
        {"a": "constant array"},
    ),
    "a parameter outside the model": (
        lambda: Made(
            lambda m, x: m.d(m.b(m.a(x) * STRANGER).relu()),
        ),
        {"a": "constant array"},
    ),
    "constant data": (
        lambda: Made(lambda m, x: m.d(m.b(m.a(x).relu()) + Tensor(m.k) @ m.c.weight),
                     k=vector().reshape(1, 6)),
        {"b": "other than data"},
    ),
    "a dead branch": (
        lambda: Made(lambda m, x: (m.d(m.b(h := m.a(x)).relu()), m.c(h))[0]),
        {"c": DEAD},
    ),
    "a detached value": (
        lambda: Made(lambda m, x: m.d(m.b(h := m.a(x).relu()) + m.c(h.detach()))),
        {},
    ),
    "a number for all channels": (
        lambda: Made(lambda m, x: m.d(m.b(m.a(x)).relu() * m.k), k=nn.Parameter(np.float32(2))),
        {},
    ),
}  # fmt: skip
STRANGER = nn.Parameter(vector(3))


@pytest.mark.parametrize("name", AWKWARD)
def test_groups_that_more_depends_on_are_fixed_and_the_others_pruned_right(name: str) -> None:
    make, reasons = AWKWARD[name]
    model = make()
    found = fixed(model)
    for group, reason in reasons.items():
        assert reason in found[group], found
    free = {g for g, reason in found.items() if not reason}
    assert free == {"a", "b", "c"} & found.keys() - reasons.keys()
    seen = observe(model, batches())
    if not free:
        with pytest.raises(PruneError, match=next(iter(reasons.values()))):
            prune.channels(model, seen, importance.l1, select.number(4))
        return

    def score(group: Any, *_: Any) -> np.ndarray:
        return np.random.default_rng(ord(group.name)).random(group.size)

    smaller = prune.channels(model, seen, score, select.number(4), fold="none")
    masked = model.copy()
    parameters = dict(masked.named_parameters())
    for group in (g for g in seen.graph.groups() if not g.fixed):
        for reader in group.readers:
            parameters[reader.weight.name].mutate()[~select.number(4)(score(group))] = 0
    x = Tensor(batches()[0][0])
    np.testing.assert_allclose(smaller(x).data, masked(x).data, rtol=1e-4, atol=1e-5)
    assert smaller.size() < model.size()


def test_means_and_other_values_without_axes_have_no_channels() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self.a, self.b = nn.Linear(3, 4, rng=rng), nn.Linear(4, 1, rng=rng)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).relu()).sum(axis=1)
            return (y - y.mean()) * 2.0

    model = Centred()
    seen = observe(model, batches())
    by_op = {n.op.name: n.output for n in seen.graph.nodes}
    assert by_op["linear"] in seen and by_op["sub"] not in seen
    with pytest.raises(GraphError, match="no channels"):
        seen[by_op["sub"]]
    smaller = prune.channels(model, seen, importance.activation_rate, select.number(2))
    assert smaller(Tensor(batches()[0][0])).shape == (50,)


# --- observing -----------------------------------------------------------------------------------


def test_observe_takes_images_flattened_in_batches_of_any_size() -> None:
    rng = np.random.default_rng(0)
    first, last = nn.Linear(12, 5, rng=rng), nn.Linear(5, 2, rng=rng)
    net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)
    data = [rng.standard_normal((n, 2, 2, 3)).astype(np.float32) for n in (4, 7, 1)]
    seen = observe(net, data)
    hidden = seen[seen.graph.nodes[1].output]
    h = np.concatenate([first(Tensor(x.reshape(len(x), -1)), relu=True).data for x in data])
    assert hidden.samples == 12
    np.testing.assert_array_equal(hidden.count, (h > 0).sum(0))
    smaller = prune.channels(net, seen, importance.l1, select.number(3))
    assert [p.shape for p in smaller.parameters()] == [(12, 3), (3,), (3, 2), (2,)]


@pytest.mark.parametrize("change", ["fewer", "more", "other", "elsewhere"])
def test_ops_that_depend_on_the_data_are_refused(change: str) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        h, late = m.a(x).relu(), x.data[0, 0] > 100
        if not late:
            return m.d(m.b(h).relu()).tanh()
        return {
            "fewer": lambda: m.d(m.b(h).relu()),
            "more": lambda: m.d(m.b(h).relu()).tanh().tanh(),
            "other": lambda: m.d(m.b(h).relu()).sigmoid(),
            "elsewhere": lambda: m.d(m.c(h).relu()).tanh(),
        }[change]()

    data = [np.ones((2, 3), np.float32), np.full((2, 3), 101, np.float32)]
    observe(Made(compute), data[:1])
    with pytest.raises(GraphError, match="must not depend on the data"):
        observe(Made(compute), data)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nodes_that_are_not_finite_are_named_not_counted_as_dead(bad: float) -> None:
    net = mlp(3, 5, 2)
    net[0].bias.mutate()[[1, 3]] = bad  # type: ignore[union-attr]
    net[2].weight.mutate()[[1, 3]] = 0  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match=r"linear in '0', 2 of 5 channels are not finite"):
        observe(net, batches())
    with pytest.raises(NonFiniteError, match="model's input, 1 of 3"):
        observe(net, [np.array([[0, bad, 0]], np.float32)])


def test_values_too_large_for_their_variance_are_refused() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    with pytest.raises(NonFiniteError, match="1 of 2 channels"):
        observe(Same(), [np.array([[0, 1e200], [1, -1e200]])])


@pytest.mark.parametrize("shape", [(0, 3), (), (4, 0)])
def test_an_empty_batch_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="batch 1 has"):
        observe(mlp(3, 5, 2), [np.ones((2, 3), np.float32), np.ones(shape, np.float32)])


def test_observations_of_another_net_of_equal_sizes_are_refused() -> None:
    net = mlp(3, 6, 2)
    seen = observe(net, batches())
    prune.channels(net, seen, importance.l1, select.number(2))
    tanh = nn.Sequential(net[0], nn.Tanh(), net[2])
    for other in (mlp(3, 6, 2, seed=1), tanh):
        with pytest.raises(PruneError, match="observe it again"):
            prune.channels(other, seen, importance.l1, select.number(2))
    net.parameters()[-1].mutate()[...] += 1
    with pytest.raises(PruneError, match="observe it again"):
        prune.channels(net, seen, importance.l1, select.number(2))


def test_a_buffer_belongs_to_what_was_observed() -> None:
    model = Made(lambda m, x: m.d(m.b(m.a(x)) * Tensor(m.k)), k=vector())
    seen = observe(model, batches())
    model.k[2] += 1
    with pytest.raises(PruneError, match="observe it again"):
        prune.channels(model, seen, importance.l1, select.number(2))


# --- criteria and selections ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, None, "1", True, [1.0]])
def test_selections_want_numbers(bad: Any) -> None:
    for select_by in (select.above, select.share, select.number, select.bounds):
        with pytest.raises(ConfigError, match="select"):
            select_by(bad)
    for call in (lambda: select.number(2.5), lambda: select.bounds(np.inf)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="select"):
            call()
    assert select.above(np.float32(0.5))(np.array([0.0, 1.0])).tolist() == [False, True]


@pytest.mark.parametrize("name", ["count", "rate", "variance", "l1", "l2", "random"])
def test_groups_that_nothing_reads_have_scores(name: str) -> None:
    model = AWKWARD["a dead branch"][0]()
    seen = observe(model, batches())
    parameters = {n: p.numpy() for n, p in model.named_parameters()}
    score = importance.by_name(name, np.random.default_rng(0))
    for group in seen.graph.groups():
        assert score(group, seen, parameters).shape == (group.size,)


@pytest.mark.parametrize(
    ("scores", "mask"),
    [
        (np.array([1.0, np.nan, 1, 1, 1, 1]), None),
        (np.ones(5), None),
        (np.ones((6, 1)), None),
        (np.ones(6), np.ones(5, bool)),
        (np.ones(6), True),
    ],
)
def test_scores_and_decisions_are_one_a_channel(scores: np.ndarray, mask: Any) -> None:
    net = mlp(3, 6, 2)
    keep = select.above(0) if mask is None else lambda s: mask
    with pytest.raises(PruneError, match="6"):
        prune.channels(net, observe(net, batches()), lambda *_: scores, keep)


def test_a_frozen_parameter_stays_frozen_when_pruned() -> None:
    net = mlp(3, 6, 2)
    net.parameters()[0].requires_grad = False
    smaller = prune.channels(net, observe(net, batches()), importance.l1, select.number(2))
    assert [p.requires_grad for p in smaller.parameters()] == [False, True, True, True]
