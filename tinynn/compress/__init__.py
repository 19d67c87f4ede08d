"""Passes that make a model smaller. Each returns a new model and leaves the old one alone."""

from tinynn.compress import (
    blocks,
    calibrate,
    cluster,
    factorize,
    importance,
    integers,
    merge,
    prune,
    quantize,
    saliency,
    select,
    sparsify,
)
from tinynn.compress.batchnorm import fold_batchnorm
from tinynn.compress.distort import distort
from tinynn.compress.exchange import exchange
from tinynn.compress.reestimate import reestimate

__all__ = [
    "blocks",
    "calibrate",
    "cluster",
    "distort",
    "exchange",
    "factorize",
    "fold_batchnorm",
    "importance",
    "integers",
    "merge",
    "prune",
    "quantize",
    "reestimate",
    "saliency",
    "select",
    "sparsify",
]
