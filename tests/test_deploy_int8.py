"""Plans of quantised models compute the integers that the model says, to the last bit."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from test_deploy import images, lived_in, networks
from test_kernels_int8 import as_dense, exact_conv, finished

import tinynn as tn
from kernels import int8, int8_depthwise, int8_product
from kernels.geometry import window
from tinynn import nn
from tinynn.compress import blocks, importance, integers, quantize, select
from tinynn.errors import CompileError
from tinynn.graph import Graph, Node, Value, trace
from tinynn.models import thesis
from tinynn.nn.module import Module
from tinynn.observe import observe

Array = np.ndarray


@pytest.fixture
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer kernels to compile."""
    monkeypatch.setattr(int8_product, "_HEIGHTS", (4, 1))
    monkeypatch.setattr(int8_depthwise, "_HEIGHTS", (4,))


FLOATING = frozenset({"conv_transpose2d", "tanh", "softmax", "conv2d", "depthwise_conv2d"})


# --- the oracle -----------------------------------------------------------------------------------


class Oracle:
    """Runs the graph of a quantised model in NumPy's int64: grids, weights from `integers`.

    `floating` are the ops that had to be computed in float32.
    """

    def __init__(self, model: Module, x: Array) -> None:
        self.model = model
        self.graph: Graph = trace(model, x)
        self.grids = integers.grids(self.graph, model)
        self.modules = dict(model.named_modules())
        self.readers: dict[int, list[Node]] = defaultdict(list)
        for node in self.graph.nodes:
            for v in node.inputs:
                self.readers[v.index].append(node)
        self.values: dict[int, Array] = {self.graph.input.index: x}
        self.arrays = {i: np.asarray(a) for i, a in self.graph.arrays.items()}
        self.floating: list[str] = []

    def result(self) -> Array:
        for node in self.graph.nodes:
            if node.output.index in self.values:
                continue
            if not any(v.index in self.values for v in node.inputs):
                arrays = [self.arrays[v.index] for v in node.inputs]
                self.arrays[node.output.index] = np.asarray(node.op.forward(*arrays)[0])
            else:
                self.run(node)
        return self.number(self.graph.output)

    def number(self, v: Value) -> Array:
        """The value in float32."""
        if v.index in self.arrays:
            return self.arrays[v.index]
        grid, value = self.grids.get(v.index), self.values[v.index]
        if grid is None or value.dtype != np.uint8:
            return value
        return (value.astype(np.float32) - np.float32(grid.zero)) * grid.scale

    def run(self, node: Node) -> None:
        out, op = node.output.index, node.op.name
        x = node.inputs[0]
        if op == "fake_quantize":
            grid = self.grids[out]
            if self.grids.get(x.index) == grid:
                self.values[out] = self.values[x.index]
            else:
                ratio = self.number(x) / grid.scale
                self.values[out] = (np.rint(np.clip(ratio, grid.low, grid.high)) - grid.low).astype(
                    np.uint8
                )
        elif all(v.index in self.grids for v in self.data(node)) and self.integer(node):
            return
        elif out in self.grids and op in (
            "reshape",
            "relu",
            "max_pool2d",
            "pad",
            "scatter",
            "concat",
        ):
            self.values[out] = self.moved(node)
        else:
            self.values[out] = np.asarray(node.op.forward(*map(self.number, node.inputs))[0])
            self.floating.append(op)

    def data(self, node: Node) -> list[Value]:
        return [v for v in node.inputs if v.index not in self.arrays]

    def moved(self, node: Node) -> Array:
        """What only moves numbers does to bytes what it does to the numbers less the zero."""
        zero = self.grids[node.output.index].zero
        whole = [self.values[v.index].astype(np.float32) - zero for v in node.inputs]
        return (np.asarray(node.op.forward(*whole)[0]) + zero).astype(np.uint8)

    def goal(self, v: Value, relu: bool) -> tuple[list[Value], bool, integers.Grid | None]:
        """Where a sum is rounded to, if that is all that becomes of it, perhaps after a ReLU."""
        out, readers = self.graph.output, self.readers[v.index]
        if len(readers) == 1 and readers[0].op.name == "relu" and v != out:
            v, relu = readers[0].output, True
            readers = self.readers[v.index]
        grids = {self.grids[n.output.index] for n in readers if n.op.name == "fake_quantize"}
        only = all(n.op.name == "fake_quantize" for n in readers) and v != out
        if only and len(grids) == 1:
            return [n.output for n in readers], relu, grids.pop()
        return [v], relu, None

    def integer(self, node: Node) -> bool:
        """Sums of integers, and the one rounding behind them."""
        op: Any = node.op
        v, relu = node.output, bool(getattr(op, "relu", False))
        x = self.values[node.inputs[0].index]
        grid = self.grids[node.inputs[0].index]
        factor: Any = 1.0
        after = self.readers[v.index]
        if op.name == "sum" and len(after) == 1 and after[0].op.name == "mul":
            factor = float(self.arrays[after[0].inputs[1].index].item())
            v = after[0].output
        ends, relu, goal = self.goal(v, relu)
        skipped = [v, *(n.output for n in self.readers[v.index] if n.op.name == "relu" and relu)]

        def how(factor: Any) -> int8.Scaling:
            if goal is None:
                return int8.dequantized(float(grid.scale), factor, relu=relu)
            top = goal.high - goal.low
            return int8.requantized(
                float(grid.scale), factor, float(goal.scale), goal.zero, relu=relu, top=top
            )

        if op.name == "add":
            if goal is None:
                return False
            other = self.grids[node.inputs[1].index]
            b = self.values[node.inputs[1].index]
            way = int8.addition(
                float(grid.scale), grid.zero, float(other.scale), other.zero, float(goal.scale),
                goal.zero, relu=relu, top=goal.high - goal.low,
            )  # fmt: skip
            total = (x.astype(np.int64) - grid.zero) * way.a_factor
            total += (b.astype(np.int64) - other.zero) * way.b_factor
            y = finished(total, int8.Scaling(way.scale, *way[5:]))
        elif op.name == "sum":
            total = (x.astype(np.int64) - grid.zero).sum((1, 2))
            y = finished(total, how(factor))
        elif op.name == "avg_pool2d":
            win = window(*x.shape[1:3], op.kernel_size, op.stride, op.padding)
            one = np.ones((*win.kernel, x.shape[3], 1), np.int8)
            sums = int8.dequantized(1.0, 1.0)
            total = exact_conv(x, as_dense(one), None, grid.zero, sums, win).astype(np.int64)
            count = exact_conv(np.ones_like(x), as_dense(one), None, 0, sums, win)
            scale = how(1.0)
            shares = (scale.multiplier.astype(np.float64) / count).astype(np.float32)
            y = finished(total, scale._replace(multiplier=shares))
        else:
            module = self.modules[node.path]
            whole = isinstance(module, nn.Quantized) and module.weight is not None
            if not whole or op.name == "conv_transpose2d":
                return False
            assert isinstance(module, nn.Quantized)
            ints = integers.layer(module, float(grid.scale))
            w, bias, scale = ints.weight, ints.bias, how(ints.scale)
            if op.name == "scale_shift":
                total = (x.astype(np.int64) - grid.zero) * w.astype(np.int64) + bias
                y = finished(total, scale)
            elif op.name in ("linear", "matmul"):
                total = (x.astype(np.int64) - grid.zero) @ w.astype(np.int64)
                y = finished(total if bias is None else total + bias, scale)
            else:
                win = window(*x.shape[1:3], w.shape[:2], op.stride, op.padding, op.dilation)
                dense = as_dense(w) if op.name == "depthwise_conv2d" else w
                y = exact_conv(x, dense, bias, grid.zero, scale, win)
        self.values.update((end.index, y) for end in (*skipped, *ends))
        return True


