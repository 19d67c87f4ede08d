"""The experiments on labelled images, on a data set of a few synthetic images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

import tinynn as tn
from experiments import classify
from experiments.runner import Context, main
from experiments.small_cifar import EXPERIMENT, cells, run
from tinynn.data import Dataset

TINY = ["--images", "64", "--test-images", "30", "--batch", "16", "--epochs", "2", "--threads", "1"]


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """12x12 pictures whose class is where the bright half lies."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 100)
    images = rng.integers(0, 60, (100, 12, 12, 3))
    images[labels == 0, :6] += 150
    images[labels == 1, 6:] += 150
    whole = Dataset("halves", images.astype(np.uint8), labels.astype(np.int64), ("top", "bottom"))
    monkeypatch.setattr(tn.data, "load", lambda name, folder=None: (whole, whole))


def config(*flags: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--quick", action="store_true")
    EXPERIMENT.arguments(parser)
    return next(iter(cells(parser.parse_args(flags)).values()))


def test_a_run_from_the_command_line_leaves_its_files(pictures: None, tmp_path: Path) -> None:
    assert main(EXPERIMENT, [*TINY, "--flip", "--out", str(tmp_path), "--model", "small"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    (only,) = result["runs"]
    assert only["parameters"] == 131_018 - 8 * 129
    assert len(only["curve"]) == 2 and only["steps"] == 8
    assert sum(map(sum, only["confusion"])) == only["test_images"] == 30
    assert 0 <= only["accuracy"] <= 1
    assert 0 < only["waiting_seconds"] <= only["seconds"]
    for name in ("curves.png", "classes.png", "model.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000
    model = tn.load(tmp_path / "model.safetensors")
    test = tn.data.load("halves")[1]
    batches = test.take(30).batches(30, augment=classify.augmentation(config()))
    assert tn.accuracy(*tn.predict(model, batches)) == only["accuracy"]


def test_classes_without_test_images_are_drawn_anew(pictures: None, tmp_path: Path) -> None:
    flags = ["--images", "16", "--test-images", "1", "--batch", "16", "--epochs", "1"]
    flags += ["--threads", "1", "--flip", "--out", str(tmp_path)]
    assert main(EXPERIMENT, flags) == 0
    (only,) = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert None in only["class_recall"].values()
    assert main(EXPERIMENT, [*flags, "--resume"]) == 0


def test_an_interrupted_run_goes_on_to_the_same_bits(pictures: None, tmp_path: Path) -> None:
    whole = run(config(*TINY[:-2]), 3, Context(tmp_path / "a"))
    half = Context(tmp_path / "b", resume=True)

    def stop(text: str) -> None:
        if "epoch   2" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # before the checkpoint of the second epoch
        run(config(*TINY[:-2]), 3, Context(tmp_path / "b", resume=True, say=stop))
    assert (tmp_path / "b" / "checkpoint.safetensors").exists()
    again = run(config(*TINY[:-2]), 3, half)
    assert again["confusion"] == whole["confusion"]
    ours, theirs = (tn.load(tmp_path / n / "model.safetensors").state_dict() for n in "ab")
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours)


def test_the_published_recipe_is_the_published_one() -> None:
    c = config("--full")
    assert c["steps"] == 80_000 and c["epochs"] == 0 and c["crop"] == 24 and c["l2"] == 1e-3
    schedule = classify.schedule_of(c, 80_000)
    rates = [schedule.lr(step, 0.1) for step in (0, 39_999, 40_000, 59_999, 60_000, 79_999)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_flags_override_the_recipe() -> None:
    c = config("--recipe", "published", "--lr", "0.3", "--steps", "7")
    assert c["lr"] == 0.3 and c["steps"] == 7 and c["epochs"] == 0 and c["crop"] == 24
