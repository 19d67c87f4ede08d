"""Checkpoints hold masks and codes: a resumed training goes on with them, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn import nn
from tinynn.compress import cluster, sparsify
from tinynn.errors import ConfigError, FileFormatError, ShapeError, TinynnError
from tinynn.nn.module import Parameter
from tinynn.storage import read_tensors, write_tensors

Array = np.ndarray


def net(seed: int = 0) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    return nn.Sequential(nn.Linear(8, 16, rng=rng), nn.ReLU(), nn.Linear(16, 2, rng=rng))


def train(model: nn.Module, steps: int, path: Path | None = None, **options: Any) -> None:
    x = np.random.default_rng(1).standard_normal((48, 8), dtype=np.float32)
    data = tn.Batches(x, (x.sum(1) > 0).astype(int), size=16, rng=np.random.default_rng(2))
    optimizer = tn.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss = tn.softmax_cross_entropy
    tn.fit(model, data, loss=loss, optimizer=optimizer, steps=steps, checkpoint=path, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        np.array_equal(p.data, q.data)
        and (p.mask is None) == (q.mask is None)
        and (p.codes is None) == (q.codes is None)
        and np.array_equal(p.mask, q.mask)  # type: ignore[arg-type]
        and np.array_equal(p.codes, q.codes)  # type: ignore[arg-type]
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def held(model: nn.Module) -> list[Parameter]:
    return [p for p in model.parameters() if p.mask is not None or p.codes is not None]


def thin(model: nn.Module) -> nn.Module:
    return sparsify.weights(model, sparsify.magnitude, sparsify.share(0.3))


@pytest.mark.parametrize("make", [thin, lambda m: cluster.kmeans(m, 4),
                                  lambda m: cluster.kmeans(thin(m), 4)])  # fmt: skip
def test_a_plain_model_resumes_with_masks_and_codes(
    make: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    whole, cut, later = make(net()), make(net()), net(5)
    train(whole, 8)
    train(cut, 4, tmp_path / "c")
    train(later, 8, tmp_path / "c", resume=True)
    assert len(held(later)) == 2 and same(later, whole)


@pytest.mark.parametrize("steps", [2, 5, 8, 10])  # before, in the middle and after the schedule
def test_gradual_pruning_goes_on_where_it_was(steps: int, tmp_path: Path) -> None:
    whole, cut, later = net(), net(), net(5)
    train(whole, 14, each_step=sparsify.Gradual(whole, 8, 0.9, every=3))
    train(cut, steps, tmp_path / "c", each_step=sparsify.Gradual(cut, 8, 0.9, every=3))
    each_step = sparsify.Gradual(later, 8, 0.9, every=3)
    train(later, 14, tmp_path / "c", resume=True, each_step=each_step)
    assert sparsify.density(later) < 0.2 and same(later, whole)


def test_masks_and_codes_of_the_model_given_make_way(tmp_path: Path) -> None:
    whole, cut = net(), net()
    train(whole, 8)
    train(cut, 4, tmp_path / "c")
    later = cluster.kmeans(thin(net(5)), 4)
    train(later, 8, tmp_path / "c", resume=True)
    assert not held(later) and same(later, whole)


def rewrite(path: Path, change: Callable[[dict[str, Array], dict[str, Any]], None]) -> None:
    """Write the checkpoint anew, as valid a file as before, with other tensors or state."""
    tensors, header = read_tensors(path)
    state = json.loads(header["state"])
    change(tensors, state)
    write_tensors(path, tensors, {**header, "state": json.dumps(state)})


def forget(tensors: dict[str, Array], state: dict[str, Any]) -> None:
    del state["held"]
    for name in [n for n in tensors if n.startswith(("masks/", "codes/"))]:
        del tensors[name]


def test_a_checkpoint_from_before_masks_were_kept_leaves_the_models_own(tmp_path: Path) -> None:
    whole, cut = thin(net()), thin(net())
    later = cut.copy()
    train(whole, 8)
    train(cut, 4, tmp_path / "c")
    rewrite(tmp_path / "c", forget)
    train(later, 8, tmp_path / "c", resume=True)
    assert same(later, whole)


def put(name: str, values: Array) -> Callable[[dict[str, Array], dict[str, Any]], None]:
    return lambda tensors, state: tensors.update({name: values})


def say(kind: str, names: Any) -> Callable[[dict[str, Array], dict[str, Any]], None]:
    return lambda tensors, state: state["held"].update({kind: names})


def name_another(tensors: dict[str, Array], state: dict[str, Any]) -> None:
    tensors["masks/x"] = np.ones(3, bool)
    state["held"]["masks"] = ["x"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (put("masks/0.weight", np.ones((8, 15), bool)), ShapeError),
        (put("masks/0.weight", np.ones((8, 16), np.uint8)), ShapeError),
        (put("codes/0.weight", np.full((8, 16), 128, np.uint8)), ShapeError),
        (put("codes/0.weight", np.full((8, 16), -1)), ShapeError),
        (put("codes/0.weight", np.zeros((8, 16), np.float32)), ShapeError),
        (say("masks", ["model"]), FileFormatError),
        (say("codes", 3), FileFormatError),
        (lambda tensors, state: state.update(held={}), FileFormatError),
        (name_another, ConfigError),
    ],
)
def test_masks_and_codes_that_do_not_fit_are_refused_and_nothing_changes(
    change: Any, error: type[TinynnError], tmp_path: Path
) -> None:
    train(cluster.kmeans(thin(net()), 4), 4, tmp_path / "c")
    rewrite(tmp_path / "c", change)
    model = cluster.kmeans(thin(net(3)), 8)
    before = model.copy()
    with pytest.raises(error):
        train(model, 8, tmp_path / "c", resume=True)
    assert same(model, before)
