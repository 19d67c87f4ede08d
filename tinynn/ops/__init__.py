"""The ops as functions on Tensors. Importing this package gives Tensor its methods too."""

from tinynn import tensor as _tensor
from tinynn.ops.additive import additive_conv2d, additive_linear
from tinynn.ops.conv import conv2d, conv_transpose2d, depthwise_conv2d
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
from tinynn.ops.hashing import hashed
from tinynn.ops.linear import linear, matmul
from tinynn.ops.loss import log_softmax, mse, rmse, softmax, softmax_cross_entropy
from tinynn.ops.norm import batchnorm, batchnorm_eval, scale_shift
from tinynn.ops.pool import avg_pool2d, global_avg_pool2d, max_pool2d
from tinynn.ops.quantize import fake_quantize, round_to_half
from tinynn.ops.reduce import max, mean, sum, var
from tinynn.ops.shape import concat, flatten, index, pad, reshape, scatter, take, transpose

__all__ = [
    "absolute",
    "add",
    "additive_conv2d",
    "additive_linear",
    "avg_pool2d",
    "batchnorm",
    "batchnorm_eval",
    "concat",
    "conv2d",
    "conv_transpose2d",
    "depthwise_conv2d",
    "div",
    "exp",
    "fake_quantize",
    "flatten",
    "global_avg_pool2d",
    "hashed",
    "index",
    "linear",
    "log",
    "log_softmax",
    "matmul",
    "max",
    "max_pool2d",
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
    "round_to_half",
    "scale_shift",
    "scatter",
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
