"""The training loop: it ends, logs, stops on NaN, and resumes bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinynn import nn, ops
from tinynn.checkpoint import load_checkpoint
from tinynn.data import Batches
from tinynn.errors import (
    ConfigError,
    DataError,
    FileFormatError,
    NonFiniteError,
    OutputError,
    TinynnError,
)
from tinynn.optim import SGD, Adam, Optimizer
from tinynn.schedule import Cosine, Plateau, Schedule
from tinynn.storage import read_tensors, write_tensors
from tinynn.tensor import Tensor
from tinynn.train import Converged, History, evaluate, fit, predict


class Setting:
    """A small regression with everything that has a state: dropout, momentum, shuffling."""

    def __init__(self, seed: int = 0, rows: int = 90) -> None:
        rng = np.random.default_rng(seed)
        self.net = nn.Sequential(
            nn.Linear(2, 8, rng=rng), nn.ReLU(), nn.Dropout(0.1, rng=rng), nn.Linear(8, 1, rng=rng)
        )
        x = rng.random((rows, 2), dtype=np.float32)
        self.data = Batches(x, x.sum(1, keepdims=True), size=16, rng=np.random.default_rng(seed))
        self.optimizer: Optimizer = Adam(self.net.parameters(), lr=0.01)
        self.schedule: Schedule = Cosine(total=60)

    def fit(self, **options: Any) -> History:
        return fit(
            self.net,
            options.pop("data", self.data),
            loss=ops.rmse,
            optimizer=self.optimizer,
            schedule=self.schedule,
            **options,
        )


def weights(s: Setting) -> dict[str, np.ndarray]:
    return s.net.state_dict()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_training_reduces_the_loss_and_records_epochs() -> None:
    s = Setting()
    history = s.fit(epochs=10)
    assert len(history) == 10 and history.losses[-1] < history.losses[0] / 2
    assert [r["epoch"] for r in history.records] == list(range(1, 11))
    assert history.records[-1]["step"] == 60
    assert s.optimizer.lr == 0.01  # the schedule's last rate does not stick


def test_records_say_the_rate_although_checkpoints_are_written_between(tmp_path):
    s = Setting()
    history = s.fit(epochs=3, checkpoint=tmp_path / "c.safetensors", checkpoint_seconds=0.0)
    expected = [Cosine(total=60).lr(record["step"] - 1, 0.01) for record in history.records]
    assert [record["lr"] for record in history.records] == expected


def test_same_seed_same_weights() -> None:
    a, b = Setting(), Setting()
    a.fit(epochs=2)
    b.fit(epochs=2)
    assert same(weights(a), weights(b))


def test_converged_means_no_gain_within_the_window() -> None:
    def after(*losses: float) -> bool:
        return Converged(window=2, tolerance=0.1)(History([{"loss": v} for v in losses]))

    assert not after(1.0, 0.99)
    assert not after(1.0, 0.95, 0.85)
    assert after(1.0, 0.95, 0.95)
    assert after(0.5, 1.0, 2.0)


def test_until_ends_the_training() -> None:
    history = Setting().fit(until=lambda h: len(h) == 3)
    assert len(history) == 3
    with pytest.raises(ConfigError, match="epochs, steps or until"):
        Setting().fit()


def test_steps_may_end_within_an_epoch_and_resume_there(tmp_path: Path) -> None:
    whole, cut = Setting(), Setting()
    assert [r["step"] for r in whole.fit(steps=9).records] == [6, 9]
    path = tmp_path / "state"
    cut.fit(steps=4, checkpoint=path)
    later = Setting(1)
    later.data = Batches(whole.data.x, whole.data.y, size=16, rng=np.random.default_rng(7))
    later.fit(steps=9, checkpoint=path, resume=True)
    assert same(weights(later), weights(whole))


@pytest.mark.parametrize("end", [6, 12])
def test_steps_may_end_with_an_epoch_and_resume_with_the_next(end: int, tmp_path: Path) -> None:
    whole, cut, later = Setting(), Setting(), Setting(1)
    expected = whole.fit(steps=15)
    cut.fit(steps=end, checkpoint=tmp_path / "state")
    later.data = Batches(whole.data.x, whole.data.y, size=16, rng=np.random.default_rng(7))
    history = later.fit(steps=15, checkpoint=tmp_path / "state", resume=True)
    assert [r["step"] for r in history.records] == [6, 12, 15]
    assert history.losses == expected.losses
    assert same(weights(later), weights(whole))


def test_data_that_have_no_batches_after_a_resumption_are_refused(tmp_path: Path) -> None:
    Setting().fit(steps=6, checkpoint=tmp_path / "state", data=list(Setting().data))
    with pytest.raises(DataError, match="at least one batch"):
        Setting().fit(steps=9, checkpoint=tmp_path / "state", data=[], resume=True)


def test_log_has_one_line_an_epoch(tmp_path: Path) -> None:
    s = Setting()
    history = s.fit(epochs=3, log=tmp_path / "deep" / "log.jsonl", validation=s.data.take(2))
    lines = [json.loads(t) for t in (tmp_path / "deep" / "log.jsonl").read_text().splitlines()]
    assert lines == history.records
    assert all(np.isfinite(r["validation"]) for r in lines)


def test_evaluation_weighs_rows_not_batches() -> None:
    s = Setting(rows=20)
    s.net.eval()
    expected = ((s.net(Tensor(s.data.x)).data - s.data.y) ** 2).mean()
    assert np.isclose(evaluate(s.net, s.data, ops.mse), expected, rtol=1e-5)
    with pytest.raises(DataError):
        evaluate(s.net, [], ops.mse)


def stopping_after(step: int, data: Batches) -> Iterator[Any]:
    """An epoch that is cut off, as by a power failure, after some steps."""
    for i, batch in enumerate(data):
        if i == step:
            raise RuntimeError("power failure")
        yield batch


class Cut:
    """The data set of a run that dies in its third epoch."""

    def __init__(self, data: Batches) -> None:
        self.data, self.epoch = data, 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        return stopping_after(4 if self.epoch == 3 else 99, self.data)

    def state_dict(self) -> Any:
        return self.data.state_dict()


@pytest.mark.parametrize("seconds", [0.0, 60.0])
@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True), lambda p: Adam(p, lr=0.01)]
)
@pytest.mark.parametrize("schedule", [lambda: Cosine(total=60), lambda: Plateau(patience=1)])
def test_a_resumed_training_gives_the_same_bits(
    tmp_path: Path, seconds: float, make: Callable[..., Optimizer], schedule: Callable[[], Schedule]
) -> None:
    def setting(seed: int) -> Setting:
        s = Setting(seed)
        s.optimizer, s.schedule = make(s.net.parameters()), schedule()
        return s

    whole = setting(0)
    expected = whole.fit(epochs=5)
    path = tmp_path / "state"
    broken = setting(0)
    options = {"epochs": 5, "checkpoint": path, "checkpoint_seconds": seconds}
    with pytest.raises(RuntimeError, match="power failure"):
        broken.fit(data=Cut(broken.data), **options)
    other = setting(1)  # everything that matters must come from the file
    other.data = Batches(whole.data.x, whole.data.y, size=16, rng=np.random.default_rng(99))
    history = other.fit(resume=True, **options)
    assert same(weights(other), weights(whole))
    assert history.losses == expected.losses
    again = setting(2)
    assert again.fit(resume=True, **options).losses == expected.losses
    assert same(weights(again), weights(whole))


def test_resume_without_a_file_starts_afresh(tmp_path: Path) -> None:
    history = Setting().fit(epochs=1, checkpoint=tmp_path / "state", resume=True)
    assert len(history) == 1
    with pytest.raises(ConfigError, match="resume=True requires"):
        Setting().fit(epochs=1, resume=True)


def test_a_damaged_checkpoint_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "state"
    Setting().fit(epochs=1, checkpoint=path)
    content = path.read_bytes()
    for damaged in (content[:-5], content[:100], b"", content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        s = Setting(3)
        before = weights(s)
        with pytest.raises(FileFormatError, match="state"):
            s.fit(epochs=2, checkpoint=path, resume=True)
        assert same(weights(s), before)
        assert path.read_bytes() == damaged


def test_a_checkpoint_of_something_else_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "state"
    Setting().fit(epochs=1, checkpoint=path)
    other_optimizer, other_data, other_net = Setting(1), Setting(1, rows=40), Setting(1)
    other_optimizer.optimizer = SGD(other_optimizer.net.parameters(), lr=0.1)
    other_net.net = nn.Sequential(nn.Linear(2, 1, rng=np.random.default_rng(0)))
    other_net.optimizer = Adam(other_net.net.parameters(), lr=0.1)
    for s in (other_optimizer, other_data, other_net):
        before = weights(s)
        with pytest.raises(TinynnError):
            s.fit(epochs=2, checkpoint=path, resume=True)
        assert same(weights(s), before)
    model = tmp_path / "model"
    nn.save(model, Setting().net)
    s = Setting()
    with pytest.raises(FileFormatError, match="no training checkpoint"):
        load_checkpoint(model, s.net, s.optimizer, s.schedule, s.data)


def test_nan_in_the_loss_stops_with_the_step_and_the_op() -> None:
    s = Setting()

    def bad_loss(prediction: Tensor, target: Any) -> Tensor:
        return ops.rmse(ops.log(prediction - 1e6), target)

    with pytest.raises(NonFiniteError, match=r"step 0.*Log.*16 of 16"):
        fit(s.net, s.data, loss=bad_loss, optimizer=s.optimizer, epochs=1)


def test_exploding_weights_are_named_with_the_step() -> None:
    s = Setting()
    s.schedule = Plateau(patience=100)
    s.optimizer = SGD(s.net.parameters(), lr=1e30)
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss is (nan|inf)"):
        s.fit(epochs=5)


def test_data_without_batches_and_unwritable_files() -> None:
    s = Setting()
    with pytest.raises(DataError, match="at least one batch"):
        s.fit(data=[], epochs=1)
    with pytest.raises(OutputError):
        s.fit(epochs=1, log="/proc/nothing/log.jsonl")
    with pytest.raises(OutputError):
        s.fit(epochs=1, checkpoint="/proc/nothing/state")


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r}); sys.path.insert(0, {tests!r})
from test_train import Setting
from tinynn.train import fit
s = Setting()
class Slow:
    def __iter__(self):
        for batch in s.data:
            time.sleep(0.02)
            yield batch
    def state_dict(self): return s.data.state_dict()
    def load_state_dict(self, state): s.data.load_state_dict(state)
print("started", flush=True)
s.fit(data=Slow(), epochs=1000, checkpoint=sys.argv[1], checkpoint_seconds=0.05)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_process_leaves_a_usable_checkpoint(
    tmp_path: Path, how: signal.Signals
) -> None:
    path = tmp_path / "state"
    here = Path(__file__).resolve()
    script = SCRIPT.format(root=str(here.parents[1]), tests=str(here.parent))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert b"stopped by the user at step" in errors
    s = Setting(5)
    s.data = Setting(0).data
    at, _ = load_checkpoint(path, s.net, s.optimizer, s.schedule, s.data)
    assert at.step > 0
    resumed = Setting(6)
    resumed.data = Setting(0).data
    resumed.fit(epochs=at.epoch + 2, checkpoint=path, resume=True)
    whole = Setting(0)
    whole.fit(epochs=at.epoch + 2)
    assert same(weights(resumed), weights(whole))


def test_an_optimiser_of_another_model_is_refused() -> None:
    s = Setting()
    with pytest.raises(ConfigError, match="not the model's"):
        fit(s.net.copy(), s.data, loss=ops.rmse, optimizer=s.optimizer, epochs=1)


def test_gradients_from_before_do_not_leak_into_the_first_step() -> None:
    a, b = Setting(), Setting()
    x, y = next(iter(Setting(5).data))
    ops.rmse(b.net.eval()(Tensor(x)), y).backward()
    a.fit(epochs=1)
    b.net.train()
    b.fit(epochs=1)
    assert same(weights(a), weights(b))


def test_a_list_of_batches_resumes_in_the_middle_too(tmp_path: Path) -> None:
    batches = list(Setting().data)
    path = tmp_path / "state"
    whole, cut, rest = Setting(), Setting(), Setting(1)
    whole.fit(data=batches, steps=9)
    cut.fit(data=batches, steps=4, checkpoint=path)
    assert rest.fit(data=batches, steps=9, checkpoint=path, resume=True).records[-1]["step"] == 9
    # the part of an epoch counts as one, so the second fit begins the list again
    assert not same(weights(rest), weights(cut))

    with pytest.raises(RuntimeError):
        broken = Setting()
        options = {"epochs": 3, "checkpoint": path, "checkpoint_seconds": 0.0}
        broken.fit(data=CutList(batches), **options)
    later, straight = Setting(1), Setting()
    later.fit(data=batches, resume=True, **options)
    straight.fit(data=batches, epochs=3)
    assert same(weights(later), weights(straight))


class CutList:
    """A list of batches that fails in its second epoch."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.epoch = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for i, batch in enumerate(self.batches):
            if self.epoch == 2 and i == 3:
                raise RuntimeError("power failure")
            yield batch


