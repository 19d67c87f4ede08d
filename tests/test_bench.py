"""The benchmark harness: strings, arithmetic, processes. Nothing here asserts a time."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench
from bench import __main__ as command
from bench import libraries, suites
from bench.case import Case, CaseError
from bench.race import Race, Settings, Team
from bench.records import geometric_mean, records_of, summarize
from bench.suites import Work, train_step
from kernels import probes, simd
from kernels._jit import planning
from kernels.timing import Timing, compare, measure
from tinynn import roofline
from tinynn.environment import cache_sizes, environment
from tinynn.roofline import Limits

FAST = Settings(rounds=3, round_seconds=1e-4, pause=0.0)
LIMITS = Limits(
    threads=1,
    flops=100e9,
    caches={"L1": 1000, "L2": 10_000},
    bandwidths={"L1": 200e9, "L2": 100e9, "L3": 50e9, "memory": 10e9},
    spread=0.01,
)

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
problem_names = names.filter(lambda name: name not in ("family", "variant", "dtype", "threads"))
words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.+-]{0,8}", fullmatch=True)
shapes = st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple)
floats = st.floats(allow_nan=False, allow_infinity=False)
values = shapes | st.integers() | floats | words


class Clock:
    """Advances only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleeper(self, seconds: float) -> Any:
        def call() -> None:
            self.now += seconds

        return call


# --- cases -------------------------------------------------------------------------------------


@given(
    names,
    st.dictionaries(problem_names, values, max_size=5),
    words,
    st.sampled_from(["float32", "int8"]),
    st.integers(1, 512),
)
def test_a_case_is_read_back_from_its_string(family, problem, variant, dtype, threads):
    case = Case.of(family, variant=variant, dtype=dtype, threads=threads, **problem)
    again = Case.parse(str(case))
    assert again == case and hash(again) == hash(case)
    for name, value in problem.items():
        assert again[name] == value and type(again[name]) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1conv",
        "conv x",
        "conv x=",
        "conv x=2x3 x=4x5",
        "conv x=2x3 threads=0",
        "conv threads=two",
        "conv threads=1 threads=1",
        "conv dtype=float31",
        "conv variant=",
        "conv s=-3x2",
    ],
)
def test_a_string_that_is_no_case_is_refused(text):
    with pytest.raises(CaseError):
        Case.parse(text)


@pytest.mark.parametrize("value", [math.inf, math.nan, "two words", "", True, (), (2, -1), "3x3"])
def test_a_value_that_cannot_be_written_is_refused(value):
    with pytest.raises(CaseError):
        Case.of("conv", value=value)


def test_a_case_gives_its_values():
    case = Case.of("conv", x=(8, 28, 28, 3), w=(3, 3, 3, 64), stride=2, padding="same").on(2)
    assert str(case) == (
        "conv x=8x28x28x3 w=3x3x3x64 stride=2 padding=same variant=default dtype=float32 threads=2"
    )
    assert case.shape("x") == (8, 28, 28, 3) and case.integer("stride") == 2
    with pytest.raises(KeyError):
        case["dilation"]
    with pytest.raises(CaseError):
        case.integer("padding")


# --- measuring ---------------------------------------------------------------------------------


def test_measure_on_a_clock_that_the_function_moves():
    clock = Clock()
    timing = measure(clock.sleeper(0.25), rounds=5, round_seconds=2.0, clock=clock)
    assert timing == Timing(median=0.25, spread=0.0, minimum=0.25, rounds=5, repetitions=8)


def test_measure_passes_arguments_and_is_public():
    seen = []
    timing = bench.measure(lambda *args: seen.append(args), 1, "x", rounds=2, round_seconds=1e-5)
    assert set(seen) == {(1, "x")}
    assert timing.rounds == 2 and timing.median > 0 and timing.minimum <= timing.median


