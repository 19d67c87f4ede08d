"""A profile as a table and as a picture."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinynn.profile.parts import Bound, Profile

_COLOURS: dict[Bound, str] = {"compute": "#3b6fb5", "memory": "#d98e32", "overhead": "#9a9a9a"}

_QUIET_SPREAD = 0.1


def table(profile: Profile) -> list[str]:
    """Two lines an op, then what all take together."""
    width = max([5, *(len(layer.path) for layer in profile.layers)])
    names = max([2, *(len(layer.op) for layer in profile.layers)])
    head = (
        f"{'layer':<{width}}  {'op':<{names}}  {'result':<16}{'pass':<9}{'ms':>9}{'share':>7}"
        f"{'MMAC':>9}{'MB':>8}{'FLOP/B':>8}{'GFLOP/s':>9}{'GB/s':>8}{'bound ms':>10}  limited by"
    )
    rule = "-" * (len(head) + 6)
    lines = [head, rule]
    whole = math.fsum(p.seconds for p in profile.passes) or 1.0
    for layer in profile.layers:
        shape = "x".join(map(str, layer.output)) or "number"
        for i, (name, p) in enumerate(layer.passes.items()):
            start = (layer.path, layer.op, shape) if i == 0 else ("", "", "")
            lines.append(
                f"{start[0]:<{width}}  {start[1]:<{names}}  {start[2]:<16}{name:<9}"
                f"{p.seconds * 1e3:>9.4f}{p.seconds / whole:>7.1%}{p.macs / 1e6:>9.3f}"
                f"{p.nbytes / 1e6:>8.3f}{p.intensity:>8.2f}{p.gflops:>9.1f}{p.gbytes:>8.1f}"
                f"{p.bound * 1e3:>10.4f}  {p.limited_by} ({p.share:.0%})"
            )
    return [*lines, rule, *_totals(profile)]


def _totals(profile: Profile) -> list[str]:
    lines = []
    for name in ("forward", "backward"):
        mine = [p for layer in profile.layers for n, p in layer.passes.items() if n == name]
        seconds = math.fsum(p.seconds for p in mine)
        bound = math.fsum(p.bound for p in mine)
        macs = sum(p.macs for p in mine)
        lines.append(
            f"{name}: {seconds * 1e3:.3f} ms, {macs / 1e6:,.2f} million multiply-adds; "
            f"all at their bounds: {bound * 1e3:.3f} ms"
        )
    by_bound = profile.seconds_by_bound()
    whole = math.fsum(by_bound.values()) or 1.0
    lines += [
        "of the time, limited by " + ", ".join(f"{k} {s / whole:.0%}" for k, s in by_bound.items()),
        f"forward and backward at once: {profile.timing.median * 1e3:.3f} ms, median of "
        f"{profile.timing.rounds} "
        f"rounds, batch {'x'.join(map(str, profile.batch))}, "
        f"{profile.limits.threads} thread{'s' * (profile.limits.threads > 1)}",
    ]
    limits = profile.limits
    rates = ", ".join(f"{k} {rate / 1e9:.0f}" for k, rate in limits.bandwidths.items())
    lines.append(f"limits: {limits.flops / 1e9:.0f} GFLOP/s float32; read {rates} GB/s")
    if profile.timing.spread > _QUIET_SPREAD:
        lines.append(f"the rounds vary by {profile.timing.spread:.0%}: other work disturbed them")
    if not limits.trustworthy():
        lines.append(f"the limits vary by {limits.spread:.0%}: other work disturbed them")
    return lines


def picture(profile: Profile) -> bytes:
    """A PNG: a bar for each op and direction, coloured by what limits it."""
    from matplotlib.figure import Figure  # here: it takes half a second to import
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    layers = profile.layers
    figure = Figure(figsize=(9, 1.9 + 0.27 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    for row, layer in enumerate(layers):
        for name, p in layer.passes.items():
            y = row - 0.2 if name == "forward" else row + 0.2
            colour = _COLOURS[p.limited_by]
            face = colour if name == "forward" else "none"
            ms = p.seconds * 1e3
            axes.barh(y, ms, 0.36, facecolor=face, edgecolor=colour, linewidth=1)
            axes.plot([p.bound * 1e3] * 2, [y - 0.18, y + 0.18], color="black", linewidth=1.6)
            axes.annotate(
                f"{p.share:.0%}", (max(ms, p.bound * 1e3), y), (3, 0), textcoords="offset points",
                va="center", fontsize=5.5, color="#444444",
            )  # fmt: skip
    axes.set_yticks(range(len(layers)), [f"{r.path}  {r.op}" for r in layers], fontsize=6.5)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("milliseconds; %: the bound's share of the measured time", fontsize=8)
    batch, threads = "×".join(map(str, profile.batch)), profile.limits.threads
    axes.set_title(
        f"batch {batch}, {threads} thread{'s' * (threads > 1)}: "
        f"{profile.timing.median * 1e3:.2f} ms forward and backward",
        fontsize=9,
    )
    grey = "#555555"
    handles: list[Any] = [Patch(color=c, label=f"limited by {k}") for k, c in _COLOURS.items()]
    handles.append(Patch(facecolor=grey, edgecolor=grey, label="forward"))
    handles.append(Patch(facecolor="none", edgecolor=grey, label="backward"))
    handles.append(Line2D([], [], color="black", label="bound: the least time"))
    figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
