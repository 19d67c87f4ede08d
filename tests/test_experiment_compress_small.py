"""Compressing the small model: a tiny run, what is counted, and what is concluded from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from experiments import compress_small_findings as findings
from experiments import compress_small_recipes as recipes
from experiments.classify import Sets, Taught
from experiments.compress_small import EXPERIMENT, on_dense_kernels
from experiments.compress_small_costs import (
    CACHE_BYTE,
    DRAM_BYTE,
    JOULES,
    Executable,
    content,
    costs,
    executed_multiply_adds,
)
from experiments.compress_small_figures import frontier
from experiments.compress_small_steps import STEPS, carry_out
from experiments.runner import Context, main
from kernels import _jit
from tinynn import nn
from tinynn.compress import cluster, quantize, sparsify
from tinynn.data import Augment, Dataset

TINY = [
    "--quick", "--images", "192", "--test-images", "60", "--batch", "64", "--threads", "1",
    "--tuning", "0.5", "--epochs", "0.5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serial kernels compile in a third of the time; tests of models train with parallel ones."""
    monkeypatch.setattr(_jit, "PARALLEL_BYTES", 1 << 60)


def test_a_tiny_run_and_its_times_taken_again(tmp_path: Path) -> None:
    flags = [*TINY, "--out", str(tmp_path), "--group", "dense", "weights", "designed small"]
    assert main(EXPERIMENT, flags) == 0
    first = json.loads((tmp_path / "result.json").read_text())
    *runs, times = first["runs"]
    assert [r["cell"] for r in runs] == list(times["batches"]["1"]) and len(runs) == 4
    assert all(r["executed_as"] == "plan" for r in runs)
    pruned = next(r for r in runs if r["cell"] == "weights 70 %, gradual")
    dense = runs[0]
    assert pruned["bytes"] < dense["bytes"] and pruned["non_zeros"] < dense["non_zeros"]
    for r in runs:
        assert r["deflated_bytes"] <= r["bytes"] and r["content_bytes"] < r["bytes"]
    sizes = {p.stat().st_size for p in (tmp_path / "runs" / "plans").iterdir()}
    assert sizes == {r["bytes"] for r in runs}
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["top-1, %"]) for r in rows] == [
        pytest.approx(100 * r["accuracy"], abs=0.01) for r in runs
    ]
    assert "dense" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "pareto.png").stat().st_size > 5000

    assert main(EXPERIMENT, [*flags, "--resume", "--times", "2"]) == 0
    second = json.loads((tmp_path / "result.json").read_text())
    assert second["runs"][:-1] == runs and second["runs"][-1]["key"] != times["key"]


def test_recipes_are_data_and_name_steps_that_there_are() -> None:
    every = [recipes.published(1, 1), recipes.quick(1, 1), recipes.sweep()]
    for groups in every:
        names = [name for group in groups.values() for name in group]
        assert len(names) == len(set(names))
        for steps in (s for group in groups.values() for s in group.values()):
            assert json.loads(json.dumps(steps)) == steps
            assert {item["do"] for item in steps} <= STEPS.keys()
    used = {i["do"] for g in every for m in g.values() for steps in m.values() for i in steps}
    assert used == STEPS.keys()
    twice = recipes.published(2, 1)["weights"]["weights 70 %, gradual"]
    assert twice[-1]["epochs"] == 2 * recipes.PRUNED[-1]["epochs"]


CONFIG: dict[str, Any] = {
    "crop": 0, "pad": 0, "flip": False, "brightness": 0.0, "contrast": 0.0, "standardize": True,
    "batch": 20, "optimizer": "sgd", "momentum": 0.9, "l2": 1e-3, "smoothing": 0.0,
    "schedule": "constant", "evaluate_every": 1000, "steps": 0, "warmup": 0.0, "seed": 0,
}  # fmt: skip


