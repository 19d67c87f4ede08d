"""Optimisers: they turn the gradients of parameters into new values, one fused pass each.

With w a parameter, g its gradient, every optimiser sees g + l1 sign(w) + l2 w, the gradient of
loss + l1 |w|_1 + l2/2 |w|_2^2, and `weight_decay` subtracts lr weight_decay w from w apart from
that (Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithms 1 and 2).
Unless `penalise_biases`, all three leave parameters with fewer than 2 axes alone, and learned
scales of quantisers always: to pull those towards 0 is to pull the grid from under its numbers.

Parameters that have no gradient are left as they are, and so is their state: neither penalties
nor decay nor momentum move them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kernels import optimizer as kernels
from tinynn.errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from tinynn.nn.module import Parameter, is_scale, is_weight
from tinynn.op import Array
from tinynn.tensor import Tensor

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_LARGEST = 2**53  # of the counts in a state: whole numbers up to here are exact as floats


class Optimizer:
    """Base of all optimisers. Subclasses say in `_fresh` what they remember of a parameter and in
    `_update` how it moves.

    Raises ConfigError for no parameters, a parameter given twice, something that is not trained,
    or a hyper-parameter outside its range; DTypeError unless parameters are float32 or float64.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        penalise_biases: bool = False,
    ) -> None:
        self.params = list(params)
        self._check_params()
        self.lr = lr
        terms = {
            "l1": self._at_least_zero("l1", l1),
            "l2": self._at_least_zero("l2", l2),
            "decay": self._at_least_zero("weight_decay", weight_decay),
        }
        exempt = dict.fromkeys(terms, 0.0)
        self._terms = [
            terms if is_weight(p) or (penalise_biases and not is_scale(p)) else exempt
            for p in self.params
        ]
        self._state = [self._fresh(p) for p in self.params]

    @property
    def lr(self) -> float:
        """The learning rate of the next step; schedules set it."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = self._at_least_zero("lr", value)

    def step(self) -> None:
        """Move every parameter that has a gradient; Parameters' masks, codes and least hold."""
        for p, state, terms in zip(self.params, self._state, self._terms, strict=True):
            if p._grad is not None and isinstance(p, Parameter):
                self._update(p.mutate(), p.pooled(p._grad), state, terms)
                p.hold()
            elif p._grad is not None:
                self._update(p.mutate(), p._grad, state, terms)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.params:
            p._grad = None

    def penalty(self) -> float:
        """l1 |w|_1 + l2/2 |w|_2^2 over the penalised parameters, summed in float64."""
        total = 0.0
        for p, terms in zip(self.params, self._terms, strict=True):
            if terms["l1"]:
                total += terms["l1"] * float(np.abs(p._data).sum(dtype=np.float64))
            if terms["l2"]:
                total += terms["l2"] / 2 * _sum_of_squares(p._data)
        return total

    def state_dict(self) -> dict[str, Array | float]:
        """Everything that a resumed run needs to go on bit for bit, as copies.

        Keys are "KIND.lr" and "KIND.POSITION.NAME", for instance "adam.0.mean": the kind of
        optimiser, the parameter's position in `params`, the name of the state. Hyper-parameters
        other than `lr` belong to the program, not to the state.
        """
        kind = type(self).__name__.lower()
        out: dict[str, Array | float] = {f"{kind}.lr": self.lr}
        for i, state in enumerate(self._state):
            for name, value in state.items():
                copied = value.copy() if isinstance(value, np.ndarray) else value
                out[f"{kind}.{i}.{name}"] = copied
        return out

    def load_state_dict(self, state: Mapping[str, Array | float]) -> None:
        """Continue from `state_dict()`; nothing is changed unless all of it fits.

        Raises ConfigError for the state of another kind of optimiser, missing or unknown names or
        a number out of range, ShapeError and DTypeError for arrays that do not fit.
        """
        who, own = type(self).__name__, self.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ConfigError(f"{who}.load_state_dict: missing {missing}, unknown {unknown}")
        for name, value in own.items():
            _check_entry(f"{who}.load_state_dict: {name}", value, state[name])
        kind = who.lower()
        self.lr = float(state[f"{kind}.lr"])
        for i, mine in enumerate(self._state):
            for name, value in mine.items():
                came = state[f"{kind}.{i}.{name}"]
                if isinstance(value, np.ndarray):
                    value[...] = came
                else:
                    mine[name] = type(value)(came)

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step: arrays and numbers by name."""
        raise NotImplementedError(f"{type(self).__name__}._fresh")

    def _update(
        self, w: Array, grad: Array, state: dict[str, Any], terms: dict[str, float]
    ) -> None:
        """Move `w` and its state in place; `terms` are l1, l2 and decay."""
        raise NotImplementedError(f"{type(self).__name__}._update")

    def _check_params(self) -> None:
        who = type(self).__name__
        if not self.params:
            raise ConfigError(f"{who}: required at least one parameter; came none")
        seen: dict[int, int] = {}
        for i, p in enumerate(self.params):
            if not isinstance(p, Tensor) or not p.requires_grad or p._node is not None:
                raise ConfigError(
                    f"{who}: required Tensors that are trained and not computed; "
                    f"came {type(p).__name__} at position {i}"
                )
            if p.dtype not in _FLOATS:
                raise DTypeError(f"{who}: required float32 or float64; came {p.dtype} at {i}")
            if not p._data.flags.carray:
                raise ConfigError(
                    f"{who}: required writable C-contiguous parameters; parameter {i} of shape "
                    f"{p.shape} is not"
                )
            if id(p) in seen:
                raise ConfigError(
                    f"{who}: required every parameter once; position {i} repeats {seen[id(p)]}"
                )
            seen[id(p)] = i

    def _at_least_zero(self, name: str, value: float) -> float:
        if not 0 <= _number(value) < math.inf:
            raise self._refusal(f"a finite {name} >= 0", value)
        return float(value)

    def _share(self, name: str, value: float) -> float:
        if not 0 <= _number(value) < 1:
            raise self._refusal(f"0 <= {name} < 1", value)
        return float(value)

    def _positive(self, name: str, value: float) -> float:
        if not 0 < _number(value) < math.inf:
            raise self._refusal(f"a finite {name} > 0", value)
        return float(value)

    def _refusal(self, required: str, value: object) -> ConfigError:
        return ConfigError(f"{type(self).__name__}: required {required}; came {value!r:.60}")


class SGD(Optimizer):
    """v <- momentum v + g; w <- w - lr v, with `nesterov` w <- w - lr (g + momentum v).

    Sutskever et al., On the importance of initialization and momentum (ICML 2013), section 2, in
    the form in which lr scales the velocity at its use.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        penalise_biases: bool = False,
    ) -> None:
        self.momentum = self._share("momentum", momentum)
        self.nesterov = bool(nesterov)
        if nesterov and not momentum:
            raise ConfigError(f"SGD: nesterov requires momentum > 0; came momentum={momentum}")
        super().__init__(
            params, lr, l1=l1, l2=l2, weight_decay=weight_decay, penalise_biases=penalise_biases
        )

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        return {"velocity": np.zeros_like(p._data)} if self.momentum else {}

    def _update(
        self, w: Array, grad: Array, state: dict[str, Any], terms: dict[str, float]
    ) -> None:
        kernels.sgd(
            w,
            grad,
            state.get("velocity"),
            lr=self._lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            **terms,
        )


