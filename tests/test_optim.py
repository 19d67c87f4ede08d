"""Optimisers against torch, against the reference steps, against formulas; and resumption."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest

from kernels import reference
from tinynn import optim
from tinynn.errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from tinynn.nn.module import Parameter
from tinynn.schedule import Plateau
from tinynn.tensor import Tensor

SHAPES = [(3, 4), (2, 2, 3, 5), (4,), (1,)]
PENALTIES = {"l1": 0.02, "l2": 0.05, "weight_decay": 0.1}

# Name -> how to make it from (parameters, further options).
MAKE = {
    "sgd": lambda p, **o: optim.SGD(p, 0.05, **o),
    "momentum": lambda p, **o: optim.SGD(p, 0.05, 0.9, **o),
    "nesterov": lambda p, **o: optim.SGD(p, 0.05, 0.9, nesterov=True, **o),
    "adam": lambda p, **o: optim.Adam(p, 0.01, 0.8, 0.95, 1e-6, **o),
    "nadam": lambda p, **o: optim.Nadam(p, 0.01, 0.8, 0.95, 1e-6, 0.01, **o),
    "adadelta": lambda p, **o: optim.Adadelta(p, 0.7, 0.85, 1e-5, **o),
    "rmsprop": lambda p, **o: optim.RMSProp(p, 0.01, 0.9, 1e-6, **o),
    "rmsprop, momentum": lambda p, **o: optim.RMSProp(p, 0.01, 0.9, 1e-6, 0.8, **o),
}

TORCH = {
    "sgd": lambda t, p: t.SGD(p, 0.05),
    "momentum": lambda t, p: t.SGD(p, 0.05, 0.9),
    "nesterov": lambda t, p: t.SGD(p, 0.05, 0.9, nesterov=True),
    "adam": lambda t, p: t.Adam(p, 0.01, (0.8, 0.95), 1e-6),
    "nadam": lambda t, p: t.NAdam(p, 0.01, (0.8, 0.95), 1e-6, momentum_decay=0.01),
    "adadelta": lambda t, p: t.Adadelta(p, 0.7, 0.85, 1e-5),
    "rmsprop": lambda t, p: t.RMSprop(p, 0.01, 0.9, 1e-6),
    "rmsprop, momentum": lambda t, p: t.RMSprop(p, 0.01, 0.9, 1e-6, momentum=0.8),
}


def parameters(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [Parameter(rng.standard_normal(s).astype(dtype)) for s in SHAPES]


def gradients(dtype=np.float32, seed=1):
    rng = np.random.default_rng(seed)
    while True:
        yield [rng.standard_normal(s).astype(dtype) for s in SHAPES]


def run(optimizer, source, steps):
    for _ in range(steps):
        for p, grad in zip(optimizer.params, next(source), strict=True):
            p.grad = grad
        optimizer.step()


def values(optimizer):
    return [p.numpy() for p in optimizer.params]


@pytest.fixture
def torch_default_float64():
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_twenty_steps_agree_with_torch(name, penalised, dtype, request):
    torch = pytest.importorskip("torch")
    options = {**PENALTIES, "penalise_biases": True} if penalised else {}
    ours = MAKE[name](parameters(dtype), **options)
    theirs_params = [torch.nn.Parameter(torch.tensor(p.numpy())) for p in ours.params]
    theirs = TORCH[name](torch.optim, theirs_params)
    theirs_source = gradients(dtype)
    if dtype == np.float64:  # the product of momenta in its NAdam is of this dtype
        request.getfixturevalue("torch_default_float64")
    run(ours, gradients(dtype), 20)
    for _ in range(20):
        with torch.no_grad():
            for p, grad in zip(theirs_params, next(theirs_source), strict=True):
                p.grad = torch.tensor(grad)
                if penalised:
                    p.grad += PENALTIES["l1"] * torch.sign(p) + PENALTIES["l2"] * p
                    p *= 1 - theirs.param_groups[0]["lr"] * PENALTIES["weight_decay"]
        theirs.step()
    tolerance = 2e-5 if dtype == np.float32 else 1e-12
    for got, want in zip(values(ours), theirs_params, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=tolerance, atol=tolerance)


def test_adamw_and_l2_mean_what_torch_means_by_them():
    torch = pytest.importorskip("torch")
    for option, make in {
        "weight_decay": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.3),
        "l2": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.3),
    }.items():
        ours = optim.Adam(parameters(np.float64), 0.01, penalise_biases=True, **{option: 0.3})
        theirs_params = [torch.nn.Parameter(torch.tensor(p.numpy())) for p in ours.params]
        theirs, source = make(theirs_params), gradients(np.float64)
        run(ours, gradients(np.float64), 20)
        for _ in range(20):
            for p, grad in zip(theirs_params, next(source), strict=True):
                p.grad = torch.tensor(grad)
            theirs.step()
        for got, want in zip(values(ours), theirs_params, strict=True):
            np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-11)


def reference_step(name, w, grad, state, t, l1, l2, decay):
    """One step of the plain-loop twin on copies, with state kept in the dict `state`."""
    terms = {"l1": l1, "l2": l2, "decay": decay}
    a, b = (state.setdefault(k, np.zeros_like(w)) for k in "ab")
    adam = {"step": t, "lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, **terms}
    if name == "sgd":
        reference.sgd(w, grad, None, lr=0.05, **terms)
    elif name in ("momentum", "nesterov"):
        nesterov = name == "nesterov"
        reference.sgd(w, grad, a, lr=0.05, momentum=0.9, nesterov=nesterov, **terms)
    elif name == "adam":
        reference.adam(w, grad, a, b, **adam)
    elif name == "nadam":
        so_far = state.get("mu_product", 1.0)
        state["mu_product"] = reference.nadam(
            w, grad, a, b, mu_product=so_far, momentum_decay=0.01, **adam
        )
    elif name == "adadelta":
        reference.adadelta(w, grad, a, b, lr=0.7, rho=0.85, eps=1e-5, **terms)
    else:
        momentum = 0.8 if "momentum" in name else 0.0
        v = b if momentum else None
        reference.rmsprop(w, grad, a, v, lr=0.01, alpha=0.9, eps=1e-6, momentum=momentum, **terms)


@pytest.mark.parametrize("name", MAKE)
def test_twenty_steps_agree_with_the_reference_twin(name):
    ours = MAKE[name](parameters(np.float64), **PENALTIES)
    expected = values(ours)
    states = [{} for _ in SHAPES]
    source = gradients(np.float64)
    run(ours, gradients(np.float64), 20)
    for t in range(1, 21):
        for w, grad, state in zip(expected, next(source), states, strict=True):
            terms = (0.02, 0.05, 0.1) if w.ndim >= 2 else (0.0, 0.0, 0.0)
            reference_step(name, w, grad, state, t, *terms)
    for got, want in zip(values(ours), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


# --- penalties and decay -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("biases", [False, True])
def test_penalties_are_a_gradient_and_decay_is_not(name, biases):
    # The penalised optimiser on grad must equal the plain one on grad + l1 sign(w) + l2 w, with
    # lr decay w subtracted on top of its step.
    penalised = MAKE[name](parameters(np.float64), **PENALTIES, penalise_biases=biases)
    plain = MAKE[name](parameters(np.float64))
    source = gradients(np.float64)
    for _ in range(5):
        for p, q, grad in zip(penalised.params, plain.params, next(source), strict=True):
            w = p.numpy()
            on = 1.0 if biases or w.ndim >= 2 else 0.0
            p.grad = grad
            q.grad = grad + on * (0.02 * np.sign(w) + 0.05 * w)
            decayed = w * (1 - plain.lr * on * 0.1)
            q.mutate()[...] = decayed
        penalised.step()
        plain.step()
        for got, want in zip(values(penalised), values(plain), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)


def test_l1_does_not_move_a_weight_at_zero():
    p = Parameter(np.array([[0.0, 2.0, -2.0]], np.float32))
    p.grad = np.zeros((1, 3), np.float32)
    optim.SGD([p], 0.5, l1=1.0).step()
    assert p.data.tolist() == [[0.0, 1.5, -1.5]]


def test_penalty_is_the_value_whose_gradient_is_added():
    params = parameters(np.float64)
    weights = [p.data for p in params if p.ndim >= 2]
    expected = sum(0.02 * np.abs(w).sum() + 0.025 * (w**2).sum() for w in weights)
    assert optim.SGD(params, 0.1, **PENALTIES).penalty() == pytest.approx(expected, rel=1e-12)
    expected += sum(0.02 * np.abs(p.data).sum() + 0.025 * (p.data**2).sum() for p in params[2:])
    everything = optim.SGD(params, 0.1, **PENALTIES, penalise_biases=True)
    assert everything.penalty() == pytest.approx(expected, rel=1e-12)
    assert optim.SGD(params, 0.1, weight_decay=0.1).penalty() == 0


# --- state ---------------------------------------------------------------------------------------


def through_json(state):
    """The state as a checkpoint keeps it: arrays apart, numbers as text."""
    numbers = {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}
    arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
    return {**json.loads(json.dumps(numbers, allow_nan=False)), **arrays}


@pytest.mark.parametrize("cut", [0, 1, 7])
@pytest.mark.parametrize("name", MAKE)
def test_a_resumed_run_continues_bit_for_bit(name, cut):
    whole = MAKE[name](parameters(), **PENALTIES)
    first = MAKE[name](parameters(), **PENALTIES)
    source = gradients()
    run(whole, gradients(), 20)
    run(first, source, cut)
    state, saved_values = through_json(first.state_dict()), values(first)
    run(first, gradients(seed=9), 3)  # must not reach into what was saved

    second = MAKE[name](parameters(), **PENALTIES)
    for p, value in zip(second.params, saved_values, strict=True):
        p.mutate()[...] = value
    second.load_state_dict(state)
    run(second, source, 20 - cut)
    for got, want in zip(values(second), values(whole), strict=True):
        assert got.tobytes() == want.tobytes()
    saved, wanted = second.state_dict(), whole.state_dict()
    assert saved.keys() == wanted.keys()
    assert all(np.array_equal(saved[k], wanted[k]) for k in saved)


def test_the_rate_is_part_of_the_state():
    a, b = optim.SGD(parameters(), 0.1), optim.SGD(parameters(), 0.1)
    a.lr = 0.003
    b.load_state_dict(a.state_dict())
    assert b.lr == 0.003


def altered(**changes):
    def change(state):
        merged = {**state, **{k.replace("__", "."): v for k, v in changes.items()}}
        return {k: v for k, v in merged.items() if v is not ...}

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: {}, ConfigError, r"missing \['nadam\.0\.mean'"),
        (lambda s: {k.replace("nadam", "adam"): v for k, v in s.items()}, ConfigError, "unknown"),
        (altered(nadam__lr=...), ConfigError, "missing"),
        (altered(nadam__9__mean=np.zeros(1)), ConfigError, r"unknown \['nadam\.9\.mean'"),
        (altered(nadam__lr=math.nan), ConfigError, "nan"),
        (altered(nadam__lr="1"), ConfigError, "'1'"),
        (altered(nadam__1__step=-1), ConfigError, "-1"),
        (altered(nadam__1__step=2.5), ConfigError, "2.5"),
        (altered(nadam__1__step=10**400), ConfigError, "step"),
        (altered(nadam__1__step=True), ConfigError, "True"),
        (altered(nadam__3__mu_product=np.ones(2)), ConfigError, "mu_product"),
        (altered(nadam__0__mean=np.zeros((4, 3), np.float32)), ShapeError, r"\(3, 4\).*\(4, 3\)"),
        (altered(nadam__0__mean=1.0), ShapeError, r"\(\)"),
        (altered(nadam__0__mean=np.zeros((3, 4))), DTypeError, "float64"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, error, message):
    optimizer = optim.Nadam(parameters())
    run(optimizer, gradients(), 2)
    before = optimizer.state_dict()
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(change(before))
    after = optimizer.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_momentum_is_part_of_what_must_fit():
    with pytest.raises(ConfigError, match="velocity"):
        optim.SGD(parameters(), 0.1, 0.9).load_state_dict(optim.SGD(parameters(), 0.1).state_dict())


# --- steps and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_parameters_without_gradient_and_their_state_stay(name):
    optimizer = MAKE[name](parameters(), **PENALTIES)
    run(optimizer, gradients(), 2)
    before, state = values(optimizer), optimizer.state_dict()
    optimizer.zero_grad()
    assert all(p.grad is None for p in optimizer.params)
    optimizer.params[0].grad = np.ones(SHAPES[0], np.float32)
    optimizer.step()
    after, changed = values(optimizer), optimizer.state_dict()
    assert not np.array_equal(before[0], after[0])
    assert all(np.array_equal(x, y) for x, y in zip(before[1:], after[1:], strict=True))
    assert all(np.array_equal(state[k], changed[k]) for k in state if ".0." not in k)


@pytest.mark.parametrize("name", MAKE)
def test_gradients_of_any_layout_give_the_same_step(name):
    straight, strided = MAKE[name](parameters()), MAKE[name](parameters())
    grads = next(gradients())
    for p, q, grad in zip(straight.params, strided.params, grads, strict=True):
        p.grad = grad
        spread = np.zeros((*grad.shape[:-1], 2 * grad.shape[-1]), grad.dtype)
        spread[..., ::2] = grad
        q.grad = np.asfortranarray(grad) if grad.ndim == 2 else spread[..., ::2]
    straight.step()
    strided.step()
    for a, b in zip(values(straight), values(strided), strict=True):
        assert a.tobytes() == b.tobytes()


def test_a_step_marks_values_as_changed():
    p = Parameter(np.ones((2, 2), np.float32))
    loss = (p * p).sum()
    p.grad = np.ones((2, 2), np.float32)
    optim.SGD([p], 0.1).step()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_the_rate_can_be_set_between_steps():
    p = Parameter(np.zeros(2, np.float32))
    optimizer = optim.SGD([p], 1.0)
    for lr in (0.5, 0.25, 0.0):
        optimizer.lr = lr
        p.grad = np.ones(2, np.float32)
        optimizer.step()
    assert p.data.tolist() == [-0.75, -0.75]
    with pytest.raises(ConfigError, match="lr >= 0; came -1"):
        optimizer.lr = -1
    assert optimizer.lr == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.SGD(p, -0.1), "lr >= 0; came -0.1"),
        (lambda p: optim.SGD(p, math.nan), "lr >= 0; came nan"),
        (lambda p: optim.SGD(p, 0.1, 1.0), "momentum < 1; came 1.0"),
        (lambda p: optim.SGD(p, 0.1, nesterov=True), "nesterov requires momentum > 0"),
        (lambda p: optim.SGD(p, 0.1, l1=-1), "l1 >= 0; came -1"),
        (lambda p: optim.SGD(p, 0.1, l2=math.inf), "l2 >= 0; came inf"),
        (lambda p: optim.Adam(p, weight_decay=-2), "weight_decay >= 0; came -2"),
        (lambda p: optim.Adam(p, beta1=1.5), "beta1 < 1; came 1.5"),
        (lambda p: optim.Adam(p, beta2=-0.5), "beta2 < 1; came -0.5"),
        (lambda p: optim.Adam(p, eps=0), "eps > 0; came 0"),
        (lambda p: optim.Nadam(p, momentum_decay=-1), "momentum_decay >= 0; came -1"),
        (lambda p: optim.Adadelta(p, rho=1), "rho < 1; came 1"),
        (lambda p: optim.Adadelta(p, eps=-1), "eps > 0; came -1"),
        (lambda p: optim.RMSProp(p, alpha=2), "alpha < 1; came 2"),
        (lambda p: optim.RMSProp(p, momentum=-1), "momentum < 1; came -1"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make(parameters())


def test_parameters_that_cannot_be_trained_are_refused():
    p, *_ = parameters()
    with pytest.raises(ConfigError, match="came none"):
        optim.SGD([], 0.1)
    with pytest.raises(ConfigError, match="position 2 repeats 0"):
        optim.SGD([p, *parameters()[:1], p], 0.1)
    for stranger in (Tensor([1.0]), p * p, p.numpy(), "weight"):
        with pytest.raises(ConfigError, match="at position 1"):
            optim.SGD([p, stranger], 0.1)
    with pytest.raises(DTypeError, match="float16"):
        optim.SGD([Parameter(np.ones(2, np.float16))], 0.1)
    with pytest.raises(ConfigError, match="contiguous"):
        optim.SGD([Parameter(np.ones((3, 2), np.float32).T, copy=False)], 0.1)


# --- clipping ------------------------------------------------------------------------------------


def with_gradients(dtype=np.float32):
    params = parameters(dtype)
    for p, grad in zip(params, next(gradients(dtype)), strict=True):
        p.grad = grad
    return params


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_by_norm_agrees_with_torch(limit):
    torch = pytest.importorskip("torch")
    ours = with_gradients()
    theirs = [torch.nn.Parameter(torch.tensor(p.numpy())) for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        q.grad = torch.tensor(np.array(p.grad))
    found = optim.clip_gradients(ours, norm=limit)
    assert found == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, limit)), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert p.grad.dtype == np.float32
        np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=1e-5)


def test_clipping_by_norm_reaches_the_norm_exactly_or_leaves_it():
    params = with_gradients(np.float64)
    found = optim.clip_gradients(params, norm=0.25)
    assert found == pytest.approx(math.sqrt(sum((p.grad**2).sum() for p in with_gradients())))
    assert optim.clip_gradients(params, norm=10) == pytest.approx(0.25, rel=1e-12)
    before = [p.grad.copy() for p in params]
    optim.clip_gradients(params, norm=0.26)
    assert all(np.array_equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_clipping_by_value_returns_the_norm_before():
    params, before = with_gradients(), with_gradients()
    found = optim.clip_gradients(params, value=0.3)
    assert found == pytest.approx(math.sqrt(sum((p.grad**2).sum() for p in before)), rel=1e-6)
    for p, q in zip(params, before, strict=True):
        assert np.array_equal(p.grad, np.minimum(np.maximum(q.grad, np.float32(-0.3)), 0.3))
        assert p.grad.dtype == np.float32


def test_clipping_scales_a_shared_gradient_once_and_skips_missing_ones():
    a, b, c = (Parameter(np.ones(2, np.float32)) for _ in range(3))
    a.grad = b.grad = np.array([3.0, 4.0], np.float32)
    found = optim.clip_gradients([a, b, c], norm=1.0)
    assert found == pytest.approx(math.sqrt(50))
    assert np.hypot(*a.grad) == pytest.approx(math.sqrt(0.5))
    assert np.array_equal(a.grad, b.grad)
    assert c.grad is None
    assert optim.clip_gradients([c], norm=1.0) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_refuses_gradients_that_are_not_finite(bad):
    p = Parameter(np.ones(2, np.float32))
    p.grad = np.array([1.0, bad], np.float32)
    for limit in ({"norm": 1.0}, {"value": 1.0}):
        with pytest.raises(NonFiniteError, match="finite gradients"):
            optim.clip_gradients([p], **limit)
    np.testing.assert_array_equal(p.grad, np.array([1.0, bad], np.float32))


@pytest.mark.parametrize(
    "limits",
    [{}, {"norm": 1.0, "value": 1.0}, {"norm": 0.0}, {"value": -1.0}, {"norm": math.nan}],
)
def test_clipping_needs_one_positive_limit(limits):
    with pytest.raises(ConfigError, match="clip_gradients"):
        optim.clip_gradients(with_gradients(), **limits)


# --- rates that can be used can be saved ----------------------------------------------------------


@pytest.mark.parametrize("lr", [0.0, 5e-324, 2.0**53 + 2, 1e300, np.float32(0.5), 10**20])
def test_every_rate_that_is_accepted_is_accepted_from_a_state(lr):
    saved = optim.SGD(parameters(), lr).state_dict()
    other = optim.SGD(parameters(), 1.0)
    other.load_state_dict(saved)
    assert other.lr == float(lr)


@pytest.mark.parametrize("lr", [10**400, None, "1", True, math.nan, math.inf, -1.0])
def test_every_rate_that_is_refused_is_refused_from_a_state(lr):
    optimizer = optim.SGD(parameters(), 0.5)
    with pytest.raises(ConfigError, match="lr"):
        optim.SGD(parameters(), lr)
    with pytest.raises(ConfigError, match="lr"):
        optimizer.load_state_dict({**optimizer.state_dict(), "sgd.lr": lr})
    assert optimizer.lr == 0.5


@pytest.mark.parametrize(
    "state",
    [
        {"waited": "1", "scale": 1.0},
        {"waited": -1, "scale": 1.0},
        {"waited": 0, "scale": 2.0},
        {"waited": 0, "scale": 10**400},
        {"waited": 0, "scale": 1.0, "best": None},
        {"waited": 0, "scale": 1.0, "best": math.nan},
    ],
)
def test_a_plateau_refuses_numbers_that_it_cannot_have_saved(state):
    plateau = Plateau()
    with pytest.raises(ConfigError, match="Plateau: required"):
        plateau.load_state_dict(state)
    assert plateau.state_dict() == {"waited": 0, "scale": 1.0}


@pytest.mark.parametrize("name", MAKE)
def test_masked_weights_stay_zero_whatever_the_optimiser_remembers(name):
    params = parameters()
    optimizer = MAKE[name](params, weight_decay=0.1)
    run(optimizer, gradients(), 3)  # momentum and means of all weights are built up
    mask = np.arange(12).reshape(3, 4) % 3 > 0
    params[0].mask = mask
    free = params[1].numpy()
    run(optimizer, gradients(seed=2), 5)
    assert np.all(params[0].data[~mask] == 0) and np.all(params[0].data[mask] != 0)
    assert np.all(params[1].data != free)
    params[0].mask = None
    run(optimizer, gradients(seed=3), 1)
    assert np.all(params[0].data != 0)


def test_masks_must_fit_and_travel_with_copies():
    p = Parameter(np.array([[1.0, np.nan], [2.0, np.inf]]))
    with pytest.raises(ShapeError, match=r"required booleans \(2, 2\); came bool \(2,\)"):
        p.mask = [True, False]
    with pytest.raises(ShapeError, match="came int64"):
        p.mask = [[1, 0], [1, 0]]
    p.mask = [[True, False], [True, False]]
    np.testing.assert_array_equal(p.data, [[1, 0], [2, 0]])
    twin = copy.deepcopy(p)
    np.testing.assert_array_equal(twin.mask, p.mask)
    assert p.mask is not None and not p.mask.flags.writeable
