"""Put other modules in the place of some of a model's; which models that is not for."""

from __future__ import annotations

from collections.abc import Mapping

from tinynn.errors import ConfigError
from tinynn.nn.module import Module
from tinynn.nn.quantized import Quantized


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


def require_floating(model: Module, what: str) -> None:
    """Raise ConfigError, which names the layers, if weights of the model are rounded as they run.

    What such a pass would do to them the rounding could undo, or it would pass them over.
    """
    held = [
        p for p, m in model.named_modules() if isinstance(m, Quantized) and m.weight is not None
    ]
    if held:
        shown = ", ".join(repr(p) for p in held[:3]) + (", ..." if len(held) > 3 else "")
        raise ConfigError(
            f"{what}: required floating weights; came layers that are quantised: {shown}. Quantise "
            "afterwards; quantize.floating(model) has no grids"
        )
