"""Layers whose weights are made of few values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn import nn, ops
from tinynn.errors import ConfigError, FileFormatError
from tinynn.storage import read_tensors, write_tensors
from tinynn.tensor import Tensor

Array = np.ndarray


def network(dtype: Any = np.float32) -> nn.Sequential:
    rng = np.random.default_rng(0)
    return nn.Sequential(
        nn.HashedConv2d(3, 4, 3, share=0.5, stride=2, rng=rng, dtype=dtype),
        nn.ReLU(),
        nn.HashedConv2d(4, 5, (1, 2), share=0.3, padding="valid", bias=False, rng=rng, dtype=dtype),
        nn.HashedConv2d(5, 4, 1, share=0.5, dilation=2, seed=4, rng=rng, dtype=dtype),
        nn.Flatten(),
        nn.HashedLinear(3 * 2 * 4, 3, share=0.25, seed=5, rng=rng, dtype=dtype),
    )


def images(dtype: Any = np.float32) -> Array:
    return np.random.default_rng(1).standard_normal((4, 6, 6, 3)).astype(dtype)


def test_they_are_the_ordinary_ops_on_hashed_weights() -> None:
    model, x = network(), Tensor(images())
    a, _, b, c, _, d = (model[i] for i in range(6))
    layers: Any = (a, b, c, d)
    w = [ops.hashed(m.values, m.shape, m.buckets, m.seed) for m in layers]
    assert [m.shape for m in w] == [(3, 3, 3, 4), (1, 2, 4, 5), (1, 1, 5, 4), (24, 3)]
    y = ops.conv2d(x, w[0], a.bias, stride=2, relu=True)  # type: ignore[attr-defined]
    y = ops.conv2d(y, w[1], padding="valid")
    y = ops.conv2d(y, w[2], c.bias, dilation=2)  # type: ignore[attr-defined]
    y = ops.linear(ops.flatten(y), w[3], d.bias)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(model(x).data, y.data)


def test_training_lowers_the_loss_and_moves_every_value_in_use() -> None:
    model = network()
    y = np.array([0, 1, 2, 0])
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    assert set(before) == {"0.values", "0.bias", "2.values", "3.values", "3.bias", "5.values",
                           "5.bias"}  # fmt: skip
    history = tn.fit(
        model, tn.Batches(images(), y, size=4, shuffle=False), loss=tn.softmax_cross_entropy,
        epochs=30, optimizer=tn.SGD(model.parameters(), lr=0.05, momentum=0.9),
    )  # fmt: skip
    assert history.losses[-1] < 0.3 * history.losses[0]
    moved = [np.mean(p.data != before[name]) for name, p in model.named_parameters()]
    assert min(moved) > 0.5


def test_values_have_the_variance_that_weights_would_have() -> None:
    layer = nn.HashedConv2d(64, 64, 3, share=0.5, rng=np.random.default_rng(0))
    want = np.sqrt(2 / (64 * 9))
    assert abs(layer.weights().data.std() / want - 1) < 0.05


def test_they_count_what_they_store() -> None:
    model = network()
    layers: Any = [model[i] for i in (0, 2, 3, 5)]
    values = [m.values.size for m in layers]
    assert values == [54, 12, 10, 18]
    found = tn.count(model, images())
    assert found.weights == sum(layer.weights for layer in found.layers) == sum(values)
    assert found.parameters == found.trainable == sum(values) + 4 + 4 + 3 == model.size()
    assert found.weight_bytes == 4 * found.parameters
    assert found.macs == 4 * (9 * 9 * 12 + 6 * 2 * 20 + 6 * 20 + 24 * 3)
    assert "3x3, 3 -> 4, 54 values" in repr(model) and "24 -> 3, 18 values, seed=5" in repr(model)


def test_saved_and_loaded_they_give_the_same_bits(tmp_path: Path) -> None:
    model = network().eval()
    path = tmp_path / "m"
    tn.save(path, model)
    again = tn.load(path)
    np.testing.assert_array_equal(again(Tensor(images())).data, model(Tensor(images())).data)
    assert repr(again) == repr(model)


@pytest.mark.parametrize(
    ("name", "what", "value"),
    [
        ("shape", "tuple", [3, 3, 3]),
        ("shape", "tuple", [3, 3, 3, 5]),
        ("shape", "tuple", [3, 3, 1 << 20, 1 << 20]),
        ("shape", "tuple", [3, 3, "3", 4]),
        ("shape", "value", 4),
        ("buckets", "tuple", [54]),
        ("buckets", "tuple", [1, 2, 3, 4, 5]),
        ("buckets", "tuple", [1 << 62, 1 << 62, 1, 1, 1]),
        ("buckets", "value", "54"),
        ("seed", "value", -1),
        ("seed", "value", 0.5),
        ("seed", "value", None),
        ("values", "value", None),
        ("values", "buffer", "0.values"),
        ("bias", "parameter", "0.values"),
        ("stride", "tuple", [0, 1]),
        ("padding", "value", "none"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(
    name: str, what: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    model = nn.Sequential(network()[0])
    tn.save(path, model)
    arrays, metadata = read_tensors(path)
    tree = json.loads(metadata["model"])
    parts = tree["parts"][0][2]["parts"]
    place = next(i for i, part in enumerate(parts) if part[0] == name)
    parts[place] = [name, what, value]
    write_tensors(path, arrays, {**metadata, "model": json.dumps(tree)})
    with pytest.raises(FileFormatError):
        tn.load(path)
    del parts[place]
    write_tensors(path, arrays, {**metadata, "model": json.dumps(tree)})
    with pytest.raises(FileFormatError):
        tn.load(path)


def test_wrong_sizes_and_shares_are_refused() -> None:
    rng = np.random.default_rng(0)
    for make in (
        lambda: nn.HashedLinear(0, 3, share=0.5, rng=rng),
        lambda: nn.HashedLinear(3.5, 3, share=0.5, rng=rng),  # type: ignore[arg-type]
        lambda: nn.HashedLinear(3, 3, share=0.0, rng=rng),
        lambda: nn.HashedLinear(3, 3, share=0.5, seed=-1, rng=rng),
        lambda: nn.HashedConv2d(3, 3, 0, share=0.5, rng=rng),
        lambda: nn.HashedConv2d(3, 3, 3, share=0.5, beta=0, rng=rng),
        lambda: nn.HashedConv2d(3, 3, 3, share=0.5, stride=0, rng=rng),
    ):
        with pytest.raises(ConfigError):
            make()