def test_contestants_take_turns():
    clock = Clock()
    calls = []

    def contestant(name: str) -> Any:
        sleep = clock.sleeper(1.0)

        def call() -> None:
            sleep()
            calls.append(name)

        return call

    compare({n: contestant(n) for n in "ab"}, rounds=3, round_seconds=1.0, clock=clock)
    assert "".join(calls).endswith("aabb" * 3)  # one untimed and one timed call a round


def test_median_and_spread():
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 100.0], 7)
    assert timing.median == 3.0 and timing.minimum == 1.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"round_seconds": 0.0}])
def test_measure_refuses_no_rounds(wrong):
    with pytest.raises(ValueError, match="rounds"):
        measure(lambda: None, **wrong)


# --- roofline and summary ----------------------------------------------------------------------


def test_attainable_time_is_the_larger_of_arithmetic_and_traffic():
    assert LIMITS.attainable_seconds(1e9, 8) == LIMITS.compute_seconds(1e9) == 1e9 / 100e9
    assert LIMITS.attainable_seconds(0, 1000) == LIMITS.memory_seconds(1000) == 1000 / 200e9
    assert LIMITS.attainable_seconds(0, 1001) == 1001 / 100e9
    assert LIMITS.attainable_seconds(0, 1e9) == 1e9 / 10e9
    assert LIMITS.attainable_seconds(0, 1e9, working_set=8) == 1e9 / 200e9


def test_limits_are_kept_and_a_damaged_file_is_measured_again(tmp_path, monkeypatch):
    measured = []

    spread = 0.01

    def pretend(threads: int) -> Limits:
        measured.append(threads)
        return replace(LIMITS, threads=threads, spread=spread)

    monkeypatch.setattr(roofline, "_measure", pretend)
    cache = tmp_path / "roofline" / "limits.json"
    first = roofline.limits([1, 2], cache=cache)
    assert measured == [1, 2]
    assert roofline.limits([2, 1], cache=cache) == first[::-1]
    assert measured == [1, 2]
    roofline.limits([2], remeasure=True, cache=cache)
    assert measured == [1, 2, 2]
    cache.write_text(cache.read_text()[:-20])
    spread = 0.5  # a busy machine: used, not kept
    for _ in range(2):
        assert roofline.limits([1], cache=cache) == [replace(LIMITS, spread=0.5)]
    assert measured == [1, 2, 2, 1, 1]


def test_probes_do_the_work_that_they_say(monkeypatch):
    monkeypatch.setattr(roofline, "_CALL_BYTES", 1e5)
    a, out = np.full((2, 64), 0.5, np.float32), np.zeros(2, np.float32)
    for read in (probes.read, probes.read_in_four):
        read(a, 3, out)
        assert out.tolist() == [96, 96]
    many = np.full((2, 512), 0.5, np.float32)
    probes.fma(many, np.float32(0.25), 3, out)
    starts, terms = 0.5 * simd.LANES, 3 * 512 * 0.5 * 0.25
    assert out.tolist() == [probes.FMAS_PER_ELEMENT * (starts + terms)] * 2
    probe = roofline.Probe("L1", 2)
    assert probe.flops == probe.nbytes / 4 == 2 * probe.elements * probe.repeats
    assert probe.working_set == 4 * 2 * probe.elements <= 2 * cache_sizes()["L1"]
    assert list(probe.calls()) == ["one stream", "four streams"]


def _race(threads: int, hidden: int, **seconds: float) -> Race:
    case = Case.of("train_step", hidden=hidden, threads=threads)
    return Race(case, {name: Timing(s, 0.1, s, 5, 10) for name, s in seconds.items()})


def test_a_record_of_a_race():
    record, other = records_of(
        _race(1, 50, tinynn=2e-3, torch=5e-3, numpy=1e-3), Work(1e8, 100.0), LIMITS
    )
    assert record == {
        "case": "train_step hidden=50 variant=default dtype=float32 threads=1",
        "family": "train_step",
        "variant": "default",
        "threads": 1,
        "seconds": 2e-3,
        "spread": 0.1,
        "gflops": pytest.approx(50.0),
        "roofline_share": pytest.approx(0.5),
        "peer": "torch",
        "peer_seconds": 5e-3,
        "ratio": 2.5,
    }
    assert (other["peer"], other["ratio"]) == ("numpy", 0.5)


