"""Losses and their gradients. Sums run in float64, in one order, on one thread."""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from kernels import memory
from kernels._jit import jit, prepared


@jit
def _mse(P, T):
    # mean_i (P[i] - T[i])^2;  P, T (n,)
    total = 0.0
    for i in range(P.size):
        d = np.float64(P[i] - T[i])
        total += d * d
    return total / P.size


@jit
def _mse_grad(P, T, factor, G):
    # G[i] = factor (P[i] - T[i]);  P, T, G (n,)
    for i in range(P.size):
        G[i] = factor * (P[i] - T[i])


@jit
def _softmax_cross_entropy(Z, labels, smoothing, S):
    # S[b, c] = exp(Z[b, c] - top_b) / e_b, e_b = sum_c exp(Z[b, c] - top_b), top_b = max_c Z[b, c]
    # loss_b = log(e_b) - sum_c q[b, c] (Z[b, c] - top_b)
    # q[b, c] = (1 - smoothing) [c = labels[b]] + smoothing / C;  Z, S (B, C), labels (B,)
    B, C = Z.shape
    loss = 0.0
    for b in range(B):
        top = Z[b, 0]
        for c in range(1, C):
            top = max(top, Z[b, c])
        e = 0.0
        shifted = 0.0
        for c in range(C):
            S[b, c] = np.exp(Z[b, c] - top)
            e += np.float64(S[b, c])
            shifted += np.float64(Z[b, c] - top)
        scale = Z.dtype.type(1.0 / e)
        for c in range(C):
            S[b, c] *= scale
        loss += np.log(e) - (1.0 - smoothing) * np.float64(Z[b, labels[b]] - top)
        if smoothing > 0:  # a logit of -inf is welcome without smoothing
            loss -= smoothing / C * shifted
    return loss / B


@jit
def _softmax_cross_entropy_grad(S, labels, smoothing, scale, G):
    # G[b, c] = scale / B (S[b, c] - q[b, c]), q as above;  S, G (B, C), labels (B,)
    B, C = S.shape
    factor = S.dtype.type(scale / B)
    low = S.dtype.type(smoothing / C)
    peak = S.dtype.type(1.0 - smoothing)
    for b in range(B):
        for c in range(C):
            G[b, c] = factor * (S[b, c] - low)
        at = labels[b]
        G[b, at] = factor * (S[b, at] - low - peak)


def mse(pred: np.ndarray, target: np.ndarray) -> float:
    """Mean of (pred - target)^2 over all elements of two arrays of one shape."""
    pred, target = _pair("mse", pred, target)
    return float(_mse(pred.reshape(-1), target.reshape(-1)))


def mse_grad(pred: np.ndarray, target: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Gradient of scale * mse with respect to pred: 2 scale / n (pred - target)."""
    pred, target = _pair("mse_grad", pred, target)
    grad = memory.empty(pred.shape, pred.dtype)
    factor = pred.dtype.type(2.0 * scale / pred.size)
    _mse_grad(pred.reshape(-1), target.reshape(-1), factor, grad.reshape(-1))
    return grad


def softmax_cross_entropy(
    logits: np.ndarray, labels: np.ndarray, smoothing: float = 0.0
) -> tuple[float, np.ndarray]:
    """Mean over the batch of -sum_c q_c log softmax(logits)_c, and softmax(logits) (B, C).

    logits (B, C), labels (B,) integers in [0, C); q is 1 - smoothing at the label, plus
    smoothing / C everywhere (Szegedy et al. 2016, section 7).
    """
    (logits,) = prepared("softmax_cross_entropy", logits)
    labels = _labels("softmax_cross_entropy", logits, labels, smoothing)
    probabilities = memory.empty(logits.shape, logits.dtype)
    loss = _softmax_cross_entropy(logits, labels, float(smoothing), probabilities)
    return float(loss), probabilities


def softmax_cross_entropy_grad(
    probabilities: np.ndarray, labels: np.ndarray, smoothing: float = 0.0, scale: float = 1.0
) -> np.ndarray:
    """Gradient of scale * `softmax_cross_entropy` by the logits, from its softmax (B, C)."""
    (probabilities,) = prepared("softmax_cross_entropy_grad", probabilities)
    labels = _labels("softmax_cross_entropy_grad", probabilities, labels, smoothing)
    grad = memory.empty(probabilities.shape, probabilities.dtype)
    _softmax_cross_entropy_grad(probabilities, labels, float(smoothing), float(scale), grad)
    return grad


def _pair(kernel: str, pred: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    if pred.shape != target.shape or pred.size == 0:
        raise ValueError(
            f"{kernel}: expected pred and target of one shape, not empty, "
            f"got {pred.shape} and {target.shape}"
        )
    return prepared(kernel, pred, target)


def _labels(kernel: str, scores: np.ndarray, labels: np.ndarray, smoothing: float) -> np.ndarray:
    if scores.ndim != 2 or scores.size == 0 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"{kernel}: expected (B, C) scores, not empty, and (B,) labels, "
            f"got {scores.shape} and {labels.shape}"
        )
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{kernel}: expected integer labels, got {labels.dtype}")
    classes = scores.shape[1]
    lowest, highest = labels.min(), labels.max()
    if lowest < 0 or highest >= classes:
        raise ValueError(f"{kernel}: expected labels in [0, {classes}), got {lowest} to {highest}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{kernel}: expected smoothing in [0, 1], got {smoothing}")
    labels = np.ascontiguousarray(labels, np.int64)
    return labels if labels.flags.carray else labels.copy()
