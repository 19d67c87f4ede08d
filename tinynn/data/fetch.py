"""Downloads: several mirrors, retries, and nothing kept whose hash is not the known one."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from tinynn.data.published import Remote
from tinynn.errors import DataNotFoundError, OutputError

_ATTEMPTS = 3
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 18


def fetch(remote: Remote, folder: Path) -> Path:
    """Download a file into `folder`, atomically, and return its path.

    Raises DataNotFoundError with every mirror's answer if none gives the file that is known by its
    size and SHA-256, OutputError if it cannot be written.
    """
    target = folder / remote.name
    answers = []
    for mirror in remote.mirrors:
        for attempt in range(_ATTEMPTS):
            error = _attempt(mirror + remote.name, remote, target)
            if error is None:
                return target
            answers.append(f"{mirror}: {error}")
            if not _transient(error):
                break
            if attempt + 1 < _ATTEMPTS:
                time.sleep(1 << attempt)
    raise DataNotFoundError(f"{remote.name} cannot be downloaded: {'; '.join(answers)}")


def _attempt(address: str, remote: Remote, target: Path) -> Exception | None:
    """What kept the file from being downloaded, or None."""
    try:
        _download(address, remote, target)
    except OutputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        return error
    return None


def _download(address: str, remote: Remote, target: Path) -> None:
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(address, timeout=_TIMEOUT) as answer,
        _temporary(target) as (file, path),
        tqdm(total=remote.size, unit="B", unit_scale=True, desc=remote.name, disable=None) as bar,
    ):
        received = 0
        while part := answer.read(min(_CHUNK, remote.size + 1 - received)):
            received += len(part)
            if received > remote.size:
                raise ValueError(f"required {remote.size} bytes; came more")
            digest.update(part)
            _write(file, part, target)
            bar.update(len(part))
        if received < remote.size:
            raise ConnectionError(f"required {remote.size} bytes; came {received}")
        if digest.hexdigest() != remote.sha256:
            raise ValueError(f"required SHA-256 {remote.sha256}; came {digest.hexdigest()}")
        try:
            os.fsync(file)
            os.chmod(path, 0o644)  # a temporary file is private, a data set is not
            os.replace(path, target)
        except OSError as error:
            raise _cannot_write(target, error) from error


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[int, str]]:
    """(descriptor, path) of a new file beside the target; gone afterwards unless it was renamed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file, path = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield file, path
    finally:
        os.close(file)
        with contextlib.suppress(OSError):
            os.unlink(path)


def _write(file: int, part: bytes, target: Path) -> None:
    try:
        while part:
            part = part[os.write(file, part) :]
    except OSError as error:
        raise _cannot_write(target, error) from error


def _cannot_write(target: Path, error: OSError) -> OutputError:
    return OutputError(error.errno, f"cannot write {target} ({error.strerror})")


def _transient(error: Exception) -> bool:
    """Whether another attempt at the same address may succeed."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, socket.gaierror):  # no network, or no such host
        return False
    return isinstance(reason, OSError | http.client.HTTPException)
