"""From numbers to a sentence: rules in order, of which the first that applies gives the reason.

A rule sees a layer, the dense way of running it and another one, and gives its reason or None. What
it decides by are times that were measured and bounds that were predicted, never the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kernels import simd

if TYPE_CHECKING:
    from tinynn.explain.parts import Layer, Way

Rule = Callable[["Layer", "Way"], "str | None"]

HELPS, HURTS = 1.05, 0.95  #: of the dense time / the time; between them a technique changes nothing
_OVERHEAD = 0.3  #: the least share of a call's own time in the dense time that explains a failure
_ALIKE = 0.9  #: bounds whose ratio is above promise nothing
_SHORT = 0.7  #: a gain below this share of what the bounds promise needs a word
_FIXED = 0.4  #: the least share of time without weights in the whole that is named
_FEW_VECTORS = 2  #: vectors of channels below which padding and set-up weigh

_LIMITS = {
    "compute": "arithmetic",
    "memory": "memory traffic",
    "index": "index traffic",
    "overhead": "call overhead",
}


def sentence(layer: Layer, way: Way) -> str:
    """Whether the technique helps here, by how much, and why."""
    gain = layer.gain(way)
    if gain is None:
        return _no_kernel(layer, way)
    if gain >= HELPS:
        return f"helps, {gain:.2f}x: {_first(_WHY_IT_HELPS, layer, way)}"
    verdict = f"slower, {gain:.2f}x" if gain <= HURTS else f"no change, {gain:.2f}x"
    return f"{verdict}: {_first(_WHY_NOT, layer, way)}"


def _first(rules: tuple[Rule, ...], layer: Layer, way: Way) -> str:
    return next(said for rule in rules if (said := rule(layer, way)) is not None)


def _no_kernel(layer: Layer, way: Way) -> str:
    if way.rank is not None and layer.mixes:
        return f"not done: factors of any rank below {layer.channels} would cost more"
    shape = "x".join(map(str, layer.weight or ()))
    return f"no kernel: none runs a {layer.kind} layer with weights {shape} so"


def _promise(layer: Layer, way: Way) -> float:
    """How much faster it could be by the bounds alone."""
    return layer.dense.bound / way.bound


# --- why it helps ---------------------------------------------------------------------------------


def _less_of_what_limits(layer: Layer, way: Way) -> str | None:
    dense = layer.dense
    limit = dense.limited_by
    if limit == "overhead" or way.bounds[limit] > _ALIKE * dense.bounds[limit]:
        return None
    share = way.bounds[limit] / dense.bounds[limit]
    said = f"{_LIMITS[limit]} limits it dense, and {share:.0%} of that is left"
    gain, promise = layer.gain(way) or 0.0, _promise(layer, way)
    if gain >= _SHORT * promise:
        return said
    return f"{said}; the bounds promise {promise:.1f}x, {_what_is_lost(layer, way)}"


def _what_is_lost(layer: Layer, way: Way) -> str:
    if way.limited_by == "overhead":
        return f"but then a call of its kernel takes {way.share:.0%} of the time"
    fixed = _fixed_share(way)
    if fixed >= _FIXED:
        return (
            f"but {fixed:.0%} of its time would remain without a weight: activations are turned "
            "into rows of pixels and back"
        )
    if way.limited_by == "index":
        return "and indices take more yet than the loads that they ask for"
    return f"but its kernel runs at {way.share:.0%} of its bound, the dense one at {_dense(layer)}"


def _fixed_share(way: Way) -> float:
    return way.fixed / way.seconds if way.fixed is not None and way.seconds else 0.0


def _better_kernel(layer: Layer, way: Way) -> str:
    return (
        f"not by what the bounds say ({_promise(layer, way):.1f}x), but its kernel runs at "
        f"{way.share:.0%} of its bound and the dense one at {_dense(layer)}"
    )


def _dense(layer: Layer) -> str:
    return f"{layer.dense.share:.0%}"


_WHY_IT_HELPS: tuple[Rule, ...] = (_less_of_what_limits, _better_kernel)


# --- why not --------------------------------------------------------------------------------------


def _call_overhead(layer: Layer, way: Way) -> str | None:
    seconds, call = layer.dense.seconds or 0.0, way.bounds["overhead"]
    if call < _OVERHEAD * seconds:
        return None
    return (
        f"call overhead: a call of its kernel on next to nothing takes {call * 1e6:.1f} us, the "
        f"whole layer dense {seconds * 1e6:.1f} us"
    )


def _saves_no_arithmetic(layer: Layer, way: Way) -> str | None:
    dense = layer.dense
    if dense.limited_by != "compute" or way.macs < _ALIKE * dense.macs:
        return None
    if way.bounds["compute"] < _ALIKE * dense.bounds["compute"]:
        return None
    whole = dense.weight_bytes + dense.activation_bytes
    saved = (whole - way.weight_bytes - way.activation_bytes) / whole
    return (
        f"bound by arithmetic, of which it saves none; it saves {saved:.0%} of the bytes, which "
        f"take {dense.bounds['memory'] / dense.bound:.0%} of the arithmetic's time"
    )


def _memory_bound(layer: Layer, way: Way) -> str | None:
    dense = layer.dense
    if dense.limited_by != "memory" or way.bounds["memory"] < _ALIKE * dense.bounds["memory"]:
        return None
    share = dense.activation_bytes / (dense.weight_bytes + dense.activation_bytes)
    return f"memory bound, and {share:.0%} of the bytes are activations, which it does not shrink"


def _index_traffic(layer: Layer, way: Way) -> str | None:
    if way.bounds["index"] < _ALIKE * way.bound or way.bounds["index"] == 0:
        return None
    share = way.bounds["index"] / (layer.dense.seconds or 1.0)
    return (
        f"index traffic: every weight that is left asks for activations of its own, which alone "
        f"takes {share:.0%} of the dense time"
    )


def _turned(layer: Layer, way: Way) -> str | None:
    fixed, dense = _fixed_share(way), layer.dense.seconds or 1.0
    if way.fixed is None or fixed < _FIXED:
        return None
    return (
        f"layout: {fixed:.0%} of its time would remain without a weight, {way.fixed / dense:.0%} "
        f"of the dense time, as activations are turned into rows of pixels and back for sums of "
        f"{layer.inputs} inputs"
    )


def _few_channels(layer: Layer, way: Way) -> str | None:
    least = _FEW_VECTORS * simd.LANES
    sizes = {"outputs": layer.channels}
    if layer.mixes:
        sizes["inputs"] = layer.inputs
    if way.rank is not None:
        sizes["channels between the factors"] = way.rank
    name = min(sizes, key=lambda key: sizes[key])
    if sizes[name] >= least:
        return None
    return (
        f"too few channels: with {sizes[name]} {name} and vectors of {simd.LANES}, little work "
        f"bears what is done once for a block of rows ({layer.rows} rows)"
    )


def _slower_kernel(layer: Layer, way: Way) -> str:
    return (
        f"the bounds promise {_promise(layer, way):.1f}x, but its kernel runs at {way.share:.0%} "
        f"of its bound ({_LIMITS[way.limited_by]}), the dense one at {_dense(layer)}"
    )


_WHY_NOT: tuple[Rule, ...] = (
    _call_overhead,
    _saves_no_arithmetic,
    _memory_bound,
    _turned,
    _index_traffic,
    _few_channels,
    _slower_kernel,
)
