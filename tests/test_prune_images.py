"""Surgery on image networks: removal equals masking, on random networks and the published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn, ops
from tinynn.compress import importance, prune, select
from tinynn.errors import PruneError
from tinynn.graph import trace
from tinynn.models import thesis
from tinynn.observe import Observer, Statistics, observe
from tinynn.tensor import Tensor

SIDE = 6


def randomise(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    """Nothing left at a value under which a mistake would not show."""
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.mutate()[...] = rng.normal(1.0 if name.endswith("gamma") else 0.0, 0.4, p.shape)
    for name, b in model.named_buffers():
        low = 0.5 if name.endswith("variance") else -0.5
        b[...] = rng.uniform(low, low + 1, b.shape)
    return model.eval()


def images(shape: tuple[int, ...], seed: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, *shape)).astype(np.float32) for n in (3, 2)]


class Drawn:
    """Draws a random network: residuals, concatenations, depthwise, deconvolution, flatten."""

    def __init__(self, data: st.DataObject, rng: np.random.Generator) -> None:
        self.data, self.rng = data, rng

    def choose(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    def part(self, m: int, depth: int) -> tuple[nn.Module, int]:
        """A module that keeps the image's size, and its output channels."""
        kinds = ["conv", "bn", "relu", "depthwise", "deconv", "pool", "tanh"]
        kind = self.choose(*kinds, *(["residual", "residual", "concat"] if depth else []))
        if kind == "conv":
            out = self.choose(1, 2, 4)
            size, bias = self.choose(1, 3), self.choose(True, False)
            return nn.Conv2d(m, out, size, bias=bias, rng=self.rng), out
        if kind == "deconv":
            return nn.ConvTranspose2d(m, 3, 3, rng=self.rng), 3
        if kind == "depthwise":
            r = self.choose(1, 2) if m < 9 else 1
            return nn.DepthwiseConv2d(m, 3, multiplier=r, rng=self.rng), m * r
        if kind == "pool":
            pool = self.choose(nn.MaxPool2d, nn.AvgPool2d)
            return pool(3, stride=1, padding="same"), m
        if kind == "residual":
            body, out = self.chain(m, depth - 1)
            if out < m:
                body, out = nn.Sequential(body, nn.PointwiseConv2d(out, m, rng=self.rng)), m
            return nn.Add(body, nn.Shortcut(m, out)), out
        if kind == "concat":
            one, a = self.chain(m, depth - 1)
            other, b = self.choose((nn.Shortcut(m, m), m), self.chain(m, depth - 1))
            return nn.Concat(one, other), a + b
        simple = {"bn": nn.BatchNorm(m), "relu": nn.ReLU(), "tanh": nn.Tanh()}
        return simple[kind], m

    def chain(self, m: int, depth: int) -> tuple[nn.Module, int]:
        parts = []
        for _ in range(self.choose(1, 2, 3)):
            part, m = self.part(m, depth)
            parts.append(part)
        return nn.Sequential(*parts), m

    def network(self) -> nn.Module:
        stem = nn.Conv2d(3, 4, 3, stride=self.choose(1, 2), rng=self.rng)
        body, m = self.chain(4, 2)
        side = SIDE // stem.stride[0]
        if self.choose(True, False):
            tail: list[nn.Module] = [nn.GlobalAvgPool2d()]
        else:
            tail, m = [nn.Flatten()], m * side * side
        if self.choose(True, False):
            tail.append(nn.BatchNorm(m))
        if self.choose(True, False):
            tail += [nn.Linear(m, 5, rng=self.rng), nn.ReLU()]
            m = 5
        net = nn.Sequential(stem, body, *tail, nn.Linear(m, 2, rng=self.rng))
        return randomise(net, self.rng)


def masked(model: nn.Module, decisions: list[prune.Decision]) -> nn.Module:
    """A copy whose readers multiply the channels that go by zero."""
    out = model.copy()
    parameters = dict(out.named_parameters())
    for d in decisions:
        for reader in d.group.readers:
            index = reader.weight.index
            gone = (index >= 0) & ~d.keep[index]
            rows = np.moveaxis(parameters[reader.weight.name].mutate(), reader.weight.axis, 0)
            rows[gone] = 0
    return out


