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
from experiments import runner
from experiments.runner import Record, main
from experiments.summation_prune import EXPERIMENT, run
from experiments.summation_recipes import OPTIONS, random_control
from tinynn.errors import ConfigError

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
        random_control(config()),
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


@pytest.mark.parametrize(
    "recipe",
    [
        {"criterion": "rate", "threshold": 1e-5},
        {"criterion": "rate", "threshold": 0.2},
        {"criterion": "l2", "threshold": 0.5},
    ],
)
def test_random_pruning_follows_the_schedule_of_the_recipes_criterion(recipe: Record) -> None:
    own = config(cycles=3, distortion="none", roll_back=False, merge=False, **recipe)
    judged, random = run(own, 2, say_nothing), run(random_control(own), 2, say_nothing)
    wanted = [c["removed"] for c in judged["cycles"]]
    assert [c["removed"] for c in random["cycles"]] == wanted and wanted[0] > 0


def recipe_of(*flags: str) -> Record:
    args = runner._parser(EXPERIMENT).parse_args(list(flags))
    (cell,) = EXPERIMENT.cells(args).values()
    return cell


def test_the_command_lines_random_pruning_follows_its_recipe() -> None:
    for flags, own in (
        (["--criterion", "random"], ("rate", 1e-5)),
        (["--criterion", "random", "--threshold", "0.25"], ("rate", 0.25)),
        (["--criterion", "random", "--literal"], ("count", 0.0)),
    ):
        cell = recipe_of(*flags)
        assert (cell["twin_criterion"], cell["twin_threshold"]) == own
    assert recipe_of("--criterion", "variance")["threshold"] == 0.0
    assert recipe_of("--criterion", "rate")["threshold"] == 1e-5


def test_epochs_on_the_command_line_are_not_ignored() -> None:
    assert recipe_of("--epochs", "4")["steps"] == 0
    assert recipe_of("--epochs", "4", "--steps", "9")["steps"] == 9
    assert recipe_of()["steps"] == 300


@pytest.mark.parametrize("cycles", [1, 3])
def test_the_net_that_is_measured_is_the_last_trained(cycles: int) -> None:
    short = config(nodes=50, steps=30, cycles=cycles, fine_tune=0)
    record = run(short, 0, say_nothing)
    assert record["hidden_nodes"] > 1
    trained = record["cycles"][-1]["train_rmse"]
    assert record["train_rmse"] == pytest.approx(trained, rel=0.01)


def test_after_a_roll_back_the_last_good_net_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def deadly(net: tn.Module, *rest: Any, **options: Any) -> tn.Module:
        out = net.copy()
        out.parameters()[1].mutate()[...] = -1e3
        return out

    monkeypatch.setattr(tn, "distort", deadly)
    record = run(config(nodes=50, steps=30, cycles=9, patience=2, fine_tune=0), 0, say_nothing)
    good, *bad = record["cycles"]
    assert not good["collapse"] and record["roll_backs"] == len(bad) == 3
    assert not record["collapsed"] and record["hidden_nodes"] == good["after"]
    assert record["train_rmse"] == pytest.approx(good["train_rmse"], rel=0.01)


def test_a_net_that_never_trained_is_a_collapse() -> None:
    record = run(config(lr=1e4, patience=1), 0, say_nothing)
    assert record["roll_backs"] == 2 and record["collapsed"] and record["hidden_nodes"] == 0


def test_no_distortion_means_none_in_the_lift_either(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Record] = []

    def noted(net: tn.Module, rng: np.random.Generator, **options: Any) -> tn.Module:
        calls.append(options)
        return net.copy()

    monkeypatch.setattr(tn, "distort", noted)
    record = run(config(distortion="none", patience=3, merge=False), 0, say_nothing)
    assert not calls and {c["phase"] for c in record["cycles"]} == {"prune"}
    run(config(distortion_scale=0.25, patience=3, merge=False), 0, say_nothing)
    lifts = [c for c in calls if c["formula"] == "constant"]
    assert lifts and all(c["scale"] == 0.25 for c in calls)


def test_removed_nodes_are_counted_by_what_removed_them() -> None:
    record = run(config(nodes=50, steps=30, cycles=3), 0, say_nothing)
    criterion, merge = record["removed_by_criterion"], record["removed_by_merge"]
    assert criterion > 0 and merge > 0
    assert 50 - criterion - merge == record["hidden_nodes"]


