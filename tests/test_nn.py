"""Modules: the tree, the layers, and files that bring a model back with its sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn import nn, ops
from tinynn.errors import (
    ConfigError,
    DTypeError,
    FileFormatError,
    OutputError,
    ShapeError,
    TinynnError,
)
from tinynn.storage import (
    read_tensors,
    write_tensors,
)
from tinynn.tensor import Tensor, recording


def net(rng: np.random.Generator | None = None, hidden: int = 5) -> nn.Sequential:
    rng = rng or np.random.default_rng(0)
    return nn.Sequential(
        nn.Linear(3, hidden, rng=rng), nn.ReLU(), nn.Linear(hidden, 2, rng=rng), nn.Tanh()
    )


def batch(rows: int = 4) -> Tensor:
    return Tensor(np.random.default_rng(1).standard_normal((rows, 3)).astype(np.float32))


class TwoHeads(nn.Module):
    """A user's module with a shared parameter, a buffer and plain settings."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.body = nn.Linear(3, 4, rng=rng)
        self.left = nn.Linear(4, 2, rng=rng)
        self.right = nn.Linear(4, 2, rng=rng)
        self.right.weight = self.left.weight
        self.scale = 2.5
        self.sizes = (3, (4, 2))
        self.offset = np.arange(2, dtype=np.float32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        return self.left(h) + self.right(h) * self.scale + Tensor(self.offset)


def test_names_sizes_and_repr() -> None:
    model = net()
    assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert model.size() == 3 * 5 + 5 + 5 * 2 + 2
    assert "3 -> 5" in repr(model) and "32 parameters" in repr(model)
    assert len(model) == 4 and isinstance(model[1], nn.ReLU)


def test_a_slice_of_a_sequential_is_one_of_the_same_modules() -> None:
    model, x = net(), batch()
    head, tail = model[:2], model[2:]
    np.testing.assert_array_equal(tail(head(x)).data, model(x).data)
    assert [n for n, _ in tail.named_children()] == ["2", "3"] and head[0] is model[0]


def test_unknown_attributes_raise_and_lists_of_modules_are_refused() -> None:
    model = net()
    with pytest.raises(AttributeError):
        _ = model.wieght  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="not found by the tree walk"):
        model.layers = [nn.ReLU()]
    with pytest.raises(ConfigError, match="required modules"):
        nn.Sequential(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=">= 1"):
        nn.Linear(0, 3, rng=np.random.default_rng(0))


def test_linear_and_relu_run_as_one_op_with_the_same_bits() -> None:
    model, x = net(), batch()
    seen: list[str] = []
    with recording(lambda op, inputs, output: seen.append(op.name)):
        fused = model(x)
    assert seen == ["linear", "linear", "tanh"]
    plain = ops.tanh(model[2](ops.relu(model[0](x))))
    np.testing.assert_array_equal(fused.data, plain.data)


def test_shared_parameters_count_once_and_survive_copy_and_file(tmp_path: Path) -> None:
    model = TwoHeads(np.random.default_rng(0))
    assert model.size() == 3 * 4 + 4 + 4 * 2 + 2 + 2
    expected = model(batch()).data
    nn.save(tmp_path / "m.safetensors", model)
    for twin in (model.copy(), nn.load(tmp_path / "m.safetensors")):
        assert twin.left.weight is twin.right.weight  # type: ignore[attr-defined]
        assert twin.sizes == (3, (4, 2)) and twin.scale == 2.5  # type: ignore[attr-defined]
        np.testing.assert_array_equal(twin(batch()).data, expected)


def test_a_copy_is_independent() -> None:
    model = net()
    twin = model.copy()
    twin.parameters()[0].mutate()[...] = 0
    assert model.parameters()[0].data.any()


def test_float64_twin_computes_in_float64() -> None:
    model = net().astype(np.float64)
    out = model(Tensor(batch().data.astype(np.float64)))
    assert out.dtype == np.float64


