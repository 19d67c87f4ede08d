"""Profiles: what an op has to do, what limits it, and the command. Nothing asserts a speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn import __main__ as command
from tinynn import nn, ops, profile, roofline
from tinynn.errors import DataError, GraphError, OutputError
from tinynn.models import PUBLISHED
from tinynn.profile import Pass
from tinynn.roofline import Limits
from tinynn.statistics import Moments

LIMITS = Limits(
    threads=1,
    flops=100e9,
    caches={"L1": 1000, "L2": 10_000},
    bandwidths={"L1": 200e9, "L2": 100e9, "L3": 50e9, "memory": 10e9},
    spread=0.01,
)


def small(rng: np.random.Generator) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, rng=rng),
        nn.BatchNorm(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 2, rng=rng),
    )


@pytest.mark.parametrize(
    ("macs", "nbytes", "limited_by", "bound"),
    [
        (500_000, 1000, "compute", 1e6 / 100e9),
        (500_000, 500_000, "memory", 500_000 / 10e9),
        (500, 900, "overhead", 1e-6),
        (0, 0, "overhead", 1e-6),
    ],
)
def test_the_largest_bound_is_what_limits(
    macs: int, nbytes: int, limited_by: str, bound: float
) -> None:
    found = Pass.of(100e-6, macs, nbytes, 1e-6, LIMITS, itemsize=4)
    assert found.limited_by == limited_by
    assert found.bound == pytest.approx(bound)
    assert found.share == pytest.approx(bound / 100e-6)
    assert found.gflops == pytest.approx(2 * macs / 100e-6 / 1e9)
    assert found.gbytes == pytest.approx(nbytes / 100e-6 / 1e9)
    assert found.intensity == pytest.approx(2 * macs / nbytes if nbytes else 0)


def test_arithmetic_in_float64_takes_twice_as_long() -> None:
    single, double = (Pass.of(1.0, 500_000, 0, 0.0, LIMITS, itemsize=n) for n in (4, 8))
    assert double.bound == 2 * single.bound


def test_every_op_has_its_times_and_its_work() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(4, 8, rng=rng), nn.ReLU(), nn.Linear(8, 2, rng=rng))
    found = profile.step(model, np.ones((5, 4), np.float32), seconds=0.01, limits=LIMITS)
    first, second = found.layers
    assert [(r.path, r.op, r.output) for r in found.layers] == [
        ("0", "linear+relu", (5, 8)),
        ("2", "linear", (5, 2)),
    ]
    assert first.forward.macs == 5 * 4 * 8 and second.forward.macs == 5 * 8 * 2
    assert first.forward.nbytes == 4 * (5 * 4 + 4 * 8 + 8 + 5 * 8)
    assert first.backward is not None and second.backward is not None
    assert first.backward.macs == first.forward.macs  # no gradient by the input is asked for
    assert second.backward.macs == 2 * second.forward.macs
    assert second.backward.nbytes >= 4 * (5 * 2 + 2 * 5 * 8 + 2 * 8 * 2 + 2)
    assert all(p.seconds > 0 and p.bounds["overhead"] > 0 for p in found.passes)
    assert found.timing.rounds >= 5 and found.batch == (5, 4)
    assert found.timing.median > max(p.seconds for p in found.passes) / 2
    by_bound = found.seconds_by_bound()
    assert sum(by_bound.values()) == pytest.approx(sum(p.seconds for p in found.passes))


def test_views_move_nothing_and_the_model_stays_as_it_was() -> None:
    model = small(np.random.default_rng(0)).eval()
    before = {name: value.copy() for name, value in model.state_dict().items()}
    found = profile.step(model, np.ones((2, 6, 6, 3), np.float32), seconds=0.01, limits=LIMITS)
    flatten = next(r for r in found.layers if r.op == "reshape")
    assert [p.nbytes for p in flatten.passes.values()] == [0, 0]
    assert {p.limited_by for p in flatten.passes.values()} == {"overhead"}
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert not model.training and all(p.grad is None for p in model.parameters())


class Moody(nn.Module):
    """Computes one op more every time."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(np.ones(3, np.float32))
        self.calls = 0

    def forward(self, x: tn.Tensor) -> tn.Tensor:
        self.calls += 1
        for _ in range(self.calls):
            x = x * self.weight
        return x


