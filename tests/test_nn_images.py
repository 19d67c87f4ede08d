"""Layers and blocks over images: shapes, gradients, running statistics, files, torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tinynn import nn, ops
from tinynn.errors import ConfigError, ShapeError
from tinynn.gradcheck import gradcheck
from tinynn.tensor import Tensor

Rng = np.random.Generator


def images(rows: int = 2, height: int = 6, width: int = 5, channels: int = 4) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.standard_normal((rows, height, width, channels)).astype(np.float32)


MODULES: dict[str, tuple[Callable[[Rng], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda r: nn.Conv2d(4, 6, 3, rng=r), (2, 6, 5, 6)),
    "conv stride": (lambda r: nn.Conv2d(4, 6, (3, 2), stride=2, rng=r), (2, 3, 3, 6)),
    "conv valid": (lambda r: nn.Conv2d(4, 6, 3, padding="valid", rng=r), (2, 4, 3, 6)),
    "conv dilated": (lambda r: nn.Conv2d(4, 3, 3, dilation=2, bias=False, rng=r), (2, 6, 5, 3)),
    "pointwise": (lambda r: nn.PointwiseConv2d(4, 7, rng=r), (2, 6, 5, 7)),
    "depthwise": (lambda r: nn.DepthwiseConv2d(4, 3, rng=r), (2, 6, 5, 4)),
    "multiplier": (lambda r: nn.DepthwiseConv2d(4, 3, multiplier=2, rng=r), (2, 6, 5, 8)),
    "transpose": (lambda r: nn.ConvTranspose2d(4, 3, 3, stride=2, rng=r), (2, 12, 10, 3)),
    "composing": (lambda r: nn.KernelComposingConv2d(4, 6, 5, 3, rng=r), (2, 6, 5, 6)),
    "composing linear": (
        lambda r: nn.KernelComposingConv2d(4, 6, 3, 3, nonlinear=False, stride=2, rng=r),
        (2, 3, 3, 6),
    ),
    "separable": (lambda r: nn.SeparableConv2d(4, 6, 3, rng=r), (2, 6, 5, 6)),
    "separable nonlinear": (
        lambda r: nn.SeparableConv2d(4, 6, 3, nonlinear=True, stride=2, rng=r),
        (2, 3, 3, 6),
    ),
    "batch norm": (lambda r: nn.BatchNorm(4), (2, 6, 5, 4)),
    "max pool": (lambda r: nn.MaxPool2d(), (2, 3, 2, 4)),
    "avg pool": (lambda r: nn.AvgPool2d(3, stride=2, padding="same"), (2, 3, 3, 4)),
    "global pool": (lambda r: nn.GlobalAvgPool2d(), (2, 4)),
    "flatten": (lambda r: nn.Flatten(), (2, 120)),
    "residual": (lambda r: nn.ResidualBlock(4, 4, rng=r), (2, 6, 5, 4)),
    "residual down": (lambda r: nn.ResidualBlock(4, 7, stride=2, rng=r), (2, 3, 3, 7)),
    "bottleneck": (lambda r: nn.BottleneckBlock(4, 8, stride=2, rng=r), (2, 3, 3, 8)),
    "separable residual": (lambda r: nn.SeparableResidualBlock(4, 4, rng=r), (2, 6, 5, 4)),
    "separable residual down": (
        lambda r: nn.SeparableResidualBlock(4, 8, stride=2, rng=r),
        (2, 3, 3, 8),
    ),
    "inception": (lambda r: nn.InceptionBlock(4, (2, 4, 2, 1), rng=r), (2, 6, 5, 9)),
}


@pytest.mark.parametrize("name", MODULES)
def test_shapes_files_and_eval(name: str, tmp_path: Path) -> None:
    make, shape = MODULES[name]
    model = make(np.random.default_rng(0))
    x = Tensor(images())
    assert model(x).shape == shape  # in training mode: running statistics move
    expected = model.eval()(x).data
    nn.save(tmp_path / "m", model)
    twin = nn.load(tmp_path / "m")
    np.testing.assert_array_equal(twin(x).data, expected)
    assert repr(model)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_whole_modules(name: str) -> None:
    make, _ = MODULES[name]
    model = make(np.random.default_rng(0)).astype(np.float64)
    rng = np.random.default_rng(1)
    parameters = model.parameters()
    shapes = [p.shape for p in parameters]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        twin = model.copy()
        slots = {id(p): v for p, v in zip(twin.parameters(), values, strict=True)}
        for _, module in twin.named_modules():
            for key, value in list(vars(module).items()):
                if id(value) in slots:
                    vars(module)[key] = slots[id(value)]
        return twin(x)

    values = [rng.uniform(0.5, 1.5, s) * rng.choice([-1, 1], s) for s in shapes]
    gradcheck(run, [images(height=4, width=4).astype(np.float64), *values], projections=1)


def test_batch_norm_keeps_running_statistics_as_torch_does() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    ours, theirs = nn.BatchNorm(4), torch.nn.BatchNorm2d(4)
    for seed in range(3):
        x = np.random.default_rng(seed).normal(2, 3, (3, 5, 4, 4)).astype(np.float32)
        got = ours(Tensor(x)).data
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.mean, theirs.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours.variance, theirs.running_var.numpy(), rtol=1e-5)
    ours.eval()
    theirs.eval()
    expected = theirs(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours(Tensor(x)).data, expected.detach().numpy(), atol=1e-5)


def test_a_following_relu_runs_in_the_same_pass_with_the_same_bits() -> None:
    from tinynn.tensor import recording

    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(4, 5, 3, rng=rng), nn.ReLU(), nn.BatchNorm(5), nn.ReLU(),
        nn.DepthwiseConv2d(5, 3, rng=rng), nn.ReLU(),
    ).eval()  # fmt: skip
    seen: list[str] = []
    x = Tensor(images())
    with recording(lambda op, inputs, output: seen.append(op.name)):
        fused = model(x)
    assert "relu" not in seen
    plain = x
    for layer in model:
        plain = ops.relu(plain) if isinstance(layer, nn.ReLU) else layer(plain)
    np.testing.assert_array_equal(fused.data, plain.data)


def test_shortcuts_add_channels_front_and_back() -> None:
    x = images(channels=3)
    y = nn.Shortcut(3, 6)(Tensor(x)).data
    assert not y[..., :1].any() and not y[..., 4:].any()
    np.testing.assert_array_equal(y[..., 1:4], x)
    with pytest.raises(ConfigError, match="m_out >= m_in"):
        nn.Shortcut(4, 3)


def test_misfits_are_named() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ShapeError, match=r"Conv2d.*\(2, 6, 5, 4\)"):
        nn.Conv2d(3, 5, 3, rng=rng)(Tensor(images()))
    with pytest.raises(ShapeError, match="fits in"):
        nn.Conv2d(4, 5, 9, padding="valid", rng=rng)(Tensor(images()))
    with pytest.raises(ConfigError, match="stride >= 1"):
        nn.Conv2d(4, 5, 3, stride=0, rng=rng)
    with pytest.raises(ConfigError, match="padding is"):
        nn.Conv2d(4, 5, 3, padding="full", rng=rng)
    with pytest.raises(ShapeError, match="equal shapes"):
        nn.Add(nn.Conv2d(4, 5, 3, rng=rng), nn.Conv2d(4, 6, 3, rng=rng))(Tensor(images()))
