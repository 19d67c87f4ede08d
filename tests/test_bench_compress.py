"""The suite of compressed layers and networks: contestants agree; crossovers; merged files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from bench import __main__ as command
from bench import compressed, compressed_int8, compressed_networks, crossover, layers, records
from bench.case import Case, CaseError
from bench.libraries import DENSE, LIBRARIES, OURS
from bench.suites import compress
from bench.worker import _fingerprint
from kernels import reference, simd

CASES = [
    "dense x=40x20 w=20x24",
    "dense x=2x6x5x3 w=3x3x3x8 stride=1 padding=half",
    "sparse density=0.3 x=40x20 w=20x24",
    "sparse density=0.3 x=2x6x5x3 w=3x3x3x8 stride=1 padding=half",
    "sparse4x1 density=0.3 x=40x20 w=20x24",
    "sparse4x1 density=0.3 x=40x20 w=20x22",
    "sparse4x1 density=1.0 x=2x6x6x3 w=3x3x3x8 stride=2 padding=half",
    "codebook bits=4 x=40x20 w=20x24",
    "codebook bits=4 x=2x6x5x3 w=3x3x3x8 stride=1 padding=half",
    "float16 x=40x20 w=20x24",
    "float16 x=2x6x5x3 w=3x3x3x8 stride=1 padding=half",
    "lowrank rank=5 x=40x20 w=20x24",
    "lowrank rank=5 x=2x6x5x3 w=3x3x3x8 stride=1 padding=half",
    "int8_product x=40x20 w=20x24",
    "int8_conv x=2x6x5x8 w=3x3x8x16 stride=1 padding=half",
]


def saturated(problem: compressed_int8.Problem) -> Any:
    """x w of a product of bytes, real, as others sum it where no instruction sums bytes exactly.

    vpmaddubsw adds two products of neighbouring bytes as int16, and stops at its limits.
    """
    x, w = problem.x.astype(np.int64), problem.w.astype(np.int64)
    products = x[:, :, None] * w
    pairs = np.clip(products[:, ::2] + products[:, 1::2], -(2**15), 2**15 - 1)
    x_scale = compressed_int8._X_SCALE
    sums = pairs.sum(1) - compressed_int8._X_ZERO * w.sum(0)
    return sums * x_scale * problem.w_scale.astype(np.float64)


@pytest.mark.parametrize("text", CASES)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("library", compress.LIBRARIES)
def test_contestants_compute_what_the_plain_loops_do(library: str, text: str) -> None:
    case = Case.parse(text)
    if library not in compress.contestants(case):
        pytest.skip(f"{library} does not take part")
    pytest.importorskip(LIBRARIES[library].module)
    if library == "onnxruntime":
        pytest.importorskip("onnx")
    shapes = [case.shape("x"), case.shape("w")]
    if case.family == "dense" and len(shapes[1]) == 4:
        shapes.append(shapes[1][3:])  # as the suite `conv` draws them, with a bias
    x, w, *bias = layers.numbers(*shapes)
    tolerance = 1e-4
    if case.family.startswith("int8"):
        problem = compressed_int8.problem(case, x, w)
        x, w, tolerance = problem.real_x, problem.real_w, 2e-3  # bytes come out
    w = compressed.changed(case, w).astype(np.float64)
    exact = any(simd.LEVELS[name].dot4 == "vpdpbusd" for name in simd.available())
    if case.family == "int8_product" and library.endswith("_int8") and not exact:
        wanted = saturated(problem)
    elif len(w.shape) == 2:
        wanted = x @ w
    else:
        win = layers.Geometry.of(case).window()
        wanted = reference.conv2d(x.astype(np.float64), w, bias[0] if bias else None, win)
    built = compress.build(library, case)
    for name, call in (built if isinstance(built, Mapping) else {"": built}).items():
        call()
        got = _fingerprint(call())
        expected = _fingerprint(wanted)
        assert expected is not None
        close = tolerance * max(1.0, expected[2])  # of the root mean square
        np.testing.assert_allclose(got, expected, rtol=0, atol=close, err_msg=f"{library} {name}")


@pytest.mark.parametrize(("block", "channels"), [(1, 12), (4, 12), (4, 10)])
def test_as_many_blocks_as_asked_stay(block: int, channels: int) -> None:
    w = compressed.thinned(np.ones((3, 3, 5, channels), np.float32), 0.4, block)
    padded = np.zeros((45, -(-channels // block) * block))
    padded[:, :channels] = w.reshape(45, channels)
    blocks = padded.reshape(45, -1, block)
    assert (blocks != 0).any(axis=2).sum() == round(0.4 * 45 * blocks.shape[1])
    assert set(np.unique(w)) == {0, 1}


def test_the_work_of_what_is_left() -> None:
    def work(text: str) -> tuple[float, float]:
        found = compress.work(Case.parse(text))
        return found.flops, found.bytes

    moved = 4 * (100 * 64 + 100 * 32)
    assert work("dense x=100x64 w=64x32") == (2 * 100 * 64 * 32, moved + 4 * 2048)
    assert work("sparse density=0.25 x=100x64 w=64x32") == (100 * 64 * 16, moved + 5 * 512)
    assert work("codebook bits=4 x=100x64 w=64x32") == (2 * 100 * 64 * 32, moved + 1024)
    rank = compressed.half_rank(64, 32)
    flops, _ = work(f"lowrank rank={rank} x=100x64 w=64x32")
    assert flops == 2 * 100 * rank * 96 <= 100 * 64 * 32


@pytest.mark.parametrize(
    "text",
    [
        "sparse x=4x4 w=4x4",
        "sparse density=0 x=4x4 w=4x4",
        "sparse density=much x=4x4 w=4x4",
        "plan_dense x=1x32x32x3 model=large",
        "plan_dense x=1x32x32x3 model=small_cifar variant=slow",
        "plan_dense x=1x32x32 model=small_cifar",
    ],
)
def test_wrong_cases_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--case", text]) == 2
    assert "incomplete or wrong" in capsys.readouterr().err


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "plan_dense x=2x8x8x3 model=small_cifar",
        "plan_sparse x=2x8x8x3 model=small_cifar density=0.3",
        "plan_sparse4x1 x=2x8x8x3 model=small_cifar density=0.3 variant=measured",
        "plan_codebook x=2x8x8x3 model=small_cifar bits=4",
        "plan_float16 x=2x8x8x3 model=small_cifar",
        "plan_lowrank x=2x8x8x3 model=small_cifar",
    ],
)
def test_plans_and_what_other_runtimes_get_give_the_same(text: str, tmp_path: Any) -> None:
    case = Case.parse(text)
    (x,) = layers.numbers(case.shape("x"))
    wanted = np.asarray(compress.build(DENSE, case)())  # type: ignore[operator]
    got = np.asarray(compress.build(OURS, case)())  # type: ignore[operator]
    close = 5e-3 if "float16" in text else 1e-5  # what is folded is rounded once more
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=close)
    if "onnxruntime" in compress.contestants(case):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
        compressed_networks.export(case, str(tmp_path / "model.onnx"))
        content = (tmp_path / "model.onnx").read_bytes()
        call = layers.onnxruntime_network(1, content, x.transpose(0, 3, 1, 2))
        np.testing.assert_allclose(call(), wanted, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_low_rank_is_raced_against_whole_layers() -> None:
    case = Case.parse("plan_lowrank x=1x8x8x3 model=small_cifar")
    (x,) = layers.numbers(case.shape("x"))
    whole, factors = (compressed_networks.model(case, dense=dense) for dense in (True, False))
    published = compressed_networks.model(dataclasses.replace(case, family="plan_dense"))
    macs = [tn.count(m, x).macs for m in (published, whole, factors)]
    assert macs[0] == macs[1] > 1.5 * macs[2]


# --- crossovers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "density", "seen"),
    [
        ([(0.1, 4.0), (0.5, 1.0), (1.0, 0.5)], 0.5, True),
        ([(0.1, 4.0), (0.3, 2.0), (0.7, 0.5)], 0.5, True),
        ([(0.1, 0.9), (0.2, 2.0), (0.4, 0.5)], 0.3, True),  # where it last passes 1
        ([(0.1, 0.9), (0.5, 0.5)], 0.1, False),
        ([(0.1, 3.0), (1.0, 1.1)], 1.0, False),
    ],
)
def test_where_a_curve_last_passes_one(curve: Any, density: float, seen: bool) -> None:
    assert crossover.crossing(curve) == (pytest.approx(density), seen)


def _record(text: str, seconds: float, **peers: float) -> list[dict[str, Any]]:
    case = Case.parse(text)
    own = {"case": str(case), "family": case.family, "variant": case.variant}
    own |= {"threads": case.threads, "seconds": seconds}
    return [own | {"peer": p, "peer_seconds": s, "ratio": s / seconds} for p, s in peers.items()]


def _run() -> list[dict[str, Any]]:
    shape, row = "x=64x8 w=8x16 layer=a", "x=1x8 w=8x16 layer=b"
    return [
        *_record(f"dense {shape}", 2.0, torch=1.0, openvino=3.0),
        *_record(f"sparse density=0.25 {shape}", 1.0, tinynn_dense=4.0, scipy=2.0),
        *_record(f"sparse density=0.75 {shape}", 4.0, tinynn_dense=4.0, scipy=8.0),
        *_record(f"sparse density=0.25 {row}", 2.0, tinynn_dense=1.0),
    ]


def test_crossovers_against_our_dense_kernel_and_the_best_dense_peer() -> None:
    found = {(c.library, c.against, c.few_rows): c for c in crossover.crossovers(_run())}
    assert len(found) == 5
    own = found[OURS, DENSE, False]
    assert own.curve == [(0.25, 4.0), (0.75, 1.0)] and own.density == 0.75
    # torch takes half of our dense kernel's time
    assert found[OURS, crossover.BEST_DENSE, False].curve == [(0.25, 2.0), (0.75, 0.5)]
    assert found[OURS, crossover.BEST_DENSE, False].density == pytest.approx(0.5)
    assert found["scipy", crossover.BEST_DENSE, False].curve == [(0.25, 1.0), (0.75, 0.25)]
    never = found[OURS, DENSE, True]
    assert not never.seen and never.density == 0.25 and "<0.25" in "\n".join(
        crossover.lines(list(found.values()))
    )  # fmt: skip
    means = {(m["library"], m["against"], m["few_rows"]): m for m in crossover.summarize(
        found.values()
    )}  # fmt: skip
    assert means[OURS, DENSE, False]["geomean"] == pytest.approx(0.75)
    assert means[OURS, DENSE, True]["bounds"] == 1


# --- merged files ---------------------------------------------------------------------------------


def _content(found: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    environment = {"cpu": "a", "versions": {}, "python": "3", "os": "linux", "commit": "c"}
    environment |= {"load_average": [0.0], "limits": [], "choices": [], "failures": []}
    return {"environment": environment | changes, "records": found}


def test_merging_takes_the_last_of_a_case(tmp_path: Any, capsys: Any) -> None:
    again = _record("sparse density=0.25 x=64x8 w=8x16 layer=a", 2.0, tinynn_dense=4.0)
    failure = {"case": again[0]["case"], "library": "scipy", "reason": "absent"}
    files = [tmp_path / f"{i}.json" for i in range(3)]
    files[0].write_text(json.dumps(_content(_run(), failures=[failure])))
    files[1].write_text(json.dumps(_content(again, commit="d")))
    arguments = ["--merge", *map(str, files[:2]), "--json", str(files[2]), "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    content = json.loads(files[2].read_text())
    assert len(content["records"]) == len(_run()) - 1  # scipy was in the first only
    assert content["environment"]["failures"] == []
    assert [part["commit"] for part in content["environment"]["parts"]] == ["c", "d"]
    ratios = {(s["family"], s["peer"]): s["geomean"] for s in content["summary"]}
    assert ratios["sparse", DENSE] == pytest.approx(math.cbrt(2.0 * 1.0 * 0.5))
    assert ratios["sparse", records.BEST_PEER] == 2.0  # our own dense kernel is no peer
    assert {c["shape"].split("=")[-1] for c in content["crossovers"]} == {"a", "b"}
    assert (tmp_path / "crossover.png").read_bytes().startswith(b"\x89PNG")
    assert "crossover density" in capsys.readouterr().out


def test_what_cannot_be_merged_is_refused(tmp_path: Any, capsys: Any) -> None:
    with pytest.raises(CaseError, match="same cpu"):
        records.merge([_content(_run()), _content([], cpu="b")])
    file = tmp_path / "broken.json"
    file.write_text("{}")
    assert command.main(["--merge", str(file)]) == 2
    assert "no result of a run" in capsys.readouterr().err


def test_match_chooses_among_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    options = command._parser().parse_args(
        ["compress", "--threads", "1", "--match", "density=0.1 ", "simplenet"]
    )
    cases = [case for _, case in command._problems(options)]
    assert len(cases) == 4 and {case.family for case in cases} == set(crossover.SPARSE)
    for wrong, said in ((["--match", "nothing at all"], "no case"), (["--rounds", "0"], "rounds")):
        assert command.main(["compress", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_the_cases_of_a_suite_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--threads", "1", "--match", "plan_lowrank", "small_cifar"]
    assert command.main(["compress", "--list", *chosen]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 and all(Case.parse(line).family == "plan_lowrank" for line in listed)
    twice = [*chosen, "--threads", "1", "1", "--match", "int8_product"]
    assert command.main(["compress", "--list", *twice]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed and len(set(printed)) == len(printed)
    assert command.main(["nothing", "--list"]) == 2
    capsys.readouterr()
    assert command.main(["--list"]) == 0 and "x=" not in capsys.readouterr().out
