"""How kernels are compiled, cached and threaded. Every kernel file takes its policy from here."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core.caching import FunctionCache

# Sums may be re-ordered and multiply-adds fused, so that loops vectorise. No flag that assumes
# away NaN or infinity.
FASTMATH = frozenset({"contract", "reassoc"})

# Below this many bytes of memory traffic a parallel region costs more than it gains.
PARALLEL_BYTES = 256 * 1024

_UNUSED_SECONDS = 30 * 24 * 3600


def jit(fn: Callable[..., Any] | None = None, *, parallel: bool = False) -> Any:
    """Compile `fn` with the project's flags; use as `@jit` or `@jit(parallel=True)`.

    The compiled code is cached on disk where a directory is writable. A kernel must give the same
    bits for every thread count: its parallel loop writes disjoint outputs, or reduces over chunks
    that depend on the shapes only and combines them in order.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(
            nogil=True, error_model="numpy", fastmath=set(FASTMATH), parallel=parallel
        )(function)
        if not numba.config.DISABLE_JIT:
            _enable_cache(dispatcher)
        return dispatcher

    return decorate if fn is None else decorate(fn)


def worth_threads(work_in_bytes: int) -> bool:
    """Whether a kernel that moves this many bytes should use its parallel version.

    The answer depends on the work only, never on the thread count: the serial and the parallel
    version of one kernel may round differently.
    """
    return work_in_bytes >= PARALLEL_BYTES


def max_threads() -> int:
    """The largest thread count that `set_threads` accepts."""
    return int(numba.config.NUMBA_NUM_THREADS)


def get_threads() -> int:
    """The number of threads that parallel kernels use when called from this thread."""
    return int(numba.get_num_threads())


def set_threads(n: int) -> None:
    """Let parallel kernels that are called from this thread use `n` threads.

    Raises TypeError where `n` is not an integer, ValueError outside 1 <= n <= max_threads().
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"set_threads: expected an integer, got {n!r}") from None
    if isinstance(n, bool) or not 1 <= count <= max_threads():
        raise ValueError(
            f"set_threads: expected 1 <= n <= {max_threads()} (NUMBA_NUM_THREADS), got {n!r}"
        )
    numba.set_num_threads(count)


def contiguous(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays; those that are not C-contiguous as contiguous copies."""
    return [a if a.flags.c_contiguous else np.ascontiguousarray(a) for a in arrays]


# --- cache -------------------------------------------------------------------------------------


def user_cache_dir() -> Path:
    """`$TINYNN_CACHE`, or the platform's directory for caches of the user, with `tinynn` in it."""
    chosen = os.environ.get("TINYNN_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tinynn"


def _fingerprint() -> str:
    """Names everything that compiled code depends on.

    Numba notices a change in the file of a cached function only, not in the files that it
    imports, hence the hash over all kernel sources.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    config = numba.config
    parts = (
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        sys.version,
        platform.platform(),
        config.CPU_NAME or llvm.get_host_cpu_name(),
        config.CPU_FEATURES or llvm.get_host_cpu_features().flatten(),
        config.OPT,
        config.LOOP_VECTORIZE,
        config.SLP_VECTORIZE,
        config.BOUNDSCHECK,
    )
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:20]


def _remove_unused(root: Path, keep: Path) -> None:
    """Drop caches of other sources or versions that nothing has opened for 30 days."""
    limit = time.time() - _UNUSED_SECONDS
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            if folder != keep and folder.is_dir() and folder.stat().st_mtime < limit:
                shutil.rmtree(folder, ignore_errors=True)


def _cache_directory() -> Path | None:
    """The writable directory of this source state, or None. Its time of change marks its use."""
    try:
        root = user_cache_dir() / "kernels"
        directory = root / _fingerprint()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        os.utime(directory)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    _remove_unused(root, directory)
    return directory


class _UniqueName:
    """Stands in for Numba's pattern `NAME.{number}.nbc`, with a name that no one else takes.

    Numba counts data files 1, 2, 3, ... from the index it has read. Two processes that compile
    different signatures of one function at once would take the same number, and the index of one
    would name the machine code of the other.
    """

    def __init__(self, pattern: str) -> None:
        self._stem = pattern.partition("{")[0]

    def format(self, **_: object) -> str:
        return f"{self._stem}{uuid.uuid4().hex}.nbc"


class _Cache(FunctionCache):
    """Numba's cache, whose failures cost time and never the computation."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # A private detail of Numba; where it has changed, Numba's own naming stays.
        file = getattr(self, "_cache_file", None)
        pattern = getattr(file, "_data_name_pattern", None)
        if isinstance(pattern, str) and "{number" in pattern:
            file._data_name_pattern = _UniqueName(pattern)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # A damaged or vanished file may raise anything from unpickling: it means "not cached".
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # disk full, directory removed or made read-only
            super().save_overload(sig, data)


_directory = _cache_directory()


def _enable_cache(dispatcher: Any) -> None:
    """Cache `dispatcher` below the project's directory, leaving other users of Numba alone."""
    if _directory is None:
        return
    saved = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_directory)
    try:
        dispatcher._cache = _Cache(dispatcher.py_func)
    except (RuntimeError, OSError):  # RuntimeError: Numba found no place it can write to
        return
    finally:
        numba.config.CACHE_DIR = saved