def test_a_record_without_peers_or_limits():
    (record,) = records_of(_race(1, 50, tinynn=2e-3), Work(1e8, 100.0), None)
    assert record["peer"] is None and record["ratio"] is None and record["roofline_share"] is None
    assert records_of(_race(1, 50, torch=2e-3), Work(1e8, 100.0), None) == []


def test_summary_has_geometric_mean_and_worst_case():
    races = [
        _race(1, 1, tinynn=1.0, torch=4.0),
        _race(1, 2, tinynn=1.0, torch=0.5),
        _race(1, 3, tinynn=1.0, torch=4.0),
        _race(2, 1, tinynn=1.0, torch=3.0),
        _race(2, 2, tinynn=1.0),
    ]
    records = [record for race in races for record in records_of(race, Work(1.0, 1.0), None)]
    one = {
        "family": "train_step",
        "peer": "torch",
        "threads": 1,
        "geomean": pytest.approx(2.0),
        "worst": 0.5,
        "worst_case": str(races[1].case),
    }
    two = {
        "family": "train_step",
        "peer": "torch",
        "threads": 2,
        "geomean": pytest.approx(3.0),
        "worst": 3.0,
        "worst_case": str(races[3].case),
    }
    best = {"peer": "best peer"}
    assert summarize(records) == [one, one | best, two, two | best]


def test_the_best_peer_is_the_fastest_in_each_case():
    races = [
        _race(1, 1, tinynn=1.0, torch=4.0, numpy=2.0),
        _race(1, 2, tinynn=1.0, torch=0.5, numpy=8.0),
    ]
    records = [record for race in races for record in records_of(race, Work(1.0, 1.0), None)]
    torch, numpy, best = summarize(records)
    assert (torch["peer"], numpy["peer"], best["peer"]) == ("torch", "numpy", "best peer")
    assert torch["geomean"] == pytest.approx(math.sqrt(2.0))
    assert numpy["geomean"] == pytest.approx(4.0)
    assert best["geomean"] == pytest.approx(1.0)  # numpy in the first case, torch in the second
    assert best["worst"] == 0.5 and best["worst_case"] == str(races[1].case)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_geometric_mean_of_inverses_is_the_inverse(ratios):
    assert geometric_mean([1 / r for r in ratios]) == pytest.approx(1 / geometric_mean(ratios))


# --- processes ---------------------------------------------------------------------------------

TOY = """
import os
import time
from bench.case import Case
from bench.suites import Work

SUMMARY = "a toy"
FAMILIES = ("toy",)
LIBRARIES = ("tinynn", "numpy")


def cases(quick):
    return [Case.of("toy", numpy=how, n=n) for how in ("well",) for n in (10, 20)]


def work(case):
    return Work(flops=1e6, bytes=1e3)


def build(library, case):
    how = case["numpy"] if library == "numpy" else "well"
    if how == "raises":
        raise RuntimeError("no compiler found\\nat all")
    if how == "chatters":
        os.write(1, b"{not json}\\n")
        print("progress")
    if how == "hangs":
        time.sleep(600)
    calls = []

    def call():
        calls.append(1)
        if how == "dies" and len(calls) > 3:
            os.write(2, b"illegal instruction\\n")
            os._exit(3)
        return 8.0 if how == "cheats" else 7.0

    return {"slow": lambda: (time.sleep(0.003), call())[1], "quick": call}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A suite whose NumPy does as its case says; workers find it by PYTHONPATH."""
    (tmp_path / "toy_suite.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_suite", raising=False)
    import toy_suite  # type: ignore[import-not-found]

    return toy_suite


