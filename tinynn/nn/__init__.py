"""Layers and models."""

from tinynn.nn.additive import AdditiveConv2d, AdditiveLinear
from tinynn.nn.blocks import (
    Add,
    BottleneckBlock,
    Concat,
    InceptionBlock,
    ResidualBlock,
    Scatter,
    SeparableResidualBlock,
    Shortcut,
)
from tinynn.nn.conv import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    ConvTranspose2d,
    DepthwiseConv2d,
    GlobalAvgPool2d,
    KernelComposingConv2d,
    MaxPool2d,
    PointwiseConv2d,
    ScaleShift,
    SeparableConv2d,
)
from tinynn.nn.hashed import HashedConv2d, HashedLinear
from tinynn.nn.layers import Dropout, Flatten, Linear, ReLU, Sigmoid, Softmax, Tanh
from tinynn.nn.module import Module, Parameter, Sequential
from tinynn.nn.quantized import Quantized
from tinynn.nn.serialize import load, save

__all__ = [
    "Add",
    "AdditiveConv2d",
    "AdditiveLinear",
    "AvgPool2d",
    "BatchNorm",
    "BottleneckBlock",
    "Concat",
    "Conv2d",
    "ConvTranspose2d",
    "DepthwiseConv2d",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2d",
    "HashedConv2d",
    "HashedLinear",
    "InceptionBlock",
    "KernelComposingConv2d",
    "Linear",
    "MaxPool2d",
    "Module",
    "Parameter",
    "PointwiseConv2d",
    "Quantized",
    "ReLU",
    "ResidualBlock",
    "ScaleShift",
    "Scatter",
    "SeparableConv2d",
    "SeparableResidualBlock",
    "Sequential",
    "Shortcut",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "load",
    "save",
]