def test_what_training_left_is_taken_up_with_its_masks_and_shared_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, 8, 8, 1)).astype(np.uint8)
    data = Dataset("noise", images, np.arange(40) % 2, ("a", "b"))
    head: list[dict[str, Any]] = [
        {"do": "design", "stem": 4, "widths": [8]},
        {"do": "train", "epochs": 1.0, "rate": 0.1, "sparsity": 0.6, "scope": "layer"},
        {"do": "fold"},
        {"do": "k-means", "entries": 4},
        {"do": "train", "epochs": 1.0, "rate": 0.01},
    ]
    tail = [{"do": "train", "epochs": 2.0, "rate": 0.01}]

    def make(steps: list[dict[str, Any]], where: str) -> nn.Module:
        return carry_out(steps, Sets(data, data), CONFIG, Context(tmp_path / where / "run"))

    whole = make(head + tail, "whole")
    make(head, "parts")
    assert len(list((tmp_path / "parts" / "stages").glob("*.safetensors"))) == 2
    parts = make(head + tail, "parts")
    ours, theirs = whole.state_dict(), parts.state_dict()
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours)
    assert sparsify.density(parts) < 0.5
    for _, p in parts.named_parameters():
        if p.ndim > 1:
            assert len(np.unique(p.data)) <= 4


def test_a_training_by_a_teacher_goes_on_with_the_images_that_are_left() -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 2, 2, 1)).astype(np.uint8)
    data = Dataset("noise", images, np.arange(40) % 2, ("a", "b"))

    def taught() -> Taught:
        return Taught(data.batches(10, np.random.default_rng(1)), lambda x: x.sum(axis=(1, 2, 3)))

    first, second = taught(), taught()
    batches = iter(first)
    next(batches)
    second.load_state_dict(first.state_dict())
    left, again = list(batches), list(second)
    assert len(left) == len(again) == 3
    for (x, y), (same, answers) in zip(left, again, strict=True):
        assert np.array_equal(x, same) and np.array_equal(y, answers)


def test_statistics_anew_are_those_of_images_as_training_shows_them(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(100, 255, (400, 8, 8, 3)).astype(np.uint8)
    data = Dataset("noise", images, np.arange(400) % 2, ("a", "b"))
    config = {**CONFIG, "pad": 3, "standardize": False}
    design = {"do": "design", "stem": 4, "widths": [8]}

    def make(*steps: dict[str, Any]) -> nn.Module:
        return carry_out([design, *steps], Sets(data, data), config, Context(tmp_path / "run"))

    def means(model: nn.Module) -> np.ndarray:
        return np.concatenate([v for k, v in model.state_dict().items() if k.endswith(".mean")])

    model, found = make(), means(make({"do": "statistics anew", "images": 400}))
    seen = data.batches(100, np.random.default_rng(1), Augment(pad=3))
    trained, whole = (means(tn.compress.reestimate(model, d)) for d in (seen, data.batches(100)))
    assert np.abs(found - trained).max() < 0.2 * np.abs(whole - trained).max()


# --- costs ----------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    rng = np.random.default_rng(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, rng=rng),
        nn.ReLU(),
        nn.PointwiseConv2d(16, 32, rng=rng),
        nn.GlobalAvgPool2d(),
        nn.Linear(32, 10, rng=rng),
    )


X = np.random.default_rng(1).normal(size=(1, 6, 6, 3)).astype(np.float32)
MACS = 36 * 9 * 3 * 16 + 36 * 16 * 32 + 320
RESULTS = 36 * (3 + 16 + 32) + 32 + 10  # numbers: ReLU is a part of the convolution


def test_sparse_kernels_carry_out_what_is_stored_only() -> None:
    slim = sparsify.weights(net(), sparsify.magnitude, sparsify.share(0.25))
    plan = tn.compile(slim, X, choose={"2": "sparse"})
    assert executed_multiply_adds(plan) == MACS - 36 * 16 * 32 * 3 // 4
    by_blocks = sparsify.weights(net(), sparsify.magnitude, sparsify.blocks(0.25))
    plan = tn.compile(by_blocks, X, choose={"2": "sparse4x1"})
    assert executed_multiply_adds(plan) == MACS - 36 * 16 * 32 * 3 // 4
    dense = on_dense_kernels(plan)
    assert dense is not None and executed_multiply_adds(dense) == MACS == dense.macs
    np.testing.assert_allclose(dense(X), plan(X), atol=1e-5)
    assert on_dense_kernels(dense) is None


def test_energy_is_what_the_published_costs_make_of_the_counts() -> None:
    runs = Executable.of(net(), X)
    c = costs(runs, X)
    assert c["executed_as"] == "plan" and c["bytes"] == runs.plan.nbytes  # type: ignore[union-attr]
    assert c["multiply_adds"] == c["executed_multiply_adds"] == MACS
    joules = c["energy_joules"]
    assert joules["arithmetic"] == pytest.approx(MACS * 4.6e-12)
    assert joules["weights"] == pytest.approx(c["bytes"] * DRAM_BYTE) and DRAM_BYTE == 162.5e-12
    moved = 2 * 4 * RESULTS
    assert joules["activations"] == pytest.approx(moved * CACHE_BYTE)
    assert JOULES["int8"] < JOULES["float32"] / 10


