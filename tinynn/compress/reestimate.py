"""Batch normalisation's running statistics anew, after a pass has changed what they describe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tinynn.errors import DataError, NonFiniteError
from tinynn.nn.conv import BatchNorm
from tinynn.nn.module import Module, mode
from tinynn.observe import require_batches, rows
from tinynn.tensor import Tensor, no_grad


def reestimate(model: Module, data: Iterable[Any]) -> Module:
    """A new model whose batch norms have the statistics of `data`; everything else stays.

    `data` are batches: arrays, or tuples or lists of arrays whose first is the input. They must
    look like what the model was trained on, augmentation included: padded, flipped crops have other
    statistics than whole images, whose statistics can cost more than the pass did. Each batch norm
    normalises by the batch itself, as in training, and its running mean and variance become the
    averages of the batches' means and unbiased variances, weighted by their rows; all other modules
    are in eval mode. Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.1,
    "PreciseBN".

    Raises DataError if there is no batch or an empty one, NonFiniteError naming the layer if its
    statistics are NaN or infinite.
    """
    require_batches("reestimate", data)
    out = model.copy()
    norms = {path: m for path, m in out.named_modules() if isinstance(m, BatchNorm)}
    momenta = [m.momentum for m in norms.values()]
    seen = 0
    with mode(out, training=False), no_grad():
        for norm in norms.values():
            norm.training = True
        for i, batch in enumerate(data):
            x = rows("reestimate", i, batch)
            seen += len(x)
            for norm in norms.values():
                norm.momentum = len(x) / seen  # a running average of all that came so far
            out(Tensor(x, copy=False))
    if not seen:
        raise DataError("reestimate: required at least one batch; came none")
    for (path, norm), momentum in zip(norms.items(), momenta, strict=True):
        norm.momentum = momentum
        if not (np.isfinite(norm.mean).all() and np.isfinite(norm.variance).all()):
            raise NonFiniteError(f"reestimate: the statistics of {path} are not finite")
    return out
