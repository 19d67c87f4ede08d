"""Reading files that nobody vouches for: bounded, and with errors that name file and offset."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, NoReturn, cast

from tinynn.errors import FileFormatError

#: no data set that is read here is larger than this, unpacked
LIMIT = 1 << 29

_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_RATIO = 1032  # deflate's largest: 258 bytes from 2 bits


def fail(path: object, offset: int, problem: str) -> NoReturn:
    """Raise FileFormatError that names the file and the offset in its unpacked content."""
    raise FileFormatError(f"{path}: offset {offset}: {problem}")


class Reader:
    """The content of a file from its start, unpacked if it is gzip, at most `limit` bytes of it.

    Nothing is ever reserved on a file's word: memory grows with what really comes.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path = path
        self.limit = limit
        self.offset = 0  #: bytes of unpacked content read so far
        try:
            self._raw = path.open("rb")
            packed = self._raw.read(2) == _GZIP
            size = self._raw.seek(0, 2)
            self._raw.seek(0)
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error}") from error
        #: no more than this can be in the file
        self.possible = size * _RATIO if packed else size
        opened = gzip.GzipFile(fileobj=self._raw) if packed else self._raw
        self._file = cast(IO[bytes], opened)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the file."""
        parts = []
        while size > 0:
            if self.offset >= self.limit:
                fail(self.path, self.offset, f"holds more than the {self.limit} bytes allowed")
            part = self._next(min(size, _CHUNK, self.limit - self.offset))
            if not part:
                break
            parts.append(part)
            size -= len(part)
            self.offset += len(part)
        return b"".join(parts)

    def exactly(self, size: int, what: str) -> bytes:
        """The next `size` bytes. Raises FileFormatError if the file ends before."""
        start = self.offset
        if size > self.possible - start:
            fail(
                self.path,
                start,
                f"required {size} bytes of {what}; no more than {max(0, self.possible - start)} "
                "can follow",
            )
        data = self.read(size)
        if len(data) < size:
            fail(
                self.path,
                self.offset,
                f"truncated: required {size} bytes of {what} from offset {start}; came {len(data)}",
            )
        return data

    def skip(self, size: int, what: str) -> None:
        """Pass over `size` bytes, keeping none. Raises FileFormatError if the file ends before."""
        while size > 0:
            size -= len(self.exactly(min(size, _CHUNK), what))

    def skip_rest(self) -> None:
        """Read to the end, where gzip has its checksum."""
        while self.read(_CHUNK):
            pass

    def end(self) -> None:
        """Raise FileFormatError unless nothing follows."""
        at = self.offset
        self.limit = max(self.limit, at + 1)
        if self.read(1):
            fail(self.path, at, "required the end of the file; came more bytes")

    def _next(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except EOFError:
            fail(self.path, self.offset, "truncated: the gzip stream ends too early")
        except (OSError, zlib.error) as error:
            fail(self.path, self.offset, f"cannot be unpacked: {error}")
