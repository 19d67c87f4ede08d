"""Kernels on compressed weights inside plans, and the forms in which files hold weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinynn as tn
from kernels._jit import max_threads
from tinynn import nn
from tinynn.compress import cluster, quantize
from tinynn.deploy import LayerTime
from tinynn.deploy.choose import choose_kernels
from tinynn.deploy.encode import decode, encode, form_bytes
from tinynn.deploy.kernels import KERNELS
from tinynn.errors import ConfigError, FileFormatError
from tinynn.nn.module import mode

SHAPE = (6, 6, 8)


def network() -> nn.Module:
    """Every kind of layer that compressed kernels run, with an addition onto a result."""
    rng = np.random.default_rng(0)
    body = nn.Sequential(
        nn.Conv2d(8, 16, 3, rng=rng), nn.ReLU(), nn.PointwiseConv2d(16, 8, rng=rng)
    )
    return nn.Sequential(
        nn.PointwiseConv2d(8, 8, rng=rng),
        nn.Add(body, nn.Sequential()),
        nn.ReLU(),
        nn.Conv2d(8, 20, 3, stride=2, rng=rng),
        nn.Flatten(),
        nn.Linear(180, 32, rng=rng),
        nn.Add(nn.Sequential(nn.Linear(32, 32, rng=rng)), nn.Sequential()),
        nn.ReLU(),
        nn.Linear(32, 5, rng=rng),
    ).eval()


def change(model: nn.Module, how: Any) -> nn.Module:
    for p in model.parameters():
        if p.ndim > 1:
            p.mutate()[...] = how(p.data)
        else:
            p.mutate()[...] = np.random.default_rng(p.size).normal(0, 0.1, p.shape)
    return model


def thinned(w: np.ndarray) -> np.ndarray:
    """Four fifths of the weights are 0."""
    return np.where(np.random.default_rng(w.size).random(w.shape) < 0.8, 0, w)


CHANGES = {
    "sparse": thinned,
    "sparse4x1": thinned,
    "codebook": lambda w: np.round(w, 1),
    "float16": lambda w: w.astype(np.float16),
    "dense": lambda w: w,
}


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("name", CHANGES)
def test_every_kernel_gives_what_the_dense_one_does(name: str, tmp_path: Path) -> None:
    model = change(network(), CHANGES[name])
    plan = tn.compile(model, images(1), choose=name)
    used = [layer.kernel for layer in plan.network.layers]
    assert used.count(name) >= 7
    plan.save(tmp_path / "plan")
    again = tn.Plan.load(tmp_path / "plan")
    assert [layer.kernel for layer in again.network.layers] == used
    for batch in (1, 2, 9):
        x = images(batch)
        with mode(model, training=False), tn.no_grad():
            want = model(tn.Tensor(x)).numpy()
        y = plan(x)
        assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()
        assert np.array_equal(again(x), y)


def test_a_code_book_for_each_channel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(300, 96, rng=rng), nn.ReLU(), nn.Linear(96, 41, rng=rng))
    shared = cluster.kmeans(model, 8, per="channel").eval()
    x = rng.normal(size=(7, 300)).astype(np.float32)
    assert len(np.unique(shared[0].weight.data)) > 256  # no book for the whole layer
    plan = tn.compile(shared, x, choose="codebook")
    assert [layer.kernel for layer in plan.network.layers] == ["codebook"] * 2
    plan.save(tmp_path / "plan")
    again = tn.Plan.load(tmp_path / "plan")
    for batch in (x[:1], x):
        with tn.no_grad():
            want = shared(tn.Tensor(batch)).numpy()
        assert np.allclose(plan(batch), want, rtol=1e-5, atol=1e-5)
        assert np.array_equal(again(batch), plan(batch))
    held = sum(p.size * 3 / 8 + 4 * 8 * p.shape[1] for p in shared.parameters() if p.ndim > 1)
    assert plan.nbytes < 1.03 * (held + 4 * (96 + 41)) + 1000
    dense = tn.compile(shared, x, choose="dense")
    assert dense.nbytes < plan.nbytes + 100  # the form is the weights', not the kernel's


def windows() -> nn.Module:
    """Convolutions with windows alone, one onto a result, two with strides, all with biases."""
    rng = np.random.default_rng(0)
    body = nn.Sequential(nn.Conv2d(16, 16, 3, rng=rng), nn.ReLU(), nn.Conv2d(16, 16, 3, rng=rng))
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, rng=rng),
        nn.ReLU(),
        nn.Add(body, nn.Sequential()),
        nn.ReLU(),
        nn.Conv2d(16, 20, 3, stride=2, rng=rng),
        nn.DepthwiseConv2d(20, 3, stride=2, rng=rng),
        nn.GlobalAvgPool2d(),
    )
    return change(model, lambda w: w).eval()


@pytest.mark.parametrize(
    ("kernel", "bits", "how"),
    [
        ("codebook", 4, lambda m: cluster.kmeans(m, 16)),
        ("codebook", 5, lambda m: cluster.kmeans(m, 32, per="channel")),
        ("float16", 16, lambda m: change(m, lambda w: w.astype(np.float16))),
    ],
)
def test_windows_run_on_packed_weights_and_give_the_bits_of_dense_ones(
    kernel: str, bits: int, how: Any, tmp_path: Path
) -> None:
    model = how(windows())
    x = np.random.default_rng(1).normal(size=(5, 12, 11, 8)).astype(np.float32)
    dense = tn.compile(model, x, choose="dense", threads=1)
    weights = [p for p in model.parameters() if p.ndim > 1]
    held = sum(p.size * (bits / 8 if p.ndim > 1 else 4) for p in model.parameters())
    books = 4 * 32 * sum(p.shape[-1] for p in weights) if bits == 5 else 5 * 64
    room = 5 * 32 + 256  # behind streams of bits; the means' weights
    for threads in (1, 2) if max_threads() > 1 else (1,):
        plan = tn.compile(model, x, choose=kernel, threads=threads)
        assert [a.kernel for a in plan.network.layers].count(kernel) == 5
        plan.save(tmp_path / "plan")
        again = tn.Plan.load(tmp_path / "plan", threads=threads)
        for batch in (x[:1], x[:2], x):
            assert np.array_equal(plan(batch), dense(batch))
            assert np.array_equal(again(batch), dense(batch))
        for one in (plan, again):
            assert held <= one.resident_nbytes <= held + books + room
            kept = [a.arrays["weight"] for a in one.network.layers if a.kernel == kernel]
            assert all(w.nbytes < w.size * 4 for w in kept)
            assert all(map(np.array_equal, kept, weights))
    size = sum(p.size for p in weights)
    assert dense.resident_nbytes > 1.9 * 4 * size  # most as they are saved, and as panels


def test_kernels_of_packed_weights_can_be_chosen_anew() -> None:
    model, x = cluster.kmeans(windows(), 16), np.ones((1, 12, 11, 8), np.float32)
    packed = tn.compile(model, x, choose="codebook", threads=1)
    y = packed(x)
    assert all(KERNELS[a.kernel].take(a) is a for a in packed.network.layers if a.kernel != "dense")
    for choice in ("dense", "codebook", "measure"):
        again = tn.Plan(choose_kernels(packed.network, choice), threads=1)
        np.testing.assert_allclose(again(x), y, rtol=0, atol=1e-6 * np.abs(y).max())
    half = choose_kernels(packed.network, "float16")
    assert [a.kernel for a in half.layers].count("float16") == 5


def test_float16_rounds_the_weights_and_halves_the_file() -> None:
    model = network()
    dense, half = (tn.compile(model, images(1), choose=k) for k in ("dense", "float16"))
    x = images(3)
    assert 0 < np.abs(dense(x) - half(x)).max() < 1e-2 * np.abs(dense(x)).max()
    weights = sum(p.size for p in model.parameters() if p.ndim > 1)
    assert dense.nbytes - half.nbytes > 1.9 * weights


def test_what_is_compressed_before_batch_norms_are_folded_stays_compressed() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(288, 256, rng=rng), nn.BatchNorm(256), nn.Linear(256, 3, rng=rng)
    )  # fmt: skip
    model[2].variance = rng.uniform(0.5, 2, 256).astype(np.float32)
    weights = sum(p.size for p in model.parameters() if p.ndim > 1)
    half = tn.compile(quantize.float16(model, images(1)), images(1))
    assert half.nbytes < 2.1 * weights
    shared = tn.compile(cluster.kmeans(model, 4), images(1))  # a plan has a book for each channel
    assert shared.nbytes < weights / 4 + 4 * (4 + 1) * 256 + 2000


def test_measuring_takes_kernels_that_can_run_the_layers() -> None:
    model = change(network(), thinned)
    plan = tn.compile(model, images(4))
    assert all(KERNELS[a.kernel].take(a) is not None for a in plan.network.layers)
    want = tn.compile(model, images(4), choose="dense")(images(4))
    assert np.allclose(plan(images(4)), want, rtol=1e-4, atol=1e-5)


def test_kernels_for_single_layers() -> None:
    model = change(network(), thinned)
    path = next(a.path for a in tn.compile(model, images(1)).network.layers)
    plan = tn.compile(model, images(1), choose={path: "sparse"})
    assert [a.kernel for a in plan.network.layers if a.arrays].count("sparse") == 1
    with pytest.raises(ConfigError, match="nowhere"):
        tn.compile(model, images(1), choose={"nowhere": "sparse"})
    with pytest.raises(ConfigError, match="fast"):
        tn.compile(model, images(1), choose="fast")
    with pytest.raises(ConfigError, match="cannot"):
        tn.compile(network(), images(1), choose={path: "sparse"})
    with pytest.raises(ConfigError, match=r"no layer.*at least 20% zeros"):
        tn.compile(network(), images(1), choose="sparse")
    with pytest.raises(ConfigError, match=r"cannot run.*at most 256 values"):
        tn.compile(network(), images(1), choose={path: "codebook"})
    for wrong in (None, 3):
        with pytest.raises(ConfigError, match=f"a mapping; came {wrong}"):
            tn.compile(network(), images(1), choose=wrong)  # type: ignore[arg-type]


def test_a_profile_counts_what_kernels_do() -> None:
    rng = np.random.default_rng(0)
    layer, x = nn.Linear(64, 32, bias=False, rng=rng), rng.normal(size=(4, 64)).astype(np.float32)
    w = layer.weight.mutate()
    moved = 4 * 4 * (64 + 32)

    def row(kernel: str) -> LayerTime:
        return tn.compile(nn.Sequential(layer), x, choose=kernel).profile(x, rounds=1).layers[0]

    for kernel, nbytes in (("dense", 4 * 2048), ("float16", 2 * 2048)):
        assert (row(kernel).macs, row(kernel).nbytes) == (4 * 2048, moved + nbytes)
    w[...] = rng.normal(size=8).astype(np.float32)[rng.integers(0, 8, w.shape)]
    assert (row("codebook").macs, row("codebook").nbytes) == (4 * 2048, moved + 2048 * 3 / 8)
    w[:, 1:] = 0
    assert (row("sparse").macs, row("sparse").nbytes) == (4 * 64, moved + 64 * 5)
    assert (row("sparse4x1").macs, row("sparse4x1").nbytes) == (4 * 4 * 64, moved + 64 * 17)


# --- forms ----------------------------------------------------------------------------------------


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Weights of every kind that a form is for, and of none."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    shape = draw(st.sampled_from([(3,), (64,), (10, 30), (3, 3, 8, 8), (1, 2000)]))
    a = rng.normal(size=shape).astype(np.float32)
    if draw(st.booleans()):
        a[rng.random(shape) < draw(st.sampled_from([0.2, 0.9, 0.999, 1.0]))] = 0
    if draw(st.booleans()):
        a = a.astype(np.float16).astype(np.float32)
    if draw(st.booleans()):
        a = np.round(a, draw(st.integers(0, 1)))  # also -0
    if len(shape) > 1 and draw(st.booleans()):
        values = rng.normal(size=(draw(st.integers(1, 5)), *shape[1:])).astype(np.float32)
        a = np.take_along_axis(values, rng.integers(0, len(values), shape), axis=0)
    if draw(st.booleans()):
        a.reshape(-1)[: draw(st.integers(1, 3))] = draw(
            st.sampled_from([np.nan, np.inf, -0.0, 1e-40, 65504, 65520])
        )
    return a


@settings(max_examples=300, deadline=None)
@given(arrays())
def test_every_bit_comes_back(a: np.ndarray) -> None:
    head, parts = encode(a)
    back = decode(head, parts)
    assert back.shape == a.shape and back.dtype == np.float32
    assert np.array_equal(back.view(np.uint32), a.view(np.uint32))
    assert form_bytes((head, parts)) <= a.nbytes


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_integers_come_back(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    shape = data.draw(st.sampled_from([(1,), (40,), (9, 30), (3, 3, 8, 1), (3, 3, 8, 24)]))
    high = rng.integers(0, data.draw(st.sampled_from([2, 16, 129])), shape[-2:])
    a = np.clip(rng.integers(-128, 128, shape), -high, high).astype(np.int8)
    a.reshape(-1)[0] = data.draw(st.sampled_from([0, -128, 127]))
    head, parts = encode(a)
    assert np.array_equal(decode(head, parts), a) and decode(head, parts).dtype == np.int8
    assert form_bytes((head, parts)) <= a.nbytes


def test_each_channel_takes_its_own_bits() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(3, 6, 64)  # of grids -3 ... 3, -7 ... 7, -15 ... 15
    high = 2 ** (bits - 1) - 1
    held = 400 * bits.sum() / 8
    for shape in ((400, 64), (20, 20, 64, 1)):
        n = rng.integers(-high, high + 1, (400, 64)).reshape(shape).astype(np.int8)
        head, parts = encode(n)
        assert head["form"] == "columns" and np.array_equal(decode(head, parts), n)
        assert form_bytes((head, parts)) <= held + 64 / 4 + 3


def test_forms_take_little_more_than_what_they_hold() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=40_000).astype(np.float32)
    zeros = np.where(rng.random(a.size) < 0.9, 0, a)
    assert form_bytes(encode(zeros)) < 0.14 * a.nbytes
    for bits in (1, 2, 4, 8):
        coded = rng.integers(0, 1 << bits, a.size).astype(np.float32) + 0.123
        held = a.size * bits / 8 + 4 * (1 << bits)
        assert form_bytes(encode(coded)) <= held + 1
    own = rng.normal(size=(16, 100)).astype(np.float32)[rng.integers(0, 16, (400, 100)), range(100)]
    assert form_bytes(encode(own)) <= own.size / 2 + 4 * 16 * 100 + 13
    both = np.where(zeros != 0, np.round(zeros), 0)
    assert form_bytes(encode(both)) < 0.03 * a.nbytes
    assert form_bytes(encode(a.astype(np.float16).astype(np.float32))) == a.nbytes / 2


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_hostile_forms_are_refused_or_harmless(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["float32", "books", "int8", "columns"]))
    a = np.zeros((10, 20), np.float32)
    if kind == "float32":
        step = data.draw(st.sampled_from([1, 7, 90]))
        a.reshape(-1)[::step] = data.draw(st.sampled_from([1, 0.1]))
    elif kind == "books":
        a = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
        a = np.concatenate([a, a, a, a])
    else:
        a = np.where(np.arange(20) < 10, 1, 7 if kind == "columns" else 1) + np.zeros((10, 20))
        a = a.astype(np.int8)
    head, parts = encode(a)
    assert kind == "float32" or head["form"] in (kind, "integers")
    key = data.draw(st.sampled_from([*head, *parts]))
    wrong = data.draw(
        st.one_of(
            st.none(),
            st.integers(-2, 300),
            st.sampled_from(
                [
                    "gaps",
                    "coded",
                    "books",
                    "columns",
                    "",
                    1e9,
                    1 << 70,
                    [1 << 20, 1 << 20],
                    [200],
                    {},
                    head,
                    [20, 10],
                    [19, 10],
                ]
            ),
        )
    )
    if key in parts:
        parts[key] = data.draw(
            st.sampled_from([np.zeros(3, np.uint8), np.full(25, 255, np.uint8), np.ones(2, "f")])
        )
    else:
        head = {**head, key: wrong}
    try:
        back = decode(head, parts)
    except FileFormatError:
        return
    assert back.dtype in (a.dtype, np.float32, np.int8) and back.size <= 1 << 28
