"""What is exported runs in onnxruntime with the same results, and comes back as it was."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn, ops
from tinynn.compress import blocks, importance, select
from tinynn.errors import ConfigError, MissingPackageError, OutputError, UnsupportedError
from tinynn.models import thesis
from tinynn.nn.module import Module
from tinynn.observe import observe
from tinynn.op import Array

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 1) -> Array:
    return rng(seed).standard_normal(shape).astype(np.float32)


def stir(model: Module) -> Module:
    """Statistics, scales and biases as training leaves them, so that none is neutral."""
    generator = rng(7)
    for _, module in model.named_modules():
        if isinstance(module, nn.BatchNorm):
            m = module.gamma.size
            module.mean = generator.normal(0, 0.5, m).astype(np.float32)
            module.variance = generator.uniform(0.5, 2, m).astype(np.float32)
            module.gamma.mutate()[...] = generator.uniform(0.5, 1.5, m)
            module.beta.mutate()[...] = generator.normal(0, 0.3, m)
        bias = getattr(module, "bias", None)
        if isinstance(bias, tn.Parameter):
            bias.mutate()[...] = generator.normal(0, 0.3, bias.shape)
    return model.eval()


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def close(got: Array, wanted: Array, tolerance: float = 1e-5) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert np.abs(got - wanted).max() <= tolerance * max(1e-3, np.abs(wanted).max())


def round_trip(model: Module, x: Array, path: Path, batch: int = 3) -> Any:
    """Export with batch x, run with another, import; the ONNX graph."""
    stir(model)
    tn.onnx.export(model, x, path)
    other = normal(batch, *x.shape[1:], seed=5).astype(x.dtype)
    wanted = model(tn.Tensor(other)).data
    close(session(path).run(None, {"input": other})[0], wanted)
    close(tn.onnx.load(path)(tn.Tensor(other)).data, wanted)
    return onnx.load(path).graph


def kinds(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


THESIS: dict[str, tuple[Callable[[], Module], tuple[int, ...]]] = {
    "autoencoder": (lambda: thesis.autoencoder(rng=rng()), (2, 28, 28, 1)),
    "baseline": (lambda: thesis.baseline(rng=rng()), (2, 24, 24, 3)),
    "composing": (lambda: thesis.baseline("composing", rng=rng()), (2, 24, 24, 3)),
    "nonlinear": (lambda: thesis.baseline("nonlinear", rng=rng()), (2, 23, 25, 3)),
    "small_cifar": (lambda: thesis.small_cifar(rng=rng()), (2, 32, 32, 3)),
    "resnet20": (lambda: thesis.resnet20(rng=rng()), (1, 31, 33, 3)),
}


@pytest.mark.parametrize("name", THESIS)
def test_models_of_the_thesis_run_in_onnxruntime_and_come_back(name: str, tmp_path: Path) -> None:
    build, shape = THESIS[name]
    graph = round_trip(build(), normal(*shape), tmp_path / "model.onnx")
    # one transpose at the entry, and one at the exit of what makes images; none between
    assert kinds(graph)["Transpose"] == (2 if name == "autoencoder" else 1)


BLOCKS: dict[str, Callable[[], Module]] = {
    "residual": lambda: nn.ResidualBlock(3, 6, stride=2, rng=rng()),
    "bottleneck": lambda: nn.BottleneckBlock(4, 8, stride=2, rng=rng()),
    "separable": lambda: nn.SeparableResidualBlock(3, 5, stride=2, rng=rng()),
    "inception": lambda: nn.InceptionBlock(3, (2, 4, 4, 3), rng=rng()),
    "kernel composing": lambda: nn.KernelComposingConv2d(3, 5, 3, 4, stride=2, rng=rng()),
    "multiplier": lambda: nn.DepthwiseConv2d(3, (3, 2), multiplier=2, stride=2, rng=rng()),
    "depthwise of one": lambda: nn.Sequential(
        nn.PointwiseConv2d(3, 1, rng=rng()), nn.DepthwiseConv2d(1, 3, multiplier=3, rng=rng())
    ),
    "dilated": lambda: nn.Conv2d(3, 4, 3, dilation=2, stride=2, rng=rng()),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, rng=rng()),
    "transposed, small window": lambda: nn.ConvTranspose2d(3, 4, (1, 2), stride=(3, 2), rng=rng()),
    "average": lambda: nn.AvgPool2d(2, padding="same"),
    "average, given padding": lambda: nn.AvgPool2d(3, stride=1, padding=((1, 0), (0, 2))),
    "maximum": lambda: nn.MaxPool2d((2, 3), stride=2, padding="same"),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5, rng=rng()), nn.ReLU()),
    "softmax": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, rng=rng()), nn.Softmax()),
    "flatten": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, rng=rng()), nn.Flatten(), nn.Linear(140, 5, rng=rng()), nn.Sigmoid()
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_and_layers_on_odd_images(name: str, tmp_path: Path) -> None:
    round_trip(BLOCKS[name](), normal(2, 5, 7, 3 + (name == "bottleneck")), tmp_path / "m.onnx")


class Function(Module):
    """Any function of one Tensor as a model."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.run = function

    def forward(self, x: Any) -> Any:
        return self.run(x)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda x: x,
    "arithmetic": lambda x: (2 - abs(x) * 3) / (x * x + 1),
    "functions": lambda x: ((-x).exp() + 1).log().sqrt() ** 1.5,
    "extremes": lambda x: ops.maximum(ops.minimum(x, 0.5), tn.Tensor(normal(3))),
    "vector and image": lambda x: image(x) * tn.Tensor(normal(3)) + tn.Tensor(normal(5, 1, 1)),
    "scale and shift": lambda x: ops.scale_shift(image(x), normal(3), normal(3, seed=2), relu=True),
    "broadcast pools": lambda x: x * image(x).mean((1, 2), keepdims=True),
    "means": lambda x: image(x).mean((1, 3)) + image(x).mean(1).mean(-1),
    "mean of channels": lambda x: image(x).mean(3, keepdims=True) * x,
    "mean over the batch": lambda x: x - image(x).mean(0, keepdims=True),
    "sums": lambda x: image(x).sum((1, 2)) + x.sum((1, 2)) + image(x).max((1, 2)),
    "sum of columns": lambda x: image(x).sum((0, 2)),
    "log softmax": lambda x: ops.log_softmax(image(x), 1),
    "concat": lambda x: ops.concat([image(x), x, image(x)], 2),
    "pad": lambda x: ops.pad(image(x), [(0, 0), (1, 0), (0, 2), (3, 1)], 0.5),
    "slices": lambda x: image(x)[:, ::-2, 1:, -1],
    "no slice": lambda x: x[:],
    "rows": lambda x: ops.take(x.mean(0), [2, 0, 2]),
    "reshape": lambda x: image(x).reshape(-1, 7, 3, 5),
    "batch in another place": lambda x: x.transpose((1, 0, 2, 3)).reshape(5, -1),
    "transpose": lambda x: image(x).transpose((0, 3, 1, 2)).transpose((0, 2, 3, 1)),
    "products": lambda x: (x.reshape(-1, 35, 3) @ tn.Tensor(normal(3, 4))).reshape(-1, 5, 28),
    "batch norm of rows": lambda x: ops.batchnorm_eval(
        x.reshape(-1, 35, 3), *(abs(normal(3, seed=i)) + 0.5 for i in range(4))
    ),
    "nothing of this matters": lambda x: (ops.take(x, [0]), x * 2)[1],
}


