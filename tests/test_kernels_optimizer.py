"""Optimiser steps against the reference loops and torch.optim."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import _jit, optimizer, reference

# name of the kernel, number of state arrays, options, the class in torch.optim and its options
CASES = {
    "sgd": ("sgd", 0, {"lr": 0.1}, "SGD", {"lr": 0.1}),
    "momentum": ("sgd", 1, {"lr": 0.1, "momentum": 0.9}, "SGD", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (
        "sgd",
        1,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "l2": 0.01},
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adam": ("adam", 2, {"lr": 0.1, "l2": 0.01}, "Adam", {"lr": 0.1, "weight_decay": 0.01}),
    "adamw": ("adam", 2, {"lr": 0.1, "decay": 0.01}, "AdamW", {"lr": 0.1, "weight_decay": 0.01}),
    "nadam": ("nadam", 2, {"lr": 0.1, "l2": 0.01}, "NAdam", {"lr": 0.1, "weight_decay": 0.01}),
    "adadelta": ("adadelta", 2, {"lr": 0.5}, "Adadelta", {"lr": 0.5}),
    "rmsprop": ("rmsprop", 1, {"lr": 0.1}, "RMSprop", {"lr": 0.1}),
    "rmsprop momentum": (
        "rmsprop",
        2,
        {"lr": 0.1, "momentum": 0.9},
        "RMSprop",
        {"lr": 0.1, "momentum": 0.9},
    ),
}
STEPS = 6


@pytest.fixture(params=["serial", "parallel"], scope="module", autouse=True)
def variant(request):
    """Every test runs with either version of the kernels, whatever the size of its arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "PARALLEL_BYTES", 0 if request.param == "parallel" else 1 << 60)
        yield


class Run:
    """A parameter and its state under one implementation of a case."""

    def __init__(self, module, case, w):
        name, count, options, _, _ = CASES[case]
        self.step = getattr(module, name)
        self.options = dict(options)
        self.w = w.copy()
        self.state = [np.zeros_like(w) for _ in range(count)]
        self.timed = name in ("adam", "nadam")
        self.product = name == "nadam"
        if self.product:
            self.options["mu_product"] = 1.0
        self.optional = [None] if (name, count) in (("sgd", 0), ("rmsprop", 1)) else []

    def __call__(self, grad, t):
        if self.timed:
            self.options["step"] = t
        result = self.step(self.w, grad, *self.state, *self.optional, **self.options)
        if self.product:
            self.options["mu_product"] = result


