"""Every registered op: against its plain-loop twin, its gradient, torch, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import fft

from kernels.geometry import window
from kernels.reference_compressed import splitmix64
from tinynn import ops
from tinynn.errors import ConfigError, DataError, DTypeError, ShapeError, TinynnError
from tinynn.gradcheck import GradientError, gradcheck
from tinynn.op import Op, Sample, registry, use_variant
from tinynn.tensor import Tensor, apply

SAMPLES = [
    pytest.param(sample, id=f"{sample.op}-{sample.shapes}")
    for kind in registry.values()
    for sample in kind.samples()
]


def operands(sample: Sample, dtype: type = np.float64) -> list[np.ndarray]:
    """Values at least 1e-3 apart and off zero, so that no kink lies within a finite difference."""
    rng = np.random.default_rng(7)
    arrays = []
    for shape in sample.shapes:
        size = int(np.prod(shape))
        grid = np.linspace(sample.low, sample.high, 4 * size + 6)[1:-1]
        picked = rng.choice(grid[np.abs(grid) > 1e-3], size, replace=False)
        arrays.append((picked + rng.uniform(-1e-4, 1e-4, size)).reshape(shape).astype(dtype))
    if sample.labels is not None:
        arrays[-1] = rng.integers(0, sample.labels, sample.shapes[-1])
    return arrays


def test_every_op_declares_samples_and_is_registered_once() -> None:
    assert len(registry) > 20
    assert all(kind.samples() for kind in registry.values())
    with pytest.raises(TinynnError, match="declared twice"):
        type("Add", (Op,), {})


@pytest.mark.parametrize("sample", SAMPLES)
def test_gradient_against_central_differences(sample: Sample) -> None:
    gradcheck(lambda *t: apply(sample.op, *t), operands(sample))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sample", SAMPLES)
def test_forward_against_the_reference(sample: Sample, dtype: type) -> None:
    if "reference" not in sample.op.variants:
        pytest.skip(f"{sample.op.name} only looks at its operand in another way")
    arrays = operands(sample, dtype)
    tensors = [Tensor(a) for a in arrays]
    got = apply(sample.op, *tensors)
    with use_variant("reference"):
        expected = apply(sample.op, *tensors)
    assert got.dtype == dtype and got.shape == expected.shape
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(got.data, expected.data, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sample", SAMPLES)
def test_float32_gradient_agrees_with_float64(sample: Sample) -> None:
    grads: dict[type, list[Any]] = {}
    for dtype in (np.float32, np.float64):
        tensors = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in operands(sample, dtype)]
        out = apply(sample.op, *tensors)
        out.backward(np.linspace(-1, 1, out.size).reshape(out.shape))
        grads[dtype] = [t.grad for t in tensors]
        for t in tensors:
            assert t.grad is None or (t.grad.dtype == dtype and t.grad.shape == t.shape)
    for a, b in zip(grads[np.float32], grads[np.float64], strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def _rectified(op: Any, y: Any) -> Any:
    return y.relu() if op.relu else y


def _window(op: Any, x: Any, kernel: Any) -> Any:
    return window(*x.shape[1:3], kernel, op.stride, op.padding, getattr(op, "dilation", (1, 1)))


def _padded(T: Any, x: Any, win: Any, value: float) -> Any:
    """Images NHWC as torch wants them, NCHW, with explicit padding."""
    (top, bottom), (left, right) = win.padding
    return T.nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom), value=value)


def torch_conv(T: Any, op: Any, x: Any, w: Any, b: Any, groups: int = 1) -> Any:
    win = _window(op, x, tuple(w.shape[:2]))
    y = T.nn.functional.conv2d(
        _padded(T, x, win, 0.0), w.permute(3, 2, 0, 1), b, op.stride, 0, op.dilation, groups
    )
    return y.permute(0, 2, 3, 1)


def torch_transpose(T: Any, op: Any, x: Any, w: Any, b: Any) -> Any:
    """The gradient of a convolution by its input, asked of torch's own convolution."""
    rows, columns = (n or x.shape[i + 1] * op.stride[i] for i, n in enumerate(op.output))
    zeros = T.zeros(len(x), rows, columns, w.shape[3], dtype=x.dtype, requires_grad=True)
    forward = type("Forward", (), {"stride": op.stride, "padding": op.padding, "dilation": (1, 1)})
    y = torch_conv(T, forward, zeros, w.transpose(2, 3), None)
    (out,) = T.autograd.grad(y, zeros, x, create_graph=True)
    return _rectified(op, out + b)