def image(x: Any) -> Any:
    """Something that is NCHW in the file."""
    return ops.max_pool2d(x, 2, stride=1, padding="same")


@pytest.mark.parametrize("flat", [False, True])
def test_scattered_channels_run_in_onnxruntime(flat: bool, tmp_path: Path) -> None:
    tail = [nn.GlobalAvgPool2d()] if flat else []
    scatter = nn.Scatter((5, 0, 2), 6)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, rng=rng()), *tail, scatter, nn.Tanh()).eval()
    x = normal(2, 4, 5, 2)
    tn.onnx.export(model, x[:1], tmp_path / "model.onnx")
    wanted = model(tn.Tensor(x)).data
    got = session(tmp_path / "model.onnx").run(None, {"input": x})[0]
    close(got, wanted)
    again = tn.onnx.load(tmp_path / "model.onnx")
    close(again(tn.Tensor(x)).data, wanted)
    (found,) = (m for _, m in again.named_modules() if isinstance(m, nn.Scatter))
    assert (found.places, found.width) == ((5, 0, 2), 6)
    close(tn.compile(again, x)(x), wanted)


def test_thinned_residual_branches_come_back(tmp_path: Path) -> None:
    model = stir(nn.Sequential(*(nn.ResidualBlock(4, 4, rng=rng()) for _ in range(2))))
    x = normal(3, 6, 5, 4)
    thin = blocks.thin(model, observe(model, [x]), importance.l1, select.share(0.5))
    assert any(isinstance(m, nn.Scatter) for _, m in thin.named_modules())
    round_trip(thin, x, tmp_path / "model.onnx")
    again = tn.onnx.load(tmp_path / "model.onnx")
    assert any(isinstance(m, nn.Scatter) for _, m in again.named_modules())


