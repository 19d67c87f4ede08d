"""Plans compute what the models compute in eval mode, for every batch and number of threads."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from kernels import _jit, program
from tinynn import nn
from tinynn.deploy.steps import Scatter
from tinynn.errors import CompileError, ConfigError, DTypeError, ShapeError
from tinynn.models import thesis
from tinynn.nn.module import mode

Array = np.ndarray


@pytest.fixture(autouse=True)
def _serial_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that plans are compared with run serial kernels, which the plans run too."""
    monkeypatch.setattr(_jit, "PARALLEL_BYTES", 1 << 60)


def lived_in(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    """The model with running statistics, shifts and biases as training leaves them."""
    for _, module in model.named_modules():
        if isinstance(module, nn.BatchNorm):
            size = module.mean.size
            module.mean = rng.normal(0, 0.5, size).astype(np.float32)
            module.variance = rng.uniform(0.5, 2, size).astype(np.float32)
            module.gamma.mutate()[...] = rng.normal(1, 0.3, size)
            module.beta.mutate()[...] = rng.normal(0, 0.3, size)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.mutate()[...] = rng.normal(0, 0.3, bias.shape)
    return model.train()  # a plan is of the model in eval mode, whatever mode it is in


def expected(model: nn.Module, x: Array) -> Array:
    """What the model gives in eval mode."""
    with mode(model, training=False), tn.no_grad():
        return model(tn.Tensor(x)).numpy()


def close(y: Array, want: Array) -> bool:
    """Equal but for rounding, relative to the largest value."""
    return y.shape == want.shape and bool(np.abs(y - want).max() <= 1e-5 * np.abs(want).max())


def images(rng: np.random.Generator, batch: int, *shape: int) -> Array:
    return rng.normal(size=(batch, *shape)).astype(np.float32)


Make = Callable[[np.random.Generator], nn.Module]

MODELS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "autoencoder": (lambda r: thesis.autoencoder(channels=(8, 16, 8), rng=r), (28, 28, 1)),
    "conv": (lambda r: thesis.baseline("conv", rng=r), (12, 12, 3)),
    "composing": (lambda r: thesis.baseline("composing", rng=r), (12, 12, 3)),
    "separable": (lambda r: thesis.baseline("separable", rng=r), (12, 12, 3)),
    "nonlinear": (lambda r: thesis.baseline("nonlinear", rng=r), (12, 12, 3)),
    "small_cifar": (lambda r: thesis.small_cifar(rng=r), (16, 16, 3)),
    "resnet20": (lambda r: thesis.resnet20(rng=r), (16, 16, 3)),
    "bottleneck": (
        lambda r: nn.Sequential(
            nn.BottleneckBlock(16, 16, rng=r), nn.BottleneckBlock(16, 32, stride=2, rng=r)
        ),
        (8, 8, 16),
    ),
    "inception": (
        lambda r: nn.Sequential(
            nn.InceptionBlock(8, (4, 8, 8, 4), rng=r), nn.InceptionBlock(24, (8, 8, 4, 4), rng=r)
        ),
        (9, 7, 8),
    ),
    "summation": (
        lambda r: nn.Sequential(nn.Linear(2, 100, rng=r), nn.ReLU(), nn.Linear(100, 1, rng=r)),
        (2,),
    ),
    "layers": (
        lambda r: nn.Sequential(
            nn.DepthwiseConv2d(4, 3, multiplier=3, rng=r),
            nn.Tanh(),
            nn.Dropout(0.5, rng=r),
            nn.AvgPool2d(3, stride=2, padding="same"),
            nn.ReLU(),
            nn.Conv2d(12, 10, 3, stride=2, padding=((2, 0), (0, 1)), dilation=(1, 2), rng=r),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(20, 7, bias=False, rng=r),
            nn.BatchNorm(7),
            nn.Softmax(),
        ),
        (8, 8, 4),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_computes_what_the_model_does(name: str) -> None:
    make, shape = MODELS[name]
    rng = np.random.default_rng(0)
    model = lived_in(make(rng), rng)
    plan = tn.compile(model, images(rng, 2, *shape))
    assert model.training  # compiling left it as it was
    for batch in (1, 2, 9):
        x = images(rng, batch, *shape)
        before = x.copy()
        assert close(plan(x), expected(model, x))
        assert np.array_equal(x, before)
    assert plan(images(rng, 0, *shape)).shape == (0, *plan.output_shape)


def test_layers_are_merged() -> None:
    rng = np.random.default_rng(0)
    kinds = {
        name: [a.step.kind for a in tn.compile(make(rng), images(rng, 1, *s)).network.layers]
        for name, (make, s) in MODELS.items()
    }
    assert kinds["conv"] == ["conv", "pool", "conv", "pool", "conv", "globalsum", "linear"]
    assert kinds["autoencoder"] == ["conv"] * 2 + ["convtranspose"] * 2 + ["activation"]
    assert kinds["resnet20"] == (
        ["conv"] * 7
        + (["conv", "pool", "pad", "conv"] + ["conv"] * 4) * 2
        + ["globalsum", "linear"]
    )
    assert kinds["small_cifar"].count("scaleshift") == 7  # before depthwise and after the mean
    assert kinds["small_cifar"].count("scatter") == 2 and "pad" not in kinds["small_cifar"]
    # Only where a block adds the network's own input, which must stay, an addition is left.
    assert [name for name, some in kinds.items() if "add" in some] == ["bottleneck"]


class Residuals(nn.Module):
    """Additions of all kinds: of the input, of what is read later, of one thing to itself."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.a = nn.PointwiseConv2d(8, 8, rng=rng)
        self.b = nn.Conv2d(8, 8, 3, rng=rng)
        self.c = nn.Conv2d(8, 8, 3, rng=rng)

    def forward(self, x: tn.Tensor) -> tn.Tensor:
        y = self.a(x) + x
        z = self.b(y) + y  # a convolution must not write over what it reads
        u = tn.ops.relu(self.c(tn.ops.relu(z)) + z)
        v = self.a(u) + u * 2.0
        w = tn.ops.reshape(v, v.shape[0], 8, v.shape[1] * v.shape[2])
        return tn.ops.concat([w, tn.ops.reshape(u + u, w.shape) - 1.0, w + w], axis=1)


def test_values_that_are_still_needed_are_not_overwritten() -> None:
    rng = np.random.default_rng(0)
    model = Residuals(rng)
    plan = tn.compile(model, images(rng, 1, 4, 4, 8))
    for batch in (1, 5):
        x = images(rng, batch, 4, 4, 8)
        before = x.copy()
        assert close(plan(x), expected(model, x))
        assert np.array_equal(x, before)


def test_thinned_branches_are_scattered_onto_the_sum(tmp_path: Path) -> None:
    """What `blocks.thin` leaves; a scatter whose sum is rectified, or that no sum reads."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, rng=rng),
        nn.Add(
            nn.Sequential(nn.Conv2d(6, 2, 3, rng=rng), nn.Scatter((4, 1), 6)), nn.Shortcut(6, 6)
        ),
        nn.Add(nn.Shortcut(6, 6), nn.Sequential(nn.Conv2d(6, 1, 3, rng=rng), nn.Scatter((5,), 6))),
        nn.ReLU(),
        nn.Scatter((0, 7, 3, 2, 6, 5), 9),
        nn.GlobalAvgPool2d(),
        nn.Scatter((8, 0, 1, 2, 3, 4, 5, 6, 7), 10),
    )
    plan = tn.compile(model, images(rng, 1, 5, 4, 3), choose="dense")
    assert [(a.step.kind, a.step.onto_operand) for a in plan.network.layers] == [
        ("conv", False), ("conv", False), ("scatter", True), ("conv", False), ("scatter", False),
        ("add", False), ("scatter", False), ("globalsum", False), ("scatter", False),
    ]  # fmt: skip
    plan.save(tmp_path / "thin.plan")
    loaded = tn.Plan.load(tmp_path / "thin.plan")
    for batch in (1, 9):
        x = images(rng, batch, 5, 4, 3)
        assert close(plan(x), expected(model, x))
        assert np.array_equal(plan(x), loaded(x))
    for places in ([0, 0], [0, 6], [-1, 0], [0]):
        with pytest.raises(ShapeError, match="places"):
            Scatter(6).result([(5, 4, 2)], {"places": np.array(places, np.int32)})


@pytest.mark.parametrize(
    "identity", [nn.Flatten(), nn.Sequential(), nn.Dropout(0.5, rng=np.random.default_rng())]
)
def test_a_model_that_does_nothing_gives_a_copy(identity: nn.Module) -> None:
    x = images(np.random.default_rng(0), 3, 2, 2)
    plan = tn.compile(identity, x)
    y = plan(x)
    assert np.array_equal(y.reshape(x.shape), x) and not np.shares_memory(y, x)


def test_zeros_around_channels_are_not_added() -> None:
    rng = np.random.default_rng(0)
    for n, last in ((26, nn.Sequential()), (11, nn.ReLU())):
        halves = [nn.PointwiseConv2d(6, 6, rng=rng), nn.PointwiseConv2d(6, n, rng=rng)]
        for parts in ((halves[1], nn.Shortcut(6, n)), (nn.Shortcut(6, n), halves[1])):
            model = lived_in(nn.Sequential(halves[0], nn.Add(*parts), last), rng)
            plan, x = tn.compile(model, images(rng, 1, 5, 4, 6)), images(rng, 3, 5, 4, 6)
            kinds = [a.step.kind for a in plan.network.layers]
            # A rectified sum needs all channels.
            assert kinds[1:] == (["conv", "scatter"] if n == 26 else ["pad", "conv"])
            assert close(plan(x), expected(model, x))


@pytest.mark.parametrize("window", [(2, 2), (2, 4), (1, 3)])
def test_means_of_whole_windows_are_those_of_the_model(window: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for padding, shape in (("valid", (9, 11, 17)), ("same", (7, 8, 17))):
        model = nn.Sequential(nn.AvgPool2d(window, padding=padding), nn.BatchNorm(17))
        lived_in(model, rng)
        x = images(rng, 3, *shape)
        plans = [tn.compile(model, x, threads=n) for n in (1, tn.max_threads())]
        assert close(plans[0](x), expected(model, x))
        assert np.array_equal(plans[0](x[:1]), plans[1](x[:1]))


@pytest.mark.parametrize("name", ["small_cifar", "bottleneck", "layers"])
def test_all_threads_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "small_cifar":  # kernels use threads inside, too
        monkeypatch.setattr(program, "_PARALLEL_WORK", 10_000)
    rng = np.random.default_rng(0)
    before = tn.get_threads()
    make, shape = MODELS[name]
    model = lived_in(make(rng), rng)
    x = images(rng, 9, *shape)
    plans = [tn.compile(model, x, threads=n, choose="dense") for n in (1, tn.max_threads())]
    for batch in (1, 9):
        results = [plan(x[:batch]) for plan in (*plans, plans[0])]
        assert all(np.array_equal(y, results[0]) for y in results)
    assert tn.get_threads() == before


@pytest.mark.parametrize("name", ["layers", "autoencoder", "nonlinear"])
def test_a_plan_keeps_what_its_program_has_the_address_of(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays: list[weakref.ref[Array]] = []
    argument = program.Program._argument

    def recorded(self: program.Program, arg: Any) -> Any:
        if isinstance(arg, np.ndarray):
            arrays.append(weakref.ref(arg))
        return argument(self, arg)

    rng = np.random.default_rng(0)
    make, shape = MODELS[name]
    model, x = lived_in(make(rng), rng), images(rng, 2, *shape)
    plan = tn.compile(model, x, choose="dense")
    with monkeypatch.context() as patch:
        patch.setattr(program.Program, "_argument", recorded)
        plan(x)
    for module in [m for n, m in sys.modules.items() if n.startswith("kernels.")]:
        for value in vars(module).values():
            if getattr(value, "cache_parameters", dict)().get("maxsize"):
                value.cache_clear()  # as when other shapes have pushed these out
    gc.collect()
    assert arrays and all(a() is not None for a in arrays)


def test_a_plan_keeps_nothing_of_the_model() -> None:
    rng = np.random.default_rng(0)
    model = lived_in(thesis.baseline("separable", rng=rng), rng)
    x = images(rng, 2, 12, 12, 3)
    plan = tn.compile(model, x)
    y = plan(x)
    for p in model.parameters():
        p.mutate()[...] = np.nan
    for _, b in model.named_buffers():
        b[...] = np.nan
    assert np.array_equal(plan(x), y)


def test_nan_passes() -> None:
    rng = np.random.default_rng(0)
    x = images(rng, 2, 12, 12, 3)
    plan = tn.compile(thesis.baseline("conv", rng=rng), x)
    x[1, 3, 3, 0] = np.nan
    y = plan(x)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).any()


class Applies(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[tn.Tensor], tn.Tensor]) -> None:
        self.function = function

    def forward(self, x: tn.Tensor) -> tn.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: tn.ops.exp(x), "Exp"),
        (lambda x: x * x, "Mul"),
        (lambda x: tn.ops.sum(x, 0), "Sum"),
        (lambda x: tn.ops.transpose(x, (1, 0)), "Transpose"),
        (lambda x: tn.ops.concat([x, x], 0), "Concat"),
        (lambda x: tn.ops.pad(x, [(1, 0), (0, 0)]), "Pad"),
        (lambda x: 1.0 / x, "Div"),
        (lambda x: x + np.ones((3, 4), np.float32), "Add"),
    ],
)
def test_what_no_plan_expresses_is_refused_by_name(
    function: Callable[[tn.Tensor], tn.Tensor], named: str
) -> None:
    with pytest.raises(CompileError, match=named):
        tn.compile(Applies(function), np.ones((3, 4), np.float32))


