"""The figures of the summation experiment: whole pictures from whole and from poor records."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

import tinynn as tn
from experiments import summation_figures as figures
from experiments import summation_networks as networks
from tinynn.errors import OutputError
from tinynn.storage import plain

Record = dict[str, Any]
ALL = {"networks.png", "cycles.png", "pareto.png", "error_plane.png", "model.safetensors"}


def weights(nodes: int, seed: int = 0) -> Record:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (2, nodes), "b1": (nodes,), "w2": (nodes, 1), "b2": (1,)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def snapshot(cycle: int, before: int, after: int) -> Record:
    w = weights(before, cycle)
    kept = np.arange(before) < after
    return {"cycle": cycle, "w1": w["w1"], "b1": w["b1"], "w2": w["w2"][:, 0], "kept": kept}


def run(
    cell: str = "default", seed: int = 0, nodes: tuple[int, ...] = (20, 9, 4, 1), **other: Any
) -> Record:
    steps = list(itertools.pairwise(nodes))
    cycles = [
        {
            "cycle": i,
            "phase": "prune" if i < 3 else "lift",
            "before": before,
            "removed": before - after,
            "merged": int(i == 3),
            "after": after,
            "train_rmse": 10.0**-i,
            "collapse": "",
        }
        for i, (before, after) in enumerate(steps, 1)
    ]
    record: Record = {
        "cell": cell,
        "seed": seed,
        "hidden_nodes": nodes[-1],
        "collapsed": False,
        "cycles": cycles,
        "snapshots": [snapshot(i, *step) for i, step in enumerate(steps, 1)],
        "train_rmse": 1e-4,
        "test_rmse": 2e-4 * (seed + 1),
        "outside_rmse": 3.0,
        "weights": weights(nodes[-1]),
    }
    return record | other


def resumed(records: list[Record]) -> list[Record]:
    """The same records as a log gives them back: lists, None for NaN, nothing transient."""
    kept = [{k: v for k, v in r.items() if k != "snapshots"} for r in records]
    result: list[Record] = json.loads(json.dumps(plain(kept), allow_nan=False))
    return result


def drawn(out: Path, records: list[Record], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Draw, and check that every file is a picture of something and that nothing was reported."""
    written = figures.draw(out, records)
    assert capsys.readouterr().err == ""
    assert sorted(p.name for p in out.glob("*")) == sorted(p.name for p in written)
    for path in written:
        if path.suffix == ".png":
            pixels = imread(path)
            assert pixels.ndim == 3 and min(pixels.shape[:2]) > 200
            assert pixels.min() < 0.3 and pixels.max() == 1.0
            assert path.stat().st_size < 500_000
    return {p.name for p in written}


def dead(cycle: int, **other: Any) -> Record:
    """A run one cycle of which collapsed."""
    record = run(**other)
    record["cycles"][cycle].update(collapse="all nodes died", after=0, train_rmse=math.nan)
    return record


GRID = [
    f"{recipe}, {criterion}, {how}, {regulariser}"
    for recipe in ("literal", "default")
    for criterion in ("count", "variance")
    for how in ("distortion", "no distortion")
    for regulariser in ("none", "l1", "l2")
]
CONTROLS = [
    "literal, random pruning",
    "default",
    "default without lift",
    "default, l2 norm > 0.5",
    "2-1-1 net from scratch",
]

