"""The pass that makes weights of few values by hashing, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_deploy import lived_in

import tinynn as tn
from tinynn import nn
from tinynn.compress import cluster, factorize, hashing, importance, merge, prune, quantize, select
from tinynn.errors import ConfigError, PruneError
from tinynn.tensor import Tensor

X = np.random.default_rng(0).standard_normal((6, 8, 8, 3)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2])


def network() -> nn.Sequential:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, rng=rng),
        nn.BatchNorm(8),
        nn.ReLU(),
        nn.DepthwiseConv2d(8, 3, rng=rng),
        nn.PointwiseConv2d(8, 16, bias=False, rng=rng),
        nn.SeparableResidualBlock(16, 16, rng=rng),
        nn.GlobalAvgPool2d(),
        nn.Linear(16, 3, rng=rng),
    )
    return lived_in(model, rng).eval()  # type: ignore[return-value]


def kinds(model: nn.Module) -> dict[str, str]:
    return {
        path: type(m).__name__
        for path, m in model.named_modules()
        if path and not dict(m.named_children())
    }


def run(model: nn.Module) -> np.ndarray:
    return model.eval()(Tensor(X)).data


def test_a_model_of_fewer_values_that_are_nearest_to_its_weights() -> None:
    model = network()
    before = model.state_dict()
    small = hashing.hashed(model, 0.5, seed=7)
    assert all(np.array_equal(v, before[k]) for k, v in model.state_dict().items())
    old, new = dict(model.named_modules()), dict(small.named_modules())
    seeds = set()
    for path, layer in old.items():
        made: Any = new[path]
        if type(layer) not in (nn.Conv2d, nn.PointwiseConv2d, nn.Linear):
            assert type(made) is type(layer)  # depthwise ones too
            continue
        plain: Any = layer
        assert isinstance(made, nn.HashedLinear | nn.HashedConv2d)
        assert abs(made.values.size - plain.weight.size / 2) <= 1
        w, z = plain.weight.data, made.weights().data
        # what a projection leaves out is at right angles to what it keeps
        assert abs(((w - z) * z).sum()) < 1e-4 * (w * w).sum()
        assert 0.2 < (z * z).sum() / (w * w).sum() < 0.95
        assert (made.bias is None) == (plain.bias is None)
        if plain.bias is not None:
            np.testing.assert_array_equal(made.bias.data, plain.bias.data)
        seeds.add(made.seed)
    assert min(seeds) == 7 and len(seeds) == 5  # not the same places in layers of one shape
    assert tn.count(small, X).parameters < 0.7 * tn.count(model, X).parameters
    assert tn.count(small, X).macs == tn.count(model, X).macs
    assert run(small).shape == (6, 3)


def test_low_frequencies_keep_more() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, rng=rng))
    smooth: Any = model[0]
    smooth.weight.mutate()[...] = rng.standard_normal((1, 1, 16, 16))  # the lowest frequency alone
    left = []
    for beta in (1.0, 3.0):
        made: Any = hashing.hashed(model, 0.2, beta=beta)[0]  # type: ignore[index]
        left.append(np.square(made.weights().data - smooth.weight.data).sum())
    assert left[1] < 0.75 * left[0]


def test_tuning_brings_back_what_hashing_lost(tmp_path: Path) -> None:
    model = network()
    target = run(model)
    small = hashing.hashed(model, 0.5)
    lost = np.square(run(small) - target).mean()
    batches = tn.Batches(X, target, size=6, shuffle=False)
    tn.fit(small, batches, loss=tn.mse, epochs=60, optimizer=tn.Adam(small.parameters(), lr=0.005))
    assert np.square(run(small) - target).mean() < 0.2 * lost
    tn.save(tmp_path / "m", small)
    np.testing.assert_array_equal(run(tn.load(tmp_path / "m")), run(small))


def test_only_and_frozen_layers() -> None:
    model = network()
    head: Any = model[7]
    head.weight.requires_grad = False
    small = hashing.hashed(model, 0.25, only=["7", "0"])
    found = kinds(small)
    assert found["0"] == "HashedConv2d" and found["7"] == "HashedLinear"
    assert sum(kind.startswith("Hashed") for kind in found.values()) == 2
    again: Any = small[7]  # type: ignore[index]
    assert not again.values.requires_grad and again.bias.requires_grad
    both = hashing.hashed(small, 0.5, only=["4"])  # other layers by another share
    assert kinds(both)["4"] == "HashedConv2d"


def test_expanded_models_compute_the_same_and_other_passes_go_on() -> None:
    model = network()
    small = hashing.hashed(model, 0.5)
    plain = hashing.expanded(small)
    assert kinds(plain) == kinds(model)
    assert plain.size() == model.size()
    np.testing.assert_array_equal(run(plain), run(small))
    for layer in (small[7], small[4]):  # type: ignore[index]
        alone: Any = hashing.expanded(layer.eval())
        assert isinstance(alone, nn.Linear | nn.PointwiseConv2d) and not alone.training
        np.testing.assert_array_equal(alone.weight.data, layer.weights().data)
    byte = quantize.int8(plain, [X])
    assert np.isfinite(run(byte)).all()
    # a batch norm behind a hashed layer stays apart
    folded = tn.fold_batchnorm(small, X)
    np.testing.assert_allclose(run(folded), run(small), rtol=1e-4, atol=1e-5)
    assert kinds(folded)["0"] == "HashedConv2d" and kinds(folded)["1"] == "ScaleShift"


def test_no_pass_takes_hashed_layers_for_others() -> None:
    small = hashing.hashed(network(), 0.5)
    seen = tn.observe(small, [X])
    for refused in (
        lambda: hashing.hashed(small, 0.5),
        lambda: factorize.layers(small, X, factorize.number(1)),
        lambda: quantize.int8(small, [X]),
        lambda: quantize.dynamic(small, X),
        lambda: quantize.float16(small),
        lambda: merge.affine(small, seen),
        lambda: merge.duplicates(small, [X]),
    ):
        with pytest.raises(ConfigError, match=r"hashed ones: .*hashing\.expanded"):
            refused()
    with pytest.raises(PruneError, match="prune"):
        prune.channels(small, seen, importance.l1, select.share(0.5))
    with pytest.raises(PruneError, match="without"):
        cluster.kmeans(hashing.hashed(nn.Sequential(model_head()), 0.5), 4)


def model_head() -> nn.Linear:
    return nn.Linear(16, 3, rng=np.random.default_rng(0))


def test_what_cannot_be_hashed_is_refused() -> None:
    model = network()
    for share in (0, -1, 1.5, np.nan):
        with pytest.raises(ConfigError, match="share"):
            hashing.hashed(model, share)
    head = nn.Sequential(model_head())
    for options in ({"alpha": 0.0}, {"beta": -1.0}, {"seed": -1}, {"only": ["1"]}, {"only": []}):
        with pytest.raises(ConfigError, match="hash"):
            hashing.hashed(head, 0.5, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Sequential"):
        hashing.hashed(model_head(), 0.5)
    shared = nn.Sequential(model_head(), nn.Linear(3, 16, rng=np.random.default_rng(0)))
    shared.again = nn.Linear(16, 3, rng=np.random.default_rng(0))
    shared.again.weight = shared[0].weight
    assert kinds(hashing.hashed(shared, 0.5)) == {
        "0": "Linear", "1": "HashedLinear", "again": "Linear"
    }  # fmt: skip