def test_an_explosion_in_the_last_step_does_not_overwrite_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "state"
    s = Setting()
    s.fit(epochs=1, checkpoint=path)
    good = path.read_bytes()
    wild = Setting()
    wild.optimizer = SGD(wild.net.parameters(), lr=1e39)
    with pytest.raises(NonFiniteError, match="was made NaN or infinite by the update of step 0"):
        fit(wild.net, wild.data, loss=ops.mse, optimizer=wild.optimizer, steps=1, checkpoint=path)
    assert path.read_bytes() == good


def test_a_finished_training_that_is_resumed_leaves_the_data_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "state"
    Setting().fit(steps=4, checkpoint=path)
    s = Setting()
    s.fit(steps=4, checkpoint=path, resume=True)
    assert sum(len(x) for x, _ in s.data) == 90


def test_a_loss_must_be_one_number_and_epochs_not_negative() -> None:
    s = Setting()
    with pytest.raises(TinynnError, match="one number"):
        fit(s.net, s.data, loss=lambda p, t: p - t, optimizer=s.optimizer, epochs=1)
    with pytest.raises(ConfigError, match="required a loss that gives a Tensor; came float"):
        fit(s.net, s.data, loss=lambda p, t: 1.0, optimizer=s.optimizer, epochs=1)  # type: ignore[arg-type,return-value]
    for wrong in (-1, 1.5, "1"):
        with pytest.raises(ConfigError, match=">= 0"):
            s.fit(epochs=wrong)


