"""What a person sees of a run: lines while it goes on, a summary, and plots."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.libraries import OURS
from bench.race import Race
from bench.records import BEST_PEER, Record
from bench.suites import Work
from tinynn.roofline import Limits
from tinynn.storage import write_bytes

_NOTES = (
    f"{BEST_PEER}: in each case the fastest of the peers. torch, torch_compile: the faster of "
    "contiguous and channels_last.",
    "onnxruntime, openvino: images in NCHW, the layout of their operators; inference only.",
)

#: More cases than this are a thicket: the ratios' bars are left out, the roofline's points unnamed.
_BARS, _NAMES = 60, 8


def case_lines(race: Race, work: Work, records: Sequence[Record]) -> list[str]:
    """A case, our time, each peer's time and ratio, and who failed for what reason."""
    lines = [str(race.case)]
    for name, timing in race.timings.items():
        choice = f" ({race.choices[name]})" if name in race.choices else ""
        text = f"  {name + choice:<34}{duration(timing.median):>11}  ±{timing.spread:>4.0%}"
        if name == OURS:
            text += f"  {work.flops / timing.median / 1e9:7.1f} GFLOP/s"
            if not work.flops or work.bytes / max(work.flops, 1) >= 1:
                text += f"  {work.bytes / timing.median / 1e9:7.1f} GB/s"
            share = records[0]["roofline_share"] if records else None
            text += "" if share is None else f"  {share:5.0%} of the roofline"
        else:
            text += "".join(f"  {r['ratio']:6.2f}x ours" for r in records if r["peer"] == name)
        lines.append(text)
    return lines + [f"  {name:<34}not timed: {why}" for name, why in race.failures.items()]


def summary_lines(summary: Iterable[Record]) -> list[str]:
    """A line for each family, peer and thread count; a ratio above 1 means that ours is faster."""
    rows = [
        f"{s['family']:<24}{s['peer']:<16}{s['threads']:>7}{s['geomean']:>9.2f}{s['worst']:>8.2f}"
        f"  {s['worst_case']}"
        for s in summary
    ]
    if not rows:
        return []
    head = f"{'family':<24}{'peer':<16}{'threads':>7}{'geomean':>9}{'worst':>8}  worst case"
    return ["", "peer's time / ours (above 1: ours is faster)", head, *rows, *_NOTES]


def limits_lines(limits: Iterable[Limits]) -> list[str]:
    """The limits that shares of the roofline refer to."""
    return [
        f"limits, {entry.threads} thread{'s' * (entry.threads > 1)}: "
        f"{entry.flops / 1e9:.0f} GFLOP/s float32; read "
        + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in entry.bandwidths.items())
        + " GB/s"
        for entry in limits
    ]