def test_load_state_dict_changes_nothing_unless_everything_fits() -> None:
    model = net()
    before = model.state_dict()
    good = {k: v + 1 for k, v in before.items()}
    for bad, error in (
        ({k: v for k, v in good.items() if k != "2.bias"}, ConfigError),
        (good | {"extra": np.ones(1)}, ConfigError),
        (good | {"2.bias": np.ones(3, np.float32)}, ShapeError),
        (good | {"2.bias": np.ones(2)}, DTypeError),
    ):
        with pytest.raises(error):
            model.load_state_dict(bad)
        for k, v in model.state_dict().items():
            np.testing.assert_array_equal(v, before[k])
    model.load_state_dict(good)
    np.testing.assert_array_equal(model.state_dict()["0.weight"], good["0.weight"])


def test_dropout_scales_what_it_keeps_and_rests_outside_training() -> None:
    layer = nn.Dropout(0.25, rng=np.random.default_rng(0))
    x = Tensor(np.ones((200, 50), np.float32), requires_grad=True)
    y = layer(x)
    assert set(np.unique(y.data)) == {np.float32(0), np.float32(1) / np.float32(0.75)}
    assert abs(float(y.data.mean()) - 1) < 0.05
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, y.data)
    assert layer.eval()(x) is x
    with pytest.raises(ConfigError, match="0 <= p < 1"):
        nn.Dropout(1.0, rng=np.random.default_rng(0))


def test_a_model_loads_without_being_told_its_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = net(hidden=7)
    nn.save(path, model)
    twin = nn.load(path)
    assert twin[0].weight.shape == (3, 7)  # type: ignore[index]
    assert not twin.training
    np.testing.assert_array_equal(twin(batch()).data, model(batch()).data)


def test_a_saved_dropout_continues_its_random_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    model = nn.Sequential(nn.Dropout(0.5, rng=rng), nn.Dropout(0.5, rng=rng))
    model(batch())
    nn.save(tmp_path / "m", model)
    twin = nn.load(tmp_path / "m").train()
    np.testing.assert_array_equal(twin(batch()).data, model(batch()).data)


def test_every_truncation_and_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    nn.save(path, net())
    whole = path.read_bytes()
    for keep in {0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:keep])
        with pytest.raises(FileFormatError, match=r"m\.safetensors"):
            nn.load(path)
    rng = np.random.default_rng(0)
    for position in rng.choice(len(whole), 150, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            loaded = nn.load(path)
        except FileFormatError:
            continue
        # the only harmless flips are in what carries no meaning, such as the header's padding
        for name, value in net().state_dict().items():
            np.testing.assert_array_equal(loaded.state_dict()[name], value)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_no_model(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x"
        path.write_bytes(content)
        with pytest.raises(FileFormatError):
            nn.load(path)


def hostile_header(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        hostile_header(b"{}", 1 << 60),
        hostile_header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}')
        + b"1234",
        hostile_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}')
        + b"1234",
        hostile_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + b"1234",
        hostile_header(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}') + b"1234",
        hostile_header(b'{"__metadata__":{"tinynn":1}}'),
        hostile_header(b"[" * 5000),
        hostile_header(b"{}"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"evil\.safetensors"):
        nn.load(path)


def evil(parts: list[Any], kind: str = "Linear") -> str:
    return json.dumps({"kind": kind, "parts": parts})


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (nn.ConvTranspose2d, ("stride", "padding", "output")),
        (nn.AdditiveConv2d, ("stride", "padding", "dilation")),
    ],
)
def test_a_convolution_whose_window_a_file_leaves_out_is_refused(
    tmp_path: Path, kind: Any, names: tuple[str, ...]
) -> None:
    model = kind(1, 2, 3, padding=((1, 0), (0, 2)), rng=np.random.default_rng(0))
    nn.save(tmp_path / "m", model)
    arrays, metadata = read_tensors(tmp_path / "m")
    parts = json.loads(metadata["model"])["parts"]
    for name in names:
        for changed in ([], [[name, "value", None]], [[name, "tuple", [1, -1]]]):
            rest = [p for p in parts if p[0] != name] + changed
            text = {**metadata, "model": evil(rest, kind.__name__)}
            write_tensors(tmp_path / "evil", arrays, text)
            with pytest.raises(FileFormatError, match=name):
                nn.load(tmp_path / "evil")
    assert cast(Any, nn.load(tmp_path / "m")).padding == model.padding


