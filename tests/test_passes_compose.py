"""The passes one after the other, in any order, with training between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn
from tinynn.compress import (
    blocks,
    cluster,
    factorize,
    importance,
    merge,
    prune,
    quantize,
    reestimate,
    saliency,
    select,
    sparsify,
)
from tinynn.errors import ConfigError, PruneError
from tinynn.observe import observe
from tinynn.tensor import Tensor

X = np.random.default_rng(0).standard_normal((6, 6, 6, 3)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2])


def batches() -> tn.Batches:
    return tn.Batches(X, Y, size=3, shuffle=False)


def net() -> nn.Sequential:
    rng = np.random.default_rng(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, rng=rng),
        nn.SeparableResidualBlock(6, 6, rng=rng),
        nn.ResidualBlock(6, 10, stride=2, rng=rng),
        nn.GlobalAvgPool2d(),
        nn.Linear(10, 3, rng=rng),
    )


def _channels(model: nn.Module) -> nn.Module:
    found = saliency.gates(model, batches(), tn.softmax_cross_entropy)
    seen = observe(model, [X])
    return prune.channels(
        model, seen, importance.taylor(found), select.share(0.8), fold="none", least=1
    )


PASSES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weights": lambda m: sparsify.weights(m, sparsify.magnitude, sparsify.share(0.7)),
    "channels": _channels,
    "thin": lambda m: blocks.thin(m, observe(m, [X]), importance.l1, select.share(0.8)),
    "drop": lambda m: blocks.drop(m, blocks.residual(m)[:1]),
    "factorise": lambda m: factorize.layers(m, X, factorize.energy(0.6), form="cheapest"),
    "round": lambda m: cluster.rounded(m, 2),
    "cluster": lambda m: cluster.kmeans(m, 16),
    "merge": lambda m: merge.duplicates(m, [X]),
    "reestimate": lambda m: reestimate(m, [X]),
}


@settings(deadline=None, max_examples=6)
@given(st.permutations(list(PASSES)), st.integers(2, 5))
def test_any_order_runs_trains_and_is_saved(order: list[str], length: int) -> None:
    model: nn.Module = net()
    for name in order[:length]:
        before = model.state_dict()
        try:
            smaller = PASSES[name](model)
        except PruneError as error:  # for instance a block whose branch was factorised
            assert "keeps at least one" in str(error) or "nothing to thin" in str(error)
            continue
        assert all(np.array_equal(v, before[k]) for k, v in model.state_dict().items())
        model = smaller
        values = {
            k: len(np.unique(p.data)) for k, p in model.named_parameters() if p.codes is not None
        }
        zeros = {k: p.data == 0 for k, p in model.named_parameters() if p.mask is not None}
        tn.fit(
            model, batches(), loss=tn.softmax_cross_entropy, steps=2,
            optimizer=tn.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        )  # fmt: skip
        parameters = dict(model.named_parameters())
        assert all(len(np.unique(parameters[k].data)) <= n for k, n in values.items())
        assert all((parameters[k].data[gone] == 0).all() for k, gone in zeros.items())
    assert np.isfinite(model.eval()(Tensor(X)).data).all()
    assert cluster.nbytes(model) <= tn.count(model, X).weight_bytes


def test_a_model_that_went_through_all_is_saved_and_loaded(tmp_path: Path) -> None:
    model: nn.Module = net()
    for name in ("merge", "channels", "thin", "weights", "cluster", "reestimate"):
        model = PASSES[name](model)
    tn.save(tmp_path / "m.safetensors", model)
    loaded = tn.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(loaded(Tensor(X)).data, model.eval()(Tensor(X)).data)
    assert cluster.nbytes(loaded) == cluster.nbytes(model)
    assert cluster.nbytes(model) < tn.count(net(), X).weight_bytes / 2


@pytest.mark.parametrize("how", ["int8", "dynamic", "float16", "clustered"])
def test_no_pass_leaves_a_quantised_model_as_it_is_without_a_word(how: str) -> None:
    rng = np.random.default_rng(0)
    inner = nn.Sequential(nn.Linear(8, 8, rng=rng), nn.ReLU(), nn.Linear(8, 8, rng=rng)).eval()
    x = np.abs(rng.standard_normal((20, 8), np.float32))
    model = {
        "int8": lambda: quantize.int8(inner, [x]),
        "dynamic": lambda: quantize.dynamic(inner, x),
        "float16": lambda: quantize.float16(inner),
        "clustered": lambda: cluster.kmeans(inner, 16),
    }[how]()
    passes: dict[str, Callable[[nn.Module], nn.Module]] = {
        "factorize": lambda m: factorize.layers(m, x, factorize.number(1)),
        "merge.affine": lambda m: merge.affine(m, observe(m, [x])),
        "merge.duplicates": lambda m: merge.duplicates(m, [x], similarity=0.5),
        "prune": lambda m: prune.channels(m, observe(m, [x]), importance.l1, select.share(0.5)),
        "sparsify": lambda m: sparsify.weights(m, sparsify.magnitude, sparsify.share(0.5)),
        "cluster": lambda m: cluster.kmeans(m, 3),
    }
    before = model.eval()(Tensor(x)).data
    refused = set()
    for name, run in passes.items():
        try:
            after = run(model).eval()
        except (ConfigError, PruneError) as error:
            refused.add(name)
            assert name in str(error) or "prune" in str(error)
            continue
        assert not np.array_equal(after(Tensor(x)).data, before)
    small = factorize.layers(quantize.floating(model), x, factorize.number(1))
    assert small.size() < model.size()
    whole = {"factorize", "merge.affine", "merge.duplicates", "prune"}
    assert refused == (set() if how == "clustered" else whole)
