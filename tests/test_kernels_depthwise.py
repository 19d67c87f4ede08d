"""Depthwise convolution and its gradients against the reference loops."""

from __future__ import annotations

import numpy as np
import pytest
from borders import bordered
from hypothesis import given, settings
from hypothesis import strategies as st
from windows import image_windows

from kernels import _jit, depthwise, reference
from kernels.geometry import Window, window

QUICK = settings(max_examples=40, deadline=None)
DTYPES = [np.float32, np.float64]
SAME, VALID = "same", "valid"
#: (shape, kernel, stride, padding, dilation, R)
CASES = [
    ((2, 9, 17, 16), (3, 3), (1, 1), SAME, (1, 1), 1),
    ((2, 12, 12, 33), (3, 3), (1, 1), ((0, 2), (3, 0)), (1, 1), 1),
    ((2, 9, 16, 24), (3, 3), (2, 2), SAME, (1, 1), 1),
    ((2, 17, 17, 16), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1),
    ((1, 12, 11, 20), (5, 5), (1, 1), SAME, (1, 1), 1),
    ((1, 17, 17, 16), (5, 5), (2, 2), ((2, 2), (2, 2)), (1, 1), 1),
    ((2, 5, 8, 3), (3, 3), (1, 1), SAME, (1, 1), 1),
    ((2, 5, 8, 1), (3, 3), (2, 1), SAME, (1, 1), 1),
    ((2, 7, 6, 9), (3, 3), (1, 1), SAME, (1, 1), 2),
    ((2, 9, 8, 16), (3, 5), (1, 1), SAME, (2, 3), 1),
    ((2, 9, 10, 17), (4, 2), (3, 2), VALID, (2, 1), 1),
    ((2, 9, 10, 16), (2, 2), (5, 6), ((1, 0), (0, 1)), (1, 1), 1),
    ((1, 1, 1, 16), (3, 3), (1, 1), SAME, (1, 1), 1),
    ((2, 1, 1, 16), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1),
    ((2, 7, 5, 48), (3, 3), (1, 1), ((3, 1), (4, 5)), (1, 1), 1),
    ((2, 5, 14, 32), (5, 3), (2, 1), SAME, (2, 1), 1),
    ((1, 2, 1, 5), (7, 5), (1, 1), SAME, (1, 1), 1),
    ((2, 3, 3, 16), (1, 1), (1, 1), ((4, 4), (9, 9)), (1, 1), 1),
]


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if request.param == "parallel" else 1 << 60)
        yield request.param


def randoms(dtype, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def problem(case, dtype=np.float32):
    """x, w, bias, grad and the window."""
    shape, kernel, stride, padding, dilation, factor = case
    win = window(*shape[1:3], kernel, stride, padding, dilation)
    results = shape[3] * factor
    out = (shape[0], *win.output(*shape[1:3]), results)
    return *randoms(dtype, shape, (*kernel, shape[3], factor), results, out), win


def ours(x, w, bias, grad, win):
    return (
        depthwise.depthwise2d(x, w, bias, win),
        depthwise.depthwise2d_input_grad(grad, w, x.shape, win),
        depthwise.depthwise2d_weight_grad(grad, x, win),
    )


def exact(x, w, bias, grad, win):
    x, w, grad = (a.astype(np.float64) for a in (x, w, grad))
    bias = None if bias is None else bias.astype(np.float64)
    return (
        reference.depthwise2d(x, w, bias, win),
        reference.depthwise2d_input_grad(grad, w, x.shape, win),
        reference.depthwise2d_weight_grad(grad, x, win),
    )


def check(got, expected, dtype):
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype and g.shape == e.shape and g.flags.carray
        np.testing.assert_allclose(g, e, rtol=0, atol=2000 * np.finfo(dtype).eps)


#: Compiling a parallel version takes three times as long: a layer of each kind stands for all.
KINDS = [("serial", c) for c in CASES] + [("parallel", CASES[i]) for i in (0, 1, 2, 4, 6, 8, 9)]


# float64 is drawn by test_any_geometry, too: here whole tiles, strides, tails and a multiplier.
@pytest.mark.parametrize(
    "variant, case, dtype",
    [(*kind, np.float32) for kind in KINDS]
    + [("serial", CASES[i], np.float64) for i in (0, 3, 8, 10)],
    ids=str,
    indirect=["variant"],
)
def test_forward_and_gradients(variant, case, dtype):
    arrays = problem(case, dtype)
    check(ours(*arrays), exact(*arrays), dtype)


@QUICK
@given(
    image_windows(13, 6, [1, 2, 3, 15, 16, 17, 33]),
    st.integers(1, 2),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_geometry(variant, case, multiplier, dtype, biased):
    if variant == "parallel":  # float64 is the same code, on vectors half as long
        dtype = np.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "_TILES", (4,))  # several tiles a row, and fewer kernels
        depthwise._forward_plan.cache_clear()
        depthwise._backward_plan.cache_clear()
        x, w, bias, grad, win = problem((*case, multiplier), dtype)
        arrays = (x, w, bias if biased else None, grad, win)
        check(ours(*arrays), exact(*arrays), dtype)
    depthwise._forward_plan.cache_clear()
    depthwise._backward_plan.cache_clear()


def test_relu_keeps_nan():
    x, w, bias, _, win = problem(CASES[0])
    x[0, 0, 0, 0] = np.nan
    y = depthwise.depthwise2d(x, w, bias, win, True)
    np.testing.assert_array_equal(y, reference.relu(depthwise.depthwise2d(x, w, bias, win)))
    assert np.isnan(y).any() and (y == 0).any()


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[6], CASES[9]], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_pass(case, value):
    for place in range(4):
        arrays = problem(case)
        for index in (0, -1):
            arrays[place].reshape(-1)[index] = value
        with np.errstate(invalid="ignore"):
            expected = exact(*arrays)
        for got, e in zip(ours(*arrays), expected, strict=True):
            np.testing.assert_allclose(got, e, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant, case", KINDS, ids=str, indirect=["variant"])
@pytest.mark.parametrize("streaming", [False, True])
def test_stays_within_its_arrays(variant, case, streaming, monkeypatch):
    *arrays, win = problem(case)
    expected = exact(*arrays, win)
    borders = []

    def empty(shape, dtype):
        array, border = bordered(np.zeros(shape, dtype))
        borders.append(border)
        return array

    monkeypatch.setattr(depthwise.memory, "empty", empty)
    if streaming:
        monkeypatch.setattr(depthwise, "_STREAM_BYTES", 0)
    check(ours(*(bordered(a)[0] for a in arrays), win), expected, np.float32)
    assert len(borders) >= 2 and all((border == 255).all() for border in borders)


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
@pytest.mark.parametrize("batch", [1, 37])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[8]], ids=str)
def test_threads_do_not_change_a_bit(case, batch):
    arrays = problem(((batch, *case[0][1:]), *case[1:]))
    before, results = _jit.get_threads(), []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            results.append(ours(*arrays))
    finally:
        _jit.set_threads(before)
    for one, two in zip(*results, strict=True):
        assert one.tobytes() == two.tobytes()


