"""The affine merge keeps the function; the distortion follows its formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn import nn
from tinynn.compress import distort, merge
from tinynn.errors import ConfigError
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
    ):
        with pytest.raises(ConfigError, match=words):
            distort(model, rng, **bad)  # type: ignore[arg-type]
