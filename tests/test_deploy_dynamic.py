"""Plans of models whose ranges are found at run time: integer sums, each image by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_deploy import expected, images, lived_in
from test_deploy_int8 import few_tiles  # noqa: F401
from test_kernels_int8 import as_dense, exact_conv

import tinynn as tn
from kernels import int8, simd
from kernels.geometry import Window, window
from tinynn import nn
from tinynn.compress import integers, quantize
from tinynn.errors import CompileError
from tinynn.models import thesis
from tinynn.nn.quantized import DynamicQuantizer, affine

Array = np.ndarray
pytestmark = pytest.mark.usefixtures("few_tiles")


def dynamic(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    rng = np.random.default_rng(3)
    return quantize.dynamic(lived_in(model, rng), images(rng, 1, *shape)).eval()


def exact(module: Any, x: Array, relu: bool) -> Array:
    """A layer's result by int64 sums, and what `kernels.int8_dynamic` says of the rest."""
    inner, ints = module.layer, integers.layer(module)
    found = []
    for image in x:
        scale, low, high = (a[0] for a in affine(float(image.min()), float(image.max()), 8))
        q = np.clip(np.rint(image / scale), low, high).astype(np.int64)
        if isinstance(inner, nn.Linear):
            sums = q @ ints.weight.astype(np.int64)
        else:
            win = Window((1, 1))
            w = ints.weight
            if not isinstance(inner, nn.PointwiseConv2d):
                geometry = inner.stride, inner.padding, inner.dilation
                win = window(x.shape[1], x.shape[2], w.shape[:2], *geometry)
            dense = as_dense(w) if isinstance(inner, nn.DepthwiseConv2d) else w
            how = int8.dequantized(1.0, 1.0)
            sums = exact_conv(q[None], dense, None, 0, how, win)[0].astype(np.int64)
        assert np.abs(sums).max() < 2**24
        y = sums.astype(np.float64) * (ints.scale * scale)  # exact, as in a fused multiply-add
        y = y if inner.bias is None else y + inner.bias.data.astype(np.float64)
        found.append(np.maximum(y, 0) if relu else y)
    return np.array(found).astype(np.float32)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda r: nn.Linear(70, 19, rng=r), (70,)),
    "linear of few": (lambda r: nn.Linear(3, 5, bias=False, rng=r), (3,)),
    "pointwise": (lambda r: nn.PointwiseConv2d(6, 7, rng=r), (5, 4, 6)),
    "conv": (lambda r: nn.Conv2d(9, 6, 3, rng=r), (7, 6, 9)),
    "conv of few": (lambda r: nn.Conv2d(3, 6, (3, 2), stride=2, rng=r), (9, 8, 3)),
    "valid": (lambda r: nn.Conv2d(4, 5, 3, padding="valid", dilation=2, rng=r), (7, 6, 4)),
    "depthwise": (lambda r: nn.DepthwiseConv2d(17, 3, stride=2, rng=r), (7, 6, 17)),
    "multiplied": (lambda r: nn.DepthwiseConv2d(3, 3, multiplier=2, rng=r), (60, 50, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_bits_of_its_integers(name: str) -> None:
    make, shape = LAYERS[name]
    rng = np.random.default_rng(0)
    relu = name in ("conv", "linear")
    inner = [make(rng), nn.ReLU()] if relu else [make(rng)]
    model: Any = dynamic(nn.Sequential(*inner), shape)
    x = images(rng, 5, *shape) * np.array([1, 1e-3, 1e4, 1, 0]).reshape(5, *[1] * len(shape))
    x[3] = np.abs(x[3])  # 0 is at an end of its grid
    x = x.astype(np.float32)
    want = exact(model[0], x, relu)
    plans = [tn.compile(model, x, threads=n) for n in (1, tn.max_threads())]
    assert [a.step.kind[:7] for a in plans[0].network.layers] == ["dynamic"]
    last = 3e-7 if simd.LEVEL == "portable" else 0  # without a fused multiply-add
    for plan in plans:
        np.testing.assert_allclose(plan(x), want, rtol=last)
        np.testing.assert_allclose(plan(x[1:2]), want[1:2], rtol=last)
    scale = np.abs(want).max(axis=tuple(range(1, want.ndim)), keepdims=True)
    assert (np.abs(expected(model, x) - want) <= 1e-5 * scale).all()


@pytest.mark.parametrize("name", ["small_cifar", "transposed"])
def test_networks(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made, shape = {
        "small_cifar": (thesis.small_cifar(rng=rng), (8, 8, 3)),
        "transposed": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2, rng=rng),
                nn.ReLU(),
                nn.ConvTranspose2d(8, 4, 3, rng=rng),
                nn.DepthwiseConv2d(4, 3, rng=rng),
                nn.Flatten(),
                nn.Linear(64, 5, rng=rng),
                nn.Softmax(),
            ),
            (8, 8, 3),
        ),
    }[name]
    model = dynamic(made, shape)
    x = images(rng, 7, *shape)
    plans = [tn.compile(model, x[:1], threads=n) for n in (1, tn.max_threads())]
    got, want = plans[0](x), expected(model, x)
    # where sums differ in their last digit, a number may be rounded to the next step instead
    difference = np.abs(got - want) / np.abs(want).max()
    assert np.median(difference) < 1e-5
    assert difference.max() < 0.02
    for i in range(len(x)):  # whatever else is in the batch
        for plan in plans:
            np.testing.assert_array_equal(plan(x[i : i + 1])[0], got[i])
    np.testing.assert_array_equal(plans[1](x), got)
    path = tmp_path / "plan"
    plans[0].save(path)
    again = tn.Plan.load(path)
    np.testing.assert_array_equal(again(x), got)
    assert path.stat().st_size == plans[0].nbytes == again.nbytes
    if name == "small_cifar":
        assert plans[0].nbytes < integers.nbytes(model) + 6000
        kinds = {a.step.kind for a in plans[0].network.layers if a.step.macs}
        assert kinds.isdisjoint({"conv", "linear", "depthwise", "dynamicround"})
        profile = plans[0].profile(x, rounds=2)
        assert sum(r.macs for r in profile.layers) == 7 * again.macs > 0
        assert {"dynamicconv", "dynamicdepthwise"} <= {r.kind for r in profile.layers}