def test_validation_that_is_not_finite_is_named() -> None:
    s = Setting()
    bad = [(np.full((2, 2), np.nan, np.float32), np.zeros((2, 1), np.float32))]
    with pytest.raises(NonFiniteError, match="evaluate"):
        s.fit(epochs=1, validation=bad)


def test_each_epoch_may_add_to_its_record(tmp_path: Path) -> None:
    s = Setting()
    history = s.fit(
        epochs=2,
        log=tmp_path / "log.jsonl",
        each_epoch=lambda record: record.update(twice=2 * record["epoch"]),
    )
    assert [r["twice"] for r in history.records] == [2, 4]
    lines = [json.loads(r) for r in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["twice"] for r in lines] == [2, 4]


@pytest.mark.parametrize("entry", [np.float32(0.5), np.int64(2), math.nan, np.arange(3)])
def test_entries_may_be_numpys(tmp_path: Path, entry: Any) -> None:
    options = {"checkpoint": tmp_path / "c", "log": tmp_path / "l"}
    s = Setting()
    history = s.fit(epochs=1, each_epoch=lambda record: record.update(entry=entry), **options)
    assert history.records[0]["entry"] is entry
    kept = None if entry is math.nan else entry.tolist()
    assert json.loads((tmp_path / "l").read_text())["entry"] == kept
    assert s.fit(epochs=2, resume=True, **options).records[0]["entry"] == kept