def gradients(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((STEPS + 1, *shape)).astype(dtype)


def assert_close(got, exact, dtype, msg=""):
    assert got.dtype == dtype
    np.testing.assert_allclose(got, exact, rtol=0, atol=64 * np.finfo(dtype).eps, err_msg=msg)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from([(), (1,), (3, 5), (2, 1, 37)]),
    dtype=st.sampled_from([np.float32, np.float64]),
    penalties=st.sampled_from([{}, {"l1": 0.02, "l2": 0.03, "decay": 0.04}]),
    seed=st.integers(0, 99),
)
def test_against_reference(case, shape, dtype, penalties, seed):
    w, *grads = gradients(shape, dtype, seed)
    w = np.asarray(w)
    fast, exact = Run(optimizer, case, w), Run(reference, case, w.astype(np.float64))
    fast.options.update(penalties)
    exact.options.update(penalties)
    for t, grad in enumerate(grads, 1):
        fast(np.asarray(grad), t)
        exact(np.asarray(grad, np.float64), t)
    assert_close(fast.w, exact.w, dtype)
    for got, expected in zip(fast.state, exact.state, strict=True):
        assert_close(got, expected, dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_torch(case, dtype):
    torch = pytest.importorskip("torch")
    w, *grads = gradients((7, 5), dtype)
    ours = Run(optimizer, case, w)
    theirs = torch.from_numpy(w.copy()).requires_grad_()
    _, _, _, name, options = CASES[case]
    step = getattr(torch.optim, name)([theirs], **options)
    for t, grad in enumerate(grads, 1):
        ours(grad, t)
        theirs.grad = torch.from_numpy(grad.copy())
        step.step()
    # torch keeps Nadam's product of momenta in float32, whatever the parameter
    precision = np.float32 if case == "nadam" else dtype
    got, exact = ours.w.astype(precision), theirs.detach().numpy().astype(precision)
    assert_close(got, exact, precision)


@pytest.mark.parametrize("case", CASES)
def test_more_than_one_chunk(case):
    size = optimizer._CHUNK + 1
    w, grad = gradients((size,), np.float32)[:2]
    whole, parts = Run(optimizer, case, w), Run(optimizer, case, w)
    whole(grad, 1)
    ends = [0, 10, size - 3, size]
    for lo, hi in itertools.pairwise(ends):
        part = Run(optimizer, case, w[lo:hi])
        part(grad[lo:hi], 1)
        parts.w[lo:hi] = part.w
    assert_close(whole.w, parts.w, np.float32)


@pytest.mark.skipif(_jit.max_threads() < 2, reason="needs NUMBA_NUM_THREADS >= 2")
@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_change_a_bit(case):
    w, *grads = gradients((3 * optimizer._CHUNK + 5,), np.float32)
    before = _jit.get_threads()
    results = []
    try:
        for threads in (1, 2):
            _jit.set_threads(threads)
            run = Run(optimizer, case, w)
            for t, grad in enumerate(grads, 1):
                run(grad, t)
            results.append(b"".join(a.tobytes() for a in (run.w, *run.state)))
    finally:
        _jit.set_threads(before)
    assert results[0] == results[1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_pass(case, value):
    w = np.array([1.0, -2.0, 0.5])
    fast, exact = Run(optimizer, case, w), Run(reference, case, w)
    with np.errstate(invalid="ignore"):
        fast(np.array([0.1, value, 0.3]), 1)
        exact(np.array([0.1, value, 0.3]), 1)
    np.testing.assert_allclose(fast.w, exact.w, rtol=1e-12)
    for got, expected in zip(fast.state, exact.state, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_l1_pulls_towards_zero_and_leaves_zero():
    w = np.array([1.0, -1.0, 0.0])
    optimizer.sgd(w, np.zeros(3), None, lr=0.5, l1=0.1)
    np.testing.assert_allclose(w, [0.95, -0.95, 0.0])


def test_a_gradient_of_any_layout_is_taken():
    w, grad = np.zeros((3, 4)), np.arange(12.0).reshape(4, 3)
    grad.flags.writeable = False
    optimizer.sgd(w, grad.T, None, lr=1)
    np.testing.assert_array_equal(w, -grad.T)


def test_wrong_arrays_are_named():
    w, grad = np.zeros((4, 6), np.float32), np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match=r"sgd: argument 0 is updated in place.*strides"):
        optimizer.sgd(w[:, ::2], grad[:, ::2], None, lr=0.1)
    with pytest.raises(ValueError, match="rmsprop: argument 2 is updated in place"):
        optimizer.rmsprop(w.T.copy(), grad.T, grad.T, None, lr=0.1)
    frozen = w.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable=False"):
        optimizer.adam(frozen, grad, w, w, step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"adadelta: .*\(4, 6\), argument 1 float32 \(6, 4\)"):
        optimizer.adadelta(w, grad.reshape(6, 4), w, w)
    with pytest.raises(TypeError, match="argument 1 float64"):
        optimizer.sgd(w, grad.astype(np.float64), None, lr=0.1)
    with pytest.raises(TypeError, match="w is int64"):
        optimizer.sgd(np.zeros(2, np.int64), np.zeros(2, np.int64), None, lr=0.1)
    with pytest.raises(ValueError, match=r"sgd: momentum=0\.9, nesterov=False need a velocity"):
        optimizer.sgd(w, grad, None, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"rmsprop: momentum=0\.9 needs a velocity"):
        optimizer.rmsprop(w, grad, w, None, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="steps count from 1, got step=0"):
        optimizer.adam(w, grad, w, w, step=0, lr=0.1)
    with pytest.raises(ValueError, match="steps count from 1, got step=0"):
        optimizer.nadam(w, grad, w, w, step=0, mu_product=1.0, lr=0.1)
    assert not w.any()
