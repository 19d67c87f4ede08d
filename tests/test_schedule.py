"""Schedules against values computed by hand, and against torch where it has the same one."""

from __future__ import annotations

import math

import pytest

from tinynn import schedule
from tinynn.errors import ConfigError, NonFiniteError

EVERY = [
    schedule.Constant(),
    schedule.Step(10),
    schedule.MultiStep([5, 9], factor=0.5),
    schedule.Cosine(40, warmup=3),
    schedule.OneCycle(40, peak=1.0),
    schedule.Plateau(),
]


def rates(s, steps, base=0.1):
    return [s.lr(step, base) for step in steps]


@pytest.mark.parametrize("s", EVERY, ids=lambda s: type(s).__name__)
def test_all_schedules_share_one_interface(s):
    assert isinstance(s.lr(0, 0.1), float)
    s.observe(1.0)
    s.load_state_dict(s.state_dict())
    with pytest.raises(ConfigError, match="stranger"):
        s.load_state_dict({"stranger": 1.0})


def test_constant():
    assert rates(schedule.Constant(), [0, 1, 10**9]) == [0.1] * 3


def test_step():
    s = schedule.Step(every=3, factor=0.5)
    assert rates(s, range(7), base=8.0) == [8, 8, 8, 4, 4, 4, 2]


def test_multi_step_with_the_published_values():
    s = schedule.MultiStep([40_000, 60_000], values=[0.01, 0.001])
    steps = [0, 39_999, 40_000, 59_999, 60_000, 80_000]
    assert rates(s, steps) == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


def test_multi_step_with_a_factor():
    s = schedule.MultiStep([2, 3, 6], factor=0.5)
    assert rates(s, range(8), base=8.0) == [8, 8, 4, 2, 2, 2, 1, 1]


def test_cosine_with_warmup():
    s = schedule.Cosine(total=12, warmup=4, final=0.2)
    assert rates(s, range(4), base=1.0) == [0.25, 0.5, 0.75, 1.0]
    assert s.lr(4, 1.0) == 1.0
    assert s.lr(6, 1.0) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert s.lr(8, 1.0) == pytest.approx(0.6)
    assert rates(s, [12, 13, 1000], base=1.0) == [0.2] * 3


def test_one_cycle():
    s = schedule.OneCycle(total=21, peak=1.0, final=0.0, rise=6 / 21)  # top at step 5
    assert s.lr(0, 0.5) == 0.5
    assert s.lr(5, 0.5) == pytest.approx(1.0)
    assert s.lr(2, 0.5) == pytest.approx(0.7)
    assert s.lr(8, 0.5) == pytest.approx(0.7)
    assert s.lr(10, 0.5) == pytest.approx(0.5)
    assert s.lr(15, 0.5) == pytest.approx(0.25)
    assert rates(s, [20, 21, 500], base=0.5) == pytest.approx([0, 0, 0])


def test_plateau_waits_shrinks_and_stops_at_its_floor():
    s = schedule.Plateau(patience=2, factor=0.1, min_lr=0.005)
    seen = []
    for loss in [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.5, 3.5, 3.5, 3.5, 3.5]:
        s.observe(loss)
        seen.append(s.lr(0, 0.1))
    assert seen == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.005] * 3)


def test_plateau_never_raises_a_rate_to_its_floor():
    assert schedule.Plateau(min_lr=0.5).lr(0, 0.1) == 0.1


def test_plateau_threshold_is_relative_also_below_zero():
    for sign in (1.0, -1.0):
        s = schedule.Plateau(patience=0, factor=0.5, threshold=0.1)
        s.observe(sign)
        s.observe(sign - 0.2)
        assert s.lr(0, 1.0) == 1.0
        s.observe(sign - 0.2 - 0.01)
        assert s.lr(0, 1.0) == 0.5


def test_plateau_continues_from_its_state():
    losses = [3.0, 2.0, 2.5, 2.5, 2.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    whole, first, second = (schedule.Plateau(patience=1, factor=0.5) for _ in range(3))
    for cut in range(len(losses)):
        whole.load_state_dict({"waited": 0, "scale": 1.0})
        first.load_state_dict({"waited": 0, "scale": 1.0})
        for i, loss in enumerate(losses):
            if i == cut:
                second.load_state_dict(first.state_dict())
            whole.observe(loss)
            (second if i >= cut else first).observe(loss)
        assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_plateau_refuses_a_loss_that_is_not_finite(loss):
    with pytest.raises(NonFiniteError, match=str(loss)):
        schedule.Plateau().observe(loss)


@pytest.mark.parametrize(
    "state", [{}, {"waited": 1}, {"waited": 0, "scale": math.nan}, {"waited": 0, "best": 1.0}]
)
def test_plateau_refuses_a_broken_state(state):
    with pytest.raises(ConfigError, match="Plateau"):
        schedule.Plateau().load_state_dict(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedule.Step(0),
        lambda: schedule.Step(5, factor=0),
        lambda: schedule.MultiStep([]),
        lambda: schedule.MultiStep([1]),
        lambda: schedule.MultiStep([1], values=[0.1], factor=0.1),
        lambda: schedule.MultiStep([3, 3], factor=0.1),
        lambda: schedule.MultiStep([-1], factor=0.1),
        lambda: schedule.MultiStep([1, 2], values=[0.1]),
        lambda: schedule.MultiStep([1], values=[math.nan]),
        lambda: schedule.Cosine(0),
        lambda: schedule.Cosine(5, warmup=5),
        lambda: schedule.Cosine(5, final=-1),
        lambda: schedule.OneCycle(100, peak=0),
        lambda: schedule.OneCycle(100, peak=1, rise=0.6),
        lambda: schedule.OneCycle(2, peak=1),
        lambda: schedule.Plateau(patience=-1),
        lambda: schedule.Plateau(factor=1.0),
        lambda: schedule.Plateau(min_lr=math.inf),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ConfigError, match="came"):
        make()


# --- torch ---------------------------------------------------------------------------------------


def torch_rates(make, steps, base=0.1):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schedule.Step(4, 0.3), lambda s, o: s.StepLR(o, 4, 0.3)),
        (schedule.MultiStep([3, 11], factor=0.1), lambda s, o: s.MultiStepLR(o, [3, 11], 0.1)),
        (schedule.Cosine(30, final=0.01), lambda s, o: s.CosineAnnealingLR(o, 30, 0.01)),
        (
            schedule.OneCycle(30, peak=0.7, final=0.001, rise=0.3),
            lambda s, o: s.OneCycleLR(
                o,
                max_lr=0.7,
                total_steps=30,
                pct_start=0.3,
                anneal_strategy="linear",
                three_phase=True,
                div_factor=7,
                final_div_factor=100,
            ),
        ),
    ],
    ids=["step", "multistep", "cosine", "onecycle"],
)
def test_agrees_with_torch(ours, theirs):
    # One step less than the total: torch's one-cycle scheduler refuses to look beyond its end.
    assert rates(ours, range(29)) == pytest.approx(torch_rates(theirs, 29), rel=1e-9)


def test_plateau_agrees_with_torch():
    torch = pytest.importorskip("torch")
    losses = [1 / (1 + i) if i < 5 else 0.2 + 0.1 * math.sin(7 * i) for i in range(60)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=3, min_lr=1e-4
    )
    ours = schedule.Plateau(patience=3, factor=0.5, min_lr=1e-4)
    for loss in losses:
        ours.observe(loss)
        theirs.step(loss)
        assert ours.lr(0, 0.1) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
