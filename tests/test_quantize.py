"""Quantisation: grids, integers, passes, fine-tuning, honest sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn, ops
from tinynn.compress import calibrate, quantize
from tinynn.compress.batchnorm import fold_batchnorm
from tinynn.compress.integers import Grid, grids, layer, nbytes, pack, tensors, unpack
from tinynn.compress.reestimate import reestimate
from tinynn.errors import ConfigError, DataError, GraphError, PruneError
from tinynn.graph import trace
from tinynn.models import thesis
from tinynn.nn.module import Parameter
from tinynn.nn.quantized import (
    ActivationQuantizer,
    DynamicQuantizer,
    Quantized,
    Quantizer,
    WeightQuantizer,
    affine,
)
from tinynn.observe import observe
from tinynn.tensor import recording

Array = np.ndarray


def net(seed: int = 0) -> nn.Sequential:
    """A bit of everything, two classes, settled batch norms."""
    rng = np.random.default_rng(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False, rng=rng),
        nn.BatchNorm(6),
        nn.ReLU(),
        nn.SeparableResidualBlock(6, 8, stride=2, rng=rng),
        nn.Concat(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(8, 3, 3, stride=2, rng=rng)),
        nn.ResidualBlock(19, 19, rng=rng),
        nn.GlobalAvgPool2d(),
        nn.Linear(19, 2, rng=rng),
    )
    for _, m in model.named_modules():
        if isinstance(m, nn.BatchNorm):
            m.mean = rng.normal(0, 0.3, m.gamma.size).astype(np.float32)
            m.variance = rng.uniform(0.5, 2, m.gamma.size).astype(np.float32)
            m.beta.mutate()[...] = rng.normal(0, 0.3, m.gamma.size)
    return model.eval()


def images(n: int = 12, seed: int = 1, channels: int = 2) -> Array:
    return np.random.default_rng(seed).standard_normal((n, 8, 8, channels), dtype=np.float32)


def answers(model: nn.Module, x: Array) -> Array:
    with tn.no_grad():
        return model.eval()(tn.Tensor(x)).numpy()


def noise(model: nn.Module, reference: nn.Module, x: Array) -> float:
    """The error of the answers, as a share of their deviation."""
    expected = answers(reference, x)
    return float(np.sqrt(np.mean((answers(model, x) - expected) ** 2)) / expected.std())


def quantizers(model: nn.Module) -> list[Quantizer]:
    return [m for _, m in model.named_modules() if isinstance(m, Quantizer)]


# --- grids ----------------------------------------------------------------------------------------

numbers = st.floats(-1e4, 1e4, width=32)


@given(ends=st.tuples(numbers, numbers), bits=st.integers(2, 8), x=st.lists(numbers, min_size=1))
@settings(max_examples=200, deadline=None)
def test_rounding_costs_half_a_step_inside_the_range_and_zero_is_exact(
    ends: tuple[float, float], bits: int, x: list[float]
) -> None:
    least, most = min(ends), max(ends)
    scale, low, high = affine(least, most, bits)
    assert high[0] - low[0] == 2**bits - 1 and low[0] <= 0 <= high[0]
    assert low[0] == np.rint(low[0])
    array = np.array([*x, 0.0], np.float32)
    y = ops.fake_quantize(array, scale, low, high).numpy()
    assert y[-1] == 0
    step = float(scale[0])
    inside = (array >= step * low[0]) & (array <= step * high[0])
    assert (np.abs(y - array)[inside] <= step * (0.5 + 1e-4)).all()
    cut = np.where(array < 0, step * low[0], step * high[0])
    np.testing.assert_allclose(y[~inside], cut[~inside], rtol=1e-6)
    # the ends of the range moved by half a step at the most, where it reached over 0
    if min(most, 1e-3) > 0 > least and step > 1e-30:
        assert abs(step * low[0] - least) <= 0.51 * step
        assert abs(step * high[0] - most) <= 0.51 * step
    np.testing.assert_array_equal(ops.fake_quantize(y, scale, low, high).data, y)


def test_ties_go_to_even_as_in_the_kernels() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300], np.float32)
    y = ops.fake_quantize(x, [1.0], [-128.0], [127.0])
    np.testing.assert_array_equal(y.data, [0, 2, 2, 0, -2, 127, -128])


def test_the_gradient_goes_straight_through_inside_the_range() -> None:
    x = tn.Tensor([-9.0, -1.3, 0.2, 1.9, 9.0], requires_grad=True)
    scale = tn.Tensor([0.5], requires_grad=True)
    out = ops.fake_quantize(x, scale, [-4.0], [3.0], gain=0.25)
    weights = np.array([1, 2, 3, 4, 5], np.float32)
    out.backward(weights)
    np.testing.assert_array_equal(x.grad, [0, 2, 3, 0, 0])  # 1.9 is 3.8 steps: rounds beyond 3
    n = np.array([-4, -3, 0, 3, 3])
    slope = np.where([0, 1, 1, 0, 0], n - np.array([0, -1.3, 0.2, 0, 0]) / 0.5, n)
    np.testing.assert_allclose(scale.grad, [0.25 * (weights * slope).sum()], rtol=1e-6)


def test_halves_are_those_of_numpy_and_saturate() -> None:
    x = np.array([1 / 3, -1e-8, 65519.0, 1e6, -1e6], np.float32)
    y = tn.Tensor(x, requires_grad=True)
    out = ops.round_to_half(y)
    np.testing.assert_array_equal(out.data[:3], x[:3].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(out.data[3:], [65504, -65504])
    out.backward(np.ones(5))
    np.testing.assert_array_equal(y.grad, [1, 1, 0, 0, 0])


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="scales > 0"):
        ops.fake_quantize([1.0], [0.0], [-1.0], [1.0])
    with pytest.raises(ConfigError, match="low <= 0 <= high"):
        Quantizer(np.ones(1), np.ones(1), np.ones(1))


@given(bits=st.integers(1, 8), size=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_and_back(bits: int, size: int, seed: int) -> None:
    top = 1 << (bits - 1)
    values = np.random.default_rng(seed).integers(-top, top, size).astype(np.int8)
    packed = pack(values, bits)
    assert packed.nbytes == -(-size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, size), values)
    with pytest.raises(ConfigError, match="numbers that they hold"):
        pack(np.array([top]), bits)


# --- passes ---------------------------------------------------------------------------------------


def test_8_bits_are_close_to_float_and_the_model_given_is_not_touched() -> None:
    model, x = net(), images()
    before = model.state_dict()
    byte = quantize.int8(model, [x])
    assert noise(byte, model, x) < 0.05
    assert noise(quantize.dynamic(model, x[:1]), model, x) < 0.05
    assert noise(quantize.float16(model, x[:1]), model, x) < 2e-3
    assert all(np.array_equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, Quantized) for _, m in model.named_modules())


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "kl", "aciq"])
def test_every_calibration_gives_a_model_that_works(ranges: str) -> None:
    model, x = net(), images()
    found = getattr(calibrate, ranges)
    byte = quantize.int8(model, [x], ranges=found if ranges in ("minmax", "mse", "kl") else found())
    assert noise(byte, model, x) < (0.4 if ranges in ("kl", "aciq") else 0.08)


@pytest.mark.parametrize("kind", ["small", "separable", "autoencoder"])
def test_the_models_of_the_thesis(kind: str) -> None:
    rng = np.random.default_rng(0)
    model: nn.Module
    if kind == "small":
        model = thesis.small_cifar(rng=rng)
    elif kind == "separable":
        model = thesis.baseline("nonlinear", rng=rng)
    else:
        model = thesis.autoencoder(channels=(4, 6, 4), rng=rng)
    x = images(8, channels=1 if kind == "autoencoder" else 3)
    byte = quantize.int8(model.eval(), [x])
    assert noise(byte, model, x) < 0.06
    graph = trace(byte, x[:1])
    found = grids(graph, byte)
    for node in graph.nodes:
        if node.op.name in ("conv2d", "linear", "depthwise_conv2d", "scale_shift", "add"):
            data = node.inputs[: 2 if node.op.name == "add" else 1]
            assert all(v.index in found for v in data), node


def runs(model: nn.Module, x: Array) -> list[tuple[Any, list[Array], Array]]:
    """(op, operands, result) of everything that the model computes."""
    found: list[tuple[Any, list[Array], Array]] = []
    with (
        tn.no_grad(),
        recording(lambda op, i, o: found.append((op, [t.numpy() for t in i], o.numpy()))),
    ):
        model.eval()(tn.Tensor(x))
    return found


def test_every_layer_is_within_a_step_of_integer_arithmetic() -> None:
    model, x = net(), images()
    byte = quantize.int8(model, [x])
    graph = trace(byte, x)
    found, computed = grids(graph, byte), runs(byte, x)
    modules = dict(byte.named_modules())
    readers = {v.index: n for n in graph.nodes for v in n.inputs}
    checked = exact = total = 0
    for node, (op, operands, _) in zip(graph.nodes, computed, strict=True):
        module = modules[node.path]
        if not (isinstance(module, Quantized) and module.weight is not None):
            continue
        grid = found[node.inputs[0].index]
        integers = layer(module, float(grid.scale))
        # float64 products of whole numbers are exact
        n = np.rint(operands[0] / grid.scale).astype(np.float64)
        assert grid.low <= n.min() and n.max() <= grid.high
        plain = replace(op, relu=False)
        if op.name == "scale_shift":
            s = n * integers.weight
        else:
            s = plain.forward(n, integers.weight.astype(np.float64))[0]
        s = s if integers.bias is None else s + integers.bias
        assert np.abs(s).max() < 2**31
        after = readers.get(node.output.index)
        if after is None:  # the last layer: float32
            result = s.astype(np.float32) * (integers.scale * grid.scale)
            np.testing.assert_allclose(result, computed[-1][2], rtol=1e-4, atol=1e-5)
            continue
        assert after.op.name == "fake_quantize"
        y = found[after.output.index]
        multiplier = (float(grid.scale) * integers.scale.astype(np.float64) / y.scale).astype("f4")
        f = s.astype(np.float32) * multiplier
        low = 0 if getattr(op, "relu", False) else y.low
        expected = np.rint(np.clip(f, low, y.high))
        place = graph.nodes.index(after)
        got = np.rint(computed[place][2] / y.scale)
        assert np.abs(got - expected).max() <= 1
        exact, total, checked = exact + (got == expected).sum(), total + got.size, checked + 1
    assert checked == 9 and exact > 0.995 * total


def test_what_a_relu_follows_needs_no_grid_below_zero() -> None:
    model, x = net(), images()
    byte = quantize.int8(model, [x])
    found = grids(trace(byte, x[:1]), byte)
    lows = [g.low for g in found.values()]
    assert 0 in lows and min(lows) < 0
    assert all(isinstance(g, Grid) and g.zero == -g.low for g in found.values())
    block = dict(byte.named_modules())["layer.5.0"]
    assert isinstance(block, Quantized) and isinstance(block.output, Quantizer)
    assert block.output.low[0] == 0  # the sum, with the ReLU behind it


def test_concatenated_values_share_one_grid() -> None:
    model, x = net(), images()
    byte = quantize.int8(model, [x])
    graph = trace(byte, x[:1])
    found = grids(graph, byte)
    (concat,) = (n for n in graph.nodes if n.op.name == "concat")
    assert len({found[v.index] for v in concat.inputs}) == 1
    assert found[concat.output.index] == found[concat.inputs[0].index]


def test_one_grid_for_each_channel_beats_one_for_all() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(20, 8, rng=rng), nn.ReLU(), nn.Linear(8, 4, rng=rng)).eval()
    spread = np.logspace(-3, 0, 8).astype(np.float32)
    model.parameters()[0].mutate()[...] *= spread
    model.parameters()[2].mutate()[...] /= spread[:, None]
    x = rng.standard_normal((64, 20), dtype=np.float32)
    errors = {}
    for per_channel in (True, False):
        byte = quantize.dynamic(model, x[:1], quantize.Scheme(per_channel=per_channel))
        (first, *_) = (m for _, m in byte.named_modules() if isinstance(m, WeightQuantizer))
        assert first.scale.size == (8 if per_channel else 1)
        weight = model.parameters()[0].data
        scale, hidden = np.asarray(first.scale), np.maximum(x @ weight, 0)
        rounded = np.maximum(x @ (np.rint(weight / scale) * scale), 0)
        errors[per_channel] = float(np.mean(((rounded - hidden) / spread) ** 2))
    assert errors[True] < 0.01 * errors[False]


def test_ranges_at_run_time_follow_each_image() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(5, 3, rng=rng)).eval()
    x = rng.standard_normal((7, 5), dtype=np.float32)
    byte = quantize.dynamic(model, x)
    for size in (1.0, 1e-3, 1e3):
        np.testing.assert_allclose(
            answers(byte, size * x), answers(model, size * x), atol=0.05 * size
        )
    mixed = x * np.logspace(-3, 3, 7, dtype=np.float32)[:, None]
    together, alone = answers(byte, mixed), [answers(byte, row[None])[0] for row in mixed]
    np.testing.assert_allclose(together, alone, rtol=1e-5)  # whatever else is in the batch
    found = grids(trace(byte, x), byte)
    assert not found  # nothing is stored
    assert isinstance(byte[0].input, DynamicQuantizer)  # type: ignore[union-attr]


def test_an_observer_can_serve_several_calibrations() -> None:
    model, x = net(), images()
    folded = fold_batchnorm(model, x[:1])
    seen = observe(folded, [x], bins=2048)
    one, other = (quantize.int8(folded, seen, ranges=r) for r in (calibrate.minmax, calibrate.mse))
    direct = quantize.int8(model, [x], ranges=calibrate.mse)
    np.testing.assert_array_equal(answers(other, x), answers(direct, x))
    assert not np.array_equal(answers(one, x), answers(other, x))
    with pytest.raises(PruneError, match="belongs to another model"):
        quantize.int8(net(3), seen)
    with pytest.raises(GraphError, match="no histogram"):
        quantize.int8(folded, observe(folded, [x]))
    with pytest.raises(ConfigError, match="fold_batchnorm"):
        quantize.int8(model, observe(model, [x], bins=64))


def test_what_cannot_be_quantised_is_refused_by_name() -> None:
    rng = np.random.default_rng(0)

    class Own(nn.Module):
        def __init__(self) -> None:
            self.w = Parameter(rng.standard_normal((3, 2), np.float32))

        def forward(self, x: tn.Tensor) -> tn.Tensor:
            return ops.matmul(x, self.w)

    with pytest.raises(ConfigError, match=r"'0' .*runs matmul with '0\.w'.*using"):
        quantize.int8(nn.Sequential(Own()), [np.ones((2, 3), np.float32)])
    with pytest.raises(ConfigError, match="without"):
        quantize.dynamic(nn.Sequential(nn.ReLU()), np.ones((1, 3), np.float32))
    with pytest.raises(DataError):
        quantize.int8(net(), [])
    for run in (quantize.int8, quantize.low_bit, observe, reestimate):
        with pytest.raises(DataError, match=r"required an iterable of batches.*\[x\]"):
            run(net(), images())
    with pytest.raises(ConfigError, match=r"2 \.\.\. 8 bits"):
        quantize.low_bit(net(), [images()], weights=1)
    with pytest.raises(ConfigError, match="no stored grids"):
        quantize.trainable(net())
    big = nn.Linear(2, 2, rng=rng)
    big.weight.mutate()[0, 0] = 1e6
    with pytest.raises(ConfigError, match="65504"):
        quantize.float16(big)


def test_modules_of_others_round_the_inputs_of_the_layers_inside() -> None:
    rng = np.random.default_rng(0)

    class Gate(nn.Module):
        def __init__(self) -> None:
            self.a, self.b = nn.Linear(4, 4, rng=rng), nn.Linear(4, 2, rng=rng)

        def forward(self, x: tn.Tensor) -> tn.Tensor:
            return self.b(ops.tanh(self.a(x)) * 2.0)

    model = Gate().eval()
    x = rng.standard_normal((32, 4), dtype=np.float32)
    byte = quantize.int8(model, [x])
    assert noise(byte, model, x) < 0.05
    inner = dict(byte.named_modules())
    assert isinstance(inner["layer.b"], Quantized) and inner["layer.b"].input is not None
    assert isinstance(inner["layer.a"], Quantized) and inner["layer.a"].output is None


def test_a_channel_of_zeros_keeps_its_bias() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(4, 3, rng=rng), nn.ReLU(), nn.Linear(3, 2, rng=rng)).eval()
    weight, bias = model.parameters()[:2]
    weight.mutate()[:, 1], weight.mutate()[:, 2] = 0, 1e-20
    bias.mutate()[...] = [0.1, 0.7, 2.3]
    x = rng.standard_normal((64, 4), dtype=np.float32)
    byte = quantize.int8(model, [x])
    assert noise(byte, model, x) < 0.05
    first = dict(byte.named_modules())["layer.0"]
    assert isinstance(first, Quantized) and isinstance(byte, Quantized)
    assert isinstance(byte.input, Quantizer)
    x_scale = float(np.asarray(byte.input.scale)[0])
    integers = layer(first, x_scale)
    assert integers.bias is not None
    np.testing.assert_allclose(
        integers.bias * integers.scale.astype(np.float64) * x_scale, bias.data, rtol=2e-3
    )


# --- low bits -------------------------------------------------------------------------------------


def wide(seed: int = 0) -> tuple[nn.Module, Array]:
    """A net whose weights and activations have long tails, and inputs of mean 1."""
    rng = np.random.default_rng(seed)
    model = nn.Sequential(
        nn.Linear(64, 96, rng=rng), nn.ReLU(), nn.Linear(96, 96, rng=rng), nn.ReLU(),
        nn.Linear(96, 96, rng=rng), nn.ReLU(), nn.Linear(96, 8, rng=rng),
    ).eval()  # fmt: skip
    for p in model.parameters():
        if p.ndim == 2:
            p.mutate()[...] = rng.laplace(0, 1 / np.sqrt(2 * len(p)), p.shape)
            p.mutate()[...] *= rng.uniform(0.2, 2, p.shape[1])
    x = 1 + rng.laplace(0, 1, (256, 64)).astype(np.float32)
    return model, x


def test_clipping_allocation_and_correction_each_help_4_bit_weights() -> None:
    errors: dict[str, list[float]] = {}
    for seed in range(4):
        model, x = wide(seed)
        for name, options in {
            "nothing": {"clip": calibrate.largest, "allocate": False, "correct": False},
            "aciq": {"allocate": False, "correct": False},
            "mmse": {"clip": calibrate.weights_mmse, "allocate": False, "correct": False},
            "allocate": {"clip": calibrate.largest, "allocate": True, "correct": False},
            "correct": {"clip": calibrate.largest, "allocate": False, "correct": True},
            "all": {},
        }.items():
            nibble = quantize.low_bit(model, [x], **options)  # type: ignore[arg-type]
            errors.setdefault(name, []).append(noise(nibble, model, x))
    mean = {name: float(np.mean(e)) for name, e in errors.items()}
    for name in ("aciq", "mmse", "allocate", "correct", "all"):
        assert mean[name] < mean["nothing"], (name, mean)


def test_correction_restores_the_mean_and_the_deviation() -> None:
    model, x = wide()
    nibble = quantize.low_bit(model, [x], allocate=False)
    plain = quantize.low_bit(model, [x], allocate=False, correct=False)
    inner = {k: dict(m.named_modules())["layer.2"] for k, m in (("c", nibble), ("p", plain))}
    before = model.parameters()[2].data
    for key, part in inner.items():
        assert isinstance(part, Quantized) and isinstance(part.weight, WeightQuantizer)
        integers = layer(part)
        after = integers.weight * integers.scale
        ratio = after.std(axis=0) / before.std(axis=0)
        assert (np.abs(ratio - 1).max() < 1e-3) == (key == "c")
    hidden = np.maximum(answers(nn.Sequential(model[0]), x), 0)  # type: ignore[index]
    for key, limit in (("c", 0.005), ("p", 1.0)):
        part = inner[key]
        assert isinstance(part, Quantized)
        integers, own = layer(part), part.layer
        got = hidden @ (integers.weight * integers.scale) + own.bias.data  # type: ignore
        wanted = hidden @ before + model.parameters()[3].data
        off = np.abs((got - wanted).mean(axis=0)).max()
        assert off < limit
        if key == "p":
            assert off > 0.01


def test_4_bit_activations_need_their_cut() -> None:
    model, x = wide()
    options = {"weights": 8, "activations": 4, "allocate": False, "correct": False}
    cut = quantize.low_bit(model, [x], **options)  # type: ignore[arg-type]
    whole = quantize.low_bit(model, [x], ranges=calibrate.minmax, **options)  # type: ignore
    assert noise(cut, model, x) < 0.8 * noise(whole, model, x)
    inner = [m for m in quantizers(cut) if isinstance(m, ActivationQuantizer)]
    steps = [int(m.high[0] - m.low[0]) for m in inner]
    assert sorted(steps) == [15, 15, 15, 255]  # the input has 8 bits


# --- fine-tuning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["fixed", "running", "learned"])
def test_fine_tuning_wins_back_what_3_bits_cost(ranges: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 8), dtype=np.float32)
    y = np.tanh(x @ rng.standard_normal((8, 2)).astype(np.float32))
    model = nn.Sequential(nn.Linear(8, 32, rng=rng), nn.ReLU(), nn.Linear(32, 2, rng=rng))
    data = tn.Batches(x, y, size=64, rng=rng)
    adam = tn.Adam(model.parameters(), lr=0.01)
    tn.fit(model, data, loss=tn.mse, optimizer=adam, epochs=60)
    scheme = quantize.Scheme(bits=3, first_last=3, clip=calibrate.weights_mmse)
    coarse = quantize.int8(model.eval(), [x], scheme=scheme, activations=4)
    tuned = quantize.trainable(coarse, ranges)
    before = [np.array(m.scale) for m in quantizers(tuned)]
    adam = tn.Adam(tuned.parameters(), lr=0.003)
    tn.fit(tuned, data, loss=tn.mse, optimizer=adam, epochs=40)

    def error(m: nn.Module) -> float:
        return float(np.mean((answers(m, x) - y) ** 2))

    assert error(tuned) < (0.6 if ranges == "learned" else 0.95) * error(coarse)
    moved = [not np.array_equal(a, m.scale) for a, m in zip(before, quantizers(tuned), strict=True)]
    assert all(moved) if ranges != "fixed" else not any(moved)
    tuned = quantize.trainable(tuned, "fixed")
    assert not any(isinstance(m.scale, Parameter) for m in quantizers(tuned))


def test_running_ranges_move_towards_what_comes() -> None:
    quantizer = ActivationQuantizer(-1, 1, 8, momentum=0.5)
    quantizer.train_ranges("running")
    x = tn.Tensor(np.array([-3, 5], np.float32))
    quantizer(x)
    assert (quantizer.least[0], quantizer.most[0]) == (-2, 3)
    quantizer.eval()
    quantizer(x)
    assert quantizer.most[0] == 3
    np.testing.assert_array_equal(quantizer.scale, affine(-2, 3, 8)[0])


# --- files and sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["int8", "low_bit", "dynamic", "float16", "learned"])
def test_saved_and_loaded_it_gives_the_same_bits(how: str, tmp_path: Path) -> None:
    model, x = net(), images()
    made = {
        "int8": lambda: quantize.int8(model, [x]),
        "low_bit": lambda: quantize.low_bit(model, [x], activations=4),
        "dynamic": lambda: quantize.dynamic(model, x[:1]),
        "float16": lambda: quantize.float16(model, x[:1]),
        "learned": lambda: quantize.trainable(quantize.int8(model, [x]), "learned"),
    }[how]()
    tn.save(tmp_path / "q.safetensors", made)
    loaded = tn.load(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(answers(loaded, x), answers(made, x))
    assert nbytes(loaded) == nbytes(made)


def test_the_honest_size() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(100, 60, rng=rng), nn.ReLU(), nn.Linear(60, 20, rng=rng),
                          nn.ReLU(), nn.Linear(20, 10, rng=rng)).eval()  # fmt: skip
    model.parameters()[2].mutate()[:, :5] *= 20
    x = rng.standard_normal((32, 100), dtype=np.float32)
    weights, biases = 6000 + 1200 + 200, 90
    assert nbytes(model) == 4 * (weights + biases)
    assert nbytes(quantize.float16(model)) == 2 * (weights + biases)
    byte = quantize.int8(model, [x])
    grid_bytes = 3 * (4 + 2)  # input and two hidden values: scale, zero point, bits
    assert nbytes(byte) == weights + 4 * biases + 4 * biases + 3 + grid_bytes
    nibble = quantize.low_bit(model, [x], allocate=False)
    assert nbytes(nibble) == 6200 + 600 + 8 * biases + 3 + grid_bytes
    allocated = tensors(quantize.low_bit(model, [x]))
    bits = allocated["layer.2.weight.bits"]
    assert bits.shape == (20,) and set(bits.tolist()) <= set(range(2, 9))
    each = [-(-60 * int((bits == b).sum()) * int(b) // 8) for b in np.unique(bits)]
    assert allocated["layer.2.weight"].nbytes == sum(each)
    assert all(a.dtype != np.float64 for a in allocated.values())


def test_layers_with_few_scales_take_fewer_bytes_and_lose_little() -> None:
    model = net()
    own, few = (
        quantize.int8(model, [images(40)], scheme=quantize.Scheme(scales=n)) for n in (0, 2)
    )
    for _, m in few.named_modules():
        if isinstance(m, WeightQuantizer):
            assert len(np.unique(m.scale)) <= 2
    assert noise(few, model, images(20, 5)) < 2 * noise(own, model, images(20, 5)) + 0.01
    corrected = quantize.low_bit(model, [images(40)], scales=2, allocate=False)
    scales = [m.scale for _, m in corrected.named_modules() if isinstance(m, WeightQuantizer)]
    assert all(len(np.unique(s)) <= 2 for s in scales)
    rng = np.random.default_rng(0)
    broad = nn.Sequential(nn.Linear(4, 512, rng=rng), nn.ReLU(), nn.Linear(512, 2, rng=rng))
    x = rng.normal(size=(8, 4)).astype(np.float32)
    wide, narrow = (
        tn.compile(quantize.int8(broad, [x], scheme=quantize.Scheme(scales=n)), x[:1]).nbytes
        for n in (0, 4)
    )
    assert narrow < wide - 512 * 3
    with pytest.raises(ConfigError, match="scales"):
        quantize.Scheme(scales=-1)


def test_a_quantised_model_is_quantised_anew_from_its_own_weights() -> None:
    model, x = net(), images(40)
    byte, half = quantize.int8(model, [x]), quantize.float16(model, x)
    wanted = byte.eval()(tn.Tensor(x)).data
    for first in (byte, half, quantize.dynamic(model, x)):
        again = quantize.int8(first, [x]).eval()
        np.testing.assert_array_equal(again(tn.Tensor(x)).data, wanted)
        assert tn.compile(again, x[:1], choose="dense")(x).shape == wanted.shape
    back = quantize.float16(quantize.float16(half)).eval()
    np.testing.assert_array_equal(back(tn.Tensor(x)).data, half.eval()(tn.Tensor(x)).data)
    folded = quantize.float16(fold_batchnorm(model, x))
    np.testing.assert_array_equal(folded.eval()(tn.Tensor(x)).data, back(tn.Tensor(x)).data)
    with pytest.raises(ConfigError, match=r"batch norms at .*float16\(model, example\)"):
        quantize.float16(model)
    with pytest.raises(ConfigError, match="an Observer of a model without grids"):
        quantize.int8(folded, observe(folded, [x], bins=64))
