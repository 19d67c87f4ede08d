"""Plans of the multiplication-free ef-operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_deploy import close, expected, images, lived_in

import tinynn as tn
from kernels.geometry import Window
from kernels.reference_compressed import additive_conv2d
from tinynn import nn
from tinynn.compress import quantize
from tinynn.deploy.additive import AdditiveConv
from tinynn.errors import ConfigError

Array = np.ndarray


def network(rng: np.random.Generator) -> nn.Module:
    model = nn.Sequential(
        nn.AdditiveConv2d(3, 8, 3, stride=2, rng=rng),
        nn.BatchNorm(8),
        nn.ReLU(),
        nn.AdditiveConv2d(8, 16, 1, padding="valid", rng=rng),
        nn.Tanh(),
        nn.Conv2d(16, 8, 3, rng=rng),
        nn.Flatten(),
        nn.AdditiveLinear(4 * 5 * 8, 6, rng=rng),
        nn.ReLU(),
    )
    for _, module in model.named_modules():
        scale = getattr(module, "scale", None)
        if isinstance(scale, nn.Parameter):
            scale.mutate()[...] = rng.normal(0, 1, scale.shape)
    return lived_in(model, rng)


def test_a_plan_equals_the_model_for_every_batch_and_number_of_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = network(rng)
    weight: Any = model[0].weight  # type: ignore[index]
    weight.mutate()[0] = 0  # zeros have no sign
    x = images(rng, 7, 8, 9, 3)
    x[:, 2] = 0
    plans = [tn.compile(model, x[:1], threads=n) for n in (1, tn.max_threads())]
    kinds = [layer.step.kind for layer in plans[0].network.layers]
    assert kinds == [
        "additiveconv",
        "additiveconv",
        "activation",
        "conv",
        "reshape",
        "additivelinear",
    ]
    for batch in (x, x[:1]):
        got = plans[0](batch)
        assert close(got, expected(model, batch))
        np.testing.assert_array_equal(plans[1](batch), got)
    plans[0].save(tmp_path / "plan")
    again = tn.Plan.load(tmp_path / "plan")
    np.testing.assert_array_equal(again(x), plans[0](x))
    assert (tmp_path / "plan").stat().st_size == again.nbytes == plans[0].nbytes
    assert again.nbytes < 4 * model.size() + 3000  # weights once, not also their signs
    profile = again.profile(x, rounds=2)
    assert sum(r.macs for r in profile.layers) == 7 * again.macs == tn.count(model, x).macs


def test_a_layer_equals_the_plain_loops() -> None:
    rng = np.random.default_rng(1)
    model = nn.Sequential(nn.AdditiveConv2d(2, 3, 3, stride=2, dilation=2, rng=rng)).eval()
    x = images(rng, 2, 7, 6, 2)
    layer: Any = model[0]
    plan = tn.compile(model, x)
    (made,) = plan.network.layers
    step: Any = made.step
    assert isinstance(step, AdditiveConv)
    win = Window((3, 3), step.stride, step.padding, step.dilation)
    sums = additive_conv2d(x.astype(np.float64), layer.weight.data.astype(np.float64), win)
    assert close(plan(x), sums * layer.scale.data + layer.bias.data)


def test_other_layers_are_quantised_and_these_stay_floating() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, rng=rng),
        nn.ReLU(),
        nn.AdditiveConv2d(8, 8, 3, rng=rng),
        nn.BatchNorm(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, rng=rng),
        nn.ReLU(),
        nn.GlobalAvgPool2d(),
        nn.AdditiveLinear(6, 5, rng=rng),
        nn.ReLU(),
        nn.Linear(5, 4, rng=rng),
    ).eval()
    x = images(rng, 9, 8, 9, 3)
    for made, kinds in (
        (quantize.int8(model, [x]), ("intconv", "additiveconv", "intlinear")),
        (quantize.dynamic(model, x), ("dynamicconv", "additiveconv", "dynamiclinear")),
    ):
        plan = tn.compile(made, x, choose="dense")
        assert {*kinds, "additivelinear"} <= {a.step.kind for a in plan.network.layers}
        want = expected(made, x)
        assert np.abs(plan(x) - want).max() < 0.02 * np.abs(want).max()
    alone = nn.Sequential(nn.AdditiveLinear(6, 5, rng=rng))
    with pytest.raises(ConfigError, match="ef-operator only, which stay floating"):
        quantize.dynamic(alone, x[:, 0, :6, 0])
