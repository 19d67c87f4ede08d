"""The affine merge keeps the function; the distortion follows its formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn import nn
from tinynn.compress import cluster, distort, merge, sparsify
from tinynn.errors import ConfigError, PruneError
from tinynn.observe import observe
from tinynn.tensor import Tensor


def net(m_in: int, hidden: int, m_out: int, seed: int = 0) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Linear(m_in, hidden, rng=rng), nn.ReLU(), nn.Linear(hidden, m_out, rng=rng)
    )


def lifted(model: nn.Sequential, nodes: list[int]) -> nn.Sequential:
    """The model with biases that keep these nodes on for inputs in [-1, 1]."""
    first = model[0]
    assert isinstance(first, nn.Linear) and first.bias is not None
    reach = np.abs(first.weight.data).sum(axis=0)
    first.bias.mutate()[nodes] = reach[nodes] + 0.1
    return model


def box(features: int, rows: int = 200) -> np.ndarray:
    return np.random.default_rng(3).uniform(-1, 1, (rows, features)).astype(np.float32)


def hidden_size(model: nn.Module) -> int:
    return model.parameters()[1].size


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 4), st.data())
def test_the_function_stays_and_the_nodes_become_as_few_as_the_rank(
    m_in: int, hidden: int, m_out: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.sets(st.integers(0, hidden - 1), max_size=hidden))
    model = lifted(net(m_in, hidden, m_out, seed=hidden), sorted(chosen))
    x = box(m_in)
    seen = observe(model, [x])
    on = int((seen[seen.graph.nodes[0].output].count == len(x)).sum())
    merged = merge.affine(model, seen)
    assert hidden_size(merged) == hidden - on + min(on, m_in, m_out)
    np.testing.assert_allclose(merged(Tensor(x)).data, model(Tensor(x)).data, rtol=1e-4, atol=1e-5)


def test_the_new_node_is_on_wherever_the_data_can_be() -> None:
    model = lifted(net(2, 5, 1), [0, 1, 2, 3, 4])
    x = box(2)
    merged = merge.affine(model, observe(model, [x]), margin=0.25)
    w, b, v, _ = (p.data for p in merged.parameters())
    corners = np.array(np.meshgrid(*[[c.min(), c.max()] for c in x.T])).reshape(2, -1).T
    assert np.isclose((corners @ w + b).min(), 0.25, atol=1e-6)
    assert np.isclose(np.linalg.norm(w), np.linalg.norm(v), rtol=1e-5)


def test_always_on_nodes_that_cancel_leave_only_a_constant() -> None:
    model = lifted(net(2, 2, 1), [0, 1])
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and first.bias is not None
    first.weight.mutate()[:, 1] = first.weight.data[:, 0]
    first.bias.mutate()[1] = first.bias.data[0]
    last.weight.mutate()[1] = -last.weight.data[0]
    x = box(2)
    merged = merge.affine(model, observe(model, [x]))
    assert hidden_size(merged) == 1
    np.testing.assert_allclose(merged(Tensor(x)).data, model(Tensor(x)).data, atol=1e-6)


def test_layers_that_the_merge_cannot_treat_stay_as_they_are() -> None:
    rng = np.random.default_rng(0)
    tanh = nn.Sequential(nn.Linear(2, 3, rng=rng), nn.Tanh(), nn.Linear(3, 1, rng=rng))
    bare = nn.Sequential(nn.Linear(2, 3, rng=rng), nn.ReLU(), nn.Linear(3, 1, bias=False, rng=rng))
    for model in (tanh, lifted(bare, [0, 1, 2])):
        merged = merge.affine(model, observe(model, [box(2)]))
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(merged.state_dict()[name], value)
    with pytest.raises(ConfigError, match="margin"):
        merge.affine(tanh, observe(tanh, [box(2)]), margin=0)


@pytest.mark.parametrize("formula", ["published", "clamped", "constant"])
def test_distortion_follows_its_formula(formula: str) -> None:
    model = net(2, 50, 1)
    first = model[0]
    assert isinstance(first, nn.Linear)
    first.weight.mutate()[...] *= 3  # a variance above 1, where the formulas differ
    before = model.state_dict()
    out = distort(model, np.random.default_rng(7), formula=formula, scale=0.5).state_dict()
    rng = np.random.default_rng(7)
    for name, w in before.items():
        variance = float(np.var(w.astype(np.float64)))
        amplitude = {
            "published": 1 - variance,
            "clamped": min(1.0, max(0.0, 1 - variance)),
            "constant": 1.0,
        }[formula]
        noise = rng.uniform(0, 1, w.shape) * 0.5 * amplitude
        np.testing.assert_allclose(out[name], w + noise, rtol=1e-5, atol=1e-6)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_distortion_of_some_parameters_and_bad_requests() -> None:
    model = net(2, 5, 1)
    out = distort(model, np.random.default_rng(0), only=["0.bias"]).state_dict()
    same = {k: bool((out[k] == v).all()) for k, v in model.state_dict().items()}
    assert same == {"0.weight": True, "0.bias": False, "2.weight": True, "2.bias": True}
    rng = np.random.default_rng(0)
    for bad, words in (
        ({"formula": "magic"}, "required one of"),
        ({"scale": np.nan}, "finite"),
        ({"low": 2.0}, "low <= high"),
        ({"only": ["7.bias"]}, r"no parameters \['7.bias'\]"),
        ({"only": "0.bias"}, "list of names; came the text"),
    ):
        with pytest.raises(ConfigError, match=words):
            distort(model, rng, **bad)  # type: ignore[arg-type]


def deep(sizes: list[int], seed: int, chosen: list[set[int]]) -> nn.Sequential:
    """A ReLU net whose chosen hidden nodes are on for all inputs in [-1, 1]."""
    rng = np.random.default_rng(seed)
    layers: list[nn.Module] = []
    reach = np.ones(sizes[0])
    for i, (a, b) in enumerate(pairwise(sizes)):
        layer = nn.Linear(a, b, rng=rng, dtype=np.float64)
        assert layer.bias is not None
        bias = layer.bias.mutate()
        bias[...] = rng.standard_normal(b) * 0.3
        total = reach @ np.abs(layer.weight.data)
        if i < len(chosen):
            nodes = sorted(n for n in chosen[i] if n < b)
            bias[nodes] = total[nodes] + 0.1
        reach = total + np.abs(bias)
        layers += [layer] + ([nn.ReLU()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 7), min_size=3, max_size=5),
    st.lists(st.sets(st.integers(0, 6)), min_size=3, max_size=3),
    st.integers(0, 1000),
)
def test_the_function_of_deep_nets_stays(
    sizes: list[int], chosen: list[set[int]], seed: int
) -> None:
    model = deep(sizes, seed, chosen)
    x = np.random.default_rng(seed).uniform(-1, 1, (200, sizes[0]))
    seen = observe(model, [x])
    merged = merge.affine(model, seen, tolerance=1e-12)
    scale = np.abs(model(Tensor(x)).data).max()
    np.testing.assert_allclose(
        merged(Tensor(x)).data, model(Tensor(x)).data, rtol=0, atol=1e-9 * scale
    )
    assert all(
        p.size <= q.size for p, q in zip(merged.parameters(), model.parameters(), strict=True)
    )


def test_two_hidden_layers_that_are_always_on_become_as_few_as_their_ranks() -> None:
    everything = set(range(6))
    model = deep([2, 6, 5, 1], 0, [everything, everything])
    merged = merge.affine(model, observe(model, [box(2).astype(np.float64)]))
    assert [p.shape for p in merged.parameters()] == [(2, 1), (1,), (1, 1), (1,), (1, 1), (1,)]


def test_the_merge_puts_even_a_single_node_into_its_form() -> None:
    model = lifted(net(2, 1, 1), [0])
    x = box(2)
    merged = merge.affine(model, observe(model, [x]), margin=0.5)
    w, b, v, _ = (p.data for p in merged.parameters())
    assert np.isclose(np.linalg.norm(w), np.linalg.norm(v), rtol=1e-5)
    lowest = np.minimum(w[:, 0] * x.min(0), w[:, 0] * x.max(0)).sum()
    assert np.isclose(b[0] + lowest, 0.5, atol=1e-5)


def test_layers_used_twice_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self.a, self.b = nn.Linear(3, 3, rng=rng), nn.Linear(3, 1, rng=rng)
            self.a.bias.mutate()[...] = 20  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x, relu=True), relu=True))

    model = Twice()
    merged = merge.affine(model, observe(model, [box(3)]))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(merged.state_dict()[name], value)


def test_the_merge_wants_what_was_observed_of_this_model() -> None:
    model, x = lifted(net(2, 5, 1), [0, 1]), box(2)
    seen = observe(model, [x])
    with pytest.raises(PruneError, match=r"merge\.affine.*observe it again"):
        merge.affine(net(2, 5, 1, seed=4), seen)
    model[0].bias.mutate()[3] += 1e-3  # type: ignore[union-attr]
    with pytest.raises(PruneError, match="observe it again"):
        merge.affine(model, seen)
    seen = observe(model, [x])
    for bad in ({"margin": np.nan}, {"margin": np.inf}, {"tolerance": np.nan}, {"tolerance": -1}):
        with pytest.raises(ConfigError, match=r"merge\.affine"):
            merge.affine(model, seen, **bad)


def test_what_is_frozen_stays_frozen() -> None:
    model, x = lifted(net(2, 5, 1), [0, 1, 2, 3, 4]), box(2)
    last = model[2]
    assert isinstance(last, nn.Linear)
    last.weight.requires_grad = False
    merged = merge.affine(model, observe(model, [x]))
    frozen = {n: not p.requires_grad for n, p in merged.named_parameters()}
    assert frozen == {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": False}


def test_distortion_keeps_zeros_and_shared_values() -> None:
    model = net(8, 32, 2)
    sparse = sparsify.weights(model, sparsify.magnitude, sparsify.share(0.2))
    moved = distort(sparse, np.random.default_rng(0), scale=0.1)
    assert sparsify.density(moved) == sparsify.density(sparse)
    shared = distort(cluster.kmeans(sparse, 4), np.random.default_rng(0), scale=0.1)
    for p, q in zip(shared.parameters(), moved.parameters(), strict=True):
        if p.ndim > 1:
            assert len(np.unique(p.data)) <= 4
            np.testing.assert_array_equal(p.data == 0, q.data == 0)