def torch_pool(T: Any, op: Any, x: Any, pool: Any, value: float) -> Any:
    win = _window(op, x, op.kernel_size)
    return pool(_padded(T, x, win, value), op.kernel_size, op.stride).permute(0, 2, 3, 1)


def torch_average(T: Any, op: Any, x: Any) -> Any:
    total = torch_pool(T, op, x, T.nn.functional.avg_pool2d, 0.0)
    return total / torch_pool(T, op, T.ones_like(x), T.nn.functional.avg_pool2d, 0.0)


def torch_hashed(T: Any, op: Any, values: Any) -> Any:
    """The coefficients where another implementation of the hash puts them, and their DCT."""
    found = []
    for i, place in enumerate(np.ndindex(*op.shape)):
        band = sum(place[:-2])
        bucket = sum(op.buckets[:band]) + splitmix64(op.seed, 2 * i) % op.buckets[band]
        found.append(values[bucket] * (-1) ** (splitmix64(op.seed, 2 * i + 1) >> 63))
    out = T.stack(found).reshape(op.shape)
    if len(op.shape) == 2:
        return out
    rows, columns = (T.tensor(fft.dct(np.eye(n), norm="ortho", axis=0)) for n in op.shape[:2])
    return T.einsum("ja,kb,jkcn->abcn", rows, columns, out)