CASES: dict[str, tuple[list[Record], set[str]]] = {
    "no records": ([], set()),
    "one run": ([run()], ALL),
    "several runs": ([run(seed=i) for i in range(3)], ALL),
    "literal, many nodes": (
        [run("literal", nodes=(400, 300, 30), weights=None)],
        {"networks.png", "cycles.png", "pareto.png"},
    ),
    "two nodes": ([run(nodes=(3, 2))], ALL),
    "sixteen nodes": ([run(nodes=(40, 16))], ALL),
    "normal inputs": ([run(inputs="normal")], ALL),
    "resumed": (resumed([run(), run(seed=1)]), ALL - {"networks.png"}),
    "resumed with NaN": (
        resumed([dead(1, test_rmse=math.nan)]),
        {"cycles.png", "error_plane.png", "model.safetensors"},
    ),
    "rolled back": ([dead(1)], ALL),
    "collapsed": (
        [dead(2, collapsed=True, hidden_nodes=0, test_rmse=None, train_rmse=math.nan)],
        {"networks.png", "cycles.png"},
    ),
    "collapsed in the first cycle": (
        [dead(0, nodes=(5, 5), collapsed=True, hidden_nodes=0, snapshots=[], weights=None)],
        {"cycles.png"},
    ),
    "first run collapsed": (
        [dead(2, collapsed=True, hidden_nodes=0), run(seed=1)],
        ALL - {"model.safetensors"},
    ),
    "no error is a number": (
        [run(test_rmse=math.nan, train_rmse=math.inf, outside_rmse=None)],
        ALL - {"pareto.png"},
    ),
    "an exact net": ([run(test_rmse=0.0, train_rmse=0.0)], ALL - {"pareto.png"}),
    "weights not finite": (
        [run(weights={**weights(1), "b1": np.array([np.nan])})],
        ALL - {"error_plane.png", "model.safetensors"},
    ),
    "weights of zero": (
        [run(weights={k: 0 * v for k, v in weights(2).items()}, nodes=(3, 2))],
        ALL,
    ),
    "no cycles": ([run(cycles=[], snapshots=[])], ALL - {"networks.png", "cycles.png"}),
    "an unknown cell": ([run("something, else")], ALL),
    "table": (
        [run(cell, seed) for cell in GRID + CONTROLS for seed in range(2)],
        ALL | {"table.png"},
    ),
    "table with collapsed runs": (
        [run(GRID[0]), *(dead(1, cell=c, collapsed=True, test_rmse=None) for c in GRID[:3])],
        ALL | {"table.png"},
    ),
    "table of collapsed runs": (
        [dead(1, cell=c, collapsed=True, hidden_nodes=0, test_rmse=None) for c in GRID[:3]],
        {"networks.png", "cycles.png", "table.png"},
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
def test_draws_what_the_records_allow(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, expected = CASES[case]
    assert drawn(tmp_path, records, capsys) == expected


def test_the_saved_model_is_the_first_runs_net(tmp_path: Path) -> None:
    record = run(nodes=(9, 3))
    figures.draw(tmp_path, [record])
    x = np.random.default_rng(1).standard_normal((50, 2)).astype(np.float32)
    w = record["weights"]
    expected = np.maximum(x @ w["w1"] + w["b1"], 0) @ w["w2"] + w["b2"]
    with tn.no_grad():
        result = tn.load(tmp_path / "model.safetensors")(tn.Tensor(x)).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_nodes_that_are_on_everywhere_are_told_apart() -> None:
    # 0: on from 0.5 to 2.5; 1: off in the corner (0, 0); 2: never on
    net = networks.Net(np.ones((2, 3)), np.array([0.5, -0.5, -3.0]), np.ones(3), 0.0)
    centre, support = networks._centre_and_support(net, "uniform")
    assert (centre - support > 0).tolist() == [True, False, False]
    assert (centre + support > 0).tolist() == [True, True, False]
    centre, support = networks._centre_and_support(net, "normal")
    assert not (centre - support > 0).any()


def test_panels_are_the_ends_and_what_changed_in_between() -> None:
    shots = [{"cycle": i} for i in range(1, 41)]
    cycles = {i: {"removed": int(i % 7 == 0), "merged": int(i == 20)} for i in range(1, 41)}
    chosen = [s["cycle"] for s in networks._chosen(shots, cycles, 12)]
    assert chosen == [1, 2, 3, 7, 14, 20, 21, 28, 35, 38, 39, 40]
    assert networks._chosen(shots[:12], cycles, 12) == shots[:12]
    fewer = [s["cycle"] for s in networks._chosen(shots, cycles, 9)]
    assert len(fewer) == 9 and fewer[:3] == [1, 2, 3] and fewer[-3:] == [38, 39, 40]
    assert set(fewer[3:-3]) <= {7, 14, 20, 21, 28, 35}


def test_the_front_is_what_no_other_run_beats() -> None:
    points = [(4.0, 0.1), (1.0, 0.5), (2.0, 0.5), (2.0, 0.2), (8.0, 0.1), (9.0, 0.01)]
    assert figures._front(points) == [(1.0, 0.5), (2.0, 0.2), (4.0, 0.1), (9.0, 0.01)]


@pytest.mark.parametrize(
    ("cell", "place"),
    [
        ("literal, count, no distortion, l1", ("literal recipe, no distortion", "count, l1")),
        ("default, random pruning", ("random pruning", "default recipe")),
        ("default without roll-back", ("default recipe", "without roll-back")),
        ("default", ("default recipe", "as it is")),
        ("default, l2 norm > 0.5", ("default recipe, other criteria", "l2 norm > 0.5")),
        ("2-1-1 net from scratch", ("from scratch", "2-1-1 net")),
    ],
)
def test_cells_are_grouped(cell: str, place: tuple[str, str]) -> None:
    assert figures._place(cell) == place
    assert place[0] in figures.GROUPS


def test_sums_read_as_in_print() -> None:
    assert networks._sum((-1.5, "a"), (2.25, "b"), (-0.125, "")) == "−1.50 a + 2.25 b − 0.125"


def test_a_picture_that_fails_does_not_take_the_others_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(records: list[Record]) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr(figures, "_cycles", broken)
    written = figures.draw(tmp_path, [run()])
    assert {p.name for p in written} == ALL - {"cycles.png"}
    message = capsys.readouterr().err
    assert "cycles.png" in message and "no such luck" in message


def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        figures.draw(tmp_path / "file", [run()])


def test_pictures_of_other_runs_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not ours")
    figures.draw(tmp_path, [run(c, key=c) for c in GRID[:2]])
    assert (tmp_path / "table.png").exists()
    figures.draw(tmp_path, resumed([run("literal", key="new", weights=None, collapsed=True)]))
    assert {p.name for p in tmp_path.iterdir()} == {"notes.png", "cycles.png"}


def test_the_networks_stay_while_their_run_is_among_the_records(tmp_path: Path) -> None:
    path = tmp_path / "networks.png"
    first, second = run(seed=0, key="a"), run(seed=1, key="b")
    figures.draw(tmp_path, [first])
    before = path.read_bytes()
    assert path in figures.draw(tmp_path, resumed([first]))
    assert path.read_bytes() == before
    figures.draw(tmp_path, [*resumed([first]), second])  # the run shown comes first
    assert path.read_bytes() == before
    figures.draw(tmp_path, [second, *resumed([first])])
    assert path.read_bytes() != before
    assert path not in figures.draw(tmp_path, resumed([first])) and not path.exists()
    path.write_text("no picture")
    assert path not in figures.draw(tmp_path, resumed([first])) and not path.exists()


def test_what_cannot_be_written_does_not_take_the_others_along(tmp_path: Path) -> None:
    (tmp_path / "cycles.png").mkdir()  # in the way of a picture
    (tmp_path / "table.png").mkdir()  # in the way of removal
    with pytest.raises(OutputError, match=r"cycles\.png.*cannot remove.*table\.png"):
        figures.draw(tmp_path, [run()])
    assert {p.name for p in tmp_path.iterdir()} == ALL | {"table.png"}


def test_the_settings_of_matplotlib_stay_as_they_were(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figures.draw(tmp_path, [run()])
    assert dict(matplotlib.rcParams) == before