def test_fewer_bits_and_weights_that_stay_floating() -> None:
    rng = np.random.default_rng(0)
    layer = nn.Linear(40, 6, rng=rng)
    model = nn.Sequential(nn.Quantized(layer, input=DynamicQuantizer(4)), nn.Tanh()).eval()
    x = images(rng, 6, 40)
    plan = tn.compile(model, x)
    assert [a.step.kind for a in plan.network.layers][:2] == ["dynamicround", "linear"]
    np.testing.assert_allclose(plan(x), expected(model, x), atol=1e-5)
    assert np.abs(plan(x) - expected(nn.Sequential(layer, nn.Tanh()), x)).max() > 1e-3


def test_an_image_that_is_not_finite_spoils_no_other() -> None:
    rng = np.random.default_rng(0)
    model = dynamic(nn.Sequential(nn.Conv2d(4, 5, 3, rng=rng), nn.ReLU()), (6, 6, 4))
    x = images(rng, 5, 6, 6, 4)
    want = tn.compile(model, x)(x)
    x[1, 2, 3, 0], x[3, 0, 0, 1], x[4, 5, 5, 3] = np.nan, np.inf, -np.inf
    y = tn.compile(model, x)(x)
    assert np.isnan(y[[1, 3, 4]]).all()
    np.testing.assert_array_equal(y[[0, 2]], want[[0, 2]])


def test_sums_beyond_int32_are_refused() -> None:
    rng = np.random.default_rng(0)
    model = dynamic(nn.Sequential(nn.Linear(140_000, 1, rng=rng)), (140_000,))
    weight = next(p for p in model.parameters() if p.ndim == 2)
    weight.mutate()[...] = weight.data.max()
    with pytest.raises(CompileError, match="2147483647"):
        tn.compile(model, images(rng, 1, 140_000))
