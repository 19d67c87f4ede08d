"""Quantised models as ONNX files: integer weights, and the grids of activations, as QDQ."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn import nn
from tinynn.compress import quantize
from tinynn.errors import UnsupportedError
from tinynn.nn.module import Module
from tinynn.nn.quantized import Quantized
from tinynn.op import Array

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def network() -> Module:
    rng = np.random.default_rng(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, rng=rng),
        nn.BatchNorm(6),
        nn.ReLU(),
        nn.DepthwiseConv2d(6, 3, multiplier=2, rng=rng),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(12, 5, 3, stride=2, rng=rng),
        nn.ResidualBlock(5, 8, stride=2, rng=rng),
        nn.GlobalAvgPool2d(),
        nn.Linear(8, 4, rng=rng),
    ).eval()


def images(count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 9, 8, 3)).astype(np.float32)


def exported(model: Module, path: Path) -> Any:
    """Export, compare with onnxruntime as the graph is written; the graph."""
    tn.onnx.export(model, images(2), path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = images(5, seed=2)
    got = ort.InferenceSession(path, options).run(None, {"input": x})[0]
    wanted = model(tn.Tensor(x)).data
    difference = np.abs(got - wanted) / np.abs(wanted).max()
    # where sums differ in their last digit, a number may be rounded to the next step instead
    assert np.median(difference) < 1e-5
    assert difference.max() < 0.1
    return onnx.load(path).graph


def test_an_int8_model_keeps_its_integers_and_its_grids(tmp_path: Path) -> None:
    model = quantize.int8(network(), [images(16)])
    graph = exported(model, tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in graph.node)
    assert "Clip" not in kinds
    assert kinds["DequantizeLinear"] == kinds["QuantizeLinear"] + 6
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    weights = {n: a for n, a in arrays.items() if a.dtype == np.int8 and a.ndim > 1}
    assert sorted(a.shape for a in weights.values()) == sorted(
        [(6, 3, 3, 3), (12, 1, 3, 3), (12, 5, 3, 3), (8, 5, 3, 3), (8, 8, 3, 3), (8, 4)]
    )
    assert not any(a.dtype == np.float32 and a.ndim == 4 for a in arrays.values())
    axes = {
        n.input[0]: n.attribute[0].i
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in weights
    }
    for name, weight in weights.items():  # one scale for each output channel
        axis = 1 if weight.shape in ((12, 5, 3, 3), (8, 4)) else 0
        assert (axes[name], arrays[f"{name}_scale"].shape) == (axis, (weight.shape[axis],))
        assert np.abs(weight).max() == 127


def test_fewer_bits_are_cut_where_their_grid_ends(tmp_path: Path) -> None:
    model = quantize.low_bit(network(), [images(16)], weights=4, activations=6)
    graph = exported(model, tmp_path / "model.onnx")
    assert Counter(node.op_type for node in graph.node)["Clip"] > 3


def test_one_grid_for_all_channels(tmp_path: Path) -> None:
    scheme = quantize.Scheme(per_channel=False)
    graph = exported(quantize.int8(network(), [images(16)], scheme=scheme), tmp_path / "m.onnx")
    scales = [t for t in graph.initializer if t.name.endswith("weight_scale")]
    assert len(scales) == 6
    assert not any(t.dims for t in scales)


def test_float16_weights_are_those_that_were_rounded(tmp_path: Path) -> None:
    exported(quantize.float16(network(), images(1)), tmp_path / "model.onnx")


def test_ranges_that_are_found_at_run_time_are_those_of_each_image(tmp_path: Path) -> None:
    model = quantize.dynamic(network(), images(2)).eval()
    graph = exported(model, tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in graph.node)
    assert (kinds["ConvInteger"], kinds["MatMulInteger"], kinds["Conv"]) == (8, 1, 0)
    assert kinds["DequantizeLinear"] == kinds["ConvTranspose"] == 1
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert not any(a.dtype == np.float32 and a.ndim == 4 for a in arrays.values())


def test_one_layer_with_ranges_found_at_run_time_has_the_same_sums(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layer = nn.Conv2d(3, 6, 3, stride=2, rng=rng)
    model = quantize.dynamic(nn.Sequential(layer, nn.ReLU()), images(1)).eval()
    path = tmp_path / "model.onnx"
    tn.onnx.export(model, images(2), path)
    x = images(4) * np.array([1, 1e-4, 1e4, 0], np.float32).reshape(4, 1, 1, 1)
    x[0] = np.abs(x[0])
    got, wanted = ort.InferenceSession(path).run(None, {"input": x})[0], tn.compile(model, x)(x)
    scale = np.abs(wanted).max(axis=(1, 2, 3), keepdims=True)
    assert (np.abs(got - wanted) <= 1e-6 * scale).all()


@pytest.mark.parametrize(
    "quantised",
    [
        lambda m, x: quantize.int8(m, [x]),
        lambda m, x: quantize.int8(m, [x], scheme=quantize.Scheme(per_channel=False)),
        lambda m, x: quantize.low_bit(m, [x], weights=4, activations=6),
    ],
    ids=["int8", "one_grid", "low_bit"],
)
def test_what_is_exported_is_loaded_with_its_grids(tmp_path: Path, quantised: Any) -> None:
    model, x = quantised(network(), images(16)).eval(), images(9, seed=2)
    tn.onnx.export(model, x, tmp_path / "model.onnx")
    again = tn.onnx.load(tmp_path / "model.onnx")
    np.testing.assert_array_equal(again(tn.Tensor(x)).data, model(tn.Tensor(x)).data)
    plans = [tn.compile(m, x, choose="dense") for m in (model, again)]
    integers = [Counter(k for k in kinds(p) if "int" in k) for p in plans]
    assert integers[0] == integers[1]
    np.testing.assert_allclose(plans[1](x), plans[0](x), rtol=0, atol=1e-6)
    assert not any(isinstance(m, Quantized) for _, m in quantize.floating(again).named_modules())
    tn.save(tmp_path / "model.safetensors", again)
    kept = tn.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(kept(tn.Tensor(x)).data, again(tn.Tensor(x)).data)


@pytest.mark.parametrize("mean", ["GlobalAveragePool", "ReduceMean"])
def test_what_others_export_is_quantised_like_our_own(tmp_path: Path, mean: str) -> None:
    model, x, path = network(), images(16), tmp_path / "model.onnx"
    tn.onnx.export(model, x, path)
    if mean == "ReduceMean":
        proto = onnx.load(path)
        pool = next(n for n in proto.graph.node if n.op_type == "GlobalAveragePool")
        pool.op_type = mean
        pool.attribute.append(onnx.helper.make_attribute("axes", [2, -1]))
        onnx.save(proto, path)
    plans = [tn.compile(quantize.int8(m, [x]), x) for m in (model, tn.onnx.load(path))]
    assert kinds(plans[0]) == kinds(plans[1])
    np.testing.assert_array_equal(plans[1](x), plans[0](x))


def kinds(plan: tn.Plan) -> list[str]:
    """The kinds of the steps, but for those that do nothing."""
    return [a.step.kind for a in plan.network.layers if a.step.kind != "reshape"]


def test_files_that_are_for_other_runtimes_say_so(tmp_path: Path) -> None:
    x = images(2)
    ef = nn.Sequential(nn.AdditiveConv2d(3, 4, 3, rng=np.random.default_rng(0))).eval()
    for model in (quantize.dynamic(network(), x).eval(), ef):
        tn.onnx.export(model, x, tmp_path / "model.onnx")
        with pytest.raises(UnsupportedError, match=r"other runtimes only.*tn\.save"):
            tn.onnx.load(tmp_path / "model.onnx")


@pytest.mark.parametrize(("kind", "low"), [(np.int8, -0.48), (np.uint8, -0.5)])
def test_grids_of_others(tmp_path: Path, kind: Any, low: float) -> None:
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.04), "z": np.array(7, kind), "w": rng.integers(-128, 128, (5, 4)),
        "ws": rng.uniform(0.01, 0.1, 5).astype(np.float32), "wz": np.zeros(5, np.int8),
        "b": rng.integers(-900, 900, 5).astype(np.int32), "low": np.float32(low),
    }  # fmt: skip
    constants["w"] = constants["w"].astype(np.int8)
    nodes = [
        ("Clip", "x low", "c", {}), ("QuantizeLinear", "c s z", "q", {}),
        ("DequantizeLinear", "q s z", "d", {}), ("DequantizeLinear", "w ws wz", "v", {"axis": 0}),
        ("DequantizeLinear", "b ws", "e", {"axis": 0}), ("Gemm", "d v e", "y", {"transB": 1}),
    ]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node(k, i.split(), [o], **a) for k, i, o, a in nodes],
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("n", 4))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ("n", 5))],
        [numpy_helper.from_array(np.asarray(a), k) for k, a in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    model, x = tn.onnx.load(path), rng.normal(0, 3, (20, 4)).astype(np.float32)
    options = ort.SessionOptions()  # optimised, it takes the bias to be on the grid of the sums
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    want = ort.InferenceSession(path, options).run(None, {"x": x})[0]
    np.testing.assert_allclose(model(tn.Tensor(x)).data, want, rtol=1e-5, atol=1e-4)
    if low == -0.48:  # on the grid, which then begins there
        np.testing.assert_allclose(tn.compile(model, x)(x), want, rtol=1e-5, atol=1e-4)
