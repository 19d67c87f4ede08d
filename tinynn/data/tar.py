"""The plain files of a tar archive, read in one pass and never written anywhere.

POSIX.1-1988 "ustar" headers: 512 bytes, the name in the first 100, the size in octal at 124, the
header's checksum at 148, the kind at 156, "ustar" at 257, a prefix of the name at 345.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from tinynn.data.files import LIMIT, Reader, fail

_BLOCK = 512
_FILE, _FOLDER, _DESCRIPTION = b"0\0", b"5", b"xgLK"  # kinds; the last are notes on other members


def read_members(path: Path, wanted: Collection[str], limit: int = LIMIT) -> dict[str, bytes]:
    """The contents of the wanted members, by name; those that the archive lacks are left out.

    The whole archive is read, so that a damaged end is found. Raises FileFormatError with the
    offset for a damaged header, a member that is cut off, comes twice, is a link or a device, or
    whose name leads out of the archive's folder, and for more than `limit` bytes in all.
    """
    found: dict[str, bytes] = {}
    with Reader(path, limit) as file:
        while True:
            start = file.offset
            header = file.read(_BLOCK)
            if not header or not any(header):
                break
            name, size, kind = _header(header, path, start)
            padded = -(-size // _BLOCK) * _BLOCK
            if kind in _FILE and name in wanted:
                if name in found:
                    fail(path, start, f"required each member once; came {name!r} again")
                found[name] = file.exactly(size, f"member {name!r}")
                padded -= size
            elif kind not in _FILE + _FOLDER + _DESCRIPTION:
                fail(
                    path, start, f"required files and folders; member {name!r} is of kind {kind!r}"
                )
            file.skip(padded, f"member {name!r}")
        file.skip_rest()
    return found


def _header(header: bytes, path: Path, start: int) -> tuple[str, int, bytes]:
    """(name, size, kind) of a member."""
    if len(header) < _BLOCK:
        fail(path, start, f"truncated: required a header of {_BLOCK} bytes; came {len(header)}")
    claimed = _octal(header[148:156], path, start + 148)
    if claimed != sum(header[:148]) + sum(header[156:]) + 8 * ord(" "):
        fail(path, start, "not a tar header, or a damaged one: its checksum is wrong")
    name = header[:100].rstrip(b"\0")
    if header[257:262] == b"ustar" and header[262:263] == b"\0" and header[345]:
        name = header[345:500].rstrip(b"\0") + b"/" + name
    text = name.decode("utf-8", "replace")
    parts = PurePosixPath(text).parts
    if text.startswith("/") or ".." in parts or "\\" in text or "\0" in text:
        fail(path, start, f"member {text[:100]!r} leads out of the archive's folder")
    return "/".join(parts), _octal(header[124:136], path, start + 124), header[156:157]


def _octal(field: bytes, path: Path, offset: int) -> int:
    digits = field.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        fail(path, offset, f"required an octal number; came {field!r}")
    return int(digits, 8)
