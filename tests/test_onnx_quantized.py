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
from tinynn.nn.module import Module
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
