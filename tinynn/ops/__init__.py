"""The ops as functions on Tensors. Importing this package gives Tensor its methods too."""

from tinynn import tensor as _tensor
from tinynn.ops.elementwise import (
    absolute,
    add,
    div,
    exp,
    log,
    maximum,
    minimum,
    mul,
    neg,
    power,
    relu,
    sigmoid,
    sqrt,
    sub,
    tanh,
)
from tinynn.ops.linear import linear, matmul
from tinynn.ops.loss import log_softmax, mse, rmse, softmax, softmax_cross_entropy
from tinynn.ops.reduce import max, mean, sum, var
from tinynn.ops.shape import concat, flatten, index, pad, reshape, take, transpose

__all__ = [
    "absolute",
    "add",
    "concat",
    "div",
    "exp",
    "flatten",
    "index",
    "linear",
    "log",
    "log_softmax",
    "matmul",
    "max",
    "maximum",
    "mean",
    "minimum",
    "mse",
    "mul",
    "neg",
    "pad",
    "power",
    "relu",
    "reshape",
    "rmse",
    "sigmoid",
    "softmax",
    "softmax_cross_entropy",
    "sqrt",
    "sub",
    "sum",
    "take",
    "tanh",
    "transpose",
    "var",
]

_tensor.functions.update({name: globals()[name] for name in __all__})
