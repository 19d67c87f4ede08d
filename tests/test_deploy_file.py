"""Plans as files: what is loaded is what was saved, and nothing else is loaded."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinynn as tn
from tinynn import nn, storage
from tinynn.compress import cluster, quantize
from tinynn.deploy import deflate, file, separable
from tinynn.errors import FileFormatError
from tinynn.models import thesis

SHAPE = (12, 12, 3)


def small_plan(choose: str = "measure") -> tn.Plan:
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, rng=rng),
        nn.SeparableResidualBlock(8, 16, stride=2, rng=rng),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(144, 4, rng=rng),
        nn.Softmax(),
    )
    return tn.compile(model, np.ones((1, *SHAPE), np.float32), choose=choose)


def byte_plan() -> tn.Plan:
    """All kinds of layers in 8 bits."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, rng=rng),
        nn.SeparableResidualBlock(8, 16, stride=2, rng=rng),
        nn.MaxPool2d(2),
        nn.GlobalAvgPool2d(),
        nn.Linear(16, 4, rng=rng),
        nn.Tanh(),
    )
    return tn.compile(quantize.int8(model, [images(4)]), images(1))


def dynamic_plan() -> tn.Plan:
    """Ranges that are found at run time."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, rng=rng),
        nn.DepthwiseConv2d(8, 3, rng=rng),
        nn.GlobalAvgPool2d(),
        nn.Linear(8, 4, rng=rng),
    )
    return tn.compile(quantize.dynamic(model, images(1)), images(1))


def additive_plan() -> tn.Plan:
    """The ef-operator."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.AdditiveConv2d(3, 8, 3, rng=rng), nn.MaxPool2d(6), nn.Flatten(),
        nn.AdditiveLinear(32, 4, rng=rng),
    )  # fmt: skip
    return tn.compile(model, images(1))


def books_plan() -> tn.Plan:
    """A code book for each channel."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(108, 32, rng=rng))
    model = cluster.kmeans(model, 3, per="channel")
    return tn.compile(model, images(1), choose="codebook")


def bits_plan() -> tn.Plan:
    """Integers of as many bits as a channel takes."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, rng=rng), nn.Conv2d(8, 16, 3, stride=2, rng=rng), nn.GlobalAvgPool2d(),
        nn.Linear(16, 4, rng=rng),
    )  # fmt: skip
    for p in model.parameters():
        if p.ndim > 1:  # channels of very different ranges
            p.mutate()[...] *= np.geomspace(1, 30, p.shape[-1])
    return tn.compile(quantize.low_bit(model, [images(4)]), images(1))


