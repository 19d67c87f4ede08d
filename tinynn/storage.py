"""Files: written whole or not at all, read only after their hash and bounds are checked.

A tensor file is a safetensors file whose metadata carries a SHA-256 of everything in it, so that a
flipped bit is found, and nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from tinynn.errors import DTypeError, FileFormatError, OutputError
from tinynn.op import Array

PathLike = str | os.PathLike[str]
_HASH = "sha256"
_ABANDONED_SECONDS = 600
_UNFINISHED = ".tinynn-part"  # nobody else's hidden files end so: they must not be removed


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write a file atomically: whoever reads `path` sees the old content or the new, never a part.

    Raises OutputError, with the old file whole, if the directory cannot be written or is full.
    """
    target = Path(path)
    temporary = None
    remove_abandoned(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(target) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is private, a result is not
        os.replace(temporary, target)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        raise OutputError(
            number, f"cannot write {target} ({reason}); nothing was changed there"
        ) from error


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity become null."""
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def write_tensors(
    path: PathLike, tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write named arrays and text metadata as one safetensors file, atomically."""
    try:
        content = tensor_bytes(tensors, metadata)
    except DTypeError as error:
        raise DTypeError(f"cannot write {path}: {error}") from error
    write_bytes(path, content)


def tensor_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """The content of the file that `write_tensors` writes."""
    arrays = {name: np.array(a, order="C") for name, a in tensors.items()}
    text = {**metadata, _HASH: _digest(arrays, metadata)}
    try:
        return _in_order(to_safetensors(arrays, text))
    except (SafetensorError, KeyError) as error:
        raise DTypeError(str(error)) from error


def read_tensors(path: PathLike) -> tuple[dict[str, Array], dict[str, str]]:
    """Read what `write_tensors` wrote.

    Raises FileNotFoundError if there is no such file, FileFormatError if it is truncated,
    corrupted, not a safetensors file, or not one of ours.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file")
    try:
        with safe_open(source, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise FileFormatError(f"{source}: not a valid safetensors file: {error}") from error
    except OSError as error:
        raise FileFormatError(f"{source}: cannot be read: {error}") from error
    claimed = metadata.pop(_HASH, None)
    if claimed is None:
        raise FileFormatError(f"{source}: no {_HASH} in its metadata: not written by tinynn")
    if claimed != _digest(arrays, metadata):
        raise FileFormatError(f"{source}: its content does not match its {_HASH}: corrupted")
    return arrays, metadata


def parse_json(text: str, what: str) -> Any:
    """JSON from an untrusted file; raises FileFormatError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{what}: not valid JSON: {error}") from error


def _in_order(content: bytes) -> bytes:
    """The same file with sorted metadata: the library's order is another one in each call."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays behind it are aligned
    return len(text).to_bytes(8, "little") + text + content[start:]


def _digest(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    shapes = [(n, a.dtype.str, a.shape) for n, a in sorted(arrays.items())]
    digest.update(json.dumps([sorted(metadata.items()), shapes]).encode())
    for _, array in sorted(arrays.items()):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """The same value in JSON's own types; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def unfinished(target: Path) -> Any:
    """A new file beside `target`, open for writing, that is to be renamed once it is whole."""
    return tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=f".{target.name}.", suffix=_UNFINISHED, delete=False
    )


def remove_abandoned(target: Path) -> None:
    """Remove what a process that was killed while it wrote `target` left behind."""
    with contextlib.suppress(OSError, ValueError):
        for file in target.parent.glob(f".{glob.escape(target.name)}.*{_UNFINISHED}"):
            if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                file.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
