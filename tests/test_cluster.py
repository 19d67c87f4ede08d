"""Weights of few values: the values, their training, and what they take to store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from kernels import codebook
from tinynn import nn, ops
from tinynn.compress import cluster, factorize, importance, prune, select, sparsify
from tinynn.errors import ConfigError, PruneError, ShapeError
from tinynn.nn.module import Parameter
from tinynn.observe import observe
from tinynn.tensor import Tensor

Array = np.ndarray


def net(seed: int = 0) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, rng=rng),
        nn.BatchNorm(6),
        nn.ReLU(),
        nn.DepthwiseConv2d(6, 3, rng=rng),
        nn.PointwiseConv2d(6, 8, rng=rng),
        nn.ReLU(),
        nn.GlobalAvgPool2d(),
        nn.Linear(8, 5, rng=rng),
    )


def batches(size: int = 4) -> tn.Batches:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 6, 6, 2), dtype=np.float32)
    return tn.Batches(x, rng.integers(0, 5, 12), size=size, shuffle=False)


def weights(model: nn.Module) -> dict[str, Parameter]:
    return {n: p for n, p in model.named_parameters() if p.ndim >= 2}


def train(model: nn.Module, optimizer: tn.Optimizer, steps: int = 5) -> None:
    tn.fit(model, batches(), loss=tn.softmax_cross_entropy, optimizer=optimizer, steps=steps)


# --- the values -----------------------------------------------------------------------------------


def test_rounding_leaves_the_decimals_and_the_model_given() -> None:
    model = net()
    before = model.state_dict()
    for name, p in weights(cluster.rounded(model, 2)).items():
        np.testing.assert_array_equal(p.data, np.round(before[name], 2))
        assert p.codes is not None and p.codes.max() + 1 == len(np.unique(p.data))
    assert all(np.array_equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.codes is None for p in model.parameters())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 20), st.integers(1, 200), st.sampled_from(["linear", "k-means++"]),
    st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_each_weight_has_the_nearest_value_and_each_value_is_the_mean_of_its_weights(
    entries: int, size: int, init: Any, seed: int, coarse: bool
) -> None:
    rng = np.random.default_rng(seed)
    model = nn.Sequential(nn.Linear(size, 1, rng=rng, dtype=np.float64))
    w = model.parameters()[0].mutate()
    w[...] = rng.standard_t(2, w.shape)  # with outliers, so that clusters become empty
    if coarse:
        w[...] = np.round(w)
    out = cluster.kmeans(
        model, entries, init=init, rng=rng if init == "k-means++" else None, only=["0.weight"]
    )
    p = out.parameters()[0]
    means = np.unique(p.data)
    assert len(means) == min(entries, len(np.unique(w)))
    np.testing.assert_allclose(np.abs(w - p.data), np.abs(w - means).min(1, keepdims=True))
    for mean in means:
        np.testing.assert_allclose(w[p.data == mean].mean(), mean, rtol=1e-9, atol=1e-12)


def test_more_entries_are_closer_and_a_book_a_channel_is_closer_still() -> None:
    model = net()
    w = weights(model)["4.weight"].data

    def error(**options: Any) -> float:
        out = weights(cluster.kmeans(model, **options))["4.weight"].data
        return float(np.square(out - w).mean())

    errors = [error(entries=n) for n in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert error(entries=4, per="channel") < error(entries=4)
    plus = [error(entries=4, init="k-means++", rng=np.random.default_rng(3)) for _ in range(2)]
    assert plus[0] == plus[1]


def test_k_means_of_the_library_finds_nothing_better() -> None:
    from scipy.cluster.vq import kmeans2

    model = net()
    w = weights(model)["4.weight"].data.reshape(-1, 1).astype(np.float64)
    start = np.linspace(w.min(), w.max(), 4)[:, None]
    means, label = kmeans2(w, start, iter=200, minit="matrix")
    ours = weights(cluster.kmeans(model, 4))["4.weight"].data.ravel()
    np.testing.assert_allclose(ours, means[label][:, 0], rtol=1e-5)


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_pruned_weights_stay_zero_in_an_entry_of_their_own(per: Any) -> None:
    slim = sparsify.weights(net(), sparsify.magnitude, sparsify.share(0.4))
    out = cluster.kmeans(slim, 4, per=per)
    for name, p in weights(out).items():
        gone = ~np.asarray(weights(slim)[name].mask)
        np.testing.assert_array_equal(p.data == 0, gone)
        for column in p.data.reshape(-1, p.shape[-1] if per == "channel" else 1).T:
            assert len(np.unique(column)) <= 4
    train(out, tn.Adam(out.parameters(), lr=0.01))
    for name, p in weights(out).items():
        np.testing.assert_array_equal(p.data == 0, ~np.asarray(weights(slim)[name].mask))
        assert len(np.unique(p.data)) <= 4 * (p.shape[-1] if per == "channel" else 1)


# --- their training -------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: tn.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: tn.Adam(p, lr=0.01),
    "nadam": lambda p: tn.Nadam(p, lr=0.01),
    "adadelta": lambda p: tn.Adadelta(p, lr=1.0),
    "rmsprop": lambda p: tn.RMSProp(p, lr=0.01, momentum=0.5),
    "penalised": lambda p: tn.SGD(p, lr=0.05, l2=0.1, l1=0.01, weight_decay=0.02),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_moves_the_entries_of_a_code_book(name: str) -> None:
    """The same training with the entries as the parameter and the weights looked up in it."""
    rng = np.random.default_rng(0)
    x, y = Tensor(rng.standard_normal((7, 9))), Tensor(rng.standard_normal((7, 4)))
    codes = rng.integers(0, 5, (9, 4))
    codes.ravel()[:5] = np.arange(5)
    entries = Parameter(rng.standard_normal((5, 1)))
    tied = Parameter(entries.data.ravel()[codes])
    tied.codes = codes
    theirs, ours = OPTIMIZERS[name]([entries]), OPTIMIZERS[name]([tied])
    for _ in range(6):
        looked_up = ops.reshape(ops.take(entries, codes.ravel()), 9, 4)
        tn.mse(x @ looked_up, y).backward()
        tn.mse(x @ tied, y).backward()
        for optimizer in (theirs, ours):
            optimizer.step()
            optimizer.zero_grad()
        np.testing.assert_allclose(tied.data, entries.data.ravel()[codes], rtol=1e-9)
        assert len(np.unique(tied.data)) == 5


def test_a_shared_training_is_deterministic_and_keeps_the_values_few() -> None:
    runs = []
    for _ in range(2):
        model = cluster.kmeans(net(), 8)
        before = model.state_dict()
        train(model, tn.SGD(model.parameters(), lr=0.1, momentum=0.9))
        runs.append(model.state_dict())
        for name, p in weights(model).items():
            assert len(np.unique(p.data)) == len(np.unique(before[name]))
            assert not np.array_equal(p.data, before[name])
    for key, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[1][key])


def test_codes_travel_with_copies_and_hold_when_values_are_loaded() -> None:
    model = cluster.kmeans(net(), 4)
    twin = model.copy()
    for name, p in weights(twin).items():
        np.testing.assert_array_equal(p.codes, weights(model)[name].codes)
    twin.load_state_dict(net(1).state_dict())
    for p in weights(twin).values():
        assert p.codes is not None and len(np.unique(p.data)) == len(np.unique(p.codes))


def test_a_mask_set_later_takes_weights_out_of_their_cluster() -> None:
    p = Parameter(np.array([[1.0, 1.0, 2.0]]))
    p.codes = [[0, 0, 1]]
    p.mask = [[False, True, True]]
    np.testing.assert_array_equal(p.data, [[0, 1, 2]])
    np.testing.assert_array_equal(p.pooled(np.array([[5.0, 3.0, 7.0]])), [[3, 3, 7]])
    p.mutate()[0, 1] = 4
    p.hold()
    np.testing.assert_array_equal(p.data, [[0, 4, 2]])
    p.codes = None
    np.testing.assert_array_equal(p.pooled(np.array([[5.0, 3.0, 7.0]])), [[5, 3, 7]])


@pytest.mark.parametrize("bad", [[[0, 1]], [[0.0, 1.0, 2.0]], [[0, -1, 2]], [[0, 1, 3]]])
def test_codes_must_fit(bad: Any) -> None:
    with pytest.raises(ShapeError, match=r"integers from 0 to 2 \(1, 3\)"):
        Parameter(np.ones((1, 3))).codes = bad


# --- with other passes ----------------------------------------------------------------------------


def test_surgery_keeps_what_is_shared() -> None:
    model = cluster.kmeans(sparsify.weights(net(), sparsify.magnitude, sparsify.share(0.6)), 4)
    seen = observe(model, [x for x, _ in batches()])
    small = prune.channels(model, seen, importance.l1, select.share(0.5), fold="none")
    assert small.size() < model.size()
    for name, p in weights(small).items():
        old = set(np.unique(weights(model)[name].data))
        assert set(np.unique(p.data)) <= old and p.codes is not None
    train(small, tn.Adam(small.parameters(), lr=0.01))
    assert all(len(np.unique(p.data)) <= 4 for p in weights(small).values())


def test_factors_are_clustered_and_loaded_models_tied_again(tmp_path: Path) -> None:
    x = next(iter(batches()))[0]
    small = factorize.layers(cluster.rounded(net(), 2), x, factorize.number(3))
    shared = cluster.kmeans(small, 8)
    tn.save(tmp_path / "m.safetensors", shared)
    loaded = tn.load(tmp_path / "m.safetensors")
    assert all(p.codes is None for p in loaded.parameters())
    cluster.tie(loaded)
    train(loaded, tn.SGD(loaded.parameters(), lr=0.1))
    assert all(len(np.unique(p.data)) <= 8 for p in weights(loaded).values())


# --- what it takes to store -----------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 300), st.booleans())
def test_a_book_gives_the_weights_back(rows: int, m_out: int, values: int, apart: bool) -> None:
    rng = np.random.default_rng(rows)
    w = rng.integers(0, values, (rows, m_out)).astype(np.float32)
    w += np.arange(m_out, dtype=np.float32) * 1000 * apart
    found = cluster.pack(w)
    if found is None:
        few = len(np.unique(w))
        bits = max(1, (few - 1).bit_length())
        assert few > 256 or -(-w.size * bits // 8) + 4 * max(2, few) >= w.nbytes
        return
    assert found.nbytes < w.nbytes
    np.testing.assert_array_equal(codebook.unpack(found), w)
    assert cluster.pack(w.astype(np.float64)) is None


def test_bytes_are_those_of_packed_codes_books_and_the_rest() -> None:
    model = net()
    rest = sum(p.size for p in model.parameters() if p.ndim < 2) * 4 + 2 * 6 * 4
    sizes = [p.size for p in weights(model).values()]
    assert cluster.nbytes(model) == rest + sum(sizes) * 4
    packed = rest + sum(-(-n * 2 // 8) + 4 * 4 for n in sizes)
    assert cluster.nbytes(cluster.kmeans(model, 4)) == packed
    sparse = sparsify.weights(model, sparsify.magnitude, sparsify.share(0.3))
    assert cluster.nbytes(cluster.kmeans(sparse, 4)) == packed  # zero is one of the four
    book = cluster.pack(weights(cluster.kmeans(model, 4, per="channel"))["4.weight"].data)
    assert book is not None and book.book.shape == (8, 4)
    assert book.nbytes == 48 * 2 // 8 + 8 * 4 * 4  # one book of all 32 would take 5 bits a weight
    large = nn.Sequential(nn.Linear(64, 64, rng=np.random.default_rng(0)))
    shared = cluster.kmeans(large, 256)
    assert cluster.nbytes(shared) == 64 * 4 + 64 * 64 + 256 * 4


def test_what_does_not_fit_is_refused() -> None:
    model = net()
    for options in (
        {"entries": 1},
        {"entries": 257},
        {"entries": 16.5},
        {"entries": 4, "per": "row"},
        {"entries": 4, "init": "k-means++"},
        {"entries": 4, "init": "random"},
    ):
        with pytest.raises(ConfigError):
            cluster.kmeans(model, **options)  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="no weights"):
        cluster.rounded(model, 2, only=["0.bias"])


def test_another_dtype_keeps_masks_codes_and_what_is_shared() -> None:
    model = net()
    model.tied = nn.Linear(8, 5, rng=np.random.default_rng(0))
    model.tied.weight = model[7].weight  # type: ignore[assignment]
    sparse = sparsify.weights(model, sparsify.magnitude, sparsify.share(0.5))
    made = cluster.kmeans(sparse, 4).astype(np.float64)
    assert made.tied.weight is made[7].weight  # type: ignore[union-attr]
    for name, p in weights(made).items():
        assert p.dtype == np.float64
        np.testing.assert_array_equal(p.mask, weights(sparse)[name].mask)
        p.mutate()[...] = np.random.default_rng(0).standard_normal(p.shape)
        p.hold()
        assert len(np.unique(p.data)) <= 4