def nested(depth: int) -> str:
    tree: dict[str, Any] = {"kind": "ReLU", "parts": []}
    for _ in range(depth):
        tree = {"kind": "Sequential", "parts": [["0", "module", tree]]}
    return json.dumps(tree)


@pytest.mark.parametrize(
    "architecture",
    [
        "not json",
        "[]",
        "{}",
        nested(100),
        evil([], "os.system"),
        evil([["weight", "parameter", "missing"]]),
        evil([["forward", "value", 1], ["weight", "parameter", "w"]]),
        evil([["__class__", "value", "x"], ["weight", "parameter", "w"]]),
        evil([["a b", "value", 1], ["weight", "parameter", "w"]]),
        evil([["weight", "parameter", "w"], ["bias", "parameter", "w"]]),
        evil([["weight", "call", "w"]]),
        evil([["weight", "value", {"x": 1}]]),
        evil([["p", "value", 7.0]], "Dropout"),
        evil([["rng", "generator", ["", {"bit_generator": "MT19937"}]]], "Dropout"),
        evil(
            [["p", "value", 0.5], ["rng", "generator", {"bit_generator": "PCG64", "path": ""}]],
            "Dropout",
        ),
        evil([]),
    ],
)
def test_hostile_architectures_are_refused(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "evil.safetensors"
    write_tensors(path, {"w": np.ones((2, 2), np.float32)}, {"tinynn": "1", "model": architecture})
    with pytest.raises(FileFormatError, match=r"evil\.safetensors"):
        nn.load(path)


def test_files_of_others_are_named_as_such(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2, np.float32)}, tmp_path / "other")
    with pytest.raises(FileFormatError, match="not written by tinynn"):
        nn.load(tmp_path / "other")
    write_tensors(tmp_path / "tensors", {"w": np.ones(2)}, {})
    with pytest.raises(FileFormatError, match="holds no model"):
        nn.load(tmp_path / "tensors")
    with pytest.raises(FileNotFoundError):
        nn.load(tmp_path / "nothing")


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = net()
    model.callback = print  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="callback"):
        nn.save(tmp_path / "m", model)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    nn.save(path, net())
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        nn.save(path, net(hidden=9))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_errors_share_one_base() -> None:
    assert issubclass(FileFormatError, TinynnError) and issubclass(OutputError, OSError)


class Clipped(nn.Module):
    """A user's own layer whose name is that of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.minimum(ops.relu(x), 0.1)


Clipped.__name__ = "ReLU"


class Careless(nn.Linear):
    """A subclass with a forward of its own that knows nothing of fused ReLUs."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


def test_only_our_own_layers_are_fused() -> None:
    rng, x = np.random.default_rng(0), batch()
    linear = nn.Linear(3, 4, rng=rng)
    clipped = nn.Sequential(linear, Clipped())
    assert float(clipped(x).data.max()) <= np.float32(0.1)
    careless = Careless(3, 4, rng=rng)
    assert float(nn.Sequential(careless, nn.ReLU())(x).data.min()) >= 0
    hooked, calls = nn.ReLU(), []
    hooked.forward = lambda t: (calls.append(1), ops.relu(t))[1]  # type: ignore[method-assign]
    nn.Sequential(linear, hooked)(x)
    assert calls == [1]


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = net()
    model.parameters()[0].requires_grad = False
    nn.save(tmp_path / "m", model)
    for twin in (model.copy(), model.astype(np.float64), nn.load(tmp_path / "m")):
        assert [p.requires_grad for p in twin.parameters()] == [False, True, True, True]


def test_a_shared_module_with_a_buffer_survives_the_file(tmp_path: Path) -> None:
    shared = TwoHeads(np.random.default_rng(0))
    model = nn.Sequential(nn.Linear(3, 3, rng=np.random.default_rng(1)), shared)
    model.again = shared
    nn.save(tmp_path / "m", model)
    twin = nn.load(tmp_path / "m")
    np.testing.assert_array_equal(twin[1].offset, shared.offset)  # type: ignore[index]