def test_energy_of_activations_is_of_what_the_plan_moves() -> None:
    """Not of batch norms that it folds, nor of 8 bits where only the products have 8."""
    norms = nn.Sequential(net()[0], nn.BatchNorm(16), nn.ReLU(), *list(net())[2:])
    models = {
        "folded": norms,
        "half": quantize.float16(net()),
        "int8": quantize.int8(net(), [X]),
        "dynamic": quantize.dynamic(net(), X),
    }
    found = {name: costs(Executable.of(m, X), X)["energy_joules"] for name, m in models.items()}
    moved = {name: round(j["activations"] / 2 / CACHE_BYTE) for name, j in found.items()}
    # in 8 bits the image is float32 first, and so is the result
    bytes_of_int8 = 4 * (36 * 3 + 10) + RESULTS - 10
    assert moved == {**dict.fromkeys(models, 4 * RESULTS), "int8": bytes_of_int8}
    for name in ("int8", "dynamic"):
        assert found[name]["arithmetic"] == pytest.approx(MACS * JOULES["int8"])


def test_a_taught_model_is_trained_towards_its_teacher(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (60, 8, 8, 1)).astype(np.uint8)
    data = Dataset("noise", images, np.arange(60) % 2, ("a", "b"))
    teacher = {"do": "design", "stem": 4, "widths": [8]}, {"do": "fold"}
    sets, context = Sets(data, data), Context(tmp_path / "run")
    model = carry_out(list(teacher), sets, CONFIG, context)
    tn.save(tmp_path / "teacher.safetensors", model)
    load = {"do": "load", "path": str(tmp_path / "teacher.safetensors")}
    hurt: list[dict[str, Any]] = [load, {"do": "weights", "kept": 0.5}]
    tune = {"do": "train", "epochs": 10.0, "rate": 0.02, "teacher": load["path"]}

    def far(recipe: list[dict[str, Any]]) -> float:
        x = Augment(standardize=True)(images)
        found = carry_out(recipe, sets, CONFIG, context)
        return float(np.abs(found(tn.Tensor(x)).data - model(tn.Tensor(x)).data).mean())

    assert far([load]) == 0 and far([*hurt, tune]) < 0.5 * far(hurt)


class Logarithm(nn.Module):
    """What no plan has: log(softmax(x)) of a layer without multiplications."""

    def __init__(self) -> None:
        self.layer = nn.AdditiveLinear(3, 4, rng=np.random.default_rng(0))

    def forward(self, x: tn.Tensor) -> tn.Tensor:
        return tn.ops.log_softmax(self.layer(x))


def test_a_model_that_no_plan_expresses_is_run_itself_and_said_to_be() -> None:
    model = Logarithm()
    runs = Executable.of(model, X[0, 0])
    c = costs(runs, X[0, 0])
    assert c["executed_as"] == "model" and c["kernels"] is None
    assert c["bytes"] == c["content_bytes"] == 4 * 20  # without a file around them
    np.testing.assert_array_equal(runs(X[0, 0]), model(tn.Tensor(X[0, 0])).data)
    assert c["energy_joules"]["arithmetic"] == pytest.approx(2 * 6 * 12 * 0.9e-12)


def test_additions_cost_less_energy_in_a_plan_too() -> None:
    model = nn.Sequential(Logarithm().layer)
    c = costs(Executable.of(model, X[0, 0, :1]), X[0, 0, :1])
    assert c["executed_as"] == "plan" and c["executed_multiply_adds"] == 2 * 12
    assert c["energy_joules"]["arithmetic"] == pytest.approx(2 * 12 * 0.9e-12)


def test_content_is_the_packed_numbers() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False, rng=rng))
    plan = tn.compile(cluster.kmeans(model, 16), np.ones((1, 256), np.float32), choose="dense")
    assert 256 * 128 + 64 <= content(plan) <= 256 * 128 + 64 + 4 * 256


# --- conclusions ----------------------------------------------------------------------------------