def test_the_ef_operator_runs_in_onnxruntime(tmp_path: Path) -> None:
    layers = [
        nn.AdditiveConv2d(3, 6, 3, stride=2, rng=rng()),
        nn.ReLU(),
        nn.AdditiveConv2d(6, 4, 2, dilation=2, rng=rng()),
        nn.Flatten(),
        nn.AdditiveLinear(48, 5, rng=rng()),
    ]
    model = stir(nn.Sequential(*layers))
    x = normal(3, 7, 5, 3)
    x[:, 2] = 0  # has no sign
    weight: Any = layers[0].weight  # type: ignore[attr-defined]
    weight.mutate()[..., 0] = 0
    tn.onnx.export(model, x[:1], tmp_path / "model.onnx")
    got = session(tmp_path / "model.onnx").run(None, {"input": x})[0]
    close(got, model(tn.Tensor(x)).data)
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    weights = sum(int(np.prod(t.dims)) for t in stored if len(t.dims) in (2, 4))
    assert weights == sum(p.size for p in model.parameters() if p.ndim > 1)  # once


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_outside_layers(name: str, tmp_path: Path) -> None:
    round_trip(Function(FUNCTIONS[name]), normal(2, 5, 7, 3), tmp_path / "model.onnx")


def test_transposes_that_cancel_are_not_written(tmp_path: Path) -> None:
    graph = round_trip(Function(FUNCTIONS["transpose"]), normal(2, 5, 7, 3), tmp_path / "m.onnx")
    assert kinds(graph) == {"Transpose": 2, "MaxPool": 1}


def test_names_are_those_of_modules_and_parameters(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    graph = round_trip(nn.ResidualBlock(3, 6, stride=2, rng=rng()), normal(1, 4, 4, 3), path)
    names = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    assert names["0.0.0.weight"] == (6, 3, 3, 3)
    assert {"0.0.1.gamma", "0.0.1.mean", "0.0.4.variance"} <= names.keys()
    assert {"0.0.0/Conv", "0.1.pool/AveragePool"} <= {node.name for node in graph.node}
    first, *others = (d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim)
    assert (first, others) == ("batch", [4, 4, 3])
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_shared_parameter_is_written_once(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4, rng=rng())
    path = tmp_path / "model.onnx"
    graph = round_trip(nn.Sequential(layer, nn.Tanh(), layer), normal(2, 4), path)
    assert sorted(t.name for t in graph.initializer) == ["0.bias", "0.weight"]
    assert tn.onnx.load(path).size() == 20


def test_a_double_model_stays_double(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4, rng=rng()), nn.Tanh()).astype(np.float64)
    round_trip(model, normal(2, 3).astype(np.float64), tmp_path / "model.onnx")