def hashed_plan() -> tn.Plan:
    """Weights that are made of few values."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.HashedConv2d(3, 8, 3, share=0.3, rng=rng), nn.BatchNorm(8), nn.MaxPool2d(6),
        nn.Flatten(), nn.HashedLinear(32, 4, share=0.3, rng=rng),
    )  # fmt: skip
    return tn.compile(model, images(1))


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("name", ["conv", "separable"])
def test_a_loaded_plan_gives_the_same_bits(name: Any, tmp_path: Path) -> None:
    model = thesis.baseline(name, rng=np.random.default_rng(0))
    plan = tn.compile(model, images(1))
    path = tmp_path / "net.plan"
    plan.save(path)
    again = tn.Plan.load(path, threads=1)
    for batch in (1, 5):
        assert np.array_equal(again(images(batch)), plan(images(batch)))
    assert path.stat().st_size == plan.nbytes == again.nbytes
    assert plan.nbytes < 4 * model.size() + 8000  # weights, and little else
    again.save(path)
    assert tn.Plan.load(path).macs == plan.macs


def test_arrays_that_are_the_same_are_stored_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layer = nn.Linear(64, 64, rng=rng)
    once, twice = nn.Sequential(layer), nn.Sequential(layer, nn.Tanh(), layer)
    x = np.ones((1, 64), np.float32)
    assert tn.compile(twice, x).nbytes < tn.compile(once, x).nbytes + 1000


def test_files_that_are_cut_or_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.plan"
    small_plan().save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 300):
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(changed))
        with pytest.raises(FileFormatError):
            tn.Plan.load(path)
    for end in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(FileFormatError):
            tn.Plan.load(path)
    with pytest.raises(FileNotFoundError):
        tn.Plan.load(tmp_path / "none")


def test_a_model_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "model"
    tn.save(path, nn.Sequential(nn.Linear(2, 2, rng=np.random.default_rng(0))))
    with pytest.raises(FileFormatError, match="plan"):
        tn.Plan.load(path)


def parts(plan: tn.Plan) -> tuple[bytes, dict[str, Any]]:
    text, data = file.describe(plan.network)
    return data, json.loads(text)


def load(data: bytes, plan: Any, path: Path, version: int = 3) -> tn.Plan:
    """A file with a right hash and whatever content."""
    text = plan if isinstance(plan, str) else json.dumps(plan)
    storage.write_tensors(path, file.wrapped(text, data), {"format": f"tinynn plan {version}"})
    return tn.Plan.load(path)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything inside nested lists and objects."""
    found = [path]
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        found += paths_in(inner, (*path, key))
    return found


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([1 << 31, -(1 << 63), 1 << 64, 1e300, -1.0, 0.5, "", "conv", "__class__", "0"]),
    st.lists(st.integers(-1, 20), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
MADE = [
    small_plan(), byte_plan(), dynamic_plan(), additive_plan(), books_plan(), bits_plan(),
    hashed_plan(), small_plan("separable"),
]  # fmt: skip
PARTS = [parts(plan) for plan in MADE]
PLACES = [(which, way) for which, (_, plan) in enumerate(PARTS) for way in paths_in(plan)]
DATA, PLAN = PARTS[0]


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.sampled_from(PLACES), value=HOSTILE, remove=st.booleans())
def test_a_hostile_description_is_refused_or_harmless(
    place: Any, value: Any, remove: bool, tmp_path: Path
) -> None:
    which, way = place
    data, plan = PARTS[which][0], json.loads(json.dumps(PARTS[which][1]))
    if not way:
        plan = value
    else:
        inner = plan
        for key in way[:-1]:
            inner = inner[key]
        if remove:
            del inner[way[-1]]
        else:
            inner[way[-1]] = value
    try:
        loaded = load(data, plan, tmp_path / "net.plan")
    except FileFormatError:
        return
    # What is let through is a network: it runs, within its own memory.
    x = np.zeros((1, *loaded.input_shape), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separable, "_BAND_BYTES", 1000)  # a few rows
        assert loaded(x).shape == (1, *loaded.output_shape)


def test_what_would_write_outside_its_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.plan"
    onto = next(i for i, a in enumerate(PLAN["layers"]) if a["attributes"].get("onto"))
    for target in (0, PLAN["layers"][onto]["inputs"][0]):  # the network's input, its own operand
        plan = json.loads(json.dumps(PLAN))
        plan["layers"][onto]["inputs"][1] = target
        with pytest.raises(FileFormatError):
            load(DATA, plan, path)
    for text in ("", "{", "[" * 100_000, "null", '{"layers": []}'):
        with pytest.raises(FileFormatError):
            load(DATA, text, path)
    for wrong in (DATA[:-1], b""):
        with pytest.raises(FileFormatError):
            load(wrong, PLAN, path)
    whole = file.wrapped(json.dumps(PLAN), DATA)
    bomb = np.frombuffer(zlib.compress(bytes(1 << 27)), np.uint8)
    for change in (
        {"plan": whole["plan"][:-1]},
        {"plan": bomb},
        {"plan": whole["data"]},
        {"data": whole["data"].astype(np.float64)},
        {"more": whole["data"]},
    ):
        storage.write_tensors(path, {**whole, **change}, {"format": "tinynn plan 3"})
        with pytest.raises(FileFormatError):
            tn.Plan.load(path)