@pytest.mark.parametrize("bits", ["PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937"])
def test_dropout_with_any_of_numpys_generators_survives_the_file(tmp_path: Path, bits: str) -> None:
    rng = np.random.Generator(getattr(np.random, bits)(3))
    rng.random(5, dtype=np.float32)
    model = nn.Sequential(nn.Dropout(0.5, rng=rng))
    nn.save(tmp_path / "m", model)
    twin = nn.load(tmp_path / "m").train()
    np.testing.assert_array_equal(twin(batch()).data, model(batch()).data)


@pytest.mark.parametrize("bad", [np.ones(2, complex), np.array(["a"]), object()])
def test_unsavable_attributes_are_named(tmp_path: Path, bad: Any) -> None:
    model = net()
    model.odd = bad
    with pytest.raises(TinynnError, match="odd"):
        nn.save(tmp_path / "m", model)


@pytest.mark.parametrize("name", ["_hidden", "size", "kind", "rectifies"])
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, name: str) -> None:
    model = net()
    setattr(model, name, 3)
    with pytest.raises(ConfigError, match=f"Sequential.{name}: cannot save"):
        nn.save(tmp_path / "m", model)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["training", "size", "copy", "forward"])
def test_parts_do_not_hide_what_every_module_has(name: str) -> None:
    with pytest.raises(ConfigError, match=f"Sequential.{name}: required a name"):
        nn.Sequential(**{name: nn.ReLU()})
    with pytest.raises(ConfigError, match=f"Sequential.{name}: required a name"):
        setattr(net(), name, nn.Parameter([1.0]))


def test_a_module_inside_itself_is_refused(tmp_path: Path) -> None:
    model = net()
    model.self = model
    with pytest.raises(ConfigError, match="contains itself"):
        nn.save(tmp_path / "m", model)


@pytest.mark.parametrize("value", [{"a": nn.ReLU()}, [[nn.ReLU()]], (nn.Parameter([1.0]),)])
def test_parts_that_the_tree_walk_would_miss_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="tree walk"):
        net().hidden = value
    with pytest.raises(ConfigError, match="as a Parameter"):
        net().loose = Tensor([1.0], requires_grad=True)


@pytest.mark.parametrize(
    "architecture",
    [
        evil([["rectifies", "value", True]], "ReLU"),
        evil([["training", "value", "x"]], "ReLU"),
        evil([["registry", "value", 5]], "ReLU"),
        evil([["0", "value", 3]], "Sequential"),
        evil([["weight", "buffer", "w"], ["bias", "value", None]]),
        evil([["weight", "parameter", "w"], ["bias", "parameter", "d"]]),
        evil([["kernel", "tuple", [2, 2]], ["stride", "tuple", [1, 1]]], "MaxPool2d"),
        evil(
            [["kernel", "tuple", [2, 2]], ["stride", "value", 0], ["padding", "value", "same"]],
            "AvgPool2d",
        ),
        evil([["pool", "value", None], ["front", "value", 1.5], ["back", "value", 0]], "Shortcut"),
        evil([["front", "value", 1], ["back", "value", 0]], "Shortcut"),
        evil(
            [[n, "buffer", "d"] for n in ("mean", "variance")]
            + [[n, "parameter", "d"] for n in ("gamma", "beta")]
            + [["eps", "value", "x"], ["momentum", "value", 0.1]],
            "BatchNorm",
        ),
    ],
)
def test_a_file_cannot_change_what_a_class_means(tmp_path: Path, architecture: str) -> None:
    arrays = {"w": np.ones((2, 2), np.float32), "d": np.ones(2)}
    write_tensors(tmp_path / "evil", arrays, {"tinynn": "1", "model": architecture})
    with pytest.raises(FileFormatError):
        nn.load(tmp_path / "evil")


def test_modes_come_back_one_by_one() -> None:
    from tinynn.nn.module import mode

    model = net().train()
    model[1].training = False
    with pytest.raises(ZeroDivisionError), mode(model, False):
        assert not any(m.training for _, m in model.named_modules())
        _ = 1 / 0
    assert model.training and model[0].training and not model[1].training