def assert_removal_equals_masking(
    model: nn.Module,
    seen: Observer,
    rng: np.random.Generator,
    share: float = 0.5,
    least: int = 1,
) -> nn.Module:
    decisions: list[prune.Decision] = []

    def keep(scores: np.ndarray) -> np.ndarray:
        return scores < share

    smaller = prune.channels(
        model, seen, importance.random(rng), keep, fold="none", least=least, report=decisions.append
    )
    x = Tensor(images(seen.graph.input.shape[1:])[0])
    expected = masked(model, decisions)(x).data
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(smaller(x).data / scale, expected / scale, rtol=1e-4, atol=1e-5)
    assert (smaller.size() < model.size()) == any(not d.keep.all() for d in decisions)
    return smaller


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(0, 10_000))
def test_removal_equals_masking_on_random_networks(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    net = Drawn(data, rng).network()
    seen = observe(net, images((SIDE, SIDE, 3)))
    if all(g.fixed for g in seen.graph.groups()):
        return
    least = data.draw(st.integers(0, 1))
    try:
        assert_removal_equals_masking(net, seen, rng, least=least)
    except PruneError as error:
        assert not least and "keeps at least one" in str(error)


BLOCKS: dict[str, Callable[[np.random.Generator], nn.Module]] = {
    "residual": lambda rng: nn.ResidualBlock(4, 7, stride=2, rng=rng),
    "bottleneck": lambda rng: nn.BottleneckBlock(4, 8, stride=2, rng=rng),
    "separable residual": lambda rng: nn.SeparableResidualBlock(4, 8, stride=2, rng=rng),
    "inception": lambda rng: nn.InceptionBlock(4, (2, 4, 3, 2), rng=rng),
    "separable": lambda rng: nn.SeparableConv2d(4, 6, 3, nonlinear=True, rng=rng),
    "composing": lambda rng: nn.KernelComposingConv2d(4, 6, 3, 5, rng=rng),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_pruned_and_saved(name: str, tmp_path: Path) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        block = BLOCKS[name](rng)
        m = block(Tensor(images((SIDE, SIDE, 4))[0])).shape[-1]
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, rng=rng), nn.ReLU(), block, nn.GlobalAvgPool2d(),
            nn.Linear(m, 2, rng=rng),
        )  # fmt: skip
        randomise(net, rng)
        seen = observe(net, images((SIDE, SIDE, 3)))
        smaller = assert_removal_equals_masking(net, seen, rng)
        assert {g.fixed for g in seen.graph.groups()} == {
            "", "it is the model's input", "it is the model's output"
        }  # fmt: skip
        nn.save(tmp_path / "small.safetensors", smaller)
        again = nn.load(tmp_path / "small.safetensors")
        x = Tensor(images((SIDE, SIDE, 3))[0])
        np.testing.assert_array_equal(again(x).data, smaller(x).data)


