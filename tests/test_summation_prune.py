"""The summation experiment at toy size: its files, its configurations, its controls."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from experiments.runner import main
from experiments.summation_prune import EXPERIMENT, OPTIONS, run

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--nodes", "20", "--samples", "2000", "--batch", "100", "--steps", "60"]


def execute(out: Path, *flags: str) -> dict[str, Any]:
    assert main(EXPERIMENT, [*TINY, "--out", str(out), *flags]) == 0
    return json.loads((out / "result.json").read_text())


def config(**changes: Any) -> dict[str, Any]:
    base = {k: o.default for k, o in OPTIONS.items()}
    return base | {"nodes": 20, "samples": 2000, "batch": 100, "steps": 60} | changes


def say_nothing(text: str) -> None: ...


def test_the_default_reaches_the_optimum_at_toy_size(tmp_path: Path) -> None:
    result = execute(tmp_path, "--seed", "1")
    summary, (record,) = result["summary"], result["runs"]
    assert summary["hidden_nodes"] == 1 and summary["test_rmse"] < 1e-3
    assert record["nodes_with_kink_in_data"] == 0 and record["kink_at_sum"] < 0
    assert record["cycles"][0]["before"] == 20 and record["cycles"][-1]["after"] == 1
    assert result["experiment"] == "summation_prune" and "Çallı" in result["source"]
    assert set(result) >= {"config", "environment", "runs", "summary", "published", "command"}
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 1
    assert list(tmp_path.glob("*.png"))


def test_the_saved_model_computes_what_was_reported(tmp_path: Path) -> None:
    record = execute(tmp_path, "--seed", "1")["runs"][0]
    net = tn.load(tmp_path / "model.safetensors")
    x = np.random.default_rng(0).random((500, 2), dtype=np.float32)
    error = net(tn.Tensor(x)).data - x.sum(1, keepdims=True)
    assert float(np.sqrt((error**2).mean())) < 3 * record["test_rmse"] + 1e-6
    assert net.parameters()[1].size == record["hidden_nodes"]


def test_same_seed_same_result_for_any_thread_count(tmp_path: Path) -> None:
    if tn.max_threads() < 2:
        pytest.skip("one core")
    flags = ["--nodes", "600", "--batch", "1000", "--steps", "20"]  # large enough for two threads
    one = execute(tmp_path / "1", *flags, "--threads", "1")["runs"][0]
    two = execute(tmp_path / "2", *flags, "--threads", "2")["runs"][0]
    for key in one.keys() - {"seconds"}:
        assert one[key] == two[key], key


def test_processes_give_the_results_of_one_process(tmp_path: Path) -> None:
    alone = execute(tmp_path / "1", "--runs", "3")
    many = execute(tmp_path / "2", "--runs", "3", "--jobs", "2", "--threads", "1")
    assert [r["seed"] for r in many["runs"]] == [0, 1, 2]
    for a, b in zip(alone["runs"], many["runs"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }


def test_resume_takes_up_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = execute(tmp_path, "--runs", "2")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"cut off')
    again = execute(tmp_path, "--runs", "3", "--resume")
    assert "2 finished runs taken up" in capsys.readouterr().out
    assert again["runs"][:2] == first["runs"] and len(again["runs"]) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": "count", "threshold": 0.0},
        {"criterion": "variance", "threshold": 0.0},
        {"criterion": "l2", "threshold": 0.5},
        {"criterion": "random"},
        {"criterion": "count", "bounds": 1.0, "bounds_unit": "std", "bounds_remove": "outside"},
        {"criterion": "rate", "bounds": 0.1, "bounds_unit": "variance", "bounds_remove": "inside"},
        {"loss": "mse", "lr": 0.01},
        {"inputs": "normal"},
        {"regulariser": "l1", "penalty": 1e-3},
        {"regulariser": "l2", "penalty": 1e-3},
        {"distortion": "published", "distortion_scale": 0.5},
        {"distortion": "none", "lift": False, "patience": 1},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "nadam", "lr": 0.01},
        {"optimizer": "adadelta", "lr": 1.0},
        {"optimizer": "rmsprop", "lr": 0.01, "momentum": 0.0},
        {"optimizer": "nesterov"},
        {"init": "he_normal"},
        {"steps": 0, "epochs": 2},
        {"steps": 0, "epochs": 0},
        {"roll_back": False, "merge": False, "fine_tune": 0},
    ],
)
def test_every_configuration_runs(changes: dict[str, Any]) -> None:
    record = run(config(cycles=4, fine_tune=20) | changes, 0, say_nothing)
    assert 0 <= record["hidden_nodes"] <= 20
    assert record["collapsed"] == (record["hidden_nodes"] == 0)
    sizes = [c["before"] for c in record["cycles"]]
    assert all(a >= b for a, b in pairwise(sizes)) or record["roll_backs"]


def test_random_pruning_follows_the_schedule_of_the_criterion() -> None:
    judged = run(config(cycles=3, lift=False), 2, say_nothing)
    random = run(config(cycles=3, lift=False, criterion="random"), 2, say_nothing)
    wanted = [c["removed"] for c in judged["cycles"]]
    got = [c["removed"] for c in random["cycles"]]
    assert got[0] == wanted[0] > 0


def test_a_collapse_is_counted_apart() -> None:
    # a learning rate that kills everything at once, and no roll-back
    record = run(config(lr=1e4, roll_back=False), 0, say_nothing)
    assert record["collapsed"] and record["hidden_nodes"] == 0
    assert record["cycles"][-1]["collapse"]


def test_the_control_from_scratch_has_one_node() -> None:
    record = run(config(control="scratch", scratch_cycles=2), 0, say_nothing)
    assert record["hidden_nodes"] == 1 and record["ended"].startswith("trained from scratch")


def test_the_table_has_all_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = execute(
        tmp_path,
        "--table",
        "--cycles",
        "2",
        "--epochs",
        "1",
        "--fine-tune",
        "10",
        "--patience",
        "1",
    )
    cells = result["summary"]["cells"]
    assert len(cells) == 2 * (2 * 2 * 3 + 1) + 6
    assert {"default", "2-1-1 net from scratch", "literal, random pruning"} <= cells.keys()
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in cells)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runs", "0"], "--runs >= 1"),
        (["--threads", "999"], "--threads from 1 to"),
        (["--nodes", "0"], "required sizes >= 1"),
        (["--samples", "0"], "at least one row"),
        (["--out", "/proc/nothing"], "cannot write"),
    ],
)
def test_wrong_input_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(EXPERIMENT, [*TINY, "--out", str(tmp_path), *flags]) == 1
    errors = capsys.readouterr().err
    assert words in errors and "Traceback" not in errors


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    script = ROOT / "experiments" / "summation_prune.py"
    done = subprocess.run(
        [sys.executable, str(script), *TINY, "--cycles", "1", "--out", "here"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "published" in done.stdout and (tmp_path / "here" / "result.json").exists()


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(EXPERIMENT, ["--help"])
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in OPTIONS)
    assert "[0.1; literal 0.01]" in text
