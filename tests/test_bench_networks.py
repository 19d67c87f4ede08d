"""Training steps of whole networks: every library has the same network and the same loss."""

from __future__ import annotations

import numpy as np
import pytest

from bench import __main__ as command
from bench import image_step, networks
from bench.case import Case
from bench.suites import train_step
from tinynn.models import thesis

BATCH = 4


def small(case: Case) -> Case:
    """The case with a batch that takes no time."""
    return Case.of(case.family, x=(BATCH, *case.shape("x")[1:]), **dict(case.attributes))


CASES = [small(case) for case in image_step.cases(quick=False)]


def ours(case: Case):
    rng = np.random.default_rng(0)
    if case.family == "train_baseline":
        return thesis.baseline(case["kind"], rng=rng)
    name = case.family.removeprefix("train_")
    return getattr(thesis, name)(rng=rng)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_lists_of_layers_are_the_models(case):
    shapes = [parameter.shape for parameter in ours(case).parameters()]
    network = image_step.layers(case)
    assert networks.parameters(network) == shapes
    assert [value.shape for value in networks.initial(network)] == shapes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_has_as_many_parameters_and_the_same_losses(case):
    pytest.importorskip("torch")
    network = networks.torch_network(image_step.layers(case))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == sum(parameter.size for parameter in ours(case).parameters())
    step = image_step.build("tinynn", case)
    losses = [float(step().data) for _ in range(3)]
    assert losses[2] < losses[0]
    layouts = image_step.build("torch", case)
    assert set(layouts) == {"contiguous", "channels_last"}
    for name, step in layouts.items():
        theirs = [float(step().detach()) for _ in range(3)]
        # batch norm over a batch of 4 multiplies rounding from step to step
        np.testing.assert_allclose(theirs[0], losses[0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(theirs, losses, rtol=0.05, err_msg=name)


def test_multiply_adds_leave_out_the_padding():
    """Of each side's 5 n taps, 6 lie outside; the published 16.1 million include them."""
    assert networks.multiply_adds(networks.baseline("conv"), (1, 24, 24, 3)) == [
        (5 * 24 - 6) ** 2 * 3 * 32,
        (5 * 12 - 6) ** 2 * 32 * 64,
        (5 * 6 - 6) ** 2 * 64 * 128,
        128 * 10,
    ]


def test_multiply_adds_of_single_layers():
    valid_taps = (3 * 4 - 2) * (3 * 6 - 2)
    for kind, channels in (("conv", 2), ("depthwise", 1)):
        layer = networks.Layer(kind, 2, 2, (3, 3))
        assert networks.multiply_adds([layer], (5, 4, 6, 2)) == [5 * valid_taps * channels * 2]
    deconv = networks.Layer("deconv", 3, 2, (3, 3), 2)
    assert networks.multiply_adds([deconv], (1, 2, 2, 3)) == [(3 * 2 - 1) ** 2 * 3 * 2]
    assert networks.multiply_adds([networks.Layer("linear", 7, 3)], (2, 1, 1, 7)) == [42]


@pytest.mark.parametrize(
    "text",
    [
        "train_baseline x=8x24x24x3",
        "train_baseline x=8x24x24x3 kind=dense",
        "train_baseline x=8x24x24 kind=conv",
        "train_autoencoder x=8x28x28x3",
    ],
)
def test_wrong_cases_are_refused(text, capsys):
    assert command.main(["--case", text]) == 2
    assert "incomplete or wrong" in capsys.readouterr().err


def test_quick_leaves_out_what_compiles_for_minutes():
    case = train_step.cases(quick=True)[-1]

    def chosen(*arguments: str) -> list[str]:
        options = command._parser().parse_args(["train_step", *arguments])
        return command._chosen(train_step, case, options)

    assert chosen() == ["tinynn", "torch", "torch_compile"]
    assert chosen("--quick") == ["tinynn", "torch"]
    assert chosen("--quick", "--peers", "torch_compile") == ["tinynn", "torch_compile"]
    assert chosen("--peers") == ["tinynn"]
