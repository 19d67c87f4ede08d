"""Files: whole or not at all, the same for the same content, and nobody else's are touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tinynn.errors import OutputError
from tinynn.storage import (
    read_tensors,
    tensor_bytes,
    unfinished,
    write_bytes,
    write_json,
    write_tensors,
)


def test_an_unwritable_place_is_a_typed_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        write_bytes(blocker / "below" / "m", b"1")


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": np.float32("nan"), "b": [np.int64(3), np.arange(2)]})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": None, "b": [3, [0, 1]]}


def test_tensor_files_keep_every_dtype_and_shape(tmp_path: Path) -> None:
    arrays = {
        "f": np.float32(3.0).reshape(()),
        "d": np.ones((0, 3)),
        "i": np.arange(6).reshape(2, 3).T,
        "b": np.array([True, False]),
    }
    write_tensors(tmp_path / "t", arrays, {"note": "ü"})
    got, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"note": "ü"}
    for name, a in arrays.items():
        assert got[name].dtype == a.dtype
        np.testing.assert_array_equal(got[name], a)


def test_the_same_content_is_the_same_file() -> None:
    tensors = {"b": np.arange(3.0), "a": np.zeros((2, 1), np.int8)}
    text = {"é": "–", **{str(i): "x" * i for i in range(9)}}
    files = {tensor_bytes(tensors, text) for _ in range(8)}
    files.add(tensor_bytes(tensors, dict(reversed(text.items()))))
    assert len(files) == 1


def test_what_a_killed_process_left_behind_goes_with_the_next_write(tmp_path: Path) -> None:
    left = Path(unfinished(tmp_path / "m").name)
    others = [tmp_path / ".m.production", tmp_path / ".m.12345678"]
    for path in (left, *others):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    write_bytes(tmp_path / "m", b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "m"])
