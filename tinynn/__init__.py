"""tinynn: a neural-network engine in which every step can be read, changed, and is fast."""

from kernels._jit import get_threads, max_threads, set_threads
from tinynn import data, graph, init, nn, onnx, ops, profile, schedule
from tinynn.compress import (
    blocks,
    calibrate,
    cluster,
    distort,
    factorize,
    fold_batchnorm,
    hashing,
    importance,
    merge,
    prune,
    quantize,
    reestimate,
    saliency,
    select,
    sparsify,
)
from tinynn.count import Count, count
from tinynn.data import Batches
from tinynn.deploy import Plan, compile
from tinynn.diagnose import find_non_finite
from tinynn.explain import Explanation, explain
from tinynn.gradcheck import gradcheck
from tinynn.metrics import accuracy
from tinynn.nn import Module, Parameter, load, save
from tinynn.observe import Observer, observe
from tinynn.op import Op, use_variant
from tinynn.ops import mse, rmse, softmax_cross_entropy
from tinynn.optim import SGD, Adadelta, Adam, Nadam, Optimizer, RMSProp, clip_gradients
from tinynn.statistics import statistics
from tinynn.tensor import Tensor, no_grad
from tinynn.train import Converged, History, converged, evaluate, fit, predict

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adadelta",
    "Adam",
    "Batches",
    "Converged",
    "Count",
    "Explanation",
    "History",
    "Module",
    "Nadam",
    "Observer",
    "Op",
    "Optimizer",
    "Parameter",
    "Plan",
    "RMSProp",
    "Tensor",
    "accuracy",
    "blocks",
    "calibrate",
    "clip_gradients",
    "cluster",
    "compile",
    "converged",
    "count",
    "data",
    "distort",
    "evaluate",
    "explain",
    "factorize",
    "find_non_finite",
    "fit",
    "fold_batchnorm",
    "get_threads",
    "gradcheck",
    "graph",
    "hashing",
    "importance",
    "init",
    "load",
    "max_threads",
    "merge",
    "mse",
    "nn",
    "no_grad",
    "observe",
    "onnx",
    "ops",
    "predict",
    "profile",
    "prune",
    "quantize",
    "reestimate",
    "rmse",
    "saliency",
    "save",
    "schedule",
    "select",
    "set_threads",
    "softmax_cross_entropy",
    "sparsify",
    "statistics",
    "use_variant",
]
