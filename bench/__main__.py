"""`python -m bench SUITE [SUITE...]`: time cases against the peers that are installed."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import report, suites
from bench.case import Case, CaseError
from bench.libraries import OURS
from bench.race import QUICK, Race, Settings, Team
from bench.records import Record, merge, records_of, summarize
from bench.suites import Suite, Work
from kernels._jit import max_threads
from tinynn import roofline
from tinynn.environment import environment, usable_cores
from tinynn.errors import OutputError
from tinynn.roofline import Limits
from tinynn.storage import write_json

_BUSY_LOAD = 0.5
_NOISY_SPREAD = 0.1
_INTERRUPTED = 130  # the exit status: what was timed before is written all the same


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0 if all of our own cases were timed."""
    options = _parser().parse_args(arguments)
    if options.list and not options.suites:
        for name in suites.names():
            print(f"{name:<14}{suites.load(name).SUMMARY}")
        for name, members in suites.GROUPS.items():
            print(f"{name:<14}all of: {', '.join(members)}")
        return 0
    try:
        if options.list:
            print("\n".join(str(case) for _, case in _problems(options)))
            return 0
        problems = [] if options.merge else _problems(options)
    except CaseError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    try:
        return _merge(options) if options.merge else _run(problems, options)
    except CaseError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time cases against the peers that are installed, interleaved, each library in "
        "a process of its own. Figures are medians over rounds; ± is the interquartile range of "
        "the rounds divided by their median.",
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="see --list")
    parser.add_argument(
        "--list", action="store_true", help="list the suites; with SUITE, its cases"
    )
    parser.add_argument(
        "--case", action="append", default=[], help="run this case, as printed by an earlier run"
    )
    parser.add_argument(
        "--match",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="of the suites' cases only those whose string has each of these texts in it",
    )
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="time nothing: make one result of these, which --json wrote; of a case in several "
        "the last counts",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer cases, rounds and peers: a minute a suite, once kernels are compiled",
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, metavar="N", help="thread counts (default: 1 and 2)"
    )
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help="only these peers; none after it: no peer"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds a case (default: 15; 5 with --quick)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write records and summary")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write summary.png, roofline.png, and for a few cases ratios.png",
    )
    parser.add_argument(
        "--remeasure", action="store_true", help="measure the limits of this machine again"
    )
    return parser


