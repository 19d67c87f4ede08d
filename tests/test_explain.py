"""Explanations: what is predicted, which rule speaks, and the command. Nothing asserts a speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn import __main__ as command
from tinynn import nn, roofline
from tinynn.compress import fold_batchnorm, quantize
from tinynn.errors import ConfigError
from tinynn.explain import measure
from tinynn.explain.parts import Layer, Way
from tinynn.roofline import Limits

LIMITS = Limits(
    threads=1,
    flops=100e9,
    caches={"L1": 1000, "L2": 10_000},
    bandwidths={"L1": 200e9, "L2": 100e9, "L3": 50e9, "memory": 10e9},
    spread=0.01,
)
US = 1e-6


def network() -> nn.Module:
    rng = np.random.default_rng(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, rng=rng),
        nn.BatchNorm(32),
        nn.ReLU(),
        nn.DepthwiseConv2d(32, 3, rng=rng),
        nn.PointwiseConv2d(32, 48, rng=rng),
        nn.BatchNorm(48),
        nn.GlobalAvgPool2d(),
        nn.Linear(48, 2, rng=rng),
    )
    for module in (net[1], net[5]):  # scales of their own, which would tear a code book apart
        module.gamma.mutate()[...] = rng.uniform(0.5, 2, module.gamma.shape)
    return net


@pytest.fixture(scope="module")
def found() -> tn.Explanation:
    x = np.random.default_rng(1).standard_normal((4, 6, 6, 3)).astype(np.float32)
    return tn.explain(network(), x, density=0.25, entries=8, limits=LIMITS)


def ways(found: tn.Explanation, path: str) -> dict[str, Way]:
    (layer,) = (layer for layer in found.layers if layer.path == path)
    return {way.technique: way for way in (layer.dense, *layer.others)}


def test_what_every_technique_has_to_do(found: tn.Explanation) -> None:
    mine = ways(found, "4")
    rows, size = 4 * 36, 32 * 48
    assert found.chunks * found.batch >= found.batch
    dense = mine["dense"]
    assert dense.macs == rows * size and dense.weight_bytes == found.chunks * 4 * size
    assert dense.activation_bytes == 4 * rows * (32 + 48)
    assert dense.bounds["compute"] == pytest.approx(2 * rows * size / 100e9)
    sparse, blocks = mine["sparse"], mine["sparse4x1"]
    # a quarter of the weights, less those whose results nothing reads
    left = [way.macs / rows for way in (sparse, blocks)]
    assert all(size / 16 < n <= size / 4 for n in left)
    assert sparse.weight_bytes == found.chunks * 5 * left[0]
    assert blocks.weight_bytes == found.chunks * 17 * left[1] / 4
    assert sparse.bounds["index"] == pytest.approx(4 * sparse.macs / 200e9)
    assert blocks.bounds["index"] == pytest.approx(blocks.macs / 200e9)
    assert sparse.fixed is not None and mine["codebook"].fixed is None
    # a batch norm behind the layer has been folded before its weights share values: 3 bits
    assert mine["codebook"].weight_bytes == found.chunks * size * 3 / 8
    assert mine["float16"].weight_bytes == dense.weight_bytes / 2
    low = mine["lowrank"]
    assert low.rank == 32 * 48 // (2 * 80) and low.macs == rows * low.rank * 80
    assert low.activation_bytes == 4 * rows * (80 + 2 * low.rank)
    byte = mine["int8"]
    assert byte.macs == dense.macs and byte.weight_bytes == dense.weight_bytes / 4
    assert byte.activation_bytes == dense.activation_bytes / 4
    assert byte.bounds["compute"] == dense.bounds["compute"] / measure._DOT
    for way in mine.values():
        assert way.seconds is not None and way.seconds >= 0


def test_who_has_no_kernel_says_so(found: tn.Explanation) -> None:
    (first,) = (layer for layer in found.layers if layer.path == "0")
    mine = {way.technique: way for way in first.others}
    assert all(way.seconds is not None for name, way in mine.items() if name != "lowrank")
    # three bits each where the technique gave the weights a book of eight values
    assert mine["codebook"].weight_bytes == found.chunks * 27 * 32 * 3 / 8
    (depthwise,) = (layer for layer in found.layers if layer.kind == "depthwise")
    assert depthwise.dense.macs > 0  # and of the techniques two have a kernel for it
    assert [w.technique for w in depthwise.others if w.seconds is not None] == ["float16", "int8"]
    assert [way.technique for way in depthwise.others] == list(measure.TECHNIQUES)[1:]
    for other in (other for other in depthwise.others if other.seconds is None):
        assert "no kernel: none runs a depthwise layer" in depthwise.why(other)


def test_the_table_and_the_file_say_all(found: tn.Explanation) -> None:
    printed = str(found)
    for layer in found.layers:
        assert f"{layer.path}: {layer.kind}" in printed
        for way in layer.others:
            assert layer.why(way) in printed
    again = json.loads(json.dumps(found.as_dict()))
    assert [entry["path"] for entry in again["layers"]] == [layer.path for layer in found.layers]
    assert set(again["plans"]) == set(measure.TECHNIQUES)
    memory = {name: plan["memory"] for name, plan in again["plans"].items()}
    assert memory["codebook"] < memory["float16"] < memory["dense"] / 3
    assert f"{memory['float16'] / 1e3:.1f} kB of weights in memory" in printed
    assert again["settings"] == {"density": 0.25, "entries": 8, "threads": 1}


def test_a_technique_that_refuses_the_model_is_no_obstacle() -> None:
    rng = np.random.default_rng(0)
    additive = nn.Sequential(nn.Linear(8, 16, rng=rng), nn.AdditiveLinear(16, 4, rng=rng))
    for net in (additive, nn.Linear(8, 16, rng=rng)):
        found = tn.explain(net, np.ones((2, 8), np.float32), density=0.25, limits=LIMITS)
        printed = str(found)
        for layer in found.layers:
            assert [way.technique for way in layer.others] == list(measure.TECHNIQUES)[1:]
            assert all(layer.why(way) in printed for way in layer.others)


def test_each_use_of_a_layer_stands_for_itself() -> None:
    layer = nn.Linear(8, 8, rng=np.random.default_rng(0))
    x = np.ones((2, 8), np.float32)
    found = tn.explain(nn.Sequential(layer, nn.ReLU(), layer), x, density=0.5, limits=LIMITS)
    assert len(found.layers) == 2
    for use in found.layers:
        costs = {way.technique: way for way in use.others}
        assert costs["codebook"].macs == costs["int8"].macs == use.dense.macs
        assert costs["lowrank"].macs == use.dense.macs // 2


def test_a_compressed_model_is_shown_as_it_is() -> None:
    rng, x = np.random.default_rng(0), np.ones((2, 64), np.float32)
    net = nn.Sequential(nn.Linear(64, 64, rng=rng), nn.ReLU(), nn.Linear(64, 8, rng=rng))
    found = tn.explain(quantize.int8(net, [x]), x, limits=LIMITS)
    for path in ("0", "2"):
        mine = ways(found, path)
        itself, byte = mine["as it is"], mine["int8"]
        assert list(mine)[:2] == ["dense", "as it is"] and itself.seconds is not None
        assert (itself.macs, itself.weight_bytes) == (byte.macs, byte.weight_bytes)
        assert itself.bounds == byte.bounds
    assert "as it is" in found.plans and "as it is: " not in str(found)


def test_shares_that_cannot_be_are_warned_of(found: tn.Explanation) -> None:
    first = found.layers[0]

    def told(us: float, **bounds: float) -> str:
        slow = replace(first, dense=way("dense", us, **bounds), others=())
        return str(replace(found, layers=(slow,)))

    assert "--remeasure" not in told(10.0) and "--remeasure" not in told(1.0, overhead=20.0)
    assert "0 dense at 180%" in told(5.0) and "--remeasure" in told(5.0)


def test_a_layer_is_found_again_after_it_was_cut_in_two(found: tn.Explanation) -> None:
    x = np.zeros((4, 6, 6, 3), np.float32)
    folded = fold_batchnorm(network(), x).eval()
    plans = measure._plans(folded, x, measure.Settings(0.25, 8), 1, only=["dense", "lowrank"])
    i = next(i for i, a in enumerate(plans["dense"].network.layers) if a.path == "4")
    places = measure._standing_for(plans["lowrank"], plans["dense"], i)
    assert [plans["lowrank"].network.layers[i].path for i in places] == ["4.0", "4.1"]


# --- rules ----------------------------------------------------------------------------------------


def way(technique: str, us: float | None, **changes: Any) -> Way:
    """With bounds in microseconds."""
    bounds = {"compute": 9.0, "memory": 2.0, "index": 0.0, "overhead": 0.1}
    bounds |= {name: changes.pop(name) for name in list(changes) if name in bounds}
    given = {"macs": 100.0, "weight_bytes": 400.0, "activation_bytes": 600.0} | changes
    seconds = None if us is None else us * US
    return Way(
        technique,
        seconds,
        bounds={name: value * US for name, value in bounds.items()},  # type: ignore[misc]
        **given,
    )


DENSE = way("dense", 10.0)


@pytest.mark.parametrize(
    ("dense", "other", "words"),
    [
        (DENSE, way("sparse", None), ["no kernel"]),
        (DENSE, way("sparse", 2.0, macs=10.0, compute=1.8), ["helps, 5.00x", "arithmetic", "20%"]),
        (
            DENSE,
            way("sparse", 5.0, macs=10.0, compute=0.9, fixed=4e-6),
            ["helps, 2.00x", "promise 4.5x", "80% of its time would remain"],
        ),
        (
            way("dense", 10.0, compute=1.0, memory=8.0),
            way("float16", 5.5, compute=1.0, memory=5.0),
            ["helps, 1.82x", "memory traffic", "62%"],
        ),
        (
            DENSE,
            way("int8", 3.0, compute=2.25, memory=0.5),
            ["helps, 3.33x", "arithmetic", "25% of that is left"],
        ),
        (
            way("dense", 20.0),
            way("codebook", 10.0, weight_bytes=50.0),
            ["helps, 2.00x", "not by what the bounds say", "90%", "45%"],
        ),
        (
            DENSE,
            way("codebook", 12.0, weight_bytes=50.0),
            ["slower, 0.83x", "bound by arithmetic", "35% of the bytes"],
        ),
        (
            way("dense", 1.0, compute=0.1, memory=0.1, overhead=0.4),
            way("sparse", 1.2, compute=0.1, memory=0.1, overhead=0.5),
            ["slower", "call overhead", "0.5 us", "1.0 us"],
        ),
        (
            way("dense", 10.0, compute=1.0, memory=8.0),
            way("codebook", 10.1, compute=1.0, memory=7.9),
            ["no change", "memory bound", "60% of the bytes are activations"],
        ),
        (
            DENSE,
            way("sparse", 12.0, macs=70.0, compute=6.3, index=8.0),
            ["slower", "index traffic", "80% of the dense time"],
        ),
        (
            DENSE,
            way("sparse", 12.0, macs=10.0, compute=0.9, fixed=8e-6),
            ["slower", "layout", "67% of its time", "80% of the dense time"],
        ),
        (
            DENSE,
            way("lowrank", 10.0, macs=50.0, compute=4.5, rank=3),
            ["no change", "too few channels", "3 channels between the factors"],
        ),
        (
            DENSE,
            way("sparse", 12.0, macs=50.0, compute=4.5),
            ["slower", "promise 2.0x", "38%", "90%"],
        ),
    ],
)
def test_the_numbers_decide_what_is_said(dense: Way, other: Way, words: list[str]) -> None:
    layer = Layer("1", "conv", (1, 1, 128, 64), (8, 8, 64), 64, dense, (other,))
    said = layer.why(other)
    assert all(word in said for word in words), said
    renamed = replace(layer, path="2")
    assert renamed.why(other) == said


def test_a_depthwise_layer_has_few_inputs_by_its_nature() -> None:
    byte = way("int8", 11.0, compute=2.25)
    layer = Layer("1", "depthwise", (3, 3, 64, 1), (8, 8, 64), 64, DENSE, (byte,))
    assert (layer.inputs, layer.channels) == (9, 64)
    assert "promise 4.0x, but its kernel runs at 20%" in layer.why(byte)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_explains_a_published_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "limits", lambda *args, **kwargs: [LIMITS])
    file = tmp_path / "explain.json"
    arguments = ["explain", "summation", "--batch", "3", "--json", str(file)]
    assert command.main(arguments) == 0
    assert "call overhead" in capsys.readouterr().out or file.is_file()
    assert json.loads(file.read_text())["batch"] == 3


def test_a_file_is_known_by_its_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "limits", lambda *args, **kwargs: [LIMITS])
    x = np.ones((1, 8), np.float32)
    net = nn.Sequential(nn.Linear(8, 4, rng=np.random.default_rng(0)))
    tn.save(tmp_path / "MODEL.SAFETENSORS", net)
    tn.compile(net, x, choose="dense").save(tmp_path / "small")
    assert command.main(["explain", str(tmp_path / "MODEL.SAFETENSORS"), "--input", "8"]) == 0
    assert "lowrank" in capsys.readouterr().out
    for name in ("explain", "profile"):
        assert command.main([name, str(tmp_path / "small"), "--batch", "3", "--threads", "1"]) == 0
        assert "3 images" in capsys.readouterr().out
    assert command.main(["explain", str(tmp_path / "small"), "--input", "9"]) == 1
    assert "(8,)" in capsys.readouterr().err
    assert command.main(["explain", str(tmp_path / "small"), "--json", "figures"]) == 1
    assert "figures would not be written" in capsys.readouterr().err
    pytest.importorskip("onnx")
    tn.onnx.export(net, x, tmp_path / "net")
    assert command.main(["explain", str(tmp_path / "net"), "--input", "8"]) == 0
    assert "lowrank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no model nothing"),
        (["summation", "--density", "0.9"], "density"),
        (["summation", "--entries", "257"], "entries from 2 to 256"),
        (["summation", "--threads", "0"], "threads"),
        (["summation", "--batch", "0"], "explain: required --batch"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "limits", lambda *args, **kwargs: [LIMITS])
    assert command.main(["explain", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_density_that_no_plan_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="density"):
        tn.explain(network(), np.zeros((1, 6, 6, 3), np.float32), density=0.95, limits=LIMITS)