def test_training_state_is_left_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4, rng=rng()), nn.Dropout(0.5, rng=rng())).train()
    tn.onnx.export(model, normal(2, 3), tmp_path / "model.onnx")
    assert model.training
    assert kinds(onnx.load(tmp_path / "model.onnx").graph) == {"Gemm": 1}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: ops.mse(x, x * 2), "Mse"),
        (lambda x: x * float(len(x.data)), "constant of mul.*batch"),
        (lambda x: x / float(abs(x.data).max()), "constant of div.*batch"),
        (lambda x: x[: len(x.data)], "index.*size of the batch"),
        (lambda x: x.reshape(2, -1), "does not run with a batch of 3"),
        (lambda x: x * 2 if len(x.data) == 2 else x, "mul.*size of the batch"),
        (lambda x: ops.conv2d(x.reshape(-1, 1, 3, 1), x.reshape(1, 1, 1, -1)), "initializer"),
    ],
)
def test_what_cannot_be_said_is_refused_and_nothing_written(
    function: Callable[[Any], Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        tn.onnx.export(Function(function), normal(2, 3), tmp_path / "model.onnx")
    assert not os.listdir(tmp_path)


def test_bad_examples_and_places_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 4, rng=rng())
    for example in (np.float32(1), np.zeros((0, 3), np.float32), np.zeros((2, 3), int)):
        with pytest.raises(ConfigError, match="example"):
            tn.onnx.export(model, example, tmp_path / "model.onnx")
    path = tmp_path / "model.onnx"
    tn.onnx.export(model, normal(2, 3), path)
    before = path.read_bytes()
    with pytest.raises(OutputError):
        tn.onnx.export(model, normal(2, 3), path / "inside a file.onnx")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_without_the_package_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tinynn\[onnx\]'"):
        tn.onnx.export(nn.Linear(3, 4, rng=rng()), normal(2, 3), tmp_path / "model.onnx")
    with pytest.raises(MissingPackageError, match=r"onnx\.load"):
        tn.onnx.load(tmp_path / "model.onnx")


class Made:
    """Layers that hypothesis chooses, with the number of channels that they leave."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.m = draw(st.integers(1, 4))
        self.first = self.m

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pair(self, low: int, high: int) -> tuple[int, int]:
        return self.number(low, high), self.number(low, high)

    def layer(self) -> Module:
        kind = self.draw(
            st.sampled_from(["conv", "depthwise", "transposed", "pool", "norm", "act", "branch"])
        )
        window = {"stride": self.pair(1, 3), "padding": "same"}
        m = self.m
        if kind == "conv":
            self.m = self.number(1, 5)
            dilation = self.pair(1, 2)
            bias = self.draw(st.booleans())
            options = {**window, "dilation": dilation, "bias": bias, "rng": rng(self.m)}
            return nn.Conv2d(m, self.m, self.pair(1, 4), **options)  # type: ignore[arg-type]
        if kind == "depthwise":
            multiplier = self.number(1, 2)
            self.m *= multiplier
            size = self.pair(1, 4)
            return nn.DepthwiseConv2d(m, size, multiplier=multiplier, **window, rng=rng(1))  # type: ignore[arg-type]
        if kind == "transposed":
            self.m = self.number(1, 4)
            stride = self.pair(1, 2)
            return nn.ConvTranspose2d(m, self.m, self.pair(1, 4), stride=stride, rng=rng(2))
        if kind == "pool":
            pool = self.draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
            return pool(self.pair(1, 4), **window)
        if kind == "norm":
            return nn.BatchNorm(m)
        if kind == "act":
            return self.draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softmax]))()
        joined = self.draw(st.sampled_from([nn.Add, nn.Concat]))
        body = nn.Sequential(nn.BatchNorm(m), nn.ReLU(), nn.Conv2d(m, m, 3, rng=rng(3)))
        self.m = m if joined is nn.Add else 2 * m
        return joined(body, nn.Shortcut(m, m))


@st.composite
def networks(draw: Any) -> tuple[Module, tuple[int, int, int]]:
    made = Made(draw)
    layers = [made.layer() for _ in range(made.number(1, 6))]
    if draw(st.booleans()):
        layers += [nn.GlobalAvgPool2d(), nn.Linear(made.m, 3, rng=rng(4))]
    return nn.Sequential(*layers), (made.number(1, 9), made.number(1, 9), made.first)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(networks(), st.integers(1, 3), st.integers(1, 4))
def test_random_networks_run_in_onnxruntime_and_come_back(
    tmp_path: Path, made: tuple[Module, tuple[int, int, int]], example: int, batch: int
) -> None:
    model, shape = made
    round_trip(model, normal(example, *shape), tmp_path / "model.onnx", batch)