def test_entries_that_no_file_can_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="each_epoch: required entries of numbers"):
        Setting().fit(epochs=1, each_epoch=lambda record: record.update(entry=object()))


def test_a_model_that_no_file_can_hold_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    s = Setting()
    s.net.sizes = [1, 2]
    before = weights(s)
    with pytest.raises(ConfigError, match=r"Sequential\.sizes: cannot save list"):
        s.fit(epochs=1, checkpoint=tmp_path / "c")
    assert same(weights(s), before)


def test_shuffled_validation_gives_the_same_bits_after_a_resumption(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> list[float]:
        s = Setting()
        held_out = Batches(s.data.x, s.data.y, size=7, rng=np.random.default_rng(4))
        return [
            r["validation"] for r in s.fit(epochs=epochs, validation=held_out, **options).records
        ]

    path = tmp_path / "c"
    run(2, checkpoint=path)
    assert run(5, checkpoint=path, resume=True) == run(5)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("progress", {"epoch": -1}),
        ("progress", {"step": "1"}),
        ("progress", {"total": math.nan}),
        ("records", [{"step": 1, "loss": "x"}]),
        ("records", ["x"]),
        ("validation", {"rows": 1}),
    ],
)
def test_a_training_state_of_wrong_values_is_refused(tmp_path: Path, part: str, wrong: Any) -> None:
    path, s = tmp_path / "c", Setting()
    s.fit(epochs=1, checkpoint=path, validation=s.data)
    tensors, metadata = read_tensors(path)
    state = json.loads(metadata["state"])
    state[part] = wrong if isinstance(wrong, list) else state[part] | wrong
    write_tensors(path, tensors, {**metadata, "state": json.dumps(state)})
    other = Setting(1)
    before = weights(other)
    with pytest.raises(TinynnError):
        other.fit(epochs=2, checkpoint=path, resume=True, validation=other.data)
    assert same(weights(other), before)


def test_predict_gives_all_rows_in_order_and_leaves_the_mode() -> None:
    s = Setting()
    s.net.train()
    data = Batches(s.data.x, s.data.y, size=7, shuffle=False)
    outputs, targets = predict(s.net, data)
    assert s.net.training
    np.testing.assert_array_equal(targets, s.data.y)
    np.testing.assert_allclose(outputs, s.net.eval()(Tensor(s.data.x)).numpy(), rtol=1e-6)
    with pytest.raises(DataError, match="at least one batch"):
        predict(s.net, [])