def check(
    model: Module,
    shape: tuple[int, ...],
    batches: tuple[int, ...] = (1, 5),
    floating: frozenset[str] = frozenset(),
) -> tn.Plan:
    """The plan of a quantised model gives the oracle's bits for every batch and thread count.

    But for the ops `floating`, whose sums in float32 have an order of their own.
    """
    rng = np.random.default_rng(7)
    plans = [tn.compile(model, images(rng, 1, *shape), threads=n) for n in (1, tn.max_threads())]
    for batch in batches:
        x = images(rng, batch, *shape)
        oracle = Oracle(model, x)
        want = oracle.result()
        for plan in plans:
            got = plan(x)
            if floating.intersection(oracle.floating):
                assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
            else:
                np.testing.assert_array_equal(got, want)
        assert np.array_equal(plans[0](x), plans[1](x))
    return plans[0]


def quantised(model: Module, shape: tuple[int, ...], **how: Any) -> Module:
    rng = np.random.default_rng(3)
    return quantize.int8(lived_in(model, rng), [images(rng, 16, *shape)], **how).eval()


# --- networks -------------------------------------------------------------------------------------


def test_separable_residual_blocks(few_tiles: None) -> None:
    """Batch norms before depthwise layers, shortcuts with pools and new channels."""
    rng = np.random.default_rng(0)
    plan = check(quantised(thesis.small_cifar(rng=rng), (8, 8, 3)), (8, 8, 3))
    kinds = Counter(layer.step.kind for layer in plan.network.layers)
    assert kinds == {
        "quantize": 1, "intconv": 13, "intdepthwise": 12, "intscaleshift": 7, "intadd": 6,
        "intmean": 2, "pad": 2, "intglobalsum": 1, "intlinear": 1,
    }  # fmt: skip
    assert plan.network.dtypes[plan.network.output] == np.float32