def test_a_collapse_is_counted_apart() -> None:
    # a learning rate that kills everything at once, and no roll-back
    record = run(config(lr=1e4, roll_back=False), 0, say_nothing)
    assert record["collapsed"] and record["hidden_nodes"] == 0
    assert record["cycles"][-1]["collapse"]


def test_the_control_from_scratch_has_one_node() -> None:
    record = run(config(control="scratch", scratch_cycles=2), 0, say_nothing)
    assert record["hidden_nodes"] == 1 and record["ended"].startswith("trained from scratch")


def test_a_control_from_scratch_that_diverges_is_a_collapse() -> None:
    control = config(control="scratch", scratch_cycles=2, loss="mse", lr=1e30)
    record = run(control, 0, say_nothing)
    assert record["collapsed"] and record["hidden_nodes"] == 0


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
    assert len(cells) == 2 * (2 * 2 * 3 + 1) + 1 + 3 + 7 + 1
    assert {"default", "2-1-1 net from scratch", "literal, random pruning"} <= cells.keys()
    own = {
        name: (result["config"][name]["twin_criterion"], result["config"][name]["twin_threshold"])
        for name in ("literal, random pruning", "default, random pruning")
    }
    assert set(own.values()) == {("count", 0.0), ("rate", 1e-5)}
    configs = [json.dumps(c, sort_keys=True) for c in result["config"].values()]
    assert len(set(configs)) == len(configs)
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in cells)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runs", "0"], "--runs >= 1"),
        (["--threads", "999"], "--threads from 1 to"),
        (["--nodes", "0"], "required --nodes >= 1; came 0"),
        (["--samples", "1"], "required --samples >= 2; came 1"),
        (["--batch", "0"], "required --batch >= 1; came 0"),
        (["--bounds", "-1"], "required --bounds >= 0; came -1"),
        (["--patience", "-1"], "required --patience >= 0; came -1"),
        (["--cycles", "0"], "required --cycles >= 1; came 0"),
        (["--threshold", "nan"], "required --threshold >= 0; came nan"),
        (["--distortion-scale", "inf"], "required --distortion-scale a finite number; came inf"),
        (["--steps", "-1"], "required --steps >= 0; came -1"),
        (["--epochs", "-1"], "required --epochs >= 0; came -1"),
        (["--penalty", "-1"], "required --penalty >= 0; came -1"),
        (["--momentum", "2"], "required --momentum >= 0 and < 1; came 2"),
        (["--lr", "nan"], "required --lr > 0; came nan"),
        (["--lift-lr", "0"], "required --lift-lr > 0; came 0"),
        (["--fine-tune", "-1"], "required --fine-tune >= 0; came -1"),
        (["--fine-tune-lr", "inf"], "required --fine-tune-lr > 0; came inf"),
        (["--data-dir", "/nonexistent"], "required --data-dir: an existing directory; came /non"),
        (["--out", "/proc/nothing"], "cannot write"),
    ],
)
def test_wrong_input_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(EXPERIMENT, [*TINY, "--out", str(tmp_path), *flags]) == 1
    errors = capsys.readouterr().err
    assert words in errors and "Traceback" not in errors


def test_every_number_has_a_range() -> None:
    for name, option in OPTIONS.items():
        for value in (option.default, option.literal):
            option.check(name, value)
        if isinstance(option.default, float):
            with pytest.raises(ConfigError, match=name.replace("_", "-")):
                option.check(name, float("nan"))


def test_resume_keeps_the_runs_of_other_configurations(tmp_path: Path) -> None:
    execute(tmp_path, "--runs", "3")
    before = (tmp_path / "log.jsonl").read_text()
    execute(tmp_path, "--seed", "9", "--resume")
    after = (tmp_path / "log.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == 4
    again = execute(tmp_path, "--runs", "3", "--resume")
    assert [r["seed"] for r in again["runs"]] == [0, 1, 2]
    assert (tmp_path / "log.jsonl").read_text() == after
    assert not (tmp_path / "networks.png").exists()  # it showed seed 9


def test_a_picture_that_cannot_be_written_costs_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cycles.png").mkdir()
    assert main(EXPERIMENT, [*TINY, "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "result.json").read_text())["runs"]
    assert (tmp_path / "model.safetensors").exists()
    told = capsys.readouterr()
    assert "cycles.png" in told.err and "Traceback" not in told.err
    assert "runs that reach one node" in told.out


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
