"""Passes that make a model smaller. Each returns a new model and leaves the old one alone."""

from tinynn.compress import (
    blocks,
    cluster,
    factorize,
    importance,
    merge,
    prune,
    saliency,
    select,
    sparsify,
)
from tinynn.compress.distort import distort
from tinynn.compress.exchange import exchange
from tinynn.compress.reestimate import reestimate

__all__ = [
    "blocks",
    "cluster",
    "distort",
    "exchange",
    "factorize",
    "importance",
    "merge",
    "prune",
    "reestimate",
    "saliency",
    "select",
    "sparsify",
]
