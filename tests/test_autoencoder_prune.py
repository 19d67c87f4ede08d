"""The auto-encoder experiment, on a handful of drawn digits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

import tinynn as tn
from experiments.autoencoder_prune import EXPERIMENT, cells, channels, run
from experiments.runner import Context, main
from kernels import _jit

TINY = ["--quick", "--images", "64", "--test-images", "20", "--batch", "32"]
TINY += ["--first-steps", "3", "--steps", "2", "--cycles", "2"]


def config(*flags: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--quick", action="store_true")
    EXPERIMENT.arguments(parser)
    return next(iter(cells(parser.parse_args([*TINY, *flags])).values()))


@pytest.fixture(autouse=True)
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serial kernels compile in a third of the time; tests of models train with parallel ones."""
    monkeypatch.setattr(_jit, "PARALLEL_BYTES", 1 << 60)


def test_a_tiny_run_from_the_command_line(tmp_path: Path) -> None:
    assert main(EXPERIMENT, [*TINY, "--threads", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    (only,) = result["runs"]
    assert only["cycles"][0]["channels"] == [32, 64, 32]
    assert sum(only["channels"]) < 128  # something lay inside the bounds
    assert only["random"]["channels"] == only["channels"]
    assert "of 1 runs end at 1-2-4-3-1" in result["summary"]["verdict"]
    for name in ("reconstructions.png", "filters.png", "cycles.png", "pareto.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_the_saved_net_computes_what_was_reported(tmp_path: Path) -> None:
    record = run(config("--no-controls"), 1, Context(tmp_path))
    net = tn.load(tmp_path / "model.safetensors")
    assert channels(net) == record["channels"] and net.size() == record["parameters"]
    test = tn.data.load("glyphs")[1].take(20)
    error = tn.evaluate(net, test.batches(20, labels=False), tn.mse)
    assert error == pytest.approx(record["mse"])


def test_the_guard_keeps_a_channel_and_says_so(tmp_path: Path) -> None:
    # no score lies farther from the mean than a thousand deviations: all would go
    flags = ["--bounds-unit", "std", "--bounds", "1000", "--no-controls"]
    record = run(config(*flags), 0, Context(tmp_path))
    assert list(record["channels"]) == [1, 1, 1] and record["guard_acted"] >= 1
    assert sum(record["cycles"][0]["guarded"].values()) == 3


def test_the_first_readings_remove_what_they_say(tmp_path: Path) -> None:
    nothing = ["--bounds-unit", "std", "--bounds", "1000", "--bounds-remove", "outside"]
    record = run(config(*nothing, "--no-controls"), 0, Context(tmp_path))
    assert list(record["channels"]) == [32, 64, 32]
    assert record["ended"] == "a cycle removed nothing" and len(record["cycles"]) == 1


def test_the_table_holds_every_reading() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--quick", action="store_true")
    EXPERIMENT.arguments(parser)
    table = cells(parser.parse_args(["--table"]))
    readings = {(c["criterion"], c["bounds_unit"], c["bounds_remove"]) for c in table.values()}
    assert len(readings) == 10 and len(table) == 14


def test_baselines_are_those_of_the_images(tmp_path: Path) -> None:
    record = run(config("--no-controls"), 0, Context(tmp_path))
    train, test = (d.floats() for d in tn.data.load("glyphs"))
    expected = float(np.sqrt(np.mean((test[:20] - train[:64].mean(axis=0)) ** 2)))
    assert record["baselines"]["mean_image"] == pytest.approx(expected, rel=1e-4)
