"""What every experiment shares: its command line, its runs over seeds and processes, its files.

An experiment is a script that describes itself as an `Experiment` and calls `main`. Its `run` takes
one configuration and one seed and returns a record of numbers and text; everything else (seeds,
processes or a Dask cluster, resuming, result.json, log.jsonl, the table at the end) is here. Its
settings are `Option`s: `add_options` makes flags of them, `written` reads and checks the flags.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import tinynn as tn
from tinynn.environment import environment, usable_cores
from tinynn.errors import ConfigError, OutputError, TinynnError
from tinynn.storage import plain, write_bytes, write_json

Record = dict[str, Any]

#: optimisers by name, each made from (parameters, rate, momentum=, l1= or l2=)
OPTIMIZERS: dict[str, Callable[..., tn.Optimizer]] = {
    "sgd": tn.SGD,
    "nesterov": lambda p, lr, momentum, **k: tn.SGD(p, lr, momentum=momentum, nesterov=True, **k),
    "adam": lambda p, lr, momentum, **k: tn.Adam(p, lr, beta1=momentum, **k),
    "nadam": lambda p, lr, momentum, **k: tn.Nadam(p, lr, beta1=momentum, **k),
    "adadelta": lambda p, lr, momentum, **k: tn.Adadelta(p, lr, rho=momentum, **k),
    "rmsprop": lambda p, lr, momentum, **k: tn.RMSProp(p, lr, momentum=momentum, **k),
}


@dataclass(frozen=True)
class Option:
    """A setting: its default, its value in the literal recipe, what --help says, what is allowed.

    A number is finite, at least `least`, above `above` and below `below`, where these are given.
    `told` is what --help says of default and literal value where those are not one value each.
    """

    default: Any
    literal: Any
    help: str
    choices: tuple[str, ...] | None = None
    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    told: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError, naming the flag, what it requires and what came."""
        if isinstance(value, str | bool):
            return
        good = math.isfinite(value) and self.least <= value and self.above < value < self.below
        if not good:
            limits = (">=", self.least), (">", self.above), ("<", self.below)
            wanted = [f"{sign} {limit:g}" for sign, limit in limits if math.isfinite(limit)]
            required = " and ".join(wanted) or "a finite number"
            raise ConfigError(f"required {flag(name)} {required}; came {value}")