def test_arithmetic_with_constants() -> None:
    rng = np.random.default_rng(0)
    c = rng.normal(1, 0.1, 4).astype(np.float32)

    def function(x: tn.Tensor) -> tn.Tensor:
        return -(((2.0 - x) * c + 1.0 - c) / 3.0) @ np.ones((4, 2), np.float32)

    model, x = Applies(function), images(rng, 5, 4)
    assert close(tn.compile(model, x)(x), expected(model, x))


def test_wrong_input_is_refused() -> None:
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(4, 3, rng=rng))
    plan = tn.compile(net, np.ones((2, 4), np.float32))
    with pytest.raises(ShapeError, match="3"):
        plan(np.ones((2, 3), np.float32))
    with pytest.raises(ShapeError):
        plan(np.float32(1))
    with pytest.raises(DTypeError, match="float64"):
        plan(np.ones((2, 4)))
    with pytest.raises(DTypeError, match="float64"):
        tn.compile(net.astype(np.float64), np.ones((2, 4)))
    with pytest.raises(CompileError, match="batch"):
        tn.compile(net, np.ones((0, 4), np.float32))
    for threads in (0, 1.5, True, "1"):
        with pytest.raises(ConfigError, match="threads"):
            tn.compile(net, np.ones((2, 4), np.float32), threads=threads)  # type: ignore[arg-type]
    assert plan(np.asfortranarray(np.ones((2, 4), np.float32))).shape == (2, 3)
    assert np.array_equal(plan(tn.Tensor(np.ones((2, 4), np.float32))), plan(np.ones((2, 4), "f")))


