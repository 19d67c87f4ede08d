"""One training step of the summation network 2 -> hidden (ReLU) -> 1: RMSE loss, SGD, momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import Case
from bench.suites import Built, Work

BATCH = 1000
LR = 0.01
MOMENTUM = 0.9
Step = Callable[[], object]


def work(case: Case) -> Work:
    """Counts for batch B and h hidden nodes; hidden activations need never leave the registers.

    Forward 2Bh * (2 + 1), its weight gradients the same, the hidden gradient Bh, biases 2Bh;
    the optimiser 4 for each of 4h + 1 parameters. Bytes: inputs and targets read, parameters and
    velocities read and written.
    """
    batch, hidden = case.shape("x")[0], case.integer("hidden")
    parameters = 4 * hidden + 1
    return Work(
        flops=(6 + 6 + 1 + 2) * batch * hidden + 4 * parameters,
        bytes=4 * (3 * batch + 4 * parameters),
    )


def build(library: str, case: Case) -> Built:
    """The step, which returns the loss; every library starts from the same parameters."""
    return {
        "tinynn": _tinynn,
        "numpy": _numpy,
        "torch": _torch,
        "torch_compile": _torch_compile,
    }[library](case)


def _problem(case: Case) -> tuple[Any, Any, list[Any]]:
    """Inputs (B, 2), their sums (B, 1), and w1 (2, h), b1 (h,), w2 (h, 1), b2 (1,)."""
    import numpy as np

    rng = np.random.default_rng(0)
    hidden = case.integer("hidden")
    x = rng.random(case.shape("x")).astype(case.dtype)
    # Positive weights: with a single hidden node a negative one would leave nothing to compute.
    w1 = np.abs(rng.normal(0, 1, (2, hidden))).astype(case.dtype)
    w2 = rng.normal(0, (2 / hidden) ** 0.5, (hidden, 1)).astype(case.dtype)
    b1, b2 = (np.zeros(n, case.dtype) for n in (hidden, 1))
    return x, x.sum(1, keepdims=True), [w1, b1, w2, b2]


def _tinynn(case: Case) -> Built:
    import numpy as np

    import tinynn as tn
    from tinynn import nn

    x, target, initial = _problem(case)
    rng = np.random.default_rng(0)
    hidden = case.integer("hidden")
    net = nn.Sequential(
        nn.Linear(2, hidden, rng=rng, dtype=case.dtype),
        nn.ReLU(),
        nn.Linear(hidden, 1, rng=rng, dtype=case.dtype),
    )
    for parameter, value in zip(net.parameters(), initial, strict=True):
        parameter.mutate()[...] = value
    optimizer = tn.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    inputs, targets = tn.Tensor(x), tn.Tensor(target)

    def step() -> object:
        loss = tn.rmse(net(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _numpy(case: Case) -> Built:
    """Written out by hand, without a tape: what an engine on NumPy alone could reach."""
    import numpy as np

    x, target, (w1, b1, w2, b2) = _problem(case)
    velocities = [np.zeros_like(p) for p in (w1, b1, w2, b2)]
    batch, scalar = len(x), x.dtype.type
    h = np.empty((batch, w1.shape[1]), case.dtype)
    grad_h = np.empty_like(h)

    def step() -> object:
        np.matmul(x, w1, out=h)
        np.add(h, b1, out=h)
        np.maximum(h, 0, out=h)
        error = h @ w2 + b2 - target
        loss = float(np.sqrt(np.mean(error * error)))
        g = error * scalar(1 / (batch * loss))
        np.multiply(g, w2.T, out=grad_h)
        np.multiply(grad_h, h > 0, out=grad_h)
        grads = (x.T @ grad_h, grad_h.sum(0), h.T @ g, g.sum(0))
        for p, v, grad in zip((w1, b1, w2, b2), velocities, grads, strict=True):
            v *= scalar(MOMENTUM)
            v += grad
            p -= scalar(LR) * v
        return loss

    return step


def _torch_problem(case: Case) -> tuple[Any, Any, Any]:
    import torch

    x, target, (w1, b1, w2, b2) = _problem(case)
    hidden = case.integer("hidden")
    net = torch.nn.Sequential(
        torch.nn.Linear(2, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1)
    ).to(getattr(torch, case.dtype))
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (w1.T, b1, w2.T, b2), strict=True):
            parameter.copy_(torch.from_numpy(value.copy()))
    return net, torch.from_numpy(x), torch.from_numpy(target)


def _torch_loss(net: Any, x: Any, target: Any) -> Any:
    import torch

    return torch.sqrt(torch.nn.functional.mse_loss(net(x), target))


def _torch(case: Case) -> Built:
    """Eager, with each of torch's SGD implementations."""

    def variant(**implementation: bool) -> Step:
        import torch

        net, x, target = _torch_problem(case)
        optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, **implementation)

        def step() -> object:
            loss = _torch_loss(net, x, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    return {
        "foreach": variant(foreach=True),
        "fused": variant(fused=True),
        "loop": variant(foreach=False, fused=False),
    }


def _torch_compile(case: Case) -> Built:
    """Default mode: what torch's manual recommends, and the whole step as a single graph."""
    return {"model and loss": _compiled_loss(case), "whole step": _compiled_step(case)}


def _compiled_loss(case: Case) -> Step:
    """Model and loss compiled, forward and backward; torch's fused optimiser."""
    import torch

    net, x, target = _torch_problem(case)
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, fused=True)
    compiled_loss = torch.compile(lambda: _torch_loss(net, x, target))

    def step() -> object:
        loss = compiled_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _compiled_step(case: Case) -> Step:
    """The gradient as a function of the parameters, and the update in place, compiled as one."""
    import torch

    net, x, target = _torch_problem(case)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    velocities = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def loss_of(parameters: Any) -> Any:
        return _torch_loss(lambda x: torch.func.functional_call(net, parameters, (x,)), x, target)

    @torch.compile
    def step() -> Any:
        grads, loss = torch.func.grad_and_value(loss_of)(parameters)
        for name, parameter in parameters.items():
            velocity = velocities[name].mul_(MOMENTUM).add_(grads[name])
            parameter.sub_(velocity, alpha=LR)
        return loss

    def run() -> object:
        with torch.no_grad():
            return step()

    return run