class Mixed(nn.Module):
    """What stays in bytes without a kernel of its own, and what has to leave them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.first = nn.Conv2d(2, 5, (3, 2), stride=(2, 1), dilation=(1, 2), rng=rng)
        self.each = nn.DepthwiseConv2d(5, 3, multiplier=2, rng=rng)
        self.sum = nn.Add(nn.Sequential(nn.ReLU(), nn.PointwiseConv2d(10, 10, rng=rng)))
        self.pool = nn.AvgPool2d(3, stride=2, padding="same")
        self.last = nn.Linear(120, 7, bias=False, rng=rng)

    def forward(self, x: tn.Tensor) -> tn.Tensor:
        x = self.each(tn.ops.relu(self.first(x)))
        y = tn.ops.concat([tn.ops.relu(x), self.sum(x)], axis=2)
        y = self.pool(tn.ops.max_pool2d(y, 2, stride=1))
        return self.last(tn.ops.reshape(y, len(y._data), -1))


@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_layers_of_all_kinds(few_tiles: None, bits: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    model = lived_in(Mixed(rng), rng)
    data = [images(rng, 16, 9, 6, 2)]
    byte = quantize.low_bit(model, data, weights=bits[0], activations=bits[1], allocate=False)
    check(byte.eval(), (9, 6, 2))


def test_one_grid_for_a_layer_but_one_for_each_scale(few_tiles: None) -> None:
    """One number for all channels would round small factors, and biases, to the largest's steps."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.ScaleShift(np.float32([300, 1, 1, 1]), np.float32([0, 1, 2, 3])),
        nn.ReLU(),
        nn.DepthwiseConv2d(4, 3, multiplier=2, bias=False, rng=rng),
    ).eval()
    x = images(rng, 16, 5, 4, 4) * np.float32([0, 1, 1, 1])
    byte = quantize.int8(model, [x], scheme=quantize.Scheme(bits=3, per_channel=False)).eval()
    plan = check(byte, (5, 4, 4))
    want = byte(tn.Tensor(x)).data
    assert np.abs(plan(x) - want).max() < 0.02 * np.abs(want).max()


def test_what_reads_a_layer_that_is_never_on_keeps_its_biases(few_tiles: None) -> None:
    """Their unit in integers has the scale of what is always 0 as a factor."""
    rng = np.random.default_rng(0)
    dead = nn.Conv2d(2, 4, 3, rng=rng)
    dead.bias.mutate()[...] = -100
    model = nn.Sequential(dead, nn.ReLU(), nn.Conv2d(4, 4, 3, rng=rng), nn.ReLU(), nn.Flatten())
    model[2].bias.mutate()[...] = [0.1, 0.2, 0.3, 0.4]
    x = images(rng, 16, 5, 4, 2)
    byte = quantize.int8(model, [x], scheme=quantize.Scheme(bits=3, first_last=3)).eval()
    assert np.abs(check(byte, (5, 4, 2))(x) - byte(tn.Tensor(x)).data).max() < 0.002


def test_inception_and_bottleneck_blocks(few_tiles: None) -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.InceptionBlock(3, (4, 8, 8, 4), rng=rng),
        nn.BottleneckBlock(24, 24, stride=2, rng=rng),
        nn.Flatten(),
        nn.Linear(4 * 4 * 24, 3, rng=rng),
    )
    scheme = quantize.Scheme(per_channel=False)
    plan = check(quantised(model, (8, 7, 3), scheme=scheme), (8, 7, 3))
    assert {a.step.kind for a in plan.network.layers} >= {"concat", "maxbytes", "intadd"}