@dataclass(frozen=True)
class Task:
    """One run: a cell (a named configuration) and a seed."""

    cell: str
    config: Record
    seed: int

    @property
    def key(self) -> str:
        """What identifies the run when results are taken up again."""
        text = json.dumps([self.cell, self.config, self.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Context:
    """What a run gets from its surroundings; calling it with a line shows that as progress."""

    files: Path  #: a directory for files of this run alone; it may not exist yet
    data_dir: Path | None = None  #: where data sets lie, if --data-dir says so
    resume: bool = False  #: whether a checkpoint that stands in `files` is to be taken up
    say: Callable[[str], None] = _silent

    def __call__(self, text: str) -> None:
        self.say(text)


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    what: str
    published: str
    measured: str
    spread: str


@dataclass(frozen=True)
class Experiment:
    """An experiment's own part; see the module's docstring for what the runner adds.

    `run` must be a function at module level, since processes receive it by name. It is called with
    (config, seed, context).
    """

    name: str
    source: str  #: what it reproduces: document and section
    description: str
    published: Record
    arguments: Callable[[argparse.ArgumentParser], None]
    cells: Callable[[argparse.Namespace], dict[str, Record]]
    run: Callable[[Record, int, Context], Record]
    line: Callable[[Record], str]  #: a finished run in one line
    summary: Callable[[list[Record]], Record]
    table: Callable[[list[Record], Record], list[Row]]
    #: draws into a directory, removes what it drew there of other runs, returns what stands there
    figures: Callable[[Path, list[Record]], list[Path]]
    transient: tuple[str, ...] = ()  #: entries of a record that only figures need
    #: what is to be said after the table, in lines
    remarks: Callable[[Record], list[str]] = lambda summary: []


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run an experiment from the command line; returns the exit code."""
    args = _parser(experiment).parse_args(argv)
    try:
        _check(args)
        return _execute(experiment, args, sys.argv if argv is None else [experiment.name, *argv])
    except KeyboardInterrupt:
        print("\nstopped; --resume takes up the finished runs", file=sys.stderr)
        return 130
    except (TinynnError, OSError, MemoryError) as error:
        print(f"{experiment.name}: {error}", file=sys.stderr)
        return 1


def flag(name: str) -> str:
    """How a setting is written on the command line."""
    return "--" + name.replace("_", "-")


def add_options(group: argparse._ArgumentGroup, options: Mapping[str, Option]) -> None:
    """Add a flag for every option. Only flags that were written become attributes."""
    for name, option in options.items():
        literal = "" if option.default == option.literal else f"; literal {option.literal}"
        told = f"{option.help} [{option.told or f'{option.default}{literal}'}]"
        common: Record = {"default": argparse.SUPPRESS, "help": told}
        if isinstance(option.default, bool):
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, **common)
        else:
            kind = type(option.default)
            group.add_argument(flag(name), type=kind, choices=option.choices, **common)


def written(args: argparse.Namespace, options: Mapping[str, Option]) -> Record:
    """The settings that the command line names. Raises ConfigError if one is out of its range."""
    found = {name: value for name, value in vars(args).items() if name in options}
    for name, value in found.items():
        options[name].check(name, value)
    return found


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Smallest to largest value, or a dash for a single one."""
    if len(values) < 2:
        return "-"
    return f"{min(values):.{digits}g} to {max(values):.{digits}g}"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults, but for those that a text says itself or that are no value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"experiments/{experiment.name}.py",
        description=f"{experiment.description} Source: {experiment.source}.",
        formatter_class=_Help,
    )
    shared = parser.add_argument_group("all experiments")
    shared.add_argument(
        "--seed", type=int, default=0, help="seed of the first run; the next has the next"
    )
    shared.add_argument("--runs", type=int, default=None, help="runs a configuration (default: 1)")
    shared.add_argument("--jobs", type=int, default=1, help="runs at the same time, in processes")
    shared.add_argument(
        "--threads", type=int, default=None, help="threads a run (default: cores / jobs)"
    )
    size = shared.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a small version: a minute, once kernels are compiled"
    )
    size.add_argument("--full", action="store_true", help="the published size and schedule")
    shared.add_argument(
        "--data-dir", type=Path, default=None, help="where data sets lie, if any are read"
    )
    shared.add_argument(
        "--out", type=Path, default=None, help="where results go (default: out/NAME)"
    )
    shared.add_argument("--resume", action="store_true", help="take up finished runs from --out")
    shared.add_argument("--scheduler", default=None, help="address of a Dask scheduler to run on")
    experiment.arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    args.runs = 1 if args.runs is None else args.runs
    if args.runs < 1 or args.jobs < 1 or args.seed < 0:
        raise ConfigError(
            f"required --runs >= 1, --jobs >= 1 and --seed >= 0; came {args.runs}, {args.jobs} "
            f"and {args.seed}"
        )
    if args.threads is None:
        args.threads = max(1, min(usable_cores(), tn.max_threads()) // args.jobs)
    if not 1 <= args.threads <= tn.max_threads():
        raise ConfigError(f"required --threads from 1 to {tn.max_threads()}; came {args.threads}")
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise ConfigError(f"required --data-dir: an existing directory; came {args.data_dir}")


def _execute(experiment: Experiment, args: argparse.Namespace, command: Sequence[str]) -> int:
    """Run everything and write it down; returns the exit code."""
    began = time.perf_counter()
    out = args.out or Path("out") / experiment.name
    cells = experiment.cells(args)
    tasks = [
        Task(cell, config, args.seed + i)
        for cell, config in cells.items()
        for i in range(args.runs)
    ]
    print(f"{experiment.name}: {experiment.source}", flush=True)
    print(f"{len(tasks)} runs, {args.threads} threads each, results in {out}", flush=True)
    log = out / "log.jsonl"
    done = _finished(log) if args.resume else {}
    records = [done[t.key] for t in tasks if t.key in done]
    # runs of other configurations stay in the log: a later --resume may ask for them
    write_bytes(log, "".join(_line(r) for r in done.values()).encode())
    if records:
        print(f"{len(records)} finished runs taken up from {log}", flush=True)
    left = [t for t in tasks if t.key not in done]
    for record in _records(experiment, left, args, out):
        records.append(record)
        _append(log, {k: v for k, v in record.items() if k not in experiment.transient})
    order = {t.key: i for i, t in enumerate(tasks)}
    records.sort(key=lambda r: order[r["key"]])

    summary = experiment.summary(records)
    write_json(
        out / "result.json",
        {
            "experiment": experiment.name,
            "source": experiment.source,
            "command": " ".join(command),
            "config": cells,
            "environment": {**environment(), "threads_used": args.threads, "jobs": args.jobs},
            "seconds": round(time.perf_counter() - began, 3),
            "runs": [
                {k: v for k, v in r.items() if k not in experiment.transient} for r in records
            ],
            "summary": summary,
            "published": experiment.published,
        },
    )
    rows = [[r.what, r.published, r.measured, r.spread] for r in experiment.table(records, summary)]
    print_table(experiment.name, ["", "published", "measured", "spread over runs"], rows)
    for remark in experiment.remarks(summary):
        print(f"\n{remark}")
    code, pictures = 0, []
    try:  # last: nothing that is measured may be lost for a picture
        pictures = experiment.figures(out, records)
    except OutputError as error:
        print(f"{experiment.name}: {error}", file=sys.stderr)
        code = 1
    seconds = time.perf_counter() - began
    names = ", ".join(["result.json", "log.jsonl", *(p.name for p in pictures)])
    print(f"\n{seconds:.1f} s; in {out}: {names}")
    return code


def _records(
    experiment: Experiment, tasks: list[Task], args: argparse.Namespace, out: Path
) -> Iterator[Record]:
    """The finished runs, in whatever order they finish, with progress for a person to see."""

    def context(task: Task, say: Callable[[str], None] = _silent) -> Context:
        name = re.sub(r"\W+", "-", f"{task.cell} seed {task.seed} {task.key}")
        files = (out / "runs" / name).absolute()
        return Context(files, args.data_dir and args.data_dir.absolute(), args.resume, say)

    total = len(tasks)
    with tqdm(total=total, disable=None if total > 1 else True, unit="run") as bar:

        def say(text: str) -> None:
            if bar.disable:
                print(text, flush=True)
            else:
                bar.write(text)

        with _executor(args) as pool:
            if pool is None:
                results = (_timed(experiment.run, t, args.threads, context(t, say)) for t in tasks)
            else:
                futures = [
                    pool.submit(_timed, experiment.run, t, args.threads, context(t)) for t in tasks
                ]
                results = (f.result() for f in concurrent.futures.as_completed(futures))
            for i, record in enumerate(results, 1):
                yield record
                bar.update()
                where = f"[{i}/{total}] {record['cell']} seed {record['seed']}"
                say(f"{where}: {experiment.line(record)}")


def _timed(
    run: Callable[[Record, int, Context], Record], task: Task, threads: int, context: Context
) -> Record:
    tn.set_threads(threads)
    began = time.perf_counter()
    record = run(task.config, task.seed, context)
    seconds = round(time.perf_counter() - began, 3)
    return {"cell": task.cell, "seed": task.seed, "key": task.key, "seconds": seconds, **record}


@contextmanager
def _executor(args: argparse.Namespace) -> Iterator[Any]:
    """Where runs are computed: None for this process, else a concurrent.futures.Executor."""
    if args.scheduler:
        try:
            from distributed import Client
        except ImportError:
            raise ConfigError("--scheduler needs dask: pip install tinynn[cluster]") from None
        with Client(args.scheduler) as client, client.get_executor() as pool:
            yield pool
    elif args.jobs > 1:
        # spawn: OpenMP's threads do not survive a fork
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context)
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    else:
        yield None


def _finished(log: Path) -> dict[str, Record]:
    """Finished runs by key; a last line that was cut off is left out."""
    found: dict[str, Record] = {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        record = _record(line)
        if record is None:
            print(f"{log}: a line that is no finished run is left out", file=sys.stderr)
        else:
            found[record["key"]] = record
    return found


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("key"), str) else None


def _append(log: Path, record: Record) -> None:
    try:
        with log.open("a") as file:
            file.write(_line(record))
    except OSError as error:
        raise OutputError(error.errno, f"cannot append to {log} ({error.strerror})") from error


def _line(record: Record) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"


def median(records: list[Record], key: str) -> float:
    """The median of an entry over runs, leaving out those without it."""
    values = [r[key] for r in records if r.get(key) is not None]
    return float(np.median(values)) if values else float("nan")