def duration(seconds: float) -> str:
    """Seconds with a unit that leaves three figures or more before the point is moved."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3f} {unit}"
    return f"{seconds / 1e-9:.1f} ns"


def plot_summary(summary: Sequence[Record], path: Path) -> None:
    """A bar from the worst ratio to the geometric mean, for each family, peer and thread count.

    Raises OutputError.
    """
    from matplotlib.ticker import LogLocator

    families = list(dict.fromkeys((s["family"], s["threads"]) for s in summary))
    peers = list(dict.fromkeys(s["peer"] for s in summary))
    peers.sort(key=lambda peer: peer == BEST_PEER)
    place, ticks = -1.0, []
    places: dict[tuple[str, int, str], float] = {}
    for family, threads in families:  # the rows of a family, then a gap
        mine = {s["peer"] for s in summary if (s["family"], s["threads"]) == (family, threads)}
        rows = [place + 1 + i for i in range(len(mine))]
        places |= zip(((family, threads, p) for p in peers if p in mine), rows, strict=True)
        ticks.append((rows[0] + rows[-1]) / 2)
        place = rows[-1] + 1
    figure = new_figure(9, 1.2 + 0.16 * (place + 1))
    axes = figure.add_subplot()
    for peer in peers:
        found = [s for s in summary if s["peer"] == peer]
        rows = [places[s["family"], s["threads"], peer] for s in found]
        spans = [s["geomean"] - s["worst"] for s in found]
        bars = axes.barh(rows, spans, 0.9, [s["worst"] for s in found], label=peer)
        shown = axes.plot([s["geomean"] for s in found], rows, "o", markersize=4)[0]
        shown.set_color(bars.patches[0].get_facecolor() if found else "black")
        axes.bar_label(bars, [f"{s['geomean']:.2f}" for s in found], padding=3, fontsize=6)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    ends = [s[end] for s in summary for end in ("worst", "geomean")]
    axes.set_xlim(0.9 * min(ends, default=1), 1.15 * max(ends, default=1))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=20))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    names = [f"{family} {threads}T" for family, threads in families]
    axes.set_yticks(ticks, names, size=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("peer's time / ours: from the worst case to the geometric mean")
    figure.legend(fontsize=7, loc="outside upper center", ncols=5)
    save(figure, path)


def plot_ratios(records: Sequence[Record], path: Path) -> None:
    """Bars of peer's time / ours, a group for each case, with a line at 1. Raises OutputError.

    Nothing is drawn where there are too many cases to tell apart.
    """
    compared = [record for record in records if record["peer"] is not None]
    cases = list(dict.fromkeys(record["case"] for record in compared))
    if len(cases) > _BARS:
        return
    peers = list(dict.fromkeys(record["peer"] for record in compared))
    figure = new_figure(9, 1.2 + 0.5 * len(cases) * max(1, len(peers) / 2))
    axes = figure.add_subplot()
    height = 0.8 / max(len(peers), 1)
    for i, peer in enumerate(peers):
        mine = [record for record in compared if record["peer"] == peer]
        places = [cases.index(record["case"]) + i * height for record in mine]
        bars = axes.barh(places, [record["ratio"] for record in mine], height, label=peer)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], map(_short, cases), size=7)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("peer's time / ours (right of the line: ours is faster)")
    axes.legend(fontsize=7)
    save(figure, path)


def plot_roofline(
    records: Sequence[Record], work: dict[str, Work], limits: Sequence[Limits], path: Path
) -> None:
    """Each case's FLOP/s over its FLOPs per byte, under the measured roofs. Raises OutputError."""
    ours = {record["case"]: record for record in records if work[record["case"]].bytes}
    families = list(dict.fromkeys(record["family"] for record in ours.values()))
    figure = new_figure(4.5 * len(limits), 4.6)
    for number, entry in enumerate(limits, 1):
        axes = figure.add_subplot(1, len(limits), number)
        mine = [r for r in ours.values() if r["threads"] == entry.threads]
        intensities = [work[r["case"]].flops / work[r["case"]].bytes for r in mine]
        span = (min([0.1, *intensities]) / 2, max([100.0, *intensities]) * 2)
        for name, rate in entry.bandwidths.items():
            ridge = entry.flops / rate
            heights = [span[0] * rate / 1e9, entry.flops / 1e9, entry.flops / 1e9]
            axes.plot([span[0], ridge, max(span[1], ridge)], heights, linewidth=1, label=name)
        _points(axes, mine, intensities, families)
        for record, intensity in zip(mine, intensities, strict=True):
            if len(mine) > _NAMES:
                break
            axes.annotate(
                _short(record["case"]),
                (intensity, record["gflops"]),
                (-4, -4),
                textcoords="offset points",
                ha="right",
                fontsize=5,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs per byte moved once")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(f"{entry.threads} thread{'s' * (entry.threads > 1)}", fontsize=9)
    shared_legend(figure, 6, "lines: read bandwidth; points: families of cases")
    save(figure, path)


def _points(
    axes: Any, records: Sequence[Record], intensities: Sequence[float], families: Sequence[str]
) -> None:
    """A point for each case, a colour for each family, the same in all panels."""
    for i, family in enumerate(families):
        mine = [
            (x, r["gflops"])
            for r, x in zip(records, intensities, strict=True)
            if r["family"] == family
        ]
        if mine:
            style = {"marker": "osD^v<>P"[i // 10 % 8], "color": f"C{i % 10}", "label": family}
            axes.plot(*zip(*mine, strict=True), linestyle="", markersize=4, **style)


def _short(case: str) -> str:
    """The case without what is usual."""
    parsed = Case.parse(case)
    words = case.replace(" variant=default", "").replace(" dtype=float32", "").split()
    return " ".join(w for w in words if not w.startswith("threads=")) + f" {parsed.threads}T"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, no higher than a reader would scroll."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, min(height, 40)), layout="constrained")


def shared_legend(figure: Any, columns: int, title: str | None = None) -> None:
    """One legend below all panels, of which not each has every line."""
    drawn = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(drawn.values()), list(drawn), fontsize=6, loc="outside lower center", ncols=columns,
        title=title, title_fontsize=6,
    )  # fmt: skip


def save(figure: Any, path: Path) -> None:
    """Write it as a PNG. Raises OutputError."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_bytes(path, image.getvalue())
