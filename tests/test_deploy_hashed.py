"""Plans of hashed layers: dense kernels run them, and files hold the values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_deploy import close, expected, images, lived_in
from test_deploy_file import load, parts

import tinynn as tn
from tinynn import nn
from tinynn.compress import hashing
from tinynn.deploy import file
from tinynn.deploy.layout import Network
from tinynn.errors import FileFormatError

X = images(np.random.default_rng(1), 5, 8, 8, 8)


def plain() -> nn.Module:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(8, 32, 3, bias=False, rng=rng),
        nn.BatchNorm(32),
        nn.ReLU(),
        nn.SeparableConv2d(32, 32, 3, rng=rng),
        nn.BatchNorm(32),
        nn.ScaleShift(rng.uniform(0.5, 2, 32).astype(np.float32), np.ones(32, np.float32)),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 64, rng=rng),
        nn.Tanh(),
        nn.Linear(64, 6, bias=False, rng=rng),
    )
    return lived_in(model, rng)


def forms(plan: tn.Plan) -> list[str]:
    _, described = parts(plan)
    return [a["arrays"]["weight"]["form"] for a in described["layers"] if "weight" in a["arrays"]]


@pytest.mark.parametrize("choose", ["measure", "separable"])
def test_a_plan_equals_the_model_and_its_file_holds_the_values(choose: str, tmp_path: Path) -> None:
    model = hashing.hashed(plain(), 1 / 4)
    plans = [tn.compile(model, X[:1], threads=n, choose=choose) for n in (1, tn.max_threads())]
    got = plans[0](X)
    assert close(got, expected(model, X))
    np.testing.assert_array_equal(plans[1](X), got)
    assert forms(plans[0]).count("hashed") == 4
    path = tmp_path / "plan"
    plans[0].save(path)
    again = tn.Plan.load(path)
    np.testing.assert_array_equal(again(X), got)
    assert path.stat().st_size == plans[0].nbytes == again.nbytes
    numbers = tn.count(model, X).with_statistics
    assert again.nbytes < 4 * numbers + 2500
    assert again.nbytes < 0.4 * tn.compile(plain(), X[:1]).nbytes
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice").read_bytes() == path.read_bytes()


def test_batch_norms_stay_factors_in_the_file() -> None:
    model = hashing.hashed(plain(), 1 / 4)
    plan = tn.compile(model, X[:1], choose="dense")
    kinds = [layer.step.kind for layer in plan.network.layers]
    assert kinds.count("scaleshift") == 0
    first, second = (plan.network.layers[i].origin for i in (0, 2))
    assert first is not None and first.scale is not None and second is not None
    layer: Any = model[0]  # type: ignore[index]
    norm: Any = model[1]  # type: ignore[index]
    factor = norm.gamma.data / np.sqrt(norm.variance + norm.eps)
    np.testing.assert_allclose(first.scale, factor, rtol=1e-6)
    np.testing.assert_array_equal(first.values, layer.values.data)
    # two of them, one behind the other
    norm, factors = model[4], model[5]  # type: ignore[index]
    both = norm.gamma.data / np.sqrt(norm.variance + norm.eps) * factors.weight.data
    assert second.scale is not None
    np.testing.assert_allclose(second.scale, both, rtol=1e-6)


def test_weights_that_have_changed_since_are_stored_as_they_are(tmp_path: Path) -> None:
    model = hashing.hashed(plain(), 1 / 4)
    plan = tn.compile(model, X[:1], choose="dense")
    layers = list(plan.network.layers)
    weight = layers[0].arrays["weight"].copy()
    weight[0, 0, 0, 0] = np.nextafter(weight[0, 0, 0, 0], 9)
    layers[0] = replace(layers[0], arrays={**layers[0].arrays, "weight": weight})
    net = plan.network
    changed = tn.Plan(Network(net.shapes, tuple(layers), net.output))
    assert forms(changed)[0] != "hashed" and forms(changed)[2] == "hashed"
    changed.save(tmp_path / "plan")
    loaded = tn.Plan.load(tmp_path / "plan").network.layers[0].arrays["weight"]
    np.testing.assert_array_equal(loaded, weight)
    half = tn.compile(model, X[:1], choose="float16")
    assert set(forms(half)) == {"float16"}


def test_a_file_that_asks_for_much_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = hashing.hashed(plain(), 1 / 4)
    data, plan = parts(tn.compile(model, X[:1], choose="dense"))
    head = plan["layers"][0]["arrays"]["weight"]
    assert head["form"] == "hashed"
    good = dict(head)
    floats, at, _ = good["parts"]["values"]
    for change in (
        {"shape": [3, 3, 1 << 14, 1 << 14]},
        {"shape": [1 << 9, 1 << 9, 8, 32]},
        {"shape": [3, 3, 8, 31]},
        {"shape": [3, 3, 256]},
        {"shape": [72, 32]},
        {"buckets": [1, 1, 1, 1, 1]},
        {"buckets": [1 << 40, 1, 1, 1, 1]},
        {"buckets": good["buckets"][:-1]},
        {"buckets": None},
        {"seed": 1.5},
        {"seed": 1 << 63},
        {"parts": {}},
        {"parts": {"values": [floats, at, 3]}},
        {"parts": {**good["parts"], "scale": [floats, at, 31]}},
        {"parts": {**good["parts"], "scale": ["uint8", at, 32]}},
        {"form": "gaps", "bits": 1, "symbols": 1, "inner": good},
    ):
        plan["layers"][0]["arrays"]["weight"] = {**good, **change}
        with pytest.raises(FileFormatError):
            load(data, plan, tmp_path / "plan")
    plan["layers"][0]["arrays"]["weight"] = good
    loaded = load(data, plan, tmp_path / "plan")
    assert file.describe(loaded.network)[1] == data
