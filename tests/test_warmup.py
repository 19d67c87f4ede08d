"""Compiling ahead of use: what is planned is what is called, and the cache has it afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from bench import first_step
from kernels import _jit
from kernels._jit import jit, planning
from tinynn import __main__ as command
from tinynn import deploy, nn, warmup
from tinynn.errors import ConfigError, OutputError
from tinynn.models import PUBLISHED, Published

ROOT = Path(__file__).resolve().parents[1]


def _double(x, out):
    for i in range(x.size):
        out[i] = 2 * x[i]
    return x.size


def test_planning_notes_calls_and_runs_nothing() -> None:
    kernel = jit(_double)
    x, out = np.ones(3), np.zeros(3)
    with planning() as requests:
        assert kernel(x, out) == 1
        kernel(x, out)
        kernel(x.astype(np.float32), out)
    assert not out.any()
    assert [r.kernel for r in requests] == [kernel, kernel]
    assert len({r.name for r in requests}) == 2 and not any(r.parallel for r in requests)
    requests[0].compile()
    assert len(kernel.signatures) == 1
    assert kernel(x, out) == 3 and out.tolist() == [2, 2, 2]
    with planning() as again:
        assert kernel(x, out) == 3
    assert again == []


def test_planning_ends_where_an_error_leaves_it() -> None:
    kernel = jit(_double)
    with pytest.raises(KeyError), planning():
        raise KeyError
    assert kernel(np.ones(2), np.zeros(2)) == 2


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_take_their_batch(name: str) -> None:
    published = PUBLISHED[name]
    model = published.build(np.random.default_rng(0))
    with planning(), np.errstate(all="ignore"):  # shapes only
        y = model(tn.Tensor(np.zeros(published.batch, np.float32)))
    assert len(y.data) == published.batch[0]


PROGRAM = """
import json, sys
import numpy as np
from numba.core import event
from tinynn import warmup
from tinynn.models import PUBLISHED

compiled = []
class Listener(event.Listener):
    def on_start(self, happening):
        compiled.append(happening.data["dispatcher"].py_func.__name__)
    def on_end(self, happening):
        pass
event.register("numba:compile", Listener())
warmup._train_and_use(PUBLISHED["summation"])
print(compiled)
"""


def test_after_a_warm_up_nothing_is_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "TINYNN_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        return done.stdout

    lines = run("-m", "tinynn", "warmup", "summation", "--jobs", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["summation", "all"]
    assert int(lines[0].split()[1]) >= 5
    assert run("-c", PROGRAM) == "[]\n"


class _Here:
    """Makes the calls that other processes would."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*arguments))
        return done

    def shutdown(self, **_: object) -> None:
        pass


def test_plans_are_warmed_up_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(rng: np.random.Generator) -> tn.Module:
        return nn.Sequential(nn.Linear(2, 8, rng=rng), nn.ReLU(), nn.Linear(8, 1, rng=rng))

    monkeypatch.setitem(PUBLISHED, "tiny", Published(build, (6, 2), "rmse"))
    monkeypatch.setattr(warmup, "ProcessPoolExecutor", _Here)
    made: list[str] = []
    compiled = deploy.compile

    def compile_(model: tn.Module, example: Any) -> tn.Plan:
        plan = compiled(model, example)
        made.extend(layer.step.kind for layer in plan.network.layers)
        return plan

    monkeypatch.setattr(deploy, "compile", compile_)
    lines: list[str] = []
    warmup.warm_up(["tiny"], jobs=1, report=lines.append)
    assert made == [] and len(lines) == 2
    warmup.warm_up(["tiny"], jobs=1, plans=True, report=lines.append)
    assert made == ["linear", "linear", "quantize", "intlinear", "intlinear"]
    assert [line[:20].rstrip() for line in lines[3:]] == [
        "plans in float32",
        "plans in int8",
        "all",
    ]
    assert [warmup._plan_and_use(["tiny"], integers) for integers in (False, True)] == [0, 0]


def test_what_cannot_be_warmed_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no model no_such"):
        warmup.warm_up(["summation", "no_such"])
    with pytest.raises(ConfigError, match="jobs >= 1"):
        warmup.warm_up(["summation"], jobs=0)
    monkeypatch.setattr(_jit, "_directory", None)
    with pytest.raises(OutputError, match="TINYNN_CACHE"):
        warmup.warm_up(["summation"])


def test_the_command_line_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, module in command.COMMANDS.items():
        assert name in printed and module.SUMMARY in printed
    assert command.main(["warmup", "no_such"]) == 1
    assert "no_such" in capsys.readouterr().err


def test_first_steps_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "first.json"
    arguments = ["--model", "summation", "--threads", "1", "--rounds", "2", "--warm"]
    assert first_step.main([*arguments, "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())["records"]
    assert record["cold"] is record["warmup"] is record["prepared"] is None
    assert len(record["rounds"]) == 2 and record["warm"] > 0
    assert first_step.line(record).startswith("summation 1T: warm")
