"""Passes that make a model smaller. Each returns a new model and leaves the old one alone.

    single weights   sparsify.weights(model, score, keep); sparsify.Gradual during a training
    channels         prune.channels(model, seen, importance, select); merge.duplicates, merge.affine
    residual blocks  blocks.drop, blocks.thin
    low rank         factorize.layers(model, example, rank)
    few values       cluster.rounded, cluster.kmeans
    hashing          hashing.hashed, hashing.expanded
    few bits         quantize.float16, dynamic, int8, low_bit; quantize.trainable for fine-tuning
    batch norm       fold_batchnorm, reestimate

`seen` is what `tinynn.observe` collected; scores of weights and channels that read the loss come
from `saliency`. Passes may follow each other in any order, with training between them: masks and
shared values hold under every optimiser. Two orders matter: fold batch norms before weights get few
values, since folding scales each channel; and prune before that, since masked weights take part in
no code book. Hash last, or go on with the weights that `hashing.expanded` gives. What a pass is
worth on a model: `experiments/compress_small.py`.
"""

from tinynn.compress import (
    blocks,
    calibrate,
    cluster,
    factorize,
    hashing,
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
    "hashing",
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
