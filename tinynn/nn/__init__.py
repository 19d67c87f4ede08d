"""Layers and models."""

from tinynn.nn.layers import Dropout, Flatten, Linear, ReLU, Sigmoid, Softmax, Tanh
from tinynn.nn.module import Module, Parameter, Sequential
from tinynn.nn.serialize import load, save

__all__ = [
    "Dropout",
    "Flatten",
    "Linear",
    "Module",
    "Parameter",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "load",
    "save",
]
