"""Optimiser steps: each reads every array once and updates parameter and state in place.

With w the parameter, all steps start from

    g    = grad + l1 sign(w) + l2 w      the gradient with that of the penalty l1 |w| + l2/2 w^2
    kept = w (1 - lr decay)              decoupled decay (Loshchilov & Hutter 2019, algorithm 2)

Arrays have one shape and dtype; `w` and the state must be C-contiguous and writable.
Arithmetic is in the dtype of the arrays throughout. Each element stands alone, so threads cannot
change a result. TypeError or ValueError names the array that does not fit.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels._jit import FLOATS, Variants, jit

_CHUNK = 16384  # elements; loops run from 0 over slices: so they vectorise


@jit
def _penalised(grad, w, l1, l2):
    sign = l1 if w > 0 else (-l1 if w < 0 else l1 * 0)
    return grad + sign + l2 * w


def _sgd_loop(W, G, V, nesterov, scalars):
    # v[i] = momentum v[i] + g[i]
    # w[i] = kept[i] - lr v[i], with Nesterov: kept[i] - lr (g[i] + momentum v[i])
    # W, G (n,), V (n,) or (0,): no momentum, v[i] = g[i]
    lr, momentum, keep, l1, l2 = scalars
    for c in prange((W.size + _CHUNK - 1) // _CHUNK):
        lo, hi = c * _CHUNK, (c + 1) * _CHUNK
        w, grad, v = W[lo:hi], G[lo:hi], V[lo:hi]
        if V.size == 0:
            for i in range(w.size):
                g = _penalised(grad[i], w[i], l1, l2)
                w[i] = keep * w[i] - lr * g
        elif nesterov:
            for i in range(w.size):
                g = _penalised(grad[i], w[i], l1, l2)
                new = momentum * v[i] + g
                v[i] = new
                w[i] = keep * w[i] - lr * (g + momentum * new)
        else:
            for i in range(w.size):
                g = _penalised(grad[i], w[i], l1, l2)
                new = momentum * v[i] + g
                v[i] = new
                w[i] = keep * w[i] - lr * new


def _adam_loop(W, G, A, B, scalars):
    # a[i] = beta1 a[i] + (1 - beta1) g[i];  b[i] = beta2 b[i] + (1 - beta2) g[i]^2
    # w[i] = kept[i] - (from_mean a[i] + from_grad g[i]) / (sqrt(b[i] / bias) + eps)
    # W, G, A, B (n,)
    from_mean, from_grad, beta1, rest1, beta2, rest2, bias, eps, keep, l1, l2 = scalars
    for c in prange((W.size + _CHUNK - 1) // _CHUNK):
        lo, hi = c * _CHUNK, (c + 1) * _CHUNK
        w, grad, a, b = W[lo:hi], G[lo:hi], A[lo:hi], B[lo:hi]
        for i in range(w.size):
            g = _penalised(grad[i], w[i], l1, l2)
            mean = beta1 * a[i] + rest1 * g
            square = beta2 * b[i] + rest2 * g * g
            a[i] = mean
            b[i] = square
            w[i] = keep * w[i] - (from_mean * mean + from_grad * g) / (np.sqrt(square / bias) + eps)


def _adadelta_loop(W, G, S, D, scalars):
    # s[i] = rho s[i] + (1 - rho) g[i]^2;  step = sqrt(d[i] + eps) / sqrt(s[i] + eps) g[i]
    # d[i] = rho d[i] + (1 - rho) step^2;  w[i] = kept[i] - lr step
    # W, G, S, D (n,)
    lr, rho, rest, eps, keep, l1, l2 = scalars
    for c in prange((W.size + _CHUNK - 1) // _CHUNK):
        lo, hi = c * _CHUNK, (c + 1) * _CHUNK
        w, grad, s, d = W[lo:hi], G[lo:hi], S[lo:hi], D[lo:hi]
        for i in range(w.size):
            g = _penalised(grad[i], w[i], l1, l2)
            square = rho * s[i] + rest * g * g
            step = np.sqrt(d[i] + eps) / np.sqrt(square + eps) * g
            s[i] = square
            d[i] = rho * d[i] + rest * step * step
            w[i] = keep * w[i] - lr * step


def _rmsprop_loop(W, G, S, V, scalars):
    # s[i] = alpha s[i] + (1 - alpha) g[i]^2;  v[i] = momentum v[i] + g[i] / (sqrt(s[i]) + eps)
    # w[i] = kept[i] - lr v[i]
    # W, G, S (n,), V (n,) or (0,): no momentum
    lr, alpha, rest, eps, momentum, keep, l1, l2 = scalars
    for c in prange((W.size + _CHUNK - 1) // _CHUNK):
        lo, hi = c * _CHUNK, (c + 1) * _CHUNK
        w, grad, s, v = W[lo:hi], G[lo:hi], S[lo:hi], V[lo:hi]
        if V.size == 0:
            for i in range(w.size):
                g = _penalised(grad[i], w[i], l1, l2)
                square = alpha * s[i] + rest * g * g
                s[i] = square
                w[i] = keep * w[i] - lr * g / (np.sqrt(square) + eps)
        else:
            for i in range(w.size):
                g = _penalised(grad[i], w[i], l1, l2)
                square = alpha * s[i] + rest * g * g
                new = momentum * v[i] + g / (np.sqrt(square) + eps)
                s[i] = square
                v[i] = new
                w[i] = keep * w[i] - lr * new


_sgd = Variants(_sgd_loop)
_adam = Variants(_adam_loop)
_adadelta = Variants(_adadelta_loop)
_rmsprop = Variants(_rmsprop_loop)


def sgd(
    w: np.ndarray,
    grad: np.ndarray,
    velocity: np.ndarray | None,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> None:
    """Gradient descent with momentum (Sutskever et al. 2013, section 2), without dampening.

    velocity <- momentum velocity + g, zero at the start; w <- kept - lr velocity, with `nesterov`
    kept - lr (g + momentum velocity). `velocity` None: no momentum.
    """
    if velocity is None and (momentum != 0 or nesterov):
        raise ValueError(f"sgd: momentum={momentum}, nesterov={nesterov} need a velocity array")
    arrays = _flat("sgd", w, grad, velocity)
    scalars = _scalars(w, lr, momentum, 1 - lr * decay, l1, l2)
    _sgd.choose(5 * w.nbytes)(*arrays, nesterov, scalars)


def adam(
    w: np.ndarray,
    grad: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> None:
    """Adam (Kingma & Ba 2015, algorithm 1); with `decay` AdamW (Loshchilov & Hutter 2019).

    `mean` and `square`, zero at the start, are the running first and second moment. `step` counts
    from 1.
    """
    _check_step("adam", step)
    arrays = _flat("adam", w, grad, mean, square)
    from_mean = lr / (1 - beta1**step)
    bias = 1 - beta2**step
    keep = 1 - lr * decay
    scalars = _scalars(
        w, from_mean, 0.0, beta1, 1 - beta1, beta2, 1 - beta2, bias, eps, keep, l1, l2
    )
    _adam.choose(7 * w.nbytes)(*arrays, scalars)


def nadam(
    w: np.ndarray,
    grad: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    *,
    step: int,
    mu_product: float,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    momentum_decay: float = 0.004,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> float:
    """Adam with Nesterov momentum (Dozat 2016, algorithm 2), with its warming momentum schedule

        mu_t = beta1 (1 - 0.5 0.96^(t momentum_decay)).

    `mu_product` is mu_1 ... mu_(step - 1), 1 before the first step; returns mu_1 ... mu_step.
    State as in `adam`.
    """
    _check_step("nadam", step)
    arrays = _flat("nadam", w, grad, mean, square)
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    following = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    mu_product *= mu
    from_grad = lr * (1 - mu) / (1 - mu_product)
    from_mean = lr * following / (1 - mu_product * following)
    bias = 1 - beta2**step
    keep = 1 - lr * decay
    scalars = _scalars(
        w, from_mean, from_grad, beta1, 1 - beta1, beta2, 1 - beta2, bias, eps, keep, l1, l2
    )
    _adam.choose(7 * w.nbytes)(*arrays, scalars)
    return mu_product


def adadelta(
    w: np.ndarray,
    grad: np.ndarray,
    square: np.ndarray,
    delta: np.ndarray,
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> None:
    """Adadelta (Zeiler 2012, algorithm 1), its step scaled by `lr` (1 in the paper).

    `square` and `delta`, zero at the start, are the running means of g^2 and of the squared step.
    """
    arrays = _flat("adadelta", w, grad, square, delta)
    scalars = _scalars(w, lr, rho, 1 - rho, eps, 1 - lr * decay, l1, l2)
    _adadelta.choose(7 * w.nbytes)(*arrays, scalars)


def rmsprop(
    w: np.ndarray,
    grad: np.ndarray,
    square: np.ndarray,
    velocity: np.ndarray | None,
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> None:
    """RMSProp (Tieleman & Hinton 2012, lecture 6e), with momentum on the scaled gradient.

    `square`, zero at the start, is the running mean of g^2. `velocity` None: no momentum.
    """
    if velocity is None and momentum != 0:
        raise ValueError(f"rmsprop: momentum={momentum} needs a velocity array")
    arrays = _flat("rmsprop", w, grad, square, velocity)
    scalars = _scalars(w, lr, alpha, 1 - alpha, eps, momentum, 1 - lr * decay, l1, l2)
    _rmsprop.choose(7 * w.nbytes)(*arrays, scalars)


def _flat(
    kernel: str, w: np.ndarray, grad: np.ndarray, *state: np.ndarray | None
) -> list[np.ndarray]:
    """All as flat arrays; a state that is None as an empty one. Only `grad` may be copied."""
    flat = []
    for position, array in enumerate((w, grad, *state)):
        if array is None:
            array = np.empty(0, w.dtype)
        elif array.shape != w.shape or array.dtype != w.dtype or w.dtype not in FLOATS:
            raise (TypeError if array.shape == w.shape else ValueError)(
                f"{kernel}: expected arrays of one shape, all float32 or all float64; "
                f"w is {w.dtype} {w.shape}, argument {position} {array.dtype} {array.shape}"
            )
        elif not array.flags.carray:
            if position != 1:
                raise ValueError(
                    f"{kernel}: argument {position} is updated in place, so it must be "
                    f"C-contiguous and writable; got strides {array.strides} of shape "
                    f"{array.shape}, writable={array.flags.writeable}"
                )
            array = np.array(array, order="C")
        flat.append(array.reshape(-1))
    return flat


def _scalars(w: np.ndarray, *values: float) -> tuple[np.floating, ...]:
    """The constants of a step in the dtype of the parameter: no arithmetic turns float64."""
    return tuple(map(w.dtype.type, values))


def _check_step(kernel: str, step: int) -> None:
    if step < 1 or not math.isfinite(step):
        raise ValueError(f"{kernel}: steps count from 1, got step={step}")
