"""The alternatives to the convolution, on the drawn digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.conv_alternatives import EXPERIMENT, KINDS, _p_value, table
from experiments.runner import main
from kernels import _jit


def test_a_tiny_run_of_two_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit, "PARALLEL_BYTES", 1 << 60)  # serial kernels compile faster
    flags = "--quick --images 64 --test-images 40 --batch 32 --epochs 1 --kind conv separable"
    assert main(EXPERIMENT, [*flags.split(), "--threads", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [r["kind"] for r in result["runs"]] == ["conv", "separable"]
    for run in result["runs"]:
        assert 0 <= run["accuracy"] <= 1 and run["training_step_seconds"] > 0
    dense, light = (r["multiply_adds"] for r in result["runs"])
    assert light < dense / 5
    assert (tmp_path / "costs.png").stat().st_size > 1000


def test_help_shows_what_holds_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(EXPERIMENT, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "epochs; 0: --steps says [mnist 3.0, cifar10 10.0; literal 0.0]" in text
    assert "if --epochs is 0 [0; literal 50000]" in text and "learning rate [0.1]" in text


def records(kind: str, accuracies: list[float]) -> list[dict[str, object]]:
    return [{"kind": kind, "dataset": "mnist", "accuracy": a} for a in accuracies]


def test_welchs_test_tells_equal_from_different() -> None:
    conv = records("conv", [0.80, 0.81, 0.82, 0.81])
    alike, other = records("composing", [0.81, 0.80, 0.82]), records("separable", [0.5, 0.52, 0.51])
    assert (_p_value(alike, conv) or 0) > 0.5
    assert (_p_value(other, conv) or 1) < 0.001
    assert _p_value(conv, conv) is None and _p_value(other[:1], conv) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_row(kind: str) -> None:
    run = {
        **records(kind, [0.8])[0],
        "cell": f"cifar10, {kind}",
        "parameters": 1,
        "multiply_adds": 2,
        "training_seconds": 1.0,
        "training_step_seconds": 0.1,
        "inference_seconds": 0.1,
    }
    run["dataset"] = "cifar10"
    rows = table([run], EXPERIMENT.summary([run]))
    assert rows[0].measured == "80.00" and "max" in rows[0].published