def test_forms_with_a_book_or_a_width_a_channel_are_in_the_fuzzed_plans() -> None:
    forms = [{f for a in p["layers"] for f in _forms(a["arrays"])} for _, p in PARTS]
    assert "books" in forms[4] and "columns" in forms[5] and "hashed" in forms[6]


def _forms(arrays: Any) -> list[str]:
    return [head["form"] for head in arrays.values()]


def test_files_of_the_version_before_are_read(tmp_path: Path) -> None:
    plan = load(DATA, PLAN, tmp_path / "net.plan", version=2)
    assert np.array_equal(plan(images(3)), MADE[0](images(3)))
    for version in (1, 4):
        with pytest.raises(FileFormatError, match="tinynn plan 3"):
            load(DATA, PLAN, tmp_path / "net.plan", version)


# --- deflated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", MADE, ids=range(len(MADE)))
def test_a_deflated_file_holds_the_same(plan: tn.Plan, tmp_path: Path) -> None:
    path = tmp_path / "net.plan"
    plan.save(path, deflate=True)
    assert path.stat().st_size == plan.deflated_nbytes
    again = tn.Plan.load(path)
    assert file.describe(again.network) == file.describe(plan.network)
    assert np.array_equal(again(images(2)), plan(images(2)))


def test_streams_of_uneven_numbers_get_smaller_than_their_bits() -> None:
    rng = np.random.default_rng(0)
    layer = nn.Linear(300, 100, rng=rng)
    chances = 0.5 ** np.arange(1, 9)
    values = np.linspace(-1, 1, 8)[rng.choice(8, 30_000, p=chances / chances.sum())]
    layer.weight.mutate()[...] = values.reshape(300, 100)
    plan = tn.compile(nn.Sequential(layer), np.ones((1, 300), np.float32), choose="dense")
    entropy = -(chances / chances.sum() * np.log2(chances / chances.sum())).sum() * 30_000 / 8
    rest = plan.nbytes - 30_000 * 3 / 8
    assert plan.deflated_nbytes - rest < 1.05 * entropy < 0.8 * 30_000 * 3 / 8


def test_deflated_files_that_are_cut_or_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.plan"
    MADE[0].save(path, deflate=True)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 100):
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(changed))
        with pytest.raises(FileFormatError):
            tn.Plan.load(path)


CODED = [deflate.deflate(data, plan) for data, plan in PARTS]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_hostile_streams_are_refused_or_harmless(data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(CODED) - 1))
    stored, table = CODED[which]
    rows: Any = [list(row) for row in table]
    if data.draw(st.booleans()):
        way = data.draw(st.sampled_from(paths_in(rows)))
        value = data.draw(HOSTILE)
        if not way:
            rows = value
        elif len(way) == 1:
            rows[way[0]] = value
        else:
            rows[way[0]][way[1]] = value
    else:
        changed = bytearray(stored)
        changed[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(0, 255))
        stored = bytes(changed[: data.draw(st.sampled_from([len(stored), len(stored) // 2]))])
    try:
        back = deflate.inflate(stored, rows, "fuzzed")
    except FileFormatError:
        return
    assert len(back) <= 32 * len(stored)


def test_what_would_grow_is_refused_before_it_does() -> None:
    bomb = zlib.compress(bytes(1 << 27), 9)
    for size in (1, 1000, 1 << 27, 1 << 40):
        tracemalloc.start()
        with pytest.raises(FileFormatError):
            deflate.inflate(bomb, [[size, 8, len(bomb)]], "a bomb")
        with pytest.raises(FileFormatError):
            deflate.inflate(bomb, [[size, 1, len(bomb)]], "a bomb")
        assert tracemalloc.get_traced_memory()[1] < 100 * len(bomb)
        tracemalloc.stop()
    with pytest.raises(FileFormatError):
        deflate.inflate(b"", [[1 << 40, 8, 0]], "nothing")
    zeros = np.zeros((1000, 100), np.uint8).tobytes()  # which would take less than is allowed
    stored, rows = deflate.deflate(zeros, {})
    assert deflate.inflate(stored, [list(row) for row in rows], "zeros") == zeros