def test_any_layout_is_taken():
    x, w, bias, grad, win = problem(CASES[0])
    expected = ours(x, w, bias, grad, win)
    raw = np.zeros(x.nbytes + 4, np.uint8)[1:-3].view(np.float32).reshape(x.shape)
    raw[...] = x
    strided = np.repeat(bias, 2)[::2]
    got = ours(raw, np.asfortranarray(w), strided, np.asfortranarray(grad), win)
    for one, two in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("case", [CASES[3], CASES[8], CASES[9]], ids=str)
def test_against_torch(case):
    torch = pytest.importorskip("torch")
    if case[3] == SAME:  # torch pads both sides alike; room enough for every kernel here
        case = (*case[:3], ((4, 4), (6, 6)), *case[4:])
    x, w, bias, grad, win = problem(case, np.float64)
    kh, kw, channels, factor = w.shape
    tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    flat = w.reshape(kh, kw, 1, channels * factor).transpose(3, 2, 0, 1)
    tw = torch.tensor(flat, requires_grad=True)
    padding = (win.padding[0][0], win.padding[1][0])
    ty = torch.nn.functional.conv2d(
        tx, tw, torch.tensor(bias), win.stride, padding, win.dilation, channels
    )
    ty.backward(torch.tensor(grad.transpose(0, 3, 1, 2)))
    expected = (
        ty.detach().numpy().transpose(0, 2, 3, 1),
        tx.grad.numpy().transpose(0, 2, 3, 1),
        tw.grad.numpy().transpose(2, 3, 1, 0).reshape(w.shape),
    )
    check(ours(x, w, bias, grad, win), expected, np.float64)


def test_wrong_operands_are_named():
    x, w, bias, grad, win = problem(CASES[0])
    with pytest.raises(ValueError, match=r"depthwise2d: .*\(3, 3, 15, 1\)"):
        depthwise.depthwise2d(x, w[:, :, 1:], bias, win)
    with pytest.raises(ValueError, match=r"expected bias \(16,\), got \(15,\)"):
        depthwise.depthwise2d(x, w, bias[1:], win)
    with pytest.raises(ValueError, match=r"does not fit an image of 9 x 17"):
        depthwise.depthwise2d(
            x, np.ones((3, 3, 16, 1), np.float32), None, Window((3, 3), dilation=(9, 9))
        )
    with pytest.raises(ValueError, match=r"input_grad: expected grad \(2, 9, 17, 16\)"):
        depthwise.depthwise2d_input_grad(grad[1:], w, x.shape, win)
    with pytest.raises(ValueError, match=r"weight_grad: expected grad \(2, 9, 17, 16\)"):
        depthwise.depthwise2d_weight_grad(grad[:, 1:], x, win)
    with pytest.raises(TypeError, match=r"depthwise2d: .*float32, float64"):
        depthwise.depthwise2d(x, w.astype(np.float64), None, win)
