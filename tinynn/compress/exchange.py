"""Put other modules in the place of some of a model's; which models that is not for."""

from __future__ import annotations

from collections.abc import Mapping

from tinynn.errors import ConfigError
from tinynn.nn.conv import Conv2d, PointwiseConv2d
from tinynn.nn.hashed import HashedConv2d, HashedLinear
from tinynn.nn.layers import Linear
from tinynn.nn.module import Module, Parameter
from tinynn.nn.quantized import Quantized

#: layers that others, which compute the same with other weights, can stand for
LAYERS = (Linear, Conv2d, PointwiseConv2d)


def exchange(model: Module, new: Mapping[str, Module]) -> Module:
    """A copy of `model` with these modules at these dotted paths, in the old ones' order and mode.

    A module that stands in several places is exchanged in all of them. The new modules are taken
    as they are, not copied. Raises ConfigError for a path at which there is no module, and for "",
    the model itself.
    """
    out = model.copy()
    modules = dict(out.named_modules())
    if wrong := sorted(path for path in new if not path or path not in modules):
        raise ConfigError(f"exchange: no modules {wrong} inside {type(model).__name__}")
    by_identity = {id(modules[path]): module for path, module in new.items()}
    for path, module in new.items():
        module.train(modules[path].training)
    for parent in modules.values():
        for name, child in list(parent.named_children()):
            if id(child) in by_identity:
                setattr(parent, name, by_identity[id(child)])
    return out


def swap(model: Module, old: Module, new: Module) -> None:
    """Put `new` wherever `old` stands inside `model`, in place and in its mode."""
    new.train(old.training)
    for _, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if child is old and parent is not new:
                setattr(parent, name, new)


def plain_layers(model: Module) -> dict[str, Linear | Conv2d]:
    """The linear layers and convolutions by path that have their weights and forward to themselves.

    Depthwise and transposed convolutions and subclasses are not among them.
    """
    owners: dict[int, int] = {}
    for _, module in model.named_modules():
        for value in vars(module).values():
            if isinstance(value, Parameter):
                owners[id(value)] = owners.get(id(value), 0) + 1
    found: dict[str, Linear | Conv2d] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Linear | Conv2d) or type(module) not in LAYERS:
            continue
        alone = all(owners[id(p)] == 1 for p in module.parameters())
        if alone and "forward" not in vars(module):
            found[path] = module
    return found


def require_floating(model: Module, what: str) -> None:
    """Raise ConfigError, which names the layers, if weights are rounded or hashed as they run.

    What such a pass would do to them the rounding could undo, or it would pass them over.
    """
    modules = list(model.named_modules())
    rounded = [p for p, m in modules if isinstance(m, Quantized) and m.weight is not None]
    if rounded:
        raise ConfigError(
            f"{what}: required floating weights; came layers that are quantised: {_some(rounded)}. "
            "Quantise afterwards; quantize.floating(model) has no grids"
        )
    require_weights(model, what)


def require_weights(model: Module, what: str) -> None:
    """Raise ConfigError, which names the layers, if any make their weights by hashing."""
    if made := hashed_layers(model):
        raise ConfigError(
            f"{what}: required layers that hold their weights; came hashed ones: "
            f"{_some(list(made))}. hashing.expanded(model) has weights in their place"
        )


def hashed_layers(model: Module) -> dict[str, HashedLinear | HashedConv2d]:
    """The layers by path whose weights are made of few values."""
    kinds = HashedLinear | HashedConv2d
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}


def _some(paths: list[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (", ..." if len(paths) > 3 else "")
