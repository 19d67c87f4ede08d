"""What the loss says of weights and channels: gradients and curvature, gathered over data.

Scores of `sparsify` and `importance` read them. Nothing here changes the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinynn.compress.exchange import swap
from tinynn.errors import ConfigError, DataError
from tinynn.nn.additive import AdditiveConv2d, AdditiveLinear
from tinynn.nn.module import Module, Parameter, is_scale, is_weight, mode
from tinynn.op import Array
from tinynn.tensor import Tensor
from tinynn.train import Loss, target


@dataclass(frozen=True)
class Gradients:
    """Moments of the loss' gradient over batches, by dotted path of the parameter, float64."""

    mean: dict[str, Array]
    square: dict[str, Array]  #: of each batch's gradient; batches of one row give Fisher's diagonal


def gradients(model: Module, data: Iterable[Any], loss: Loss) -> Gradients:
    """The moments over all batches of `data`, in eval mode. DataError if there are none."""
    mean = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
    square = {name: np.zeros_like(a) for name, a in mean.items()}
    count = 0
    for x, y in _pairs("gradients", data):
        for name, grad in _gradient(model, [(x, y)], loss).items():
            mean[name] += grad
            square[name] += np.square(grad)
        count += 1
    if not count:
        raise DataError("saliency.gradients: required at least one batch; came none")
    return Gradients(
        {k: v / count for k, v in mean.items()}, {k: v / count for k, v in square.items()}
    )


@dataclass(frozen=True)
class Gates:
    """The loss' gradient by a factor on each channel that a layer reads, float64.

    `rows` has for each layer's weights, by dotted path, (batches, m_in). The factor stands at 1: to
    remove a channel is to set it to 0, in all layers that read the channel.
    """

    rows: dict[str, Array]


def gates(model: Module, data: Iterable[Any], loss: Loss) -> Gates:
    """The gates' gradients on every batch of `data`, in eval mode. DataError if there are none.

    A factor on channel c scales the weights that read it: its gradient is the sum of w dL/dw over
    them, which is the sum of x dL/dx over the channel (Molchanov et al. 2017, "Pruning
    convolutional neural networks for resource efficient inference", eq. 8). In a layer of the
    ef-operator it scales sign(x w) (|x| + |w|): there it is the sum of both sums.
    """
    weights = {n: p.data.astype(np.float64) for n, p in model.named_parameters() if is_weight(p)}
    rows: dict[str, list[Array]] = {name: [] for name in weights}
    gated, gates = _gated(model)
    inside = [name for name, p in gated.named_parameters() if is_weight(p)]
    names = dict(zip(weights, inside, strict=True))
    for x, y in _pairs("gates", data):
        found = _gradient(gated, [(x, y)], loss)
        for name, w in weights.items():
            others = tuple(axis for axis in range(w.ndim) if axis != w.ndim - 2)
            row = (w * found[names[name]]).sum(axis=others)
            rows[name].append(row + found[gates[name]] if name in gates else row)
    if not any(rows.values()):
        raise DataError("saliency.gates: required a model with weights and at least one batch")
    return Gates({name: np.stack(found) for name, found in rows.items()})


class _Gated(Module):
    """A layer with a factor of 1 on each channel of its input."""

    rectifies = True

    def __init__(self, layer: Module, channels: int, dtype: Any) -> None:
        self.layer, self.gate = layer, Parameter(np.ones(channels, dtype))

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return self.layer(x * self.gate, relu=relu)


def _gated(model: Module) -> tuple[Module, dict[str, str]]:
    """The model with gates before its layers of the ef-operator; their paths, by the weights'."""
    gated = model.copy()
    layers: dict[str, Any] = {
        path: m
        for path, m in gated.named_modules()
        if path and isinstance(m, AdditiveLinear | AdditiveConv2d)
    }
    for m in layers.values():
        swap(gated, m, _Gated(m, m.weight.shape[-2], m.weight.dtype))
    return gated, {f"{path}.weight": f"{path}.gate" for path in layers}


def hessian_diagonal(
    model: Module,
    data: Iterable[Any],
    loss: Loss,
    rng: np.random.Generator,
    *,
    probes: int = 10,
    step: float = 1e-3,
) -> dict[str, Array]:
    """The diagonal of the loss' second derivatives by every parameter, by dotted path, float64.

    Masked weights and learned scales (see `is_scale`) stay where they are; the former have zeros.
    E[z * (g(w + step z) - g(w - step z)) / (2 step)] over random signs z: Hutchinson's estimator
    (Bekas et al. 2007, "An estimator for the diagonal of a matrix") on central differences of the
    gradient over `data`, whose batches are read 2 `probes` times. Off the diagonal the signs
    cancel on average only: more probes, less noise.
    """
    batches = list(_pairs("hessian_diagonal", data))
    if not batches or probes < 1 or not step > 0:
        raise ConfigError(
            "saliency.hessian_diagonal: required batches, probes >= 1 and step > 0; came "
            f"{len(batches)}, {probes} and {step}"
        )
    twin = model.copy()
    moved = {name: p for name, p in twin.named_parameters() if not is_scale(p)}
    start = {name: p.numpy() for name, p in moved.items()}
    total = {name: np.zeros(w.shape) for name, w in start.items()}
    for _ in range(probes):
        signs = {name: rng.choice((-1.0, 1.0), w.shape) for name, w in start.items()}
        for name, p in moved.items():
            signs[name] *= 1 if p.mask is None else p.mask
        for side in (1, -1):
            for name, p in moved.items():
                p.mutate()[...] = start[name] + (side * step * signs[name]).astype(p.dtype)
            found = _gradient(twin, batches, loss)
            for name in moved:
                total[name] += side * signs[name] * found[name] / (2 * step * probes)
    return total


def _pairs(what: str, data: Iterable[Any]) -> Iterator[Any]:
    for batch in data:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(
                f"saliency.{what}: required batches (x, y); came {type(batch).__name__}"
            )
        yield batch


def _gradient(model: Module, batches: Iterable[Any], loss: Loss) -> dict[str, Array]:
    """The mean gradient over the batches; zeros for parameters that the loss does not reach."""
    parameters = dict(model.named_parameters())
    before = {name: p._grad for name, p in parameters.items()}
    count = 0
    try:
        for p in parameters.values():
            p._grad = None
        with mode(model, False):
            for x, y in batches:
                loss(model(Tensor(x, copy=False)), target(y)).backward()
                count += 1
        return {
            name: np.zeros(p.shape) if p._grad is None else p._grad.astype(np.float64) / count
            for name, p in parameters.items()
        }
    finally:
        for name, p in parameters.items():
            p._grad = before[name]
