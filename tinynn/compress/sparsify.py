"""Pruning of single weights: scores -> masks. The arrays keep their size; the zeros are for kernels
and files that know what to do with them.

    slim = sparsify.weights(model, sparsify.magnitude, sparsify.share(0.1))
    tn.fit(slim, ...)                        # the zeros stay zero
    slim = sparsify.weights(slim, sparsify.magnitude, sparsify.share(0.05))     # and again

Weights are the parameters with two axes or more but for learned scales (biases, scales and batch
norm's vectors are few, and each matters). A weight that is masked already stays so. `schedule`s say
how sparse each round is; `Gradual` prunes during a training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tinynn.compress.saliency import Gradients
from tinynn.data.batches import is_count
from tinynn.errors import ConfigError, PruneError
from tinynn.nn.conv import DepthwiseConv2d
from tinynn.nn.module import Module, Parameter, is_weight
from tinynn.op import Array

#: (dotted path, weights) -> scores of the same shape; the larger, the more important
Score = Callable[[str, Array], Array]
#: scores by dotted path, -inf for weights that are masked already -> which stay, by dotted path.
#: The last axis is the outputs and the others are what one output reads: depthwise weights come as
#: (KH, KW, 1, C R)
Keep = Callable[[Mapping[str, Array]], dict[str, Array]]


# --- scores ---------------------------------------------------------------------------------------


def magnitude(name: str, weights: Array) -> Array:
    """|w| (Han et al. 2015, "Learning both weights and connections")."""
    return np.abs(weights)


def lamp(name: str, weights: Array) -> Array:
    """w^2 over the sum of all squares of the layer that are not smaller, for `share` "global".

    The largest weight of a layer has 1, so that no layer is emptied, and weights of layers of
    different scales can be compared (Lee et al. 2021, "Layer-adaptive sparsity for the
    magnitude-based pruning", eq. 3). Of equal weights the later ones count as larger.
    """
    squares = np.square(weights.ravel(), dtype=np.float64)
    order = np.argsort(squares, kind="stable")
    ascending = squares[order]
    left = np.cumsum(ascending[::-1])[::-1]  # of this weight and all that are larger
    scores = np.zeros_like(squares)
    scores[order] = np.divide(ascending, left, out=np.zeros_like(left), where=left > 0)
    return scores.reshape(weights.shape)


def random(rng: np.random.Generator) -> Score:
    """Scores that know nothing: the control of every criterion."""
    return lambda name, weights: rng.random(weights.shape)


def taylor(seen: Gradients) -> Score:
    """|w dL/dw|, the first-order change of the loss (Molchanov et al. 2017, section 2.2)."""
    return lambda name, weights: np.abs(weights * _of(seen.mean, name, weights))


def fisher(seen: Gradients) -> Score:
    """w^2 E[(dL/dw)^2] / 2 (Theis et al. 2018, "Faster gaze prediction", eq. 7 for one weight)."""
    return lambda name, weights: np.square(weights) * _of(seen.square, name, weights) / 2


def brain_damage(diagonal: Mapping[str, Array]) -> Score:
    """w^2 d2L/dw2 / 2 (LeCun et al. 1990, "Optimal Brain Damage", eq. 5); see `hessian_diagonal`.

    Where the second derivative is negative its magnitude is taken: the estimate is noisy there.
    """
    return lambda name, weights: np.square(weights) * np.abs(_of(diagonal, name, weights)) / 2


def _of(found: Mapping[str, Array], name: str, weights: Array) -> Array:
    if name not in found or found[name].shape != weights.shape:
        came = found[name].shape if name in found else "nothing"
        raise PruneError(f"sparsify: required values {weights.shape} of {name}; came {came}")
    return found[name]


# --- which stay -----------------------------------------------------------------------------------


def share(kept: float, scope: str = "layer") -> Keep:
    """Keep this share of each layer's weights, or with scope "global" of all weights together.

    The number is rounded, of equal scores the first stay, and every layer keeps one at least.
    """
    if not 0 < kept <= 1 or scope not in ("layer", "global"):
        raise ConfigError(
            "sparsify.share: required 0 < kept <= 1, scope 'layer' or 'global'; came "
            f"{kept!r}, {scope!r}"
        )

    def each(scores: Mapping[str, Array]) -> dict[str, Array]:
        return {n: _largest(s.ravel(), kept).reshape(s.shape) for n, s in scores.items()}

    def together(scores: Mapping[str, Array]) -> dict[str, Array]:
        whole = _largest(np.concatenate([s.ravel() for s in scores.values()]), kept)
        masks, start = {}, 0
        for name, s in scores.items():
            masks[name] = whole[start : start + s.size].reshape(s.shape)
            if not masks[name].any():
                masks[name].flat[np.argmax(s)] = True
            start += s.size
        return masks

    return each if scope == "layer" else together


def above(threshold: float) -> Keep:
    """Keep scores above the threshold, the same for all layers."""
    return lambda scores: {name: s > threshold for name, s in scores.items()}


def deviation(width: float, unit: str = "std") -> Keep:
    """Keep scores of at least their layer's mean + width times its `unit`, std or variance.

    The threshold "from mean and variance" of each weight matrix of Çallı 2017, section 2.4.2, where
    the factors are left open; a negative width lies below the mean.
    """
    if not math.isfinite(width) or unit not in ("std", "variance"):
        raise ConfigError(
            "sparsify.deviation: required a finite width, unit 'std' or 'variance'; came "
            f"{width!r}, {unit!r}"
        )

    def keep(scores: Mapping[str, Array]) -> dict[str, Array]:
        masks = {}
        for name, s in scores.items():
            seen = s[np.isfinite(s)]  # without what was masked before
            masks[name] = s >= seen.mean() + width * (seen.std() if unit == "std" else seen.var())
        return masks

    return keep


def n_of_m(n: int, m: int) -> Keep:
    """Of every m weights that one output reads one after another, keep n: "2:4" is n_of_m(2, 4).

    The inputs of an output are all axes but the last, in order (for a convolution KH, KW, m_in),
    for a depthwise one the taps of its channel; an incomplete last group keeps as many as fit its
    share, rounded up. Mishra et al. 2021, "Accelerating sparse deep neural networks", section 2.
    """
    if not (is_count(n) and is_count(m) and n <= m):
        raise ConfigError(
            f"sparsify.n_of_m: required whole numbers 1 <= n <= m; came {n!r} and {m!r}"
        )

    def one(scores: Array) -> Array:
        rows = scores.reshape(-1, scores.shape[-1])  # (inputs, outputs)
        mask = np.zeros(rows.shape, bool)
        for start in range(0, len(rows), m):
            group = rows[start : start + m]
            order = np.argsort(-group, axis=0, kind="stable")[: -(-n * len(group) // m)]
            np.put_along_axis(mask[start : start + m], order, True, axis=0)
        return mask.reshape(scores.shape)

    return lambda scores: {name: one(s) for name, s in scores.items()}


def blocks(kept: float, size: int = 4) -> Keep:
    """Keep this share of blocks of `size` neighbouring outputs of one input, by summed scores; for
    a depthwise convolution, of one tap.

    The pattern "4x1" that `kernels.sparse` runs at higher densities than single weights: one index
    serves four weights. An incomplete last block counts as a block.
    """
    if not 0 < kept <= 1 or not is_count(size):
        raise ConfigError(
            f"sparsify.blocks: required 0 < kept <= 1, a whole size >= 1; came {kept!r}, {size!r}"
        )

    def one(scores: Array) -> Array:
        rows = np.where(np.isfinite(scores), scores, 0).reshape(-1, scores.shape[-1])
        starts = np.arange(0, rows.shape[1], size)
        sums = np.add.reduceat(rows, starts, axis=1)
        mask = _largest(sums.ravel(), kept).reshape(sums.shape)
        return np.repeat(mask, size, axis=1)[:, : rows.shape[1]].reshape(scores.shape)

    return lambda scores: {name: one(s) for name, s in scores.items()}


def _largest(scores: Array, kept: float) -> Array:
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[: max(1, round(kept * len(scores)))]] = True
    return mask


# --- passes ---------------------------------------------------------------------------------------


def weights(
    model: Module, score: Score, keep: Keep, *, only: Collection[str] | None = None
) -> Module:
    """A new model in which the weights that `keep` drops are zero and masked.

    `only` names the weights, by dotted path; without it all weights.
    Raises PruneError for unknown names, scores that are NaN or a layer that would lose all weights.
    """
    out = model.copy()
    apply(out, score, keep, only=only)
    return out


def apply(model: Module, score: Score, keep: Keep, *, only: Collection[str] | None = None) -> None:
    """The same on the model itself: for training, whose optimiser holds these parameters."""
    chosen = weights_of(model, only)
    layers = [m for _, m in model.named_modules() if isinstance(m, DepthwiseConv2d)]
    depthwise, scores = {id(m.weight) for m in layers}, {}
    for name, p in chosen.items():
        values = np.asarray(score(name, p.data), np.float64)
        if values.shape != p.shape or np.isnan(values).any():
            raise PruneError(
                f"sparsify: required scores {p.shape} for {name}, none of them NaN; came "
                f"{values.shape}, {np.isnan(values).sum()} NaN"
            )
        values = values if p.mask is None else np.where(p.mask, values, -np.inf)
        scores[name] = values.reshape(*p.shape[:2], 1, -1) if id(p) in depthwise else values
    masks = keep(scores)
    for name, p in chosen.items():
        mask = masks[name].reshape(p.shape) if id(p) in depthwise else masks[name]
        mask = mask if p.mask is None else mask & p.mask
        if not mask.any():
            raise PruneError(f"sparsify: all {mask.size} weights of {name} would go")
        masks[name] = mask
    for name, p in chosen.items():
        p.mask = masks[name]


def freeze_zeros(model: Module, *, only: Collection[str] | None = None) -> None:
    """Mask what is zero, for instance in a sparse model that was loaded from a file."""
    for p in weights_of(model, only).values():
        p.mask = p.data != 0


def density(model: Module) -> float:
    """The share of weights that are not zero."""
    chosen = weights_of(model, None).values()
    return sum(np.count_nonzero(p.data) for p in chosen) / sum(p.size for p in chosen)


def weights_of(model: Module, only: Collection[str] | None) -> dict[str, Parameter]:
    """All weights (see `is_weight`), or those that `only` names, by dotted path."""
    if isinstance(only, str):
        raise PruneError(f"sparsify: `only` is a list of names; came the text {only!r}")
    found = {name: p for name, p in model.named_parameters() if is_weight(p)}
    if only is not None and (unknown := sorted(set(only) - found.keys())):
        raise PruneError(f"sparsify: no weights {unknown}; there are {sorted(found)}")
    chosen = {name: p for name, p in found.items() if only is None or name in only}
    if not chosen:
        raise PruneError("sparsify: required a model with weights; came one without")
    return chosen


# --- schedules ------------------------------------------------------------------------------------


def equal_shares(sparsity: float, rounds: int) -> list[float]:
    """The sparsity after each round if every round removes the same share of what is left.

    1 - (1 - sparsity)^(k / rounds), k = 1 ... rounds (Han et al. 2015).
    """
    if not 0 <= sparsity < 1 or rounds < 1:
        raise ConfigError(
            f"equal_shares: required 0 <= sparsity < 1, rounds >= 1; came {sparsity}, {rounds}"
        )
    return [1 - (1 - sparsity) ** (k / rounds) for k in range(1, rounds + 1)]


def cubic(step: int, total: int, final: float, initial: float = 0.0) -> float:
    """final + (initial - final) (1 - step / total)^3, the sparsity at a step of a gradual pruning.

    Zhu & Gupta 2017, "To prune, or not to prune", eq. 1.
    """
    left = 1 - min(max(step / total, 0.0), 1.0)
    return final + (initial - final) * left**3


@dataclass
class Gradual:
    """Prunes a model while it is trained: `fit(..., each_step=Gradual(model, 10_000, 0.9))`.

    Every `every` steps until step `total` the weights are scored anew and the share that `cubic`
    says is masked; the optimiser goes on with what is left. `keep` makes a Keep from the share that
    stays.
    """

    model: Module
    total: int
    sparsity: float
    every: int = 100
    score: Score = magnitude
    keep: Callable[[float], Keep] = share
    only: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.total < 1 or self.every < 1 or not 0 <= self.sparsity < 1:
            raise ConfigError(
                "Gradual: required total >= 1, every >= 1, 0 <= sparsity < 1; came "
                f"{self.total}, {self.every}, {self.sparsity}"
            )

    def __call__(self, step: int) -> None:
        """Prune if it is time to."""
        if step <= self.total and (step % self.every == 0 or step == self.total):
            kept = 1 - cubic(step, self.total, self.sparsity)
            apply(self.model, self.score, self.keep(kept), only=self.only)