MODELS: dict[str, tuple[Callable[[np.random.Generator], nn.Module], tuple[int, ...]]] = {
    "autoencoder": (lambda rng: thesis.autoencoder(rng=rng), (28, 28, 1)),
    "conv": (lambda rng: thesis.baseline("conv", rng=rng), (12, 12, 3)),
    "composing": (lambda rng: thesis.baseline("composing", rng=rng), (12, 12, 3)),
    "separable": (lambda rng: thesis.baseline("separable", rng=rng), (12, 12, 3)),
    "nonlinear": (lambda rng: thesis.baseline("nonlinear", rng=rng), (12, 12, 3)),
    "small_cifar": (lambda rng: thesis.small_cifar(rng=rng), (8, 8, 3)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_published_models_are_pruned(name: str, seed: int) -> None:
    make, shape = MODELS[name]
    rng = np.random.default_rng(seed)
    model = randomise(make(rng), rng)
    seen = observe(model, images(shape))
    assert_removal_equals_masking(model, seen, rng, share=0.7)


def test_the_streams_of_small_cifar_are_groups_of_channels_in_the_same_values() -> None:
    model = thesis.small_cifar(rng=np.random.default_rng(0))
    groups = trace(model, np.zeros((1, 8, 8, 3), np.float32)).groups()
    streams = [g for g in groups if len(g.readers) > 2]
    assert sorted(g.size for g in streams) == [32, 32, 64]  # of 32, of 64 and of 128 channels
    stem = next(g for g in streams if g.name == "0")
    inner = [m for m in stem.writers if m.name == "1.0.3.weight"]
    last = {len(g.places[g.values[-1].index]) for g in streams}
    assert last == {128}
    for member in inner:  # the stem's channels lie behind 16 padded ones
        np.testing.assert_array_equal(np.flatnonzero(member.index >= 0), np.arange(16, 48))


@pytest.mark.parametrize(
    ("kept", "front", "back"),
    [
        ([1, 2, 3, 5, 6, 7, 8], 2, 2),
        ([0, 1, 2, 4, 5, 6], 3, 0),
        ([3, 4, 6], 0, 0),  # nothing is padded any more: the op is gone
    ],
)
def test_a_shortcut_knows_what_is_left_of_its_padding(
    kept: list[int], front: int, back: int
) -> None:
    rng = np.random.default_rng(0)
    net = randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, rng=rng),
            nn.Add(nn.Conv2d(4, 10, 3, rng=rng), nn.Shortcut(4, 10)),  # 3 + 4 + 3 channels
            nn.GlobalAvgPool2d(),
            nn.Linear(10, 2, rng=rng),
        ),
        rng,
    )
    seen = observe(net, images((SIDE, SIDE, 3)))

    def score(group: Any, *_: Any) -> np.ndarray:
        where = group.places[seen.graph.nodes[1].output.index]
        mine = [int(np.flatnonzero(where == i)[0]) for i in range(group.size)]
        return np.isin(mine, kept).astype(float)

    said: list[prune.Decision] = []
    smaller: Any = prune.channels(
        net, seen, score, select.above(0.5), fold="none", report=said.append
    )
    shortcut: Any = dict(smaller.named_modules())["1.1"]
    assert (shortcut.front, shortcut.back) == (front, back)
    assert smaller[0].weight.shape == (3, 3, 3, len(kept) - front - back)
    before: Any = dict(net.named_modules())["1.1"]
    assert (before.front, before.back) == (3, 3)
    x = Tensor(images((SIDE, SIDE, 3))[0])
    np.testing.assert_allclose(smaller(x).data, masked(net, said)(x).data, rtol=1e-4, atol=1e-5)


# --- constants --------------------------------------------------------------------------------


def constant_channel(padding: str, kernel: int, beta: float = 0.5) -> nn.Sequential:
    """conv, batch norm, ReLU, conv: channel 1 between them is always `beta`."""
    rng = np.random.default_rng(0)
    net = randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, rng=rng),
            nn.BatchNorm(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, kernel, padding=padding, rng=rng),
            nn.GlobalAvgPool2d(),
            nn.Linear(5, 2, rng=rng),
        ),
        rng,
    )
    norm: Any = net[1]
    norm.gamma.mutate()[1] = 0
    norm.beta.mutate()[1] = beta
    return net


@pytest.mark.parametrize(("padding", "kernel"), [("valid", 3), ("same", 1)])
def test_a_constant_channel_folds_into_the_next_convolution(padding: str, kernel: int) -> None:
    net = constant_channel(padding, kernel)
    seen = observe(net, images((SIDE, SIDE, 3)))
    smaller = prune.channels(net, seen, importance.activation_variance, select.above(0))
    assert smaller.size() < net.size()
    x = Tensor(images((SIDE, SIDE, 3))[1])
    np.testing.assert_allclose(smaller(x).data, net(x).data, rtol=1e-5, atol=1e-6)


