"""An explanation as a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinynn.explain.parts import Explanation, Layer, Way

_QUIET_SPREAD = 0.1
_POSSIBLE = 1.05  #: shares of a bound above it say that the bound is wrong


def table(found: Explanation) -> list[str]:
    """A block of lines for each layer that mixes channels, a line for each other, then totals."""
    names = ["technique", *found.plans]
    width = max(map(len, names))
    head = (
        f"  {'technique':<{width}}{'us':>10}{'bound us':>10}{'share':>7}{'MMAC':>10}"
        f"{'weight kB':>11}{'act. kB':>10}  limited by  what it does here"
    )
    whole = math.fsum(layer.dense.seconds or 0.0 for layer in found.layers) or 1.0
    lines = [head, "-" * (len(head) + 30)]
    for layer in found.layers:
        lines += _layer(layer, whole, width)
    return [*lines, "", *_totals(found)]


def _layer(layer: Layer, whole: float, width: int) -> list[str]:
    weight = "" if layer.weight is None else f", weights {'x'.join(map(str, layer.weight))}"
    seconds = layer.dense.seconds or 0.0
    lines = [
        f"{layer.path}: {layer.kind} -> {'x'.join(map(str, layer.output))}{weight}, {layer.rows} "
        f"rows; {seconds / whole:.1%} of the dense network",
        _way(layer.dense, width),
    ]
    without: dict[str, list[str]] = {}
    for way in layer.others:
        if way.seconds is None:
            without.setdefault(layer.why(way), []).append(way.technique)
        else:
            lines.append(f"{_way(way, width)}  {layer.why(way)}")
    return lines + [f"  {', '.join(names)}: {why}" for why, names in without.items()]


def _way(way: Way, width: int) -> str:
    if way.seconds is None:
        return f"  {way.technique:<{width}}{'-':>10}"
    return (
        f"  {way.technique:<{width}}{way.seconds * 1e6:>10.1f}{way.bound * 1e6:>10.1f}"
        f"{way.share:>7.0%}{way.macs / 1e6:>10.3f}{way.weight_bytes / 1e3:>11.1f}"
        f"{way.activation_bytes / 1e3:>10.1f}  {way.limited_by:<10}"
    )


def _totals(found: Explanation) -> list[str]:
    threads = found.limits.threads
    lines = [
        f"the whole network, {found.batch} images in {found.chunks} chunks, {threads} "
        f"thread{'s' * (threads > 1)}, calls from Python included:"
    ]
    dense = found.plans["dense"].median
    lines += [
        f"  {name:<12}{timing.median * 1e6:>12.1f} us  {dense / timing.median:.2f}x dense"
        f"{found.memory[name] / 1e3:>12.1f} kB of weights in memory"
        for name, timing in found.plans.items()
    ]
    best = math.fsum(
        min(w.seconds for w in (layer.dense, *layer.others) if w.seconds is not None)
        for layer in found.layers
        if layer.dense.seconds is not None
    )
    whole = math.fsum(layer.dense.seconds or 0.0 for layer in found.layers)
    lines.append(
        f"each layer by its fastest technique: {best * 1e6:.1f} us of {whole * 1e6:.1f} us, "
        f"{whole / best if best else 1.0:.2f}x; the techniques change what the network computes"
    )
    told = ", ".join(f"{name} {value:g}" for name, value in found.settings.items())
    lines.append(
        f"{told}; limits: {found.limits.flops / 1e9:.0f} GFLOP/s float32, read "
        + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in found.limits.bandwidths.items())
        + " GB/s"
    )
    lines += _impossible(found)
    noisy = max(timing.spread for timing in found.plans.values())
    if noisy > _QUIET_SPREAD:
        lines.append(f"the rounds vary by {noisy:.0%}: other work disturbed them")
    return lines


def _impossible(found: Explanation) -> list[str]:
    """Who is faster than the machine's limits allow. A call's own time is not one of these."""
    ways = [(layer, way) for layer in found.layers for way in (layer.dense, *layer.others)]
    over = [
        (way.share, f"{layer.path} {way.technique}")
        for layer, way in ways
        if way.seconds and way.limited_by != "overhead" and way.share > _POSSIBLE
    ]
    if not over:
        return []
    share, name = max(over)
    return [
        f"warning: {len(over)} ways are faster than their bounds allow, {name} at {share:.0%}: the "
        "limits were measured while the machine was slower; --remeasure measures them anew"
    ]