TORCH: dict[str, Any] = {
    "add": lambda T, op, a, b: a + b,
    "sub": lambda T, op, a, b: a - b,
    "mul": lambda T, op, a, b: a * b,
    "div": lambda T, op, a, b: a / b,
    "maximum": lambda T, op, a, b: T.maximum(a, b),
    "minimum": lambda T, op, a, b: T.minimum(a, b),
    "neg": lambda T, op, x: -x,
    "exp": lambda T, op, x: x.exp(),
    "log": lambda T, op, x: x.log(),
    "sqrt": lambda T, op, x: x.sqrt(),
    "absolute": lambda T, op, x: x.abs(),
    "power": lambda T, op, x: x**op.exponent,
    "relu": lambda T, op, x: x.relu(),
    "tanh": lambda T, op, x: x.tanh(),
    "sigmoid": lambda T, op, x: x.sigmoid(),
    "matmul": lambda T, op, a, b: a @ b,
    "linear": lambda T, op, x, w, b: (x @ w + b).relu() if op.relu else x @ w + b,
    "additive": lambda T, op, x, w: x.sign() @ w + x @ w.sign(),
    "additive_conv2d": lambda T, op, x, w: (
        torch_conv(T, op, x.sign(), w, None) + torch_conv(T, op, x, w.sign(), None)
    ),
    "sum": lambda T, op, x: x.sum(op.axes, keepdim=op.keepdims),
    "max": lambda T, op, x: x.amax(op.axes, keepdim=op.keepdims),
    "reshape": lambda T, op, x: x.reshape(op.shape),
    "transpose": lambda T, op, x: x.permute(op.axes),
    "concat": lambda T, op, *xs: T.cat(xs, op.axis),
    "pad": lambda T, op, x: T.nn.functional.pad(
        x, [n for w in reversed(op.widths) for n in w], value=op.value
    ),
    "scatter": lambda T, op, x: T.full(
        (*x.shape[:-1], op.width), op.value, dtype=x.dtype
    ).index_copy(-1, T.tensor(op.places), x),
    "index": None,  # torch has no negative steps
    "conv2d": lambda T, op, x, w, b: _rectified(op, torch_conv(T, op, x, w, b)),
    "depthwise_conv2d": lambda T, op, x, w, b: _rectified(
        op, torch_conv(T, op, x, w.reshape(*w.shape[:2], 1, -1), b, groups=w.shape[2])
    ),
    "conv_transpose2d": lambda T, op, x, w, b: torch_transpose(T, op, x, w, b),
    "max_pool2d": lambda T, op, x: torch_pool(T, op, x, T.nn.functional.max_pool2d, -np.inf),
    "avg_pool2d": lambda T, op, x: torch_average(T, op, x),
    "batch_norm": lambda T, op, x, g, b: _rectified(
        op,
        T.nn.functional.batch_norm(
            x.reshape(-1, x.shape[-1]), None, None, g, b, training=True, eps=op.eps
        ).reshape(x.shape),
    ),
    "batch_norm_eval": lambda T, op, x, g, b, m, v: _rectified(
        op, (x - m) * (g / (v + op.eps).sqrt()) + b
    ),
    "scale_shift": lambda T, op, x, a, b: _rectified(op, x * a + b),
    "fake_quantize": lambda T, op, x, s, a, b: s * T.minimum(T.maximum((x / s).round(), a), b),
    "round_to_half": lambda T, op, x: x.clamp(-65504, 65504).half().to(x.dtype),
    "hashed": torch_hashed,
    "take": lambda T, op, x, i: x[i],
    "softmax": lambda T, op, x: x.softmax(op.axis),
    "log_softmax": lambda T, op, x: x.log_softmax(op.axis),
    "mse": lambda T, op, p, t: T.nn.functional.mse_loss(p, t),
    "rmse": lambda T, op, p, t: (T.nn.functional.mse_loss(p, t) + op.eps).sqrt(),
    "softmax_cross_entropy": lambda T, op, x, y: T.nn.functional.cross_entropy(
        x, y, label_smoothing=op.smoothing
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_forward_and_gradient_against_torch(sample: Sample) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    twin = TORCH[sample.op.name]
    if twin is None:
        pytest.skip(f"torch cannot express every {sample.op.name}")
    arrays = operands(sample)
    ours = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    theirs = [torch.tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    got, expected = apply(sample.op, *ours), twin(torch, sample.op, *theirs)
    np.testing.assert_allclose(got.data, expected.detach().numpy(), rtol=1e-9, atol=1e-12)
    weights = np.linspace(-1, 2, got.size).reshape(got.shape)
    got.backward(weights)
    expected.backward(torch.tensor(weights))
    for a, b in zip(ours, theirs, strict=True):
        if a.requires_grad:
            np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-8, atol=1e-11)


def test_every_op_has_a_torch_twin_or_a_reason() -> None:
    assert set(TORCH) == set(registry)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.data(),
)
def test_reductions_over_any_axes(shape: list[int], data: st.DataObject) -> None:
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    keep = data.draw(st.booleans())
    x = np.random.default_rng(1).standard_normal(shape)
    axis = tuple(sorted(axes))
    for ours, theirs in (
        (ops.sum, np.sum),
        (ops.mean, np.mean),
        (ops.max, np.max),
        (ops.var, np.var),
    ):
        got = ours(Tensor(x), axis, keep).data
        np.testing.assert_allclose(got, theirs(x, axis=axis, keepdims=keep), atol=1e-12)
        gradcheck(lambda t, ours=ours: ours(t, axis, keep), [x], projections=1)


@given(st.data())
def test_broadcasting_gradients(data: st.DataObject) -> None:
    full = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    a = [data.draw(st.sampled_from([1, n])) for n in full]
    b = [data.draw(st.sampled_from([1, n])) for n in full][data.draw(st.integers(0, len(full))) :]
    rng = np.random.default_rng(0)
    x, y = rng.uniform(1, 2, a), rng.uniform(1, 2, b)
    for op in (ops.add, ops.sub, ops.mul, ops.div):
        gradcheck(op, [x, y], projections=1)


@given(st.data())
def test_indexing_is_numpys(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    x = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    key: list[Any] = [data.draw(st.one_of(st.integers(-n, n - 1), st.slices(n))) for n in shape]
    first = data.draw(st.integers(0, len(shape)))
    last = data.draw(st.integers(first, len(shape)))
    key[first:last] = [Ellipsis]  # stands for none or more whole axes
    key.insert(data.draw(st.integers(0, len(key))), None)
    expected = x[tuple(key)]
    np.testing.assert_array_equal(Tensor(x)[tuple(key)].data, expected)
    if expected.size:
        gradcheck(lambda t: t[tuple(key)], [x], projections=1)


def test_results_without_axes_have_gradients_without_axes() -> None:
    for function in (ops.exp, ops.neg, ops.tanh, lambda t: t * t + t, lambda t: t - 2 / t):
        x = Tensor(2.0, requires_grad=True)
        y = function(x)
        y.backward()
        assert y.shape == () and x.grad is not None and x.grad.shape == ()
        gradcheck(function, [np.array(0.3)])


def test_numbers_of_numpy_and_integers_take_the_dtype_of_the_tensor() -> None:
    x = Tensor([-2.0, 3.0], requires_grad=True)
    for y in (x * np.arange(2), x + np.int64(1), np.float64(2) * x, x ** np.int64(2)):
        assert y.dtype == np.float32
    np.testing.assert_array_equal((x ** np.int64(2)).data, [4, 9])
    np.testing.assert_allclose((2 ** Tensor([3.0])).data, [8], rtol=1e-6)
    np.testing.assert_allclose((np.ones((1, 2), np.float32) @ x.reshape(2, 1)).data, [[1.0]])
    with pytest.raises(DTypeError, match=r"int64"):
        x * Tensor(np.arange(2))
    with pytest.raises(DTypeError, match="float16"):
        ops.exp(np.ones(2, np.float16))


def test_the_reference_variant_runs_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the fast kernel ran")

    for name in ("linear", "relu", "mse", "rmse", "softmax_cross_entropy"):
        kind = registry[name]
        twins = {"numba": fail, "reference": kind.gradients["reference"]}
        monkeypatch.setattr(kind, "gradients", twins)
        for sample in kind.samples():
            tensors = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in operands(sample)]
            with use_variant("reference"):
                out = apply(sample.op, *tensors)
                out.backward(np.ones(out.shape))
    with pytest.raises(TinynnError, match="required one of"), use_variant("refrence"):
        pass


def test_power_with_a_tensor_as_exponent() -> None:
    rng = np.random.default_rng(0)
    gradcheck(ops.power, [rng.uniform(0.5, 2, (3,)), rng.uniform(-1, 2, (3,))])


def test_rmse_gradient_is_finite_at_zero_loss() -> None:
    p = Tensor(np.ones((4, 1), np.float32), requires_grad=True)
    out = ops.rmse(p, np.ones((4, 1), np.float32))
    out.backward()
    assert 0 < out.item() < 1e-5
    np.testing.assert_array_equal(p.grad, np.zeros((4, 1)))


def test_sigmoid_and_softmax_do_not_overflow() -> None:
    x = Tensor(np.array([-1e4, 0.0, 1e4], np.float32))
    np.testing.assert_allclose(x.sigmoid().data, [0, 0.5, 1])
    np.testing.assert_allclose(x.softmax().data, [0, 0, 1])
    assert np.isfinite(ops.softmax_cross_entropy(x.reshape(1, 3), [0]).item())


def test_non_finite_values_pass_as_ieee_says() -> None:
    x = np.array([np.nan, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(ops.relu(x).data, [np.nan, np.inf, 0])
    np.testing.assert_array_equal((Tensor(x) + 1).data, [np.nan, np.inf, -np.inf])
    assert np.isnan(ops.linear(x.reshape(1, 3), np.ones((3, 1), np.float32)).item())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.add(np.ones(2), np.ones(3)), ShapeError, r"Add.*broadcast.*\(2,\), \(3,\)"),
        (lambda: ops.matmul(np.ones((2, 3)), np.ones((2, 3))), ShapeError, "Matmul"),
        (lambda: ops.linear(np.ones((2, 3)), np.ones((4, 5))), ShapeError, r"Linear.*\(4, 5\)"),
        (
            lambda: ops.linear(np.ones((2, 3)), np.ones((3, 5)), np.ones(4)),
            ShapeError,
            r"bias \(N,\)",
        ),
        (lambda: ops.linear(np.ones((0, 3)), np.ones((3, 5))), ShapeError, "at least one row"),
        (lambda: ops.mse(np.ones((3, 1)), np.ones(3)), ShapeError, r"Mse.*\(3, 1\), \(3,\)"),
        (lambda: ops.rmse(np.ones((0, 1)), np.ones((0, 1))), ShapeError, "not empty"),
        (lambda: ops.rmse(np.ones(1), np.ones(1), eps=0), TinynnError, "eps"),
        (lambda: ops.reshape(np.ones(4), 3), ShapeError, "4 elements"),
        (lambda: ops.transpose(np.ones((2, 3)), (0, 0)), ShapeError, "distinct"),
        (lambda: ops.sum(np.ones((2, 3)), 2), ShapeError, "axes"),
        (lambda: ops.max(np.ones((0, 3)), 0), ShapeError, "at least one element"),
        (lambda: ops.var(np.ones(1), ddof=1), ShapeError, "more than 1"),
        (lambda: ops.concat([np.ones((2, 3)), np.ones((2, 4))], 0), ShapeError, "Concat"),
        (lambda: ops.concat([]), ShapeError, "at least one"),
        (lambda: ops.transpose(np.ones((2, 3)), 1), ShapeError, "every axis"),
        (lambda: ops.pad(np.ones(2), [(1, -1)]), ShapeError, "Pad"),
        (lambda: ops.pad(np.ones(2), [1]), DTypeError, "pair"),  # type: ignore[list-item]
        (lambda: ops.pad(np.ones(2), [(0.5, 0)]), DTypeError, "whole"),  # type: ignore[list-item]
        (lambda: ops.scatter(np.ones(2), [1, 1], 3), ShapeError, "different places"),
        (lambda: ops.scatter(np.ones(2), [1, 3], 3), ShapeError, "different places"),
        (lambda: ops.scatter(np.ones(2), [1], 3), ShapeError, r"Scatter.*\(2,\)"),
        (lambda: ops.index(np.ones(2), "a"), DTypeError, "index"),
        (lambda: ops.index(np.ones(2), 2), IndexError, "out of range"),
        (lambda: ops.take(np.ones(2), [2]), IndexError, "Take"),
        (lambda: ops.take(np.ones(2), [0.5]), DTypeError, "integers"),
        (
            lambda: ops.softmax_cross_entropy(np.ones((2, 3)), [0, 3]),
            DataError,
            "came 3 in row 1",
        ),
        (lambda: ops.softmax_cross_entropy(np.ones((2, 3)), [0]), ShapeError, "labels"),
        (
            lambda: ops.softmax_cross_entropy(np.ones((1, 3)), [0], smoothing=1.0),
            TinynnError,
            "smoothing",
        ),
    ],
)
def test_bad_operands_are_refused_by_name(call: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_axes_are_one_tuple_or_several_numbers() -> None:
    x = Tensor(np.arange(24.0).reshape(2, 3, 4))
    for axes in ((1, 2, 0), [1, 2, 0], np.array([1, 2, 0])):
        np.testing.assert_array_equal(ops.transpose(x, axes=axes).data, x.data.transpose(1, 2, 0))
    for result in (x.transpose(1, 2, 0), x.transpose(-2, np.int64(2), 0)):
        np.testing.assert_array_equal(result.data, x.data.transpose(1, 2, 0))
    np.testing.assert_array_equal(x.transpose().data, x.data.T)


IMAGE = np.arange(18, dtype=np.float32).reshape(1, 3, 3, 2)
KERNEL = np.ones((2, 2, 2, 1), np.float32)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, (1, 1.5), (1, 2, 3), "2", None, np.float32(2)])
def test_a_stride_is_one_whole_number_or_two(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="conv2d: required stride >= 1"):
        ops.conv2d(IMAGE, KERNEL, stride=wrong)


