"""Compiling ahead of use: what is planned is what is called, and the cache has it afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinynn as tn
from bench import first_step
from kernels import _jit
from kernels._jit import jit, planning
from tinynn import __main__ as command
from tinynn import warmup
from tinynn.errors import ConfigError, OutputError
from tinynn.models import PUBLISHED

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
