"""Downloads: several mirrors, retries, and nothing kept whose hash is not the known one."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinynn.data.published import Remote
from tinynn.errors import DataNotFoundError, OutputError
from tinynn.storage import remove_abandoned, unfinished

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
        _temporary(target) as file,
        tqdm(total=remote.size, unit="B", unit_scale=True, desc=remote.name, disable=None) as bar,
    ):
        received = 0
        while part := answer.read(min(_CHUNK, remote.size + 1 - received)):
            received += len(part)
            if received > remote.size:
                raise ValueError(f"required {remote.size} bytes; came more")
            digest.update(part)
            with _writing(target):
                file.write(part)
            bar.update(len(part))
        if received < remote.size:
            raise ConnectionError(f"required {remote.size} bytes; came {received}")
        if digest.hexdigest() != remote.sha256:
            raise ValueError(f"required SHA-256 {remote.sha256}; came {digest.hexdigest()}")
        with _writing(target):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.chmod(file.name, 0o644)  # a temporary file is private, a data set is not
            os.replace(file.name, target)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Any]:
    """A new file beside the target; gone afterwards unless it was renamed."""
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target)
        file = unfinished(target)
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(file.name)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(error.errno, f"cannot write {target} ({error.strerror})") from error


def _transient(error: Exception) -> bool:
    """Whether another attempt at the same address may succeed."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, socket.gaierror):  # no network, or no such host
        return False
    return isinstance(reason, OSError | http.client.HTTPException)