@pytest.mark.parametrize(
    "wrong", [-1, 0.5, (1, 1), ((0, 0.5), (0, 0)), "full", None, np.ones((2, 2)), np.ones(2)]
)
def test_a_padding_is_a_word_or_whole_numbers(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="conv2d: padding is"):
        ops.conv2d(IMAGE, KERNEL, padding=wrong)


def test_whole_numbers_of_numpy_say_where_a_window_lies() -> None:
    expected = ops.conv2d(IMAGE, KERNEL, stride=2, padding=1).data
    two, ones = np.int64(2), np.ones((2, 2), np.int64)
    for stride, padding in ((two, np.int8(1)), ((two, 2), ones)):
        made = ops.conv2d(IMAGE, KERNEL, stride=stride, padding=padding)  # type: ignore[arg-type]
        np.testing.assert_array_equal(made.data, expected)


@pytest.mark.parametrize("wrong", [(5.5, 4), (-3, -3), (1, 2, 3), None])
def test_the_size_of_a_transposed_convolution_is_whole(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="required output >= 0"):
        ops.conv_transpose2d(IMAGE, KERNEL, output=wrong)
    with pytest.raises(ShapeError, match="a kernel that fits in 1 x 1"):
        ops.conv_transpose2d(IMAGE[:, :1, :1], KERNEL, padding="valid")


@pytest.mark.parametrize("pool", [ops.max_pool2d, ops.avg_pool2d])
def test_every_window_of_a_pool_sees_a_pixel(pool: Any) -> None:
    assert np.isfinite(pool(IMAGE, 2, stride=1, padding=1).data).all()
    with pytest.raises(ShapeError, match="less padding than the window"):
        pool(IMAGE, 2, stride=1, padding=((0, 2), (0, 0)))


def test_gradcheck_finds_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Op, grad: np.ndarray, saved: Any) -> tuple[np.ndarray]:
        return (grad * saved[0] * 1.01,)

    monkeypatch.setattr(registry["exp"], "backward", wrong)
    with pytest.raises(GradientError, match="operand 0"):
        gradcheck(ops.exp, [np.ones(3)])
