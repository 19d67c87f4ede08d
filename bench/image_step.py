"""One training step of a network of images: forward, loss, backward, SGD with momentum.

Classifiers have the softmax cross entropy, the auto-encoder the mean squared error. Images are
normal random numbers; the step is repeated on one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bench import networks
from bench.case import Case
from bench.suites import Built, Work

FAMILIES = ("train_baseline", "train_small_cifar", "train_autoencoder")
KINDS = ("conv", "composing", "separable", "nonlinear")

BATCH = 128
CLASSES = 10
LR = 0.01
MOMENTUM = 0.9
Step = Callable[[], object]


def cases(quick: bool) -> list[Case]:
    """The baseline in its four kinds, 24 x 24; the small CIFAR model; the auto-encoder of MNIST."""
    kinds = KINDS[:1] if quick else KINDS
    found = [Case.of("train_baseline", x=(BATCH, 24, 24, 3), kind=kind) for kind in kinds]
    found.append(Case.of("train_small_cifar", x=(BATCH, 32, 32, 3)))
    if not quick:
        found.append(Case.of("train_autoencoder", x=(BATCH, 28, 28, 1)))
    return found


def layers(case: Case) -> list[networks.Layer]:
    """The case's network. Raises KeyError or ValueError where the case does not say which."""
    if case.family != "train_baseline":
        return networks.small_cifar() if case.family != FAMILIES[2] else networks.autoencoder()
    if case["kind"] not in KINDS:
        raise ValueError(f"kind={case['kind']}: required one of {', '.join(KINDS)}")
    return networks.baseline(str(case["kind"]))


def work(case: Case) -> Work:
    """Products only, forward and both gradients; none by the images themselves.

    Bytes: images read, parameters and velocities read and written. What normalisation, pools and
    activations cost, and the traffic of activations between layers, is not in it.
    """
    x = case.shape("x")
    if len(x) != 4 or x[3] != (1 if case.family == FAMILIES[2] else 3):
        raise ValueError(f"x={x}: required images (B, H, W, C) of the network's channels")
    network = layers(case)
    macs = networks.multiply_adds(network, x)
    size = sum(math.prod(shape) for shape in networks.parameters(network))
    return Work(flops=2 * (3 * sum(macs) - macs[0]), bytes=4 * (math.prod(x) + 4 * size))


def build(library: str, case: Case) -> Built:
    """The step, which returns the loss; every library starts from the same parameters."""
    return {"tinynn": _tinynn, "torch": _torch, "torch_compile": _torch_compile}[library](case)


def _problem(case: Case) -> tuple[Any, Any]:
    """Images (B, H, W, C), and their classes (B,) or the images that the decoder should give."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal(case.shape("x"), np.float32)
    return x, np.tanh(x) if case.family == FAMILIES[2] else rng.integers(0, CLASSES, len(x))


def _tinynn(case: Case) -> Built:
    import numpy as np

    import tinynn as tn
    from tinynn import nn
    from tinynn.models import thesis

    x, target = _problem(case)
    rng = np.random.default_rng(0)
    net = {
        "train_baseline": lambda: thesis.baseline(case["kind"], rng=rng),  # type: ignore[arg-type]
        "train_small_cifar": lambda: thesis.small_cifar(rng=rng),
        "train_autoencoder": lambda: thesis.autoencoder(rng=rng),
    }[case.family]()
    network = layers(case)
    for parameter, value in zip(net.parameters(), networks.initial(network), strict=True):
        parameter.mutate()[...] = value
    weighted = [m for _, m in net.named_modules() if hasattr(m, "weight")]
    windowed = (layer for layer in networks.flat(network) if layer.kind in networks.WEIGHTED)
    for module, layer in zip(weighted, windowed, strict=True):
        if isinstance(module, nn.Conv2d | nn.DepthwiseConv2d | nn.ConvTranspose2d):
            g = layer.geometry()
            (top, left), (bottom, right) = g.padding, g.behind
            module.padding = ((top, bottom), (left, right))
    optimizer = tn.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    loss_of = tn.mse if case.family == FAMILIES[2] else tn.softmax_cross_entropy
    images = tn.Tensor(x)

    def step() -> object:
        loss = loss_of(net(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _torch_layouts(case: Case, prepare: Callable[[Any], Any]) -> dict[str, Step]:
    """A step for each layout, of which the harness takes the faster; prepare(forward and loss)."""
    import torch

    def layout(name: str) -> Step:
        x, target = (torch.from_numpy(a) for a in _problem(case))
        memory_format = getattr(torch, name)
        net = networks.torch_network(layers(case)).to(memory_format=memory_format)
        images = x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        loss_of: Callable[[Any, Any], Any] = torch.nn.functional.cross_entropy
        if case.family == FAMILIES[2]:
            target = target.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
            loss_of = torch.nn.functional.mse_loss
        optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, fused=True)
        forward = prepare(lambda: loss_of(net(images), target))

        def step() -> object:
            loss = forward()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    return {"contiguous": layout("contiguous_format"), "channels_last": layout("channels_last")}


def _torch(case: Case) -> Built:
    return _torch_layouts(case, lambda forward: forward)


def _torch_compile(case: Case) -> Built:
    """Model and loss compiled, forward and backward; torch's fused optimiser."""
    import torch

    return _torch_layouts(case, torch.compile)
