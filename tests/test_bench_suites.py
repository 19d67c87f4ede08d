"""The suites of single layers: their shapes, their work, and that all contestants agree."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import numpy as np
import pytest

from bench import __main__ as command
from bench import layers, libraries, suites
from bench.case import Case
from bench.suites import batchnorm, conv, deconv, depthwise, matmul, pool
from bench.worker import _fingerprint
from kernels import reference
from kernels.geometry import Window

SUITES = [matmul, conv, depthwise, deconv, batchnorm, pool]
MODULES = {libraries.OURS: "tinynn", **{n: e.module for n, e in libraries.LIBRARIES.items()}}

#: Small cases: a stride that leaves pixels over, one without padding, several results a channel.
CASES = [
    "matmul x=5x7 w=7x6",
    "conv x=2x6x5x3 w=3x3x3x4 stride=1 padding=half",
    "conv x=2x6x5x3 w=1x5x3x4 stride=1 padding=half",
    "conv x=2x6x6x2 w=3x3x2x4 stride=2 padding=half",
    "conv x=2x6x6x2 w=3x3x2x4 stride=1 padding=valid",
    "depthwise x=2x6x5x3 w=3x3x3x1 stride=1 padding=half",
    "depthwise x=2x6x6x3 w=3x3x3x2 stride=2 padding=half",
    "deconv x=2x3x4x3 w=3x3x3x2 stride=2",
    "deconv x=2x3x4x3 w=3x3x3x2 stride=1",
    "batchnorm x=3x2x4x5",
    "pool x=2x6x4x3 size=2 stride=2 padding=0 of=max",
    "pool x=2x6x6x3 size=3 stride=2 padding=1 of=max",
    "pool x=2x6x4x3 size=2 stride=2 padding=0 of=avg",
    "pool x=2x6x6x3 size=6 stride=6 padding=0 of=avg",
]


def directions():
    for text in CASES:
        layer = Case.parse(text)
        families = layers.directions(layer) if "w" in dict(layer.shapes) else batchnorm.FAMILIES
        if layer.family == "pool":
            families = [f"{layer['of']}_pool", f"{layer['of']}_pool_grad"]
        for family in families:
            yield str(Case(family, layer.shapes, layer.attributes))


def expected(case: Case) -> np.ndarray:
    """By the plain loops, in float64, from the numbers that the suite gives its contestants."""
    family, x = case.family, case.shape("x")
    stem, _, way = family.partition("_")
    if stem == "matmul":
        a, w, grad = wide(x, case.shape("w"), (x[0], case.shape("w")[1]))
        return {
            "": lambda: a @ w,
            "input_grad": lambda: grad @ w.T,
            "weight_grad": lambda: a.T @ grad,
        }[way]()
    if stem == "batchnorm":
        a, grad, gamma, beta, mean, spread = wide(x, x, *[(x[3],)] * 4)
        rows = a.reshape(-1, x[3])
        if way == "eval":
            y = gamma * (a - mean) / np.sqrt(spread**2 + batchnorm.EPS) + beta
            return np.maximum(y, 0)
        y, mean, var = reference.batchnorm(rows, gamma, beta, batchnorm.EPS, True)
        if way == "":
            return y
        flat = grad.reshape(rows.shape)
        return reference.batchnorm_grad(flat, rows, y, gamma, mean, var, batchnorm.EPS)[0]
    if "pool" in family:
        g = pool._geometry(case)
        a, grad = wide(x, (x[0], *g.output(*x[1:3]), x[3]))
        win = g.window()
        if stem == "avg":
            back = family.endswith("grad")
            return reference.avg_pool2d_grad(grad, x, win) if back else reference.avg_pool2d(a, win)
        y, place = reference.max_pool2d(a, win)
        return reference.max_pool2d_grad(grad, place, x) if family.endswith("grad") else y
    return expected_convolution(case, stem, way)


def expected_convolution(case: Case, stem: str, way: str) -> np.ndarray:
    x, w = case.shape("x"), case.shape("w")
    if stem == "deconv":
        y = deconv._result(case)
        a, kernels, bias, grad = wide(x, w, (w[3],), y)
        win, turned = deconv._geometry(case).window(), kernels.transpose(0, 1, 3, 2)
        if way == "":
            return reference.conv2d_input_grad(a, turned, y, win) + bias
        if way == "input_grad":
            return reference.conv2d(grad, turned, None, win)
        return reference.conv2d_weight_grad(a, grad, win)
    g = layers.Geometry.of(case)
    features = w[3] if stem == "conv" else w[2] * w[3]
    a, kernels, bias, grad = wide(x, w, (features,), (x[0], *g.output(*x[1:3]), features))
    win = g.window()
    name = "conv2d" if stem == "conv" else "depthwise2d"
    if way == "":
        return getattr(reference, name)(a, kernels, bias, win)
    if way == "input_grad":
        return getattr(reference, f"{name}_input_grad")(grad, kernels, x, win)
    return getattr(reference, f"{name}_weight_grad")(grad, a, win)


def wide(*shapes):
    return [a.astype(np.float64) for a in layers.numbers(*shapes)]


@pytest.mark.parametrize("text", list(directions()))
@pytest.mark.parametrize("library", ["tinynn", "numpy", "torch", "onnxruntime", "openvino"])
def test_contestants_compute_what_the_plain_loops_do(library, text):
    case = Case.parse(text)
    suite = suites.suite_of(case)
    if library not in suites.contestants(suite, case):
        pytest.skip(f"{library} does not take part")
    if library == libraries.OURS:
        pytest.importorskip(
            f"kernels.{suite.__name__.rpartition('.')[2].replace('matmul', 'pointwise')}"
        )
    else:
        pytest.importorskip(MODULES[library])
    if library == "onnxruntime":
        pytest.importorskip("onnx")
    built = suite.build(library, case)
    answer = _fingerprint(expected(case))
    for name, call in (built if isinstance(built, Mapping) else {"": built}).items():
        call()
        np.testing.assert_allclose(_fingerprint(call()), answer, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: s.__name__)
def test_shapes_give_distinct_cases_and_few_quick_ones(suite):
    every, quick = suite.cases(False), suite.cases(True)
    assert len(set(every)) == len(every)
    assert set(quick) < set(every) and {c.family for c in every} == set(suite.FAMILIES)
    assert {c.family for c in quick} == set(suite.FAMILIES)
    assert len(quick) <= 9


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_taps_are_those_inside_the_image(stride, padding):
    g = layers.Geometry([3, 2], [stride, stride], [padding, 0], [0, padding])
    win = g.window()
    assert win == Window((3, 2), (stride, stride), ((padding, 0), (0, padding)))
    assert g.output(7, 5) == win.output(7, 5)
    assert g.taps(7, 5) == len(list(reference._taps(win, (1, 7, 5, 1))))


def test_known_amounts_of_work():
    """The baseline network has 16.1 million multiply-adds, padding included."""
    case = Case.parse("conv x=1x24x24x3 w=5x5x3x32 stride=1 padding=half")
    assert conv.work(case).flops == 2 * (5 * 24 - 6) ** 2 * 3 * 32
    assert conv.work(case).bytes == 4 * (24 * 24 * 3 + 25 * 96 + 24 * 24 * 32)
    case = Case.parse("matmul x=10x20 w=20x30")
    assert matmul.work(case).flops == 2 * 10 * 20 * 30
    case = Case.parse("deconv x=1x7x7x4 w=3x3x4x2 stride=2")
    assert deconv.work(case).flops == 2 * (3 * 7 - 1) ** 2 * 4 * 2
    case = Case.parse("batchnorm x=2x3x3x5")
    assert batchnorm.work(case).bytes == 3 * 2 * 9 * 5 * 4


@pytest.mark.parametrize(
    "text",
    [
        "conv x=1x4x4x3 w=3x3x3x2 stride=1 padding=odd",
        "conv x=1x2x2x3 w=3x3x3x2 stride=1 padding=valid",
        "conv x=1x4x4x3 stride=1 padding=half",
        "deconv x=1x4x4x3 w=1x1x3x2 stride=2",
        "max_pool x=1x4x4x3 size=2 stride=2",
    ],
)
def test_wrong_cases_are_refused_before_anything_runs(text, capsys):
    assert command.main(["--case", text]) == 2
    assert "incomplete or wrong" in capsys.readouterr().err


def test_kernels_stands_for_its_suites(capsys):
    options = command._parser().parse_args(["kernels", "matmul", "--quick", "--threads", "1"])
    problems = command._problems(options)
    named = {suite.__name__.rpartition(".")[2] for suite, _ in problems}
    assert named == set(suites.GROUPS["kernels"])
    assert len(problems) == len({(s.__name__, str(c)) for s, c in problems})
    assert command.main(["--list"]) == 0
    assert "kernels" in capsys.readouterr().out


def test_a_missing_kernel_file_is_named(monkeypatch):
    def absent(*_, **__):
        raise ImportError("cannot import name 'conv' from 'kernels'")

    monkeypatch.setattr(conv, "_tinynn", absent)
    with pytest.raises(ImportError, match="conv"):
        importlib.import_module(conv.__name__).build("tinynn", conv.cases(True)[0])
