"""Depthwise and pointwise convolutions in one step: the bits are those of two steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn
from tinynn.deploy import choose, layout, separable, share
from tinynn.deploy.join import join
from tinynn.deploy.steps import Add, Conv, Depthwise, Layer, ScaleShift, Scatter
from tinynn.errors import ConfigError

Array = np.ndarray


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images are worth bands and threads, too."""
    monkeypatch.setattr(separable, "_BAND_BYTES", 4000)
    monkeypatch.setattr(share, "_WORTH", 0)
    monkeypatch.setattr(layout, "_WORTH_SHARING", 0)


def kinds(plan: tn.Plan) -> list[str]:
    return [layer.step.kind for layer in plan.network.layers]


def network(shape: tuple[int, ...], layers: list[Layer]) -> layout.Network:
    """Layers whose values are numbered as they come."""
    shapes = [shape]
    for a in layers:
        shapes.append(a.step.result([shapes[i] for i in a.inputs], a.arrays))
    return layout.network(shapes, layers, layers[-1].output)


def everywhere(net: layout.Network) -> layout.Network:
    return join(net, lambda *_: True)


@st.composite
def separables(draw: st.DrawFn) -> layout.Network:
    """The pair of layers on images of many sizes, onto what is also read by the layer before it."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (
        draw(st.integers(1, 40)),
        draw(st.sampled_from([16, 31])),
        draw(st.sampled_from([3, 20])),
    )
    onto, m = draw(st.booleans()), shape[2]
    n = m if onto else 20
    stride, dilation = (1, 1) if onto else draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    around = [draw(st.integers(0, 2 * dilation)) for _ in "bb"]
    if onto or shape[0] + sum(around) <= 2 * dilation:
        around = [dilation, dilation]

    def weights(*size: int) -> dict[str, Array]:
        arrays = {"weight": rng.normal(size=size).astype(np.float32)}
        if draw(st.booleans()):
            count = size[2] if size[3] == 1 else size[3]
            arrays["bias"] = rng.normal(size=count).astype(np.float32)
        return arrays

    slid = Depthwise(
        (stride, stride),
        ((around[0], around[1]), (dilation, dilation)),
        (dilation, dilation),
        relu=draw(st.booleans()),
    )
    before = {name: rng.normal(size=m).astype(np.float32) for name in ("scale", "shift")}
    inputs = (3, 1) if onto else (3,)
    layers = [
        Layer(Conv(), (0,), 1, weights(1, 1, m, m)),
        Layer(ScaleShift(relu=True), (1,), 2, before),
        Layer(slid, (2,), 3, weights(3, 3, m, 1)),
        Layer(Conv(relu=draw(st.booleans()), onto=onto), inputs, 4, weights(1, 1, m, n)),
    ]
    return network(shape, layers)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(separables(), st.integers(1, 3))
def test_any_sizes(net: layout.Network, batch: int) -> None:
    x = np.random.default_rng(0).normal(size=(batch, *net.shapes[0])).astype(np.float32)
    two, one = tn.Plan(net, 1), tn.Plan(everywhere(net), 1)
    shared = tn.Plan(one.network, tn.max_threads())
    assert kinds(one) == ["conv", "scaleshift", "separable"]
    for some in (x[:1], x):
        want = two(some)
        assert np.array_equal(one(some), want) and np.array_equal(shared(some), want)


def block(rng: np.random.Generator) -> nn.Module:
    return nn.Sequential(
        nn.PointwiseConv2d(3, 20, rng=rng),
        nn.SeparableResidualBlock(20, 20, nonlinear=True, bias=True, rng=rng),
        nn.SeparableResidualBlock(20, 20, rng=rng),
    )


def images(batch: int) -> Array:
    return np.random.default_rng(1).normal(size=(batch, 31, 16, 3)).astype(np.float32)


def test_files_and_profiles_have_one_layer_for_two(tmp_path: Path) -> None:
    model = block(np.random.default_rng(0))
    two, one = (tn.compile(model, images(1), choose=name) for name in ("dense", "separable"))
    assert kinds(two).count("depthwise") == kinds(one).count("separable") == 4
    assert len(two.network.layers) == len(one.network.layers) + 4
    assert one.macs == two.macs and abs(one.nbytes - two.nbytes) < 1000
    one.save(tmp_path / "plan")
    again = tn.Plan.load(tmp_path / "plan", threads=1)
    assert kinds(again) == kinds(one) and np.array_equal(again(images(2)), two(images(2)))
    rows = one.profile(images(1), rounds=2).layers
    assert [r.kind for r in rows] == kinds(one) and sum(r.macs for r in rows) == one.macs
    assert "Separable(" in str(one)


def layers(kernel: Any = (3, 3, 8, 1), mixing: Any = (1, 1, 8, 8), **changes: Any) -> list[Layer]:
    """A convolution, a depthwise one, a pointwise one, that one changed."""
    same = ((1, 1), (1, 1))
    arrays = [{"weight": np.ones(shape, np.float32)} for shape in ((3, 3, 8, 8), kernel, mixing)]
    return [
        Layer(Conv(padding=same), (0,), 1, arrays[0]),
        Layer(Depthwise(padding=changes.pop("around", same)), (1,), 2, arrays[1]),
        Layer(Conv(**changes), (2, 1)[: 1 + changes.get("onto", False)], 3, arrays[2]),
    ]


def joined(some: list[Layer]) -> list[str]:
    return [a.step.kind for a in everywhere(network((9, 9, 8), some)).layers]


def test_only_what_can_run_in_bands_is_joined() -> None:
    assert joined(layers()) == ["conv", "separable"]
    add = Layer(Add(), (2, 3), 4, {})
    scatter = {"places": np.arange(8, dtype=np.int32)}
    onto = Layer(Scatter(8, onto=True), (0, 1), 3, scatter)
    first, second, third = layers()
    for some in (
        [first, second, third, add],  # what is between is read twice
        layers(onto=True),  # it would read what it has changed
        [first, second, onto, replace(third, output=4)],  # what it reads is changed before
        layers(stride=(2, 2)),
        layers(padding=((1, 1), (1, 1))),
        layers(mixing=(3, 3, 8, 8)),
        layers(kernel=(3, 3, 8, 2), mixing=(1, 1, 16, 8)),
        layers(around=((3, 0), (1, 1))),  # windows without a row
        [first, second, replace(third, kernel="sparse")],
    ):
        assert "separable" not in joined(some)


def test_one_of_several_by_its_path() -> None:
    model, x = block(np.random.default_rng(0)), images(1)
    whole = tn.compile(model, x, choose="separable").network
    path = next(a.path for a in whole.layers if a.step.kind == "separable")
    plan = tn.compile(model, x, choose={path: "separable"})
    assert kinds(plan).count("separable") == 1 and kinds(plan).count("depthwise") == 3
    with pytest.raises(ConfigError, match="cannot be separable"):
        tn.compile(model, x, choose={plan.network.layers[0].path: "separable"})
    with pytest.raises(ConfigError, match="separable"):
        tn.compile(
            nn.Sequential(nn.Conv2d(3, 4, 3, rng=np.random.default_rng(0))), x, choose="separable"
        )


@pytest.mark.parametrize("faster", [False, True])
def test_what_is_faster_is_taken(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(network: Any, layers: list[Any], images: int) -> float:
        return 1.0 if (len(layers) == 1) == faster else 2.0

    monkeypatch.setattr(choose, "_seconds", seconds)
    model, x = block(np.random.default_rng(0)), images(1)
    assert "separable" not in kinds(tn.compile(model, x))  # too small to be asked
    monkeypatch.setattr(choose, "_LARGE", 0)
    assert ("separable" in kinds(tn.compile(model, x))) == faster