def _problems(options: argparse.Namespace) -> list[tuple[Suite, Case]]:
    """All (suite, case) asked for. Raises CaseError."""
    cores = usable_cores()
    threads = options.threads or [n for n in (1, 2) if n <= cores]
    if options.rounds is not None and options.rounds < 1:
        raise CaseError(f"required --rounds >= 1; came {options.rounds}")
    if not options.suites and not options.case:
        raise CaseError("required a SUITE or --case; --list shows the suites")
    problems = []
    asked = (n for name in options.suites for n in suites.GROUPS.get(name, (name,)))
    for name in dict.fromkeys(asked):
        if name not in suites.names():
            raise CaseError(f"no suite {name!r}; there are: {', '.join(suites.names())}")
        suite = suites.load(name)
        chosen = [c for c in suite.cases(options.quick) if all(t in str(c) for t in options.match)]
        problems += [(suite, c.on(n)) for n in threads for c in chosen]
    for text in options.case:
        case = Case.parse(text)
        try:
            problems.append((suites.suite_of(case), case))
        except KeyError:
            raise CaseError(f"case {text!r}: no suite has the family {case.family!r}") from None
    problems = [p for i, p in enumerate(problems) if p not in problems[:i]]
    if not problems:
        raise CaseError(f"no case has all of {', '.join(options.match)} in it")
    for suite, case in problems:
        if case.threads > cores:
            raise CaseError(f"threads={case.threads}: this process may use {cores} cores")
        try:
            suite.work(case)
        except (KeyError, ValueError) as error:
            raise CaseError(f"case {str(case)!r} is incomplete or wrong: {error}") from None
    known = {name for suite, _ in problems for name in suite.LIBRARIES if name != OURS}
    unknown = set(options.peers or ()) - known
    if unknown:
        raise CaseError(f"no peer {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return problems


def _run(problems: list[tuple[Suite, Case]], options: argparse.Namespace) -> int:
    facts = environment()
    load = (facts["load_average"] or [0.0])[0]
    if load > _BUSY_LOAD:
        _warn(f"the load average is {load}: other work may disturb the figures")
    for directory in (options.json and options.json.parent, options.out):
        if directory is not None:  # find out now, not after minutes of measuring
            _check_writable(directory)
    settings = QUICK if options.quick else Settings()
    if options.rounds is not None:
        settings = replace(settings, rounds=options.rounds)
    with Team(settings) as team:
        limits = _limits(problems, options)
        print("\n".join([f"{facts['cpu']['name']}", *report.limits_lines(limits), ""]), flush=True)
        races, records, work = _raced(team, problems, limits, options)
    content = _content(facts, races, limits, records)
    _finish(content, work, [suite for suite, _ in problems[: len(races)]], options)
    noisy = [race for race in races if _spread(race) > _NOISY_SPREAD]
    if noisy:
        _warn(f"{len(noisy)} of {len(races)} cases vary by more than {_NOISY_SPREAD:.0%}")
    if len(races) < len(problems):
        return _INTERRUPTED
    return 0 if all(OURS in race.timings for race in races) else 1


def _limits(problems: list[tuple[Suite, Case]], options: argparse.Namespace) -> list[Limits]:
    """What the machine reaches with each number of threads that is asked for."""
    counts = sorted({case.threads for _, case in problems if case.threads <= max_threads()})
    limits = roofline.limits(counts, remeasure=options.remeasure)
    for entry in limits:
        if not entry.trustworthy():
            _warn(f"limits of {entry.threads} threads vary by {entry.spread:.0%}; not kept")
    return limits


def _raced(
    team: Team,
    problems: list[tuple[Suite, Case]],
    limits: list[Limits],
    options: argparse.Namespace,
) -> tuple[list[Race], list[Record], dict[str, Work]]:
    """Time one case after the other; interrupted after some, give these."""
    races: list[Race] = []
    records: list[Record] = []
    work: dict[str, Work] = {}
    roof = {entry.threads: entry for entry in limits}
    try:
        for suite, case in problems:
            race = team.race(suite, case, _chosen(suite, case, options))
            work[str(case)] = suite.work(case)
            found = records_of(race, work[str(case)], roof.get(case.threads))
            print("\n".join(report.case_lines(race, work[str(case)], found)), flush=True)
            races.append(race)
            records += found
    except KeyboardInterrupt:
        _warn(f"interrupted after {len(races)} of {len(problems)} cases")
        if not races:
            raise
    return races, records, work


def _merge(options: argparse.Namespace) -> int:
    """Show and write what several runs gave. Raises CaseError, OutputError."""
    content = merge([_read(file) for file in options.merge])
    cases = {record["case"]: Case.parse(record["case"]) for record in content["records"]}
    involved = {text: suites.suite_of(case) for text, case in cases.items()}
    work = {text: suite.work(cases[text]) for text, suite in involved.items()}
    _finish(content, work, list(involved.values()), options)
    return 0


def _read(file: Path) -> dict[str, Any]:
    """What --json wrote. Raises CaseError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("environment", "records")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CaseError(f"merge: {file} is no result of a run: {error!r}") from None


def _finish(
    content: dict[str, Any],
    work: dict[str, Work],
    involved: Sequence[Suite],
    options: argparse.Namespace,
) -> None:
    """Print the summary and what suites conclude, and write the files that are asked for."""
    records, summary = content["records"], content["summary"]
    limits = [Limits(**entry) for entry in content["environment"]["limits"]]
    print("\n".join(report.summary_lines(summary)))
    lines, entries = suites.conclude(involved, records, options.out)
    if lines:
        print("\n".join(lines))
    if options.json is not None:
        write_json(options.json, {**content, **entries})
    if options.out is not None:
        if summary:
            report.plot_summary(summary, options.out / "summary.png")
            report.plot_ratios(records, options.out / "ratios.png")
        if limits:
            report.plot_roofline(records, work, limits, options.out / "roofline.png")


def _chosen(suite: Suite, case: Case, options: argparse.Namespace) -> list[str]:
    """Ours, and the peers that were named; else all, in a quick run those that build at once."""
    able = suites.contestants(suite, case)
    if options.peers is not None:
        return [name for name in able if name == OURS or name in options.peers]
    left_out = suites.slow_to_build(suite) if options.quick else ()
    return [name for name in able if name not in left_out]


def _content(
    facts: dict[str, Any],
    races: list[Race],
    limits: list[Limits],
    records: list[Record],
) -> dict[str, Any]:
    """The JSON file. What is not a figure of a case stands in `environment`."""
    layers = sorted({race.layer for race in races if race.layer})
    about_run = {
        "threads": {**facts["threads"], "layer": ", ".join(layers) or None},
        "limits": [asdict(entry) for entry in limits],
        "choices": [
            {"case": str(race.case), "library": name, "choice": choice}
            for race in races
            for name, choice in race.choices.items()
        ],
        "failures": [
            {"case": str(race.case), "library": name, "reason": reason}
            for race in races
            for name, reason in race.failures.items()
        ],
    }
    return {
        "environment": {**facts, **about_run},
        "records": records,
        "summary": summarize(records),
    }


def _spread(race: Race) -> float:
    return max((timing.spread for timing in race.timings.values()), default=0.0)


def _check_writable(directory: Path) -> None:
    """Raise OutputError now if a file cannot be written there later."""
    probe = directory / ".bench-probe"
    write_json(probe, None)
    probe.unlink()


def _warn(text: str) -> None:
    print(f"bench: warning: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the workers then, too
    sys.exit(main())