class Adam(Optimizer):
    """Kingma & Ba, Adam (ICLR 2015), algorithm 1; with `weight_decay` it is AdamW.

    `beta1`, `beta2`: how much of the running mean of g and of g^2 a step keeps. A parameter's
    steps are counted from its own first gradient on.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        penalise_biases: bool = False,
    ) -> None:
        self.beta1 = self._share("beta1", beta1)
        self.beta2 = self._share("beta2", beta2)
        self.eps = self._positive("eps", eps)
        super().__init__(
            params, lr, l1=l1, l2=l2, weight_decay=weight_decay, penalise_biases=penalise_biases
        )

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        return {"mean": np.zeros_like(p._data), "square": np.zeros_like(p._data), "step": 0}

    def _update(
        self, w: Array, grad: Array, state: dict[str, Any], terms: dict[str, float]
    ) -> None:
        state["step"] += 1
        kernels.adam(
            w,
            grad,
            state["mean"],
            state["square"],
            step=state["step"],
            lr=self._lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            **terms,
        )


class Nadam(Adam):
    """Adam with Nesterov momentum: Dozat, Incorporating Nesterov Momentum into Adam (2016).

    The momentum warms up as mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 2e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        momentum_decay: float = 0.004,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        penalise_biases: bool = False,
    ) -> None:
        self.momentum_decay = self._at_least_zero("momentum_decay", momentum_decay)
        super().__init__(
            params,
            lr,
            beta1,
            beta2,
            eps,
            l1=l1,
            l2=l2,
            weight_decay=weight_decay,
            penalise_biases=penalise_biases,
        )

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        return {**super()._fresh(p), "mu_product": 1.0}

    def _update(
        self, w: Array, grad: Array, state: dict[str, Any], terms: dict[str, float]
    ) -> None:
        state["step"] += 1
        state["mu_product"] = kernels.nadam(
            w,
            grad,
            state["mean"],
            state["square"],
            step=state["step"],
            mu_product=state["mu_product"],
            lr=self._lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            momentum_decay=self.momentum_decay,
            **terms,
        )