def test_a_plan_is_evaluated_as_its_model() -> None:
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(4, 3, rng=rng)).eval()
    data = [(images(rng, 5, 4), rng.integers(0, 3, 5)) for _ in range(2)]
    plan = tn.compile(net, data[0][0])
    outputs, labels = tn.predict(plan, data)
    want, same = tn.predict(net, data)
    assert close(outputs, want) and np.array_equal(labels, same)
    assert tn.accuracy(plan, data) == tn.accuracy(net, data) == tn.accuracy(want, labels)
    loss = tn.evaluate(plan, data, tn.softmax_cross_entropy)
    assert abs(loss - tn.evaluate(net, data, tn.softmax_cross_entropy)) < 1e-6


def test_a_profile_has_every_layer_and_its_work() -> None:
    rng = np.random.default_rng(0)
    model = thesis.baseline("conv", rng=rng)
    x = images(rng, 3, 12, 12, 3)
    plan = tn.compile(model, x)
    profile = plan.profile(x, rounds=2)
    assert [r.kind for r in profile.layers] == [a.step.kind for a in plan.network.layers]
    assert sum(r.macs for r in profile.layers) == 3 * plan.macs == tn.count(model, x).macs
    assert all(r.seconds >= 0 for r in profile.layers)
    assert str(profile).count("\n") == len(profile.layers) + 1
    assert str(plan).count("Conv(") == 3


