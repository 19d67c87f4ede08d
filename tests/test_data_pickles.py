"""Pickled arrays are read; nothing in a pickle is ever looked up or called."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn.data import pickles
from tinynn.errors import FileFormatError

QUICK = settings(max_examples=150, deadline=None)


class Runs:
    """Unpickled by Python, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_in_a_pickle_is_called(tmp_path, protocol):
    made = tmp_path / "made"
    for value in (Runs(made), {"data": Runs(made)}, {"data": [Runs(made)]}):
        with pytest.raises(FileFormatError, match="f: offset"):
            pickles.parse_pickle(pickle.dumps(value, protocol), "f")
    assert not made.exists()


@pytest.mark.parametrize(
    "code",
    [b"ios\nsystem\n.", b"cbuiltins\neval\n.", b"(cos\nsystem\nX\x01\x00\x00\x00ao.",
     b"\x80\x02cnumpy\nload\n.", b"}Pid\n.", b"}Q.", b"\x82\x01.", b"}cnumpy\nndarray\n)\x81.",
     b"\x80\x05\x97."],
)  # fmt: skip
def test_instructions_that_do_more_are_refused(code):
    with pytest.raises(FileFormatError, match="f: offset"):
        pickles.parse_pickle(code, "f")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_are_read(protocol):
    value = {
        "text": "äöü\n",
        "bytes": b"\x00\xff",
        "numbers": [0, 255, 65535, -1, 2**31 - 1, -(2**40), 2.5, True, False, None],
        "nested": {1: (1, 2, 3), "a": [(), [], {}, ("x",)]},
    }
    assert pickles.parse_pickle(pickle.dumps(value, protocol), "f") == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i4", "<f8", ">u2", "f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read(protocol, dtype, order):
    array = np.asarray(np.arange(24).reshape(4, 6), dtype, order=order)
    got = pickles.parse_pickle(pickle.dumps({"a": array, "again": array}, protocol), "f")
    for name in ("a", "again"):
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype


@pytest.mark.parametrize("array", [np.array([{}]), np.zeros(2, "i4,f4"), np.array(["a"])])
def test_arrays_of_other_things_are_refused(array):
    for protocol in (2, 4, 5):
        with pytest.raises(FileFormatError, match="f: offset"):
            pickles.parse_pickle(pickle.dumps({"a": array}, protocol), "f")


def parse_or_refuse(content):
    try:
        assert isinstance(pickles.parse_pickle(content, "f"), dict)
    except FileFormatError as error:
        assert str(error).startswith("f: ")


@QUICK
@given(st.binary(max_size=80))
def test_any_bytes_are_a_dict_or_refused(content):
    parse_or_refuse(content)


PIECES = [
    *(bytes(code) for code in (b"(", b"}", b"]", b")", b"N", b"a", b"e", b"s", b"u", b"t", b"R",
                               b"b", b"\x85", b"\x86", b"\x87", b"\x93", b"\x94", b"\x88")),
    b"K\x00", b"K\x01", b"K\x02", b"U\x01b", b"U\x02u1", b"U\x01|", b"C\x02ab", b"\x8c\x01a",
    b"\x8c\x02u1", b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"G" + bytes(8), b"J\xff\xff\xff\xff",
    b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy._core.numeric\n_frombuffer\n", b"c_codecs\nencode\n", b"X\x06\x00\x00\x00latin1",
    b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R", b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R",
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
]  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25))
def test_any_program_is_a_dict_or_refused(pieces):
    parse_or_refuse(b"}" + b"".join(pieces) + b".")


@QUICK
@given(st.data())
def test_changed_pickles_are_read_or_refused(draw):
    entry = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 300]}
    content = bytearray(pickle.dumps(entry, draw.draw(st.integers(2, 5))))
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    parse_or_refuse(bytes(content[: draw.draw(st.integers(1, len(content)))]))