def test_contestants_race_in_their_own_processes_until_the_team_is_left(toy):
    with Team(FAST) as team:
        race = team.race(toy, Case.of("toy", numpy="chatters", n=1), ["tinynn", "numpy"])
        workers = list(team._workers.values())
        assert len(workers) == 2 and all(worker.alive() for worker in workers)
    assert race.failures == {}
    assert {name: timing.rounds for name, timing in race.timings.items()} == {
        "tinynn": 3,
        "numpy": 3,
    }
    assert race.choices == {"tinynn": "quick", "numpy": "quick"}
    assert not any(worker.alive() for worker in workers)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raises", "RuntimeError: no compiler found at all"),
        ("dies", "exit status 3.*illegal instruction"),
        ("cheats", "its answer differs"),
    ],
)
def test_who_fails_is_named_with_the_reason_and_the_others_go_on(toy, how, reason):
    with Team(FAST) as team:
        race = team.race(toy, Case.of("toy", numpy=how), ["tinynn", "numpy"])
        assert list(race.timings) == ["tinynn"]
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(race.failures["numpy"])
        again = team.race(toy, Case.of("toy", numpy="well"), ["tinynn", "numpy"])
        assert again.failures == {} and len(again.timings) == 2


def test_who_hangs_is_stopped(toy):
    settings = Settings(rounds=3, round_seconds=1e-4, pause=0.0, build_timeout=0.5)
    with Team(settings) as team:
        race = team.race(toy, Case.of("toy", numpy="hangs"), ["numpy"])
        assert race.failures == {"numpy": "no answer in time; stopped"}
        assert not any(worker.alive() for worker in team._workers.values())
        later = team.race(toy, Case.of("toy", numpy="well"), ["numpy"])
        assert "not tried again" in later.failures["numpy"]


