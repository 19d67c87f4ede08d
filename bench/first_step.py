"""`python -m bench.first_step`: from the start of a process to its first finished training step.

Three ways: *cold*, where no kernel is compiled and each compiles when it is called; *prepared*, the
same after `python -m tinynn warmup MODEL`, whose own time counts; and *warm*, with the cache of an
earlier run. Every process is new; warm times are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.libraries import thread_environment

_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    from tinynn.environment import environment, usable_cores
    from tinynn.errors import OutputError
    from tinynn.models import PUBLISHED
    from tinynn.storage import write_json

    parser = argparse.ArgumentParser(prog="python -m bench.first_step", description=__doc__)
    parser.add_argument("--model", default="small_cifar", choices=list(PUBLISHED))
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=5, help="warm processes (default: 5)")
    parser.add_argument("--warm", action="store_true", help="leave out what has to compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds: required 1 or more")
    threads = options.threads or [n for n in (1, 2) if n <= usable_cores()]
    facts = environment()
    records = []
    for count in threads:
        record = measure(options.model, count, rounds=options.rounds, warm_only=options.warm)
        records.append(record)
        print(line(record), flush=True)
    if options.json is not None:
        try:
            write_json(options.json, {"environment": facts, "records": records})
        except OutputError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    return 0


def measure(model: str, threads: int, *, rounds: int, warm_only: bool = False) -> dict[str, Any]:
    """Seconds `cold`, `prepared` (with the `warmup` in it) and `warm`, and `rounds` of the last.

    `cold`, `warmup` and `prepared` are None if `warm_only`; then kernels come from the usual cache.
    """
    record: dict[str, Any] = dict.fromkeys(("cold", "warmup", "prepared"))
    variables = thread_environment(threads)
    step = ["-c", f"from bench.first_step import step; step({model!r}, {threads})"]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        if not warm_only:
            variables["TINYNN_CACHE"] = one
            record["cold"] = _seconds(step, variables)
            # the processes that compile are as many as there are threads
            command = ["-m", "tinynn", "warmup", model, "--jobs", str(threads)]
            record["warmup"] = _seconds(command, {**variables, "TINYNN_CACHE": other})
            first = _seconds(step, {**variables, "TINYNN_CACHE": other})
            record["prepared"] = record["warmup"] + first
        _seconds(step, variables)  # fills the cache, and the file system's
        seconds = [_seconds(step, variables) for _ in range(rounds)]
    warm = {"warm": statistics.median(seconds), "rounds": seconds}
    return {"model": model, "threads": threads, **record, **warm}


def step(model: str, threads: int) -> None:
    """What the measured process does: the model, its data, one training step."""
    import numpy as np

    from kernels._jit import set_threads
    from tinynn.models import PUBLISHED
    from tinynn.warmup import train

    set_threads(threads)
    rng = np.random.default_rng(0)
    print(train(PUBLISHED[model].build(rng), PUBLISHED[model], rng), flush=True)


def line(record: dict[str, Any]) -> str:
    """The record in one line."""
    found = [
        f"{name} {record[name]:6.2f} s"
        for name in ("cold", "warmup", "prepared", "warm")
        if record[name] is not None
    ]
    return f"{record['model']} {record['threads']}T: " + ", ".join(found)


def _seconds(arguments: Sequence[str], variables: dict[str, str]) -> float:
    """From the start of a Python process to the last line that it prints.

    Raises CalledProcessError if it fails.
    """
    paths = [str(_ROOT), variables.get("PYTHONPATH", "")]
    variables = {**variables, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    command = [sys.executable, *arguments]
    start = end = time.perf_counter()
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in process.stdout:
            end = time.perf_counter()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return end - start


if __name__ == "__main__":
    sys.exit(main())
