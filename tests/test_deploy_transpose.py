"""Plans of models that reorder axes: those of images in NCHW, as ONNX files of others have them."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from kernels.transpose import walk
from tinynn import nn, ops
from tinynn.compress import quantize
from tinynn.deploy.transpose import Transpose
from tinynn.errors import CompileError, FileFormatError
from tinynn.nn.module import Module
from tinynn.onnx.network import Function
from tinynn.op import Array


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def moving(*orders: tuple[int, ...]) -> Module:
    return nn.Sequential(*(Function("transpose", axes=axes) for axes in orders)).eval()


def kinds(plan: tn.Plan) -> list[str]:
    return [layer.step.kind for layer in plan.network.layers]


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ((0, 2, 3, 1), (3, 9, 7)),
        ((0, 3, 1, 2), (5, 13, 4)),
        ((0, 3, 2, 1), (4, 5, 6)),
        ((0, 2, 1, 3), (4, 5, 6)),
        ((0, 2, 1), (70, 3)),
        ((0, 5, 3, 1, 4, 2), (2, 3, 2, 5, 3)),
    ],
)
def test_axes_are_reordered_for_every_batch(axes: tuple[int, ...], shape: Any) -> None:
    plan = tn.compile(moving(axes), normal(2, *shape))
    assert kinds(plan) == ["transpose"]
    for batch, threads in ((1, 1), (2, 1), (11, 2)):
        x = normal(batch, *shape)
        plan.threads = threads
        np.testing.assert_array_equal(plan(x), x.transpose(axes))


def test_what_stays_in_its_order_is_not_moved() -> None:
    x = normal(3, 1, 4, 5)
    plan = tn.compile(moving((0, 2, 3, 1)), x)
    assert "transpose" not in kinds(plan)
    np.testing.assert_array_equal(plan(x), x.transpose(0, 2, 3, 1))
    assert walk((2, 3, 1, 4), (1, 2, 3, 0)) == [(12, 1), (2, 12)]
    assert walk((2, 3, 4), (0, 1, 2)) == [(24, 1)] and walk((1, 1), (1, 0)) == []


def test_transposes_that_follow_each_other_are_one_and_those_that_cancel_none() -> None:
    x = normal(3, 2, 4, 5)
    there, back = (0, 2, 3, 1), (0, 3, 1, 2)
    nothing = tn.compile(moving(there, back), x)
    assert "transpose" not in kinds(nothing)
    np.testing.assert_array_equal(nothing(x), x)
    once = tn.compile(moving(there, back, there), x)
    assert kinds(once) == ["transpose"]
    np.testing.assert_array_equal(once(x), x.transpose(there))
    twice = tn.compile(moving(there, there), x)
    assert kinds(twice) == ["transpose"]
    np.testing.assert_array_equal(twice(x), x.transpose(there).transpose(there))


def test_the_batch_stays_where_it_is() -> None:
    with pytest.raises(CompileError, match="the batch as the first axis"):
        tn.compile(moving((1, 0, 2)), normal(3, 3, 2))


def cnn() -> Module:
    """An image in NCHW, whose features are flattened in that order."""
    rng = np.random.default_rng(1)

    class Net(Module):
        def __init__(self) -> None:
            self.a, self.b = nn.Conv2d(3, 6, 3, rng=rng), nn.Conv2d(6, 5, 3, rng=rng)
            self.norm, self.c = nn.BatchNorm(6), nn.Linear(5 * 4 * 3, 4, rng=rng)

        def forward(self, x: tn.Tensor) -> tn.Tensor:
            h = ops.relu(self.norm(self.a(ops.transpose(x, (0, 2, 3, 1)))))
            h = ops.max_pool2d(self.b(h, relu=True), 2)
            return self.c(ops.flatten(ops.transpose(h, (0, 3, 1, 2))))

    return Net().eval()


def test_bytes_and_floats_and_files(tmp_path: Path) -> None:
    x = normal(6, 3, 8, 6)
    for model in (cnn(), quantize.int8(cnn(), [x]), quantize.dynamic(cnn(), x)):
        plan = tn.compile(model.eval(), x, choose="dense")
        assert kinds(plan).count("transpose") == 2
        plan.save(tmp_path / "plan")
        for one in (plan, tn.Plan.load(tmp_path / "plan")):
            for batch in (1, 5):
                got, want = one(x[:batch]), model(tn.Tensor(x[:batch])).data
                assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    bytes_ = tn.compile(quantize.int8(cnn(), [x]).eval(), x)
    made = [a.output for a in bytes_.network.layers if isinstance(a.step, Transpose)]
    assert all(bytes_.network.dtypes[v] == np.uint8 for v in made)


def test_a_file_with_other_axes_is_refused(tmp_path: Path) -> None:
    plan = tn.compile(moving((0, 2, 1)), normal(2, 3, 4))
    object.__setattr__(plan.network.layers[0].step, "axes", (1, 1))
    plan.save(tmp_path / "plan")
    with pytest.raises(FileFormatError, match="in some order"):
        tn.Plan.load(tmp_path / "plan")


def test_what_torch_exports_is_compiled_and_quantised(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(8 * 3 * 4, 5),
    ).eval()  # fmt: skip
    x = normal(4, 3, 6, 8)
    with redirect_stdout(io.StringIO()):
        torch.onnx.export(
            net, (torch.from_numpy(x),), tmp_path / "net.onnx", dynamo=False,
            input_names=["x"], dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    model, want = tn.onnx.load(tmp_path / "net.onnx"), net(torch.from_numpy(x)).detach().numpy()
    plan = tn.compile(model, x, choose="dense")
    np.testing.assert_allclose(plan(x), want, rtol=1e-4, atol=1e-5)
    byte = quantize.int8(model, [x]).eval()
    got = tn.compile(byte, x)(x)
    np.testing.assert_allclose(got, byte(tn.Tensor(x)).data, rtol=1e-4, atol=1e-4)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