class Adadelta(Optimizer):
    """Zeiler, Adadelta (2012), algorithm 1; `lr` scales its step (1 in the paper)."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        penalise_biases: bool = False,
    ) -> None:
        self.rho = self._share("rho", rho)
        self.eps = self._positive("eps", eps)
        super().__init__(
            params, lr, l1=l1, l2=l2, weight_decay=weight_decay, penalise_biases=penalise_biases
        )

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        return {"square": np.zeros_like(p._data), "delta": np.zeros_like(p._data)}

    def _update(
        self, w: Array, grad: Array, state: dict[str, Any], terms: dict[str, float]
    ) -> None:
        kernels.adadelta(
            w,
            grad,
            state["square"],
            state["delta"],
            lr=self._lr,
            rho=self.rho,
            eps=self.eps,
            **terms,
        )


class RMSProp(Optimizer):
    """Tieleman & Hinton, Neural Networks for Machine Learning (2012), lecture 6e.

    `alpha`: how much of the running mean of g^2 a step keeps. With `momentum`, it is taken on the
    scaled gradient g / (sqrt(mean g^2) + eps).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        penalise_biases: bool = False,
    ) -> None:
        self.alpha = self._share("alpha", alpha)
        self.eps = self._positive("eps", eps)
        self.momentum = self._share("momentum", momentum)
        super().__init__(
            params, lr, l1=l1, l2=l2, weight_decay=weight_decay, penalise_biases=penalise_biases
        )

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        velocity = {"velocity": np.zeros_like(p._data)} if self.momentum else {}
        return {"square": np.zeros_like(p._data), **velocity}

    def _update(
        self, w: Array, grad: Array, state: dict[str, Any], terms: dict[str, float]
    ) -> None:
        kernels.rmsprop(
            w,
            grad,
            state["square"],
            state.get("velocity"),
            lr=self._lr,
            alpha=self.alpha,
            eps=self.eps,
            momentum=self.momentum,
            **terms,
        )


def clip_gradients(
    params: Iterable[Tensor], *, norm: float | None = None, value: float | None = None
) -> float:
    """Limit the gradients and return the Euclidean norm over all of them that was found before.

    With `norm`, all are scaled by one factor so that their joint norm is at most that (Pascanu et
    al., On the difficulty of training recurrent neural networks, ICML 2013, algorithm 1); with
    `value`, each element is limited to [-value, value]. Parameters without a gradient count for
    nothing. Raises ConfigError unless exactly one positive limit is given, NonFiniteError, leaving
    the gradients alone, if the norm is NaN or infinite.
    """
    limit = value if norm is None else norm
    if limit is None or (norm is None) == (value is None) or not limit > 0:
        raise ConfigError(
            f"clip_gradients: required a positive norm or a positive value; "
            f"came norm={norm}, value={value}"
        )
    owners = [(p, p._grad) for p in params if p._grad is not None]
    found = math.sqrt(math.fsum(_sum_of_squares(grad) for _, grad in owners))
    if not math.isfinite(found):
        raise NonFiniteError(f"clip_gradients: required finite gradients; came the norm {found}")
    # New arrays, never in place: two parameters may hold one array as their gradient.
    for p, grad in owners:
        if value is not None:
            p._grad = np.clip(grad, -limit, limit)
        elif found > limit:
            p._grad = grad * (limit / found)
    return found


def _sum_of_squares(array: Array) -> float:
    # Not a dot product: the linear algebra library's sums depend on its thread count.
    return float(np.square(array, dtype=np.float64).sum())


def _check_entry(name: str, own: Array | float, came: Array | float) -> None:
    """Raise unless `came` can take the place of the state `own`."""
    if isinstance(own, np.ndarray):
        array = np.asarray(came)
        if array.shape != own.shape:
            raise ShapeError(f"{name}: required shape {own.shape}; came {array.shape}")
        if array.dtype != own.dtype:
            raise DTypeError(f"{name}: required {own.dtype}; came {array.dtype}")
        return
    number = _number(came)
    fits = type(came) is int and number <= _LARGEST if isinstance(own, int) else number < math.inf
    if not fits or not number >= 0:
        raise ConfigError(
            f"{name}: required a finite {type(own).__name__} >= 0 (whole ones up to {_LARGEST}); "
            f"came {came!r:.60}"
        )


def _number(value: object) -> float:
    """A plain number as a float: NaN if it is none, infinity if it is too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