def test_what_has_no_integer_kernel_is_computed_in_numbers(few_tiles: None) -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, rng=rng),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 8, 3, stride=2, rng=rng),
        nn.ReLU(),
        nn.GlobalAvgPool2d(),
        nn.Linear(8, 3, rng=rng),
        nn.Softmax(),
    )
    plan = check(quantised(model, (5, 5, 3)), (5, 5, 3), floating=FLOATING)
    kinds = [layer.step.kind for layer in plan.network.layers]
    assert "convtranspose" in kinds and kinds[-2:] == ["intlinear", "activation"]


def test_after_fine_tuning(few_tiles: None) -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, rng=rng), nn.ReLU(), nn.GlobalAvgPool2d(), nn.Linear(8, 3, rng=rng)
    )
    for ranges in ("running", "learned"):
        tuned: Any = quantize.trainable(quantised(model, (5, 5, 3)), ranges).train()  # type: ignore
        optimizer = tn.SGD(tuned.parameters(), lr=1e-3)
        for _ in range(3):
            loss = tn.ops.mean(tuned(tn.Tensor(images(rng, 8, 5, 5, 3))) ** 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        check(tuned.eval(), (5, 5, 3))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks())
def test_random_networks(few_tiles: None, case: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = case
    if any(hasattr(m, "using") for _, m in model.named_modules()):
        check(quantised(model, shape), shape, (2,), FLOATING)


def test_thinned_branches_stay_in_bytes(few_tiles: None) -> None:
    rng = np.random.default_rng(0)
    layers = [
        nn.Conv2d(3, 6, 3, rng=rng),
        *(nn.ResidualBlock(6, 6, rng=rng) for _ in range(2)),
        nn.GlobalAvgPool2d(),
        nn.Linear(6, 3, rng=rng),
    ]
    model = lived_in(nn.Sequential(*layers), rng)
    x = images(rng, 16, 6, 5, 3)
    thin = blocks.thin(model, observe(model, [x]), importance.l1, select.share(0.5))
    plan = check(quantize.int8(thin, [x]).eval(), (6, 5, 3))
    kinds = Counter(layer.step.kind for layer in plan.network.layers)
    assert kinds["scatter"] == kinds["intadd"] == 2
    assert kinds["quantize"] == 1 and kinds["dequantize"] == kinds["conv"] == 0
    made = {a.output: plan.network.dtypes[a.output] for a in plan.network.layers}
    scattered = [a for a in plan.network.layers if a.step.kind == "scatter"]
    assert all(made[a.output] == np.uint8 for a in scattered)
    assert len({a.step.value for a in scattered}) == 2  # type: ignore[attr-defined]


# --- the rest -------------------------------------------------------------------------------------


def test_files_hold_the_integers(few_tiles: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = quantised(thesis.small_cifar(rng=rng), (8, 8, 3))
    x = images(rng, 3, 8, 8, 3)
    plan = tn.compile(model, x)
    plan.save(tmp_path / "plan")
    again = tn.Plan.load(tmp_path / "plan")
    assert np.array_equal(again(x), plan(x))
    assert (tmp_path / "plan").stat().st_size == plan.nbytes == again.nbytes
    assert plan.nbytes < integers.nbytes(model) + 4000
    profile = plan.profile(x, rounds=2)
    assert [r.kind for r in profile.layers] == [a.step.kind for a in plan.network.layers]
    assert sum(r.macs for r in profile.layers) == 3 * plan.macs > 0


def test_biases_beyond_int32_are_refused() -> None:
    rng = np.random.default_rng(0)
    model: Any = quantised(nn.Sequential(nn.Linear(4, 3, rng=rng)), (4,))
    layer = next(m for _, m in model.named_modules() if isinstance(m, nn.Linear))
    layer.bias.mutate()[...] = 1e9
    with pytest.raises(CompileError, match=r"int32.*lower learning rate"):
        tn.compile(model, images(rng, 1, 4))


def test_kernels_of_float32_do_not_take_layers_in_8_bits(few_tiles: None) -> None:
    rng = np.random.default_rng(0)
    model = quantised(nn.Sequential(nn.Linear(64, 64, rng=rng)), (64,))
    x = images(rng, 2, 64)
    plans = [tn.compile(model, x, choose=name) for name in ("measure", "dense")]
    assert np.array_equal(plans[0](x), plans[1](x))
    with pytest.raises(tn.errors.ConfigError, match="no layer"):
        tn.compile(model, x, choose="float16")