# --- random networks ------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A chain of random layers and residual or parallel parts over images."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    size, widths = draw(st.integers(3, 9)), st.sampled_from([3, 8, 16])
    m = first = draw(widths)
    parts: list[nn.Module] = []

    def unit(m: int, n: int) -> list[nn.Module]:
        options = {
            "conv": lambda: nn.Conv2d(
                m,
                n,
                draw(st.sampled_from([1, 2, 3, (1, 3)])),
                dilation=draw(st.sampled_from([1, 2])),
                bias=draw(st.booleans()),
                rng=rng,
            ),
            "separable": lambda: nn.SeparableConv2d(
                m, n, 3, nonlinear=draw(st.booleans()), rng=rng
            ),
            "transpose": lambda: nn.ConvTranspose2d(m, n, 3, rng=rng),
        }
        unit = [options[draw(st.sampled_from(sorted(options)))]()]
        if draw(st.booleans()):
            unit.append(nn.BatchNorm(n))
        if draw(st.booleans()):
            unit.append(nn.ReLU())
        return unit

    for _ in range(draw(st.integers(1, 4))):
        n = draw(widths)
        what = draw(st.sampled_from(["unit", "residual", "concat", "pool", "before"]))
        if what == "unit":
            parts += unit(m, n)
            m = n
        elif what == "residual":
            parts.append(nn.Add(nn.Sequential(*unit(m, n), *unit(n, m)), nn.Sequential()))
        elif what == "concat":
            parts.append(nn.Concat(nn.Sequential(*unit(m, n)), nn.Sequential()))
            m += n
        elif what == "pool":
            pool = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
            parts.append(pool(2, stride=draw(st.sampled_from([1, 2])), padding="same"))
        else:
            parts += [nn.BatchNorm(m), nn.ReLU()]
    if draw(st.booleans()):
        parts += [nn.GlobalAvgPool2d(), nn.Linear(m, 5, rng=rng)]
    return lived_in(nn.Sequential(*parts), rng), (size, size, first)


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(1, 5))
def test_random_networks(case: tuple[nn.Module, tuple[int, ...]], batch: int) -> None:
    model, shape = case
    rng = np.random.default_rng(batch)
    plan = tn.compile(model, images(rng, 2, *shape))
    x = images(rng, batch, *shape)
    assert close(plan(x), expected(model, x))