def test_the_frontier_is_what_none_beats() -> None:
    points = {"a": (1.0, 50.0), "b": (2.0, 80.0), "c": (3.0, 70.0), "d": (4.0, 90.0), "e": (4, 85)}
    assert frontier(points) == ["a", "b", "d"]


def _cell(group: str, accuracy: float, ms: float, **other: Any) -> dict[str, Any]:
    return {
        "group": group, "accuracy_mean": accuracy, "ms_1": ms, "ms_64": 50 * ms, "bytes": 500_000,
        "content_bytes": 490_000, "non_zeros": 130_000, "tuning_epochs": 0, "executed_as": "plan",
        **other,
    }  # fmt: skip


def test_verdicts_follow_from_the_numbers() -> None:
    cells = {
        "dense": _cell("dense", 0.90, 0.3),
        "weights 70 %, gradual": _cell(
            "weights", 0.898, 0.2, non_zeros=40_000, tuning_epochs=3, ms_1_dense_kernels=0.3
        ),
        "low rank, error 0.001": _cell("low rank", 0.8, 0.2),
        "int8, min-max": _cell("bits", 0.899, 0.1, bytes=125_000),
        "designed, width 0.5": _cell("designed small", 0.88, 0.1, bytes=150_000, tuning_epochs=48),
    }

    def verdicts() -> list[str]:
        return findings.findings({"cells": cells})

    told = "\n".join(verdicts())
    assert "REFUTED: pruning" in told and "loses +0.20 points" in told
    assert "HOLDS: no factorisation" in told  # faster, but not at equal accuracy
    assert "REFUTED: 8 bits" in told and "3.00 times" in told
    assert "REFUTED: dense is faster" in told and "1.50 times" in told
    assert "HOLDS: compressing beats designing small" in told and "1.90 points below" in told
    assert "met: fixed-point int8" in told and "MISSED" not in told
    assert "at 24" not in told

    cells["low rank, error 0.001"]["accuracy_mean"] = 0.899
    cells["weights 70 %, gradual"] |= {"accuracy_mean": 0.88, "ms_1_dense_kernels": 0.2}
    cells["int8, min-max"] |= {"ms_1": 0.6, "bytes": 140_000}
    cells["designed, width 0.5"]["accuracy_mean"] = 0.9
    told = "\n".join(verdicts())
    assert "HOLDS: pruning" in told and "REFUTED: no factorisation" in told
    assert "HOLDS: 8 bits" in told and "HOLDS: dense is faster" in told
    assert "REFUTED: compressing beats" in told
    assert "MISSED: fixed-point int8" in told and "MISSED: 70 %" in told
    cells["designed, width 0.5"]["tuning_epochs"] = 24
    assert any("small, at 24 epochs from scratch against the 48" in told for told in verdicts())
    cells["designed, width 0.5"]["tuning_epochs"] = 1
    assert any(told.startswith("NOT JUDGED: compressing") for told in verdicts())
    del cells["dense"]["ms_1"]
    assert "No verdicts" in verdicts()[0]


def test_aims_are_judged_on_one_recipe_and_as_they_are_shown() -> None:
    cells = {
        "dense": _cell("dense", 0.903, 0.3),
        "int8, KL": _cell("bits", 0.903, 0.3, bytes=140_000),  # the file is too large
        "int8, one scale a layer": _cell("bits", 0.89, 0.3, bytes=120_000),  # loses too much
    }
    told = "\n".join(findings.findings({"cells": cells}))
    assert "MISSED: fixed-point int8" in told and "met:" not in told
    cells["int8, four scales a layer"] = _cell("bits", 0.9, 0.3, bytes=130_000)
    assert 100 * (0.903 - 0.9) > 0.3  # by what floats add
    told = "\n".join(findings.findings({"cells": cells}))
    assert "met: fixed-point int8: points lost 0.300, aim 0.3, in a file of 0.260" in told


def test_nothing_is_judged_on_other_images() -> None:
    cells = {"dense": _cell("dense", 0.9, 0.3, dataset="glyphs"), "int8, KL": _cell("bits", 0.9, 1)}
    told = findings.findings({"cells": cells})
    assert len(told) == 1 and "glyphs" in told[0]


def test_help_says_each_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(EXPERIMENT, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in said and ") (default" not in said
    assert (
        "runs a configuration (default: 1)" in said and "first run; the next has the next (" in said
    )