def test_a_constant_that_the_border_cuts_off_is_refused() -> None:
    net = constant_channel("same", 3)
    seen = observe(net, images((SIDE, SIDE, 3)))
    with pytest.raises(PruneError, match=r"conv2d in '3'.*borders"):
        prune.channels(net, seen, importance.activation_variance, select.above(0))
    for fold in ("mean", "none"):  # what the caller asks for by name
        smaller = prune.channels(
            net, seen, importance.activation_variance, select.above(0), fold=fold
        )
        assert smaller.size() < net.size()
    dead = constant_channel("same", 3, beta=-0.5)  # 0 after the ReLU: nothing to fold
    seen = observe(dead, images((SIDE, SIDE, 3)))
    smaller = prune.channels(dead, seen, importance.activation_variance, select.above(0))
    x = Tensor(images((SIDE, SIDE, 3))[1])
    np.testing.assert_allclose(smaller(x).data, dead(x).data, rtol=1e-5, atol=1e-6)


def test_a_constant_folds_through_flatten_and_concat() -> None:
    rng = np.random.default_rng(0)
    net = randomise(
        nn.Sequential(
            nn.Concat(nn.Conv2d(3, 4, 3, rng=rng), nn.Conv2d(3, 3, 1, rng=rng)),
            nn.BatchNorm(7),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(7 * SIDE * SIDE, 2, rng=rng),
        ),
        rng,
    )
    norm: Any = net[1]
    norm.gamma.mutate()[[1, 5]] = 0
    norm.beta.mutate()[[1, 5]] = 0.5
    seen = observe(net, images((SIDE, SIDE, 3)))
    smaller: Any = prune.channels(net, seen, importance.activation_variance, select.above(0))
    assert smaller[1].mean.shape == (5,)
    assert smaller[4].weight.shape == (5 * SIDE * SIDE, 2)
    x = Tensor(images((SIDE, SIDE, 3))[1])
    np.testing.assert_allclose(smaller(x).data, net(x).data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_constant_into_a_transposed_convolution_is_refused(stride: int) -> None:
    rng = np.random.default_rng(0)
    net = randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, rng=rng),
            nn.BatchNorm(4),
            nn.ConvTranspose2d(4, 2, 3, stride=stride, rng=rng),
        ),
        rng,
    )
    net[1].gamma.mutate()[1] = 0  # type: ignore[attr-defined]
    seen = observe(net, images((SIDE, SIDE, 3)))
    with pytest.raises(PruneError, match=r"conv_transpose2d in '2'"):
        prune.channels(net, seen, importance.activation_variance, select.above(0))


# --- the guard, and statistics of spread channels ------------------------------------------------


def test_the_guard_keeps_the_best_and_says_so() -> None:
    model = thesis.autoencoder(channels=(4, 5, 3), rng=np.random.default_rng(0))
    seen = observe(model, images((28, 28, 1)))
    said: list[prune.Decision] = []
    smaller = prune.channels(
        model, seen, importance.activation_variance, select.above(1e9), fold="none",
        least=1, report=said.append,
    )  # fmt: skip
    assert [d.group.name for d in said] == ["0", "3", "6"]
    for d in said:
        assert d.keep.sum() == 1 and d.keep[np.argmax(d.scores)]
        np.testing.assert_array_equal(d.guarded, d.keep)
    assert smaller(Tensor(images((28, 28, 1))[0])).shape == (3, 28, 28, 1)
    said.clear()
    prune.channels(
        model, seen, importance.activation_variance, select.number(2), least=1, report=said.append
    )
    assert not any(d.guarded.any() for d in said)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_pooled_statistics_are_those_of_the_values_together(n: int, k: int, size: int) -> None:
    rng = np.random.default_rng(n * 100 + k * 10 + size)
    x = rng.standard_normal((n, k * size + 1))
    places = np.concatenate([rng.permutation(np.repeat(np.arange(size), k)), [-1]])
    seen = Statistics(k * size + 1)
    seen.add(x)
    pooled = seen.pooled(places, size)
    for c in range(size):
        mine = x[:, places == c]
        assert pooled.samples == mine.size and pooled.count[c] == (mine > 0).sum()
        np.testing.assert_allclose(pooled.mean[c], mine.mean(), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(pooled.variance[c], mine.var(), rtol=1e-10, atol=1e-15)
        assert (pooled.low[c], pooled.high[c]) == (mine.min(), mine.max())


# --- modules that do not follow ----------------------------------------------------------------


class Custom(nn.Module):
    """conv, something with sizes or positions of its own, pool, linear."""

    def __init__(self, compute: Callable[[Tensor], Tensor], m: int) -> None:
        rng = np.random.default_rng(0)
        self.conv = nn.Conv2d(3, 6, 3, rng=rng)
        self.head = nn.Linear(m, 2, rng=rng)
        object.__setattr__(self, "compute", compute)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.compute(self.conv(x)))

    def __deepcopy__(self, memo: Any) -> Custom:
        out = Custom(self.compute, 1)
        out.conv, out.head = self.conv.copy(), self.head.copy()
        return out