class Fixed(nn.Module):
    """Has nothing to train."""

    def forward(self, x: tn.Tensor) -> tn.Tensor:
        return ops.relu(x)


@pytest.mark.parametrize(("model", "reason"), [(Moody(), "ops"), (Fixed(), "trained Tensor")])
def test_models_that_cannot_be_profiled_are_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(GraphError, match=reason):
        profile.step(model, np.ones((2, 3), np.float32), seconds=0.01, limits=LIMITS)


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Limits that need no measuring; what they were asked for."""
    asked: list[Any] = []

    def limits(threads: list[int], *, remeasure: bool = False) -> list[Limits]:
        asked.append((threads, remeasure))
        return [replace(LIMITS, threads=n) for n in threads]

    monkeypatch.setattr(roofline, "limits", limits)
    return asked


def test_the_command_profiles_a_published_model(
    known_limits: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = tn.get_threads()
    arguments = ["summation", "--batch", "8", "--threads", "1", "--seconds", "0.01"]
    assert command.main(["profile", *arguments, "--out", str(tmp_path / "new")]) == 0
    assert known_limits == [([1], False)] and tn.get_threads() == threads
    printed = capsys.readouterr().out
    assert "linear+relu" in printed and "batch 8x2, 1 thread" in printed
    assert printed.count("limited by") == 2
    content = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert [row["op"] for row in content["layers"]] == ["linear+relu", "linear"]
    assert content["layers"][0]["forward"]["macs"] == 8 * 2 * 1000
    assert content["layers"][0]["backward"]["limited_by"] in ("compute", "memory", "overhead")
    assert (tmp_path / "new" / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_profiles_a_saved_model(
    known_limits: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "small.safetensors")
    tn.save(file, small(np.random.default_rng(0)))
    options = ["--input", "8x8x3", "--size", "6x6", "--batch", "3", "--seconds", "0.01"]
    assert command.main(["profile", file, *options, "--threads", "1", "--remeasure"]) == 0
    assert known_limits == [([1], True)]
    assert "3x6x6x4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["no_such_model"], "no model no_such_model"),
        (["missing.safetensors"], "missing.safetensors"),
        (["summation", "--size", "6x6"], "--size"),
        (["small_cifar", "--size", "6x"], "--size"),
        (["summation", "--batch", "0"], "--batch"),
        (["summation", "--threads", "100000"], "threads"),
        (["summation", "--seconds", "0"], "seconds"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    arguments: list[str], reason: str, known_limits: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["profile", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tinynn: ") and reason in error


def test_more_than_memory_holds_is_an_error_like_any(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["profile", "summation", "--batch", str(1 << 50)]) == 1
    assert capsys.readouterr().err.startswith("tinynn: ")


def test_a_file_needs_its_input_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "net.safetensors")
    tn.save(file, PUBLISHED["summation"].build(np.random.default_rng(0)))
    assert command.main(["profile", file]) == 1
    assert "--input" in capsys.readouterr().err


# --- statistics --------------------------------------------------------------------------------


def test_moments_are_those_of_all_parts_together() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e3, 1, (n, 3)).astype(np.float32) for n in (1, 7, 30)]
    parts[1][2] = 0
    moments = Moments()
    for part in parts:
        moments.add(part)
    whole = np.concatenate(parts).astype(np.float64)
    assert moments.size == whole.size and moments.zeros == 3
    assert moments.mean == pytest.approx(whole.mean(), rel=1e-12)
    assert moments.std == pytest.approx(whole.std(), rel=1e-9)
    assert moments.zero_share == 3 / whole.size
    norms = [np.linalg.norm(part.astype(np.float64)) for part in parts]
    assert moments.norm == pytest.approx(np.sqrt(np.mean(np.square(norms))), rel=1e-12)


def two_layers() -> tuple[nn.Module, list[tuple[np.ndarray, np.ndarray]]]:
    """A net in float64 whose second hidden node is dead, and two batches."""
    rng = np.random.default_rng(0)
    linear = nn.Linear(3, 4, rng=rng)
    linear.bias.mutate()[:] = (0.1, -100, 0.2, 0.3)
    model = nn.Sequential(linear, nn.ReLU(), nn.Linear(4, 2, rng=rng)).astype(np.float64)
    data = [(rng.standard_normal((n, 3)), rng.standard_normal((n, 2))) for n in (5, 9)]
    return model, data


def test_statistics_are_those_of_the_formulas() -> None:
    model, data = two_layers()
    found = tn.statistics(model, data, tn.mse)
    w1, b1, w2, b2 = (p.data for p in model.parameters())
    hidden, by_hidden, by_w2, losses = [], [], [], []
    for x, y in data:
        h = np.maximum(x @ w1 + b1, 0)
        error = h @ w2 + b2 - y
        g = 2 * error / error.size
        hidden.append(h)
        by_hidden.append(g @ w2.T)
        by_w2.append(h.T @ g)
        losses.append(np.mean(error**2))
    first, second = found.layers
    h, g = np.concatenate(hidden), np.concatenate(by_hidden)
    assert (first.path, first.op, first.shape) == ("0", "linear+relu", (5, 4))
    assert first.activation.mean == pytest.approx(h.mean())
    assert first.activation.std == pytest.approx(h.std())
    assert first.activation.zero_share == np.mean(h == 0) > 0.25
    assert first.dead == 1 and second.dead == 0
    assert first.gradient.mean == pytest.approx(g.mean())
    assert first.gradient.std == pytest.approx(g.std())
    norms = [np.linalg.norm(one) for one in by_hidden]
    assert first.gradient.norm == pytest.approx(np.sqrt(np.mean(np.square(norms))))
    weight = next(p for p in found.parameters if p.name == "2.weight")
    norms = [np.linalg.norm(one) for one in by_w2]
    assert weight.gradient.norm == pytest.approx(np.sqrt(np.mean(np.square(norms))))
    assert weight.gradient.mean == pytest.approx(np.mean(by_w2))
    assert weight.value.norm == pytest.approx(np.linalg.norm(w2))
    assert weight.ratio == pytest.approx(weight.gradient.norm / np.linalg.norm(w2))
    assert found.loss == pytest.approx(np.mean(losses)) and found.batches == 2


def test_statistics_leave_the_model_alone() -> None:
    model = small(np.random.default_rng(0)).eval()
    before = {name: value.copy() for name, value in model.state_dict().items()}
    x = np.random.default_rng(1).standard_normal((2, 6, 6, 3), np.float32)
    found = tn.statistics(model, [(x, np.array([0, 1]))], tn.softmax_cross_entropy)
    assert all(row.gradient.size for row in found.layers)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_statistics_as_a_table_and_a_picture(tmp_path: Path) -> None:
    model, data = two_layers()
    found = tn.statistics(model, data, tn.mse)
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["layer", "op", "result"]
    assert "1 of 4" in lines[2] and "linear+relu" in lines[2]
    assert any(line.startswith("2.weight") for line in lines)
    assert "2 batches" in lines[-1]
    found.draw(tmp_path / "inside.png")
    assert (tmp_path / "inside.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        found.draw(tmp_path / "file" / "inside.png")


def test_what_gives_no_statistics_is_refused() -> None:
    model, _ = two_layers()
    with pytest.raises(DataError, match="at least one batch"):
        tn.statistics(model, [], tn.mse)
    x = np.ones((2, 3), np.float32)
    with pytest.raises(GraphError, match="batch 1"):
        tn.statistics(Moody(), [(x, x), (x, x)], tn.mse)