def test_who_is_not_installed_is_named(toy, monkeypatch):
    absent = libraries.Library("absent", "no_such_module_anywhere", lambda threads: None)
    monkeypatch.setitem(libraries.LIBRARIES, "absent", absent)
    with Team(FAST) as team:
        race = team.race(toy, Case.of("toy", numpy="well"), ["numpy", "absent"])
    assert list(race.timings) == ["numpy"]
    assert race.failures == {"absent": "not installed (no_such_module_anywhere)"}


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def only_toy(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command knows the toy suite alone, and limits that need no measuring."""
    monkeypatch.setattr(suites, "names", lambda: ["toy"])
    monkeypatch.setattr(suites, "load", lambda name: toy)
    monkeypatch.setattr(roofline, "limits", lambda *args, **kwargs: [LIMITS])
    monkeypatch.setattr(command, "QUICK", FAST)


KEYS = ["case", "family", "variant", "threads", "seconds", "spread", "gflops", "roofline_share"]
KEYS += ["peer", "peer_seconds", "ratio"]


def test_json_without_peers(only_toy, tmp_path):
    file = tmp_path / "new" / "toy.json"
    arguments = ["toy", "--quick", "--threads", "1", "--peers", "--json", str(file)]
    assert command.main(arguments) == 0
    content = json.loads(file.read_text())
    assert list(content) == ["environment", "records", "summary"]
    assert [list(record) for record in content["records"]] == [KEYS, KEYS]
    for record in content["records"]:
        assert Case.parse(record["case"]).family == record["family"] == "toy"
        assert record["seconds"] > 0 and record["spread"] >= 0 and record["threads"] == 1
        assert record["gflops"] == pytest.approx(1e6 / record["seconds"] / 1e9)
        assert record["roofline_share"] == pytest.approx(1e6 / 100e9 / record["seconds"])
        assert record["peer"] is record["peer_seconds"] is record["ratio"] is None
    assert content["summary"] == []
    assert {"cpu", "threads", "versions", "commit", "limits", "failures"} <= set(
        content["environment"]
    )
    assert [path.name for path in file.parent.iterdir()] == ["toy.json"]


def test_json_plots_and_table_with_a_peer(only_toy, tmp_path, capsys):
    file, out = tmp_path / "toy.json", tmp_path / "plots"
    arguments = ["toy", "--quick", "--threads", "1", "--json", str(file), "--out", str(out)]
    assert command.main(arguments) == 0
    content = json.loads(file.read_text())
    assert [list(record) for record in content["records"]] == [KEYS, KEYS]
    ratios = [record["ratio"] for record in content["records"]]
    for record in content["records"]:
        assert record["peer"] == "numpy"
        assert record["ratio"] == pytest.approx(record["peer_seconds"] / record["seconds"])
    line, best = content["summary"]
    assert best == line | {"peer": "best peer"}
    assert list(line) == ["family", "peer", "threads", "geomean", "worst", "worst_case"]
    assert line["geomean"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
    assert line["worst"] == min(ratios)
    for name in ("summary.png", "ratios.png", "roofline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert line["worst_case"] in printed and "geomean" in printed


def test_what_was_timed_before_an_interruption_is_written(only_toy, tmp_path, monkeypatch):
    race, file, calls = Team.race, tmp_path / "toy.json", []

    def interrupted(team, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return race(team, *arguments)

    monkeypatch.setattr(Team, "race", interrupted)
    arguments = ["toy", "--quick", "--threads", "1", "--peers", "--json", str(file)]
    assert command.main(arguments) == 130
    assert len(json.loads(file.read_text())["records"]) == 1


def test_a_case_is_run_again_from_its_string_and_its_failure_reported(only_toy, tmp_path, capsys):
    file = tmp_path / "toy.json"
    case = str(Case.of("toy", numpy="raises", n=3))
    assert command.main(["--case", case, "--quick", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert [record["case"] for record in content["records"]] == [case]
    (failure,) = content["environment"]["failures"]
    assert failure["case"] == case and failure["library"] == "numpy"
    assert "no compiler found" in failure["reason"]
    assert "not timed: RuntimeError: no compiler found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no_such_suite"],
        ["--case", "no_such_family x=1x"],
        ["--case", "train_step x"],
        ["--case", "train_step x=10x2"],
        ["--case", "train_step x=10x2 hidden=1x2"],
        ["train_step", "--threads", "0"],
        ["train_step", "--threads", "100000"],
        ["train_step", "--peers", "no_such_peer"],
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(arguments, capsys):
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("bench: ")


def test_the_list_names_every_suite(capsys):
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert {"roofline", "train_step"} <= {line.split()[0] for line in printed.splitlines()}


def test_every_suite_can_build_its_own_cases():
    with planning(), np.errstate(all="ignore"):  # what they count follows from shapes
        check_suites()


def check_suites():
    for name in suites.names():
        suite = suites.load(name)
        assert suite.LIBRARIES[0] == libraries.OURS
        assert set(suite.LIBRARIES) <= set(libraries.LIBRARIES)
        for quick in (True, False):
            for case in suite.cases(quick):
                assert suites.suite_of(case) is suite and Case.parse(str(case)) == case
                assert suite.work(case).flops > 0 or suite.work(case).bytes > 0


# --- the suites' contestants -------------------------------------------------------------------


@pytest.mark.parametrize("library", ["tinynn", "torch"])
@pytest.mark.parametrize("hidden", [1, 7])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_steps_do_the_same_work(library, hidden, dtype):
    if library == "torch":
        pytest.importorskip("torch")
    case = Case.of("train_step", x=(20, 2), hidden=hidden, dtype=dtype)
    steps = train_step.build(library, case)
    by_hand = train_step.build("numpy", case)
    assert callable(by_hand)
    expected = [by_hand() for _ in range(5)]
    for step in [steps] if callable(steps) else steps.values():
        losses = [step() for _ in range(5)]
        got = [float(np.asarray(loss.detach())) for loss in losses]  # type: ignore[attr-defined]
        np.testing.assert_allclose(got, expected, rtol=1e-4 if dtype == "float32" else 1e-12)


def test_environment_is_json():
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert record["cpu"]["usable_cores"] >= 1 and record["cpu"]["caches"]["L1"] > 0
    assert "numpy" in record["versions"]