def drop(*gone: int) -> Callable[..., np.ndarray]:
    """Scores 0 for these channels of the convolution, wherever they lie in groups."""

    def score(group: Any, seen: Observer, _: Any) -> np.ndarray:
        where = group.places[seen.graph.nodes[0].output.index]
        return np.array(
            [int(np.flatnonzero(where == i)[0]) not in gone for i in range(group.size)], float
        )

    return score


def test_positions_written_into_a_module_are_found_out() -> None:
    def both(h: Tensor) -> Tensor:
        m = h.mean((1, 2))
        return ops.concat([m, m[:, 1:4]], axis=1)

    model = Custom(both, 9)
    seen = observe(model, images((SIDE, SIDE, 3)))
    fine = prune.channels(model, seen, drop(5), select.above(0.5), fold="none")  # behind the slice
    assert fine.size() < model.size()
    for gone, words in (((0, 4), "positions of its own"), ((2,), "sizes of its own")):
        with pytest.raises(PruneError, match=words):
            prune.channels(model, seen, drop(*gone), select.above(0.5), fold="none")


def test_shapes_written_into_a_module_are_found_out() -> None:
    model = Custom(lambda h: h.reshape(len(h), SIDE * SIDE * 6), SIDE * SIDE * 6)
    seen = observe(model, images((SIDE, SIDE, 3)))
    with pytest.raises(PruneError, match="sizes of its own"):
        prune.channels(model, seen, drop(2), select.above(0.5), fold="none")


def test_padding_that_no_module_declares_is_not_touched() -> None:
    model = Custom(lambda h: ops.pad(h, [(0, 0)] * 3 + [(1, 2)]).mean((1, 2)), 9)
    seen = observe(model, images((SIDE, SIDE, 3)))
    groups = {g.size: g.fixed for g in seen.graph.groups()}
    assert "pads it by widths" in groups[3] and not groups[6]
    smaller = prune.channels(
        model, seen, lambda g, *_: np.arange(g.size) - 2.0, lambda s: s != 0, fold="none"
    )
    assert smaller.head.weight.shape == (8, 2)  # type: ignore[attr-defined]


def test_channels_moved_to_another_axis_are_refused_by_name() -> None:
    model = Custom(lambda h: h.transpose((0, 3, 1, 2)).sum((2, 3)) * 1.0, 6)
    reasons = [g.fixed for g in trace(model, images((SIDE, SIDE, 3))[0]).groups()]
    assert any("transpose moves its channels to another axis" in r for r in reasons)
    model = Custom(lambda h: h.reshape(len(h), SIDE * SIDE * 2, 3).mean(1), 3)
    reasons = [g.fixed for g in trace(model, images((SIDE, SIDE, 3))[0]).groups()]
    assert any("reshape moves its channels to another axis" in r for r in reasons)


def test_batch_norm_is_one_op_with_its_statistics_among_the_members() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, rng=np.random.default_rng(0)), nn.BatchNorm(4))
    graph = trace(net, images((SIDE, SIDE, 3))[0])
    assert [n.op.name for n in graph.nodes] == ["conv2d", "batch_norm_eval"]
    names = {m.name for g in graph.groups() for m in g.writers}
    assert {"1.gamma", "1.beta", "1.mean", "1.variance"} <= names
    assert tn.graph.trace is trace
