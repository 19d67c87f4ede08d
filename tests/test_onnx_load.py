"""Graphs that others wrote become modules: trained, pruned, saved; bad files are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn import importance, nn, prune, select
from tinynn.errors import ConfigError, FileFormatError, TinynnError, UnsupportedError
from tinynn.onnx.network import Arithmetic, Function, Given, Network
from tinynn.op import Array

onnx = pytest.importorskip("onnx")
helper = onnx.helper
FLOAT = onnx.TensorProto.FLOAT


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], name=f"the_{output}", **attributes)


def model(
    nodes: list[Any],
    constants: dict[str, Any],
    shape: tuple[Any, ...] = ("n", 3, 8, 8),
    version: int = 17,
) -> Any:
    """x of this shape to y through the nodes."""
    tensors = [onnx.numpy_helper.from_array(np.asarray(a), k) for k, a in constants.items()]
    source = helper.make_tensor_value_info("x", FLOAT, shape)
    result = helper.make_tensor_value_info("y", FLOAT, None)
    graph = helper.make_graph(nodes, "test", [source], [result], tensors)
    opset = [helper.make_opsetid("", version)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=8)
    made = onnx.shape_inference.infer_shapes(made)  # the checker wants the output's number of axes
    if not made.graph.output[0].type.tensor_type.HasField("shape"):
        made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, [None] * 4))
    del made.graph.value_info[:]
    return made


def write(path: Path, made: Any) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def onnxruntime(path: Path, x: Array) -> Array:
    ort = pytest.importorskip("onnxruntime")
    run = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return run.run(None, {"x": x})[0]


def classifier() -> Any:
    """As training libraries write them: NCHW, folded bias, transposed matrix, a Constant."""
    return model(
        [
            node("Conv", "x w1 b1", "a", pads=[1, 1, 1, 1], strides=[2, 2]),
            node("Relu", "a", "b"),
            node("Conv", "b w2", "c", group=6, auto_pad="SAME_LOWER"),
            node("Add", "c shift", "d"),
            node("Constant", "", "half", value_float=0.5),
            node("Mul", "half d", "e"),
            node("Concat", "e b", "f", axis=1),
            node("MaxPool", "f", "g", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
            node("BatchNormalization", "g gamma beta mean var", "h"),
            node("GlobalAveragePool", "h", "i"),
            node("Flatten", "i", "j"),
            node("Gemm", "j w3 b3", "y", transB=1, alpha=0.5),
        ],
        {
            "w1": normal(6, 3, 3, 3),
            "b1": normal(6),
            "w2": normal(6, 1, 2, 2),
            "shift": normal(6, 1, 1),
            "gamma": normal(12),
            "beta": normal(12),
            "mean": normal(12),
            "var": abs(normal(12)) + 1,
            "w3": normal(5, 12),
            "b3": normal(5),
        },
    )


def test_a_classifier_computes_what_onnxruntime_computes(tmp_path: Path) -> None:
    path, x = write(tmp_path / "net.onnx", classifier()), normal(3, 3, 8, 8)
    net = tn.onnx.load(path)
    np.testing.assert_allclose(net(tn.Tensor(x)).data, onnxruntime(path, x), 1e-5, 1e-5)
    # one transpose, of the input: all else is NHWC
    assert [name for name, _ in net.steps if "to_n" in name] == ["to_nhwc"]
    assert not net.training
    plan = tn.compile(net, x, choose="dense")
    np.testing.assert_allclose(plan(x), net(tn.Tensor(x)).data, 1e-5, 1e-5)


def test_what_is_loaded_is_trained_saved_and_pruned(tmp_path: Path) -> None:
    net = tn.onnx.load(write(tmp_path / "net.onnx", classifier()))
    x, labels = normal(8, 3, 8, 8), np.arange(8) % 5
    names = {name for name, _ in net.named_parameters()}
    assert {"the_a.weight", "the_c.weight", "the_d.constant", "the_h.gamma", "the_y.bias"} <= names
    assert "the_e.constant" not in names

    optimizer = tn.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = tn.softmax_cross_entropy(net(tn.Tensor(x)), labels)
        net.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    tn.save(tmp_path / "net.safetensors", net)
    again = tn.load(tmp_path / "net.safetensors")
    assert np.array_equal(again(tn.Tensor(x)).data, net(tn.Tensor(x)).data)

    small = prune.channels(net, tn.observe(net, [x]), importance.l1, select.share(0.5), fold="mean")
    assert small.size() < 0.6 * net.size()
    assert small(tn.Tensor(x)).shape == (8, 5)


@pytest.mark.parametrize("sizes", [(-1, 72), (0, 72), (0, -1)])
def test_channels_before_a_reshape_to_rows_are_pruned(
    tmp_path: Path, sizes: tuple[int, int]
) -> None:
    nodes = [
        node("Conv", "x w", "a", kernel_shape=[3, 3]),
        node("Transpose", "a", "b", perm=[0, 2, 3, 1]),  # as files from NHWC have it
        node("Reshape", "b sizes", "c"),
        node("Gemm", "c v", "y"),
    ]
    constants = {"w": normal(8, 2, 3, 3), "v": normal(72, 4), "sizes": np.array(sizes)}
    path, x = (
        write(tmp_path / "net.onnx", model(nodes, constants, ("n", 2, 5, 5))),
        normal(6, 2, 5, 5),
    )
    net = tn.onnx.load(path)
    np.testing.assert_allclose(net(tn.Tensor(x)).data, onnxruntime(path, x), 1e-4, 1e-4)
    small = prune.channels(net, tn.observe(net, [x]), importance.l1, select.share(0.5), fold="none")
    assert small.size() == net.size() // 2 and small(tn.Tensor(x)).shape == (6, 4)


@pytest.mark.parametrize(
    ("nodes", "constants", "shape"),
    [
        # an image in the order of the file wherever the order of axes matters
        (
            [node("MaxPool", "x", "a", kernel_shape=[2, 2]), node("Flatten", "a", "y", axis=1)],
            {},
            ("n", 3, 8, 8),
        ),
        (
            [
                node("MaxPool", "x", "a", kernel_shape=[2, 2]),
                node("ReduceMean", "a", "b", axes=[1, -1], keepdims=0),
                node("Softmax", "b", "y", axis=-1),
            ],
            {},
            ("n", 3, 8, 8),
        ),
        (
            [
                node("MaxPool", "x", "a", kernel_shape=[2, 2]),
                node("Sub", "rows a", "b"),
                node("Div", "b five", "c"),
                node("Transpose", "c", "d", perm=[0, 2, 1, 3]),
                node("MatMul", "d m", "y"),
            ],
            {"rows": normal(7, 1), "five": normal(1, 1, 1, 1, 1)[0], "m": normal(7, 2)},
            ("n", 3, 8, 8),
        ),
        # one tensor in both orders, and an addition of the two
        (
            [
                node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
                node("GlobalAveragePool", "t", "a"),
                node("Add", "a x", "y"),
            ],
            {},
            ("n", 4, 4, 4),
        ),
        (
            [
                node("ConvTranspose", "x w", "a", strides=[2, 2], pads=[1, 0, 1, 0]),
                node("AveragePool", "a", "b", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
                node("Pad", "b pads", "y"),
            ],
            {"w": normal(3, 2, 3, 3), "pads": np.array([0, 1, 0, 2, 0, 0, 1, 0])},
            ("n", 3, 5, 8),
        ),
        (
            [node("Gemm", "x w c", "y", transA=1, beta=2.0)],
            {"w": normal(6, 2), "c": normal(4, 1)},
            (6, 4),
        ),
        (
            [node("Slice", "x s e a p", "y")],
            {"s": [-1, 0], "e": [-9, 2], "a": [1, 0], "p": [-2, 1]},
            (3, 7),
        ),
        (
            [node("Max", "x a", "b"), node("Min", "x b c", "y")],
            {"a": normal(4), "c": normal(1, 4)},
            (2, 4),
        ),
        (
            [node("Unsqueeze", "x a", "b"), node("Squeeze", "b c", "y")],
            {"a": [0, -1], "c": [0]},
            (2, 4),
        ),
        ([node("Relu", "w", "a"), node("Add", "a x", "y")], {"w": normal(2, 4)}, (2, 4)),
        # channels among zeros, in another order; none of none
        (
            [node("Pad", "x p", "a"), node("Gather", "a rows", "y", axis=1)],
            {"p": [0, 0, 0, 1], "rows": [1, 3, 0, 3, 2]},
            (2, 3),
        ),
        (
            [node("Pad", "x p", "a"), node("Gather", "a rows", "y", axis=1)],
            {"p": [0, 0, 0, 1], "rows": np.zeros(0, np.int64)},
            (2, 0),
        ),
    ],
)
def test_small_graphs_compute_what_onnxruntime_computes(
    nodes: list[Any], constants: dict[str, Any], shape: tuple[Any, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "net.onnx", model(nodes, constants, shape))
    x = normal(*(n if isinstance(n, int) else 2 for n in shape))
    wanted = onnxruntime(path, x)
    got = tn.onnx.load(path)(tn.Tensor(x)).data
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (node("Conv", "x w1", "y"), "Conv of node 'the_y': weights of 1 dimensions"),
        (node("Conv", "x w3", "y", group=3), "Conv of node 'the_y': attribute group=3"),
        (node("Conv", "x x", "y"), "Conv of node 'the_y': weights .* must be an initializer"),
        (node("Conv", "x w2", "y", pads=[0, 0, 1 << 20, 0]), "attribute pads.*out of bounds"),
        (node("Conv", "x w2", "y", kernel_shape=[3, 3]), "attribute kernel_shape"),
        (node("ConvTranspose", "x w2", "y", dilations=[2, 2]), "attribute dilations"),
        (node("ConvTranspose", "x w2", "y", output_padding=[1, 0]), "attribute output_padding"),
        (node("MaxPool", "x", "y", kernel_shape=[2]), "kernel_shape of 1 sizes"),
        (node("Pad", "x p", "y", mode="reflect"), "Pad of node 'the_y': attribute mode='reflect'"),
        (node("Elu", "x", "y"), "operator Elu of node 'the_y'"),
        (node("Add", "x i", "y"), "'i' is of int64"),
        (node("Add", "x h", "y"), "'h' is of FLOAT16"),
        (node("Softmax", "x", "y", axis=1), None),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(
    made: Any, reason: str | None, tmp_path: Path
) -> None:
    constants = {
        "w1": normal(2, 3, 3),
        "w2": normal(3, 3, 2, 2),
        "w3": normal(6, 2, 1, 1),
        "i": np.array([0, 1]),
        "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "h": np.ones(8, np.float16),
    }
    used = {k: v for k, v in constants.items() if k in made.input}
    path = write(tmp_path / "net.onnx", model([made], used))
    if reason is None:
        assert tn.onnx.load(path)(tn.Tensor(normal(1, 3, 8, 8))).shape == (1, 3, 8, 8)
        return
    with pytest.raises(UnsupportedError, match=reason):
        tn.onnx.load(path)


def test_operators_of_others_are_refused_by_name(tmp_path: Path) -> None:
    made = model([node("Relu", "x", "y")], {})
    made.graph.node[0].domain = "com.example"
    made.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(UnsupportedError, match=r"operator com\.example\.Relu of node 'the_y'"):
        tn.onnx.load(write(tmp_path / "net.onnx", made))


def test_axes_by_the_rules_of_old_opsets_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", model([node("Softmax", "x", "y")], {}, version=11))
    with pytest.raises(UnsupportedError, match="axis=1 of opset 11"):
        tn.onnx.load(path)
    path = write(tmp_path / "b.onnx", model([node("Relu", "x", "y")], {}, version=6))
    with pytest.raises(UnsupportedError, match="required opset 7 to"):
        tn.onnx.load(path)


def change(made: Any, how: Callable[[Any], None]) -> Any:
    how(made)
    return made


def external(made: Any) -> None:
    tensor = made.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def hidden(made: Any) -> None:
    tensor = made.graph.node[4].attribute[0].t
    tensor.data_location = onnx.TensorProto.EXTERNAL


HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "external data": (external, "kept in another file"),
    "external data in an attribute": (hidden, "kept in another file"),
    "more elements than data": (
        lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 40),
        "needs .* bytes|too small",
    ),
    "negative size": (
        lambda m: m.graph.initializer[0].dims.__setitem__(0, -6),
        "impossible shape|not a valid",
    ),
    "unknown operand": (lambda m: m.graph.node[1].input.__setitem__(0, "z"), "not a valid"),
    "two results of one name": (
        lambda m: m.graph.node[1].output.__setitem__(0, "a"),
        "not a valid",
    ),
    "no output of the graph": (lambda m: m.graph.output[0].__setattr__("name", "q"), "."),
    "vectors that do not fit": (lambda m: m.graph.node[8].input.__setitem__(1, "b3"), "do not fit"),
    "bias that does not fit": (lambda m: m.graph.node[0].input.__setitem__(2, "b3"), "do not fit"),
    "no graph": (lambda m: m.ClearField("graph"), "not an ONNX file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_and_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    how, reason = HOSTILE[name]
    path = write(tmp_path / "net.onnx", change(classifier(), how))
    with pytest.raises(FileFormatError, match=reason):
        tn.onnx.load(path)


def test_no_mutilated_file_raises_anything_but_our_own_errors(tmp_path: Path) -> None:
    content = classifier().SerializeToString()
    choose = random.Random(0)
    path = tmp_path / "net.onnx"
    refused = 0
    for trial in range(300):
        data = bytearray(content[: choose.randrange(len(content))] if trial % 3 == 0 else content)
        for _ in range(choose.randrange(1, 6)):
            if data:
                data[choose.randrange(len(data))] = choose.randrange(256)
        path.write_bytes(data)
        try:
            tn.onnx.load(path)
        except TinynnError:
            refused += 1
    assert refused > 100
    with pytest.raises(FileNotFoundError):
        tn.onnx.load(tmp_path / "none.onnx")


def test_a_network_checks_its_steps(tmp_path: Path) -> None:
    relu = {"a": nn.ReLU()}
    for steps, outputs in (
        ([("a", (1,))], [1]),
        ([("b", (0,))], [1]),
        ([("a", (-1,))], [1]),
        ([("a", (0,))], [2]),
        ([("a", (0,))], []),
        ([("steps", (0,))], [1]),
    ):
        with pytest.raises(ConfigError, match="Network"):
            Network(relu, steps, outputs=outputs)
    for part in (lambda: Function("load"), lambda: Arithmetic("exp")):
        with pytest.raises(ConfigError):
            part()
    net = Network({**relu, "g": Given(normal(2))}, [("a", (0,)), ("g", ())], outputs=[1, 2])
    result = net(tn.Tensor(normal(3)))
    assert [r.shape for r in result] == [(3,), (2,)]
    net.steps = (("a", (7,)),)
    tn.save(tmp_path / "bad.safetensors", net)
    with pytest.raises(FileFormatError, match="step 'a'"):
        tn.load(tmp_path / "bad.safetensors")


def test_a_product_of_rows_with_a_matrix_is_a_layer_that_can_be_quantised(tmp_path: Path) -> None:
    nodes = [node("Clip", "x low high", "a"), node("MatMul", "a w", "y")]
    constants = {"low": np.float32(0), "high": np.float32(np.inf), "w": normal(4, 3)}
    net, x = (
        tn.onnx.load(write(tmp_path / "net.onnx", model(nodes, constants, ("n", 4)))),
        normal(5, 4),
    )
    np.testing.assert_allclose(net(tn.Tensor(x)).data, x.clip(0) @ constants["w"], 1e-5, 1e-5)
    byte = tn.compress.quantize.int8(net, [x])
    assert "the_y.layer.weight" in {
        name.removeprefix("layer.") for name, _ in byte.named_parameters()
    }
