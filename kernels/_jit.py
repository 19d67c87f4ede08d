"""How kernels are compiled, cached and threaded. Every kernel file takes its policy from here."""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import itertools
import operator
import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.compiler import Compiler
from numba.core.dispatcher import _DispatcherBase
from numba.core.serialize import dumps

from kernels import simd

# Where GNU OpenMP runs the threads: let an idle thread spin for some ten microseconds only, enough
# from one kernel to the next. By default it spins for milliseconds, and two busy processes on one
# machine then slow each other down many times over. Read when the library is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

_config: Any = numba.config

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

# Sums may be re-ordered and multiply-adds fused, so that loops vectorise. No flag that assumes
# away NaN or infinity.
FASTMATH = frozenset({"contract", "reassoc"})

# Below this many bytes of memory traffic a parallel region costs more than it gains.
PARALLEL_BYTES = 256 * 1024

_HERE = Path(__file__).parent

_UNUSED_SECONDS = 30 * 24 * 3600


def jit(
    fn: Callable[..., Any] | None = None, *, parallel: bool = False, inline: bool = False
) -> Any:
    """Compile `fn` with the project's flags; use as `@jit` or `@jit(parallel=True)`.

    `inline`: it becomes part of kernels that call it. For small functions of several arrays, whose
    call takes some thirty nanoseconds.

    The compiled code is cached on disk where a directory is writable. A kernel must give the same
    bits for every thread count: its parallel loop writes disjoint outputs, or reduces over chunks
    that depend on the shapes only and combines them in order.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(
            nogil=True,
            error_model="numpy",
            fastmath=set(FASTMATH),
            parallel=parallel,
            forceinline=inline,
            pipeline_class=_Compiler,
        )(function)
        if not _config.DISABLE_JIT:
            _enable_cache(dispatcher, parallel)
        return dispatcher

    return decorate if fn is None else decorate(fn)


class _Compiler(Compiler):
    """Numba's own; Python's collector of cycles waits until it is done.

    The collector would pass over all objects many times, which takes up to a tenth of the time, and
    next to nothing could be freed.
    """

    def compile_extra(self, func: Any) -> Any:
        collects = gc.isenabled()
        gc.disable()
        try:
            return super().compile_extra(func)
        finally:
            if collects:
                gc.enable()


class Variants:
    """A serial and a parallel version of one function that loops over `numba.prange`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.serial = jit(fn)
        self.parallel = jit(fn, parallel=True)

    def choose(self, work_in_bytes: int) -> Any:
        """The version for a call that moves this many bytes of memory."""
        return self.parallel if worth_threads(work_in_bytes) else self.serial


def worth_threads(work_in_bytes: int) -> bool:
    """Whether a kernel that moves this many bytes should use its parallel version.

    The answer depends on the work only, never on the thread count: the serial and the parallel
    version of one kernel may round differently. Kernels that compute rather than move count one
    multiply-add as one byte.
    """
    return work_in_bytes >= PARALLEL_BYTES


def max_threads() -> int:
    """The largest thread count that `set_threads` accepts."""
    return int(_config.NUMBA_NUM_THREADS)


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


def prepared(kernel: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays as kernels take them: one float dtype, C-contiguous, writable, aligned.

    Others are copied, which also keeps one compiled signature for each kernel and dtype.
    Raises TypeError unless all are float32 or all are float64.
    """
    dtype = arrays[0].dtype
    if dtype not in FLOATS or any(a.dtype != dtype for a in arrays):
        found = ", ".join(str(a.dtype) for a in arrays)
        raise TypeError(f"{kernel}: expected arrays of one dtype, float32 or float64, got {found}")
    return [a if a.flags.carray else np.array(a, order="C") for a in arrays]


# --- compiling ahead of use --------------------------------------------------------------------


class Request(NamedTuple):
    """A kernel and the types of arguments that it was called with but not compiled for."""

    kernel: Any
    types: tuple[Any, ...]

    @property
    def parallel(self) -> bool:
        """Whether it has a parallel loop: these take the longest."""
        return bool(self.kernel.targetoptions.get("parallel"))

    @property
    def name(self) -> str:
        """The same in every process, and different for each request."""
        where = _describe(self.kernel)
        return f"{where} {self.types} {'parallel' if self.parallel else 'serial'}"

    def compile(self) -> None:
        """Compile, or load what the cache has."""
        self.kernel.compile(self.types)


@contextlib.contextmanager
def planning() -> Iterator[list[Request]]:
    """Note the kernels that are called inside and would be compiled, instead of running them.

    Their results stay as they were allocated, and a sum that a kernel returns is 1: run what
    depends on shapes, not on values. What this process has compiled before is not noted.
    """
    requests: dict[Request, None] = {}
    dispatchers: Any = _DispatcherBase  # Numba's own hook: called where no signature fits
    compile_and_run = dispatchers._compile_for_args

    def note(dispatcher: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(getattr(dispatcher, "_cache", None), _Cache):  # not one of ours
            return compile_and_run(dispatcher, *args, **options)
        requests.setdefault(Request(dispatcher, tuple(map(dispatcher.typeof_pyval, args))))
        return lambda *_: 1.0

    noted: list[Request] = []
    dispatchers._compile_for_args = note
    try:
        yield noted
    finally:
        dispatchers._compile_for_args = compile_and_run
        noted += requests


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


@cache
def _imports(source: bytes) -> tuple[str, ...]:
    """The files of this package that a source imports. Cached, as most are asked for many times."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names] + [f"{node.module}"]
        for name in names:
            package, _, module = name.partition(".")
            if package == __package__:
                found.append(f"{module.partition('.')[0]}.py")
    return tuple(found)


def _sources(file: Path) -> list[Path]:
    """The file and whatever it imports from this package, directly or not."""
    found: list[Path] = []
    left = [file]
    while left:
        source = left.pop()
        if source not in found and source.is_file():
            found.append(source)
            left.extend(_HERE / name for name in _imports(source.read_bytes()))
    return sorted(found, key=lambda source: source.name)


def _fingerprint(file: Path) -> str:
    """Names everything that the code compiled from a file depends on.

    Numba notices a change in the file of a cached function only, by its date, and not in the files
    that it imports: hence the hash over all of these.
    """
    digest = hashlib.sha256()
    for source in _sources(file):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    parts = (
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        sys.version,
        platform.platform(),
        simd.LEVEL,
        _config.CPU_NAME or llvm.get_host_cpu_name(),
        _config.CPU_FEATURES or llvm.get_host_cpu_features().flatten(),
        _config.OPT,
        _config.LOOP_VECTORIZE,
        _config.SLP_VECTORIZE,
        _config.BOUNDSCHECK,
    )
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:20]


def _cache_directory() -> Path | None:
    """A writable directory for compiled kernels, without what nothing has used for 30 days."""
    root = None
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home directory
        root = user_cache_dir() / "kernels"
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
        _remove_unused(root)
        return root
    return None


def _remove_unused(root: Path) -> None:
    limit = time.time() - _UNUSED_SECONDS
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            if folder.is_dir() and folder.stat().st_mtime < limit:
                shutil.rmtree(folder, ignore_errors=True)


@cache
def _home(root: Path, file: Path) -> Path:
    """Where the code compiled from a file lies. Its time of change marks its use."""
    folder = root / _fingerprint(file)
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    return folder


class _SerialLocator(_CacheLocator):
    """Tells Numba the place, which says all there is to say of the sources: no date is needed."""

    kind = "serial"

    def __init__(self, file: Path) -> None:
        assert _directory is not None
        self._path = _home(_directory, file) / self.kind

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _SerialLocator:
        return cls(Path(py_file))

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> int:
        return 0

    def get_disambiguator(self) -> None:
        return None


class _ParallelLocator(_SerialLocator):
    """Numba's key does not tell a parallel version from a serial one: it lies elsewhere."""

    kind = "parallel"


class _Serial(CompileResultCacheImpl):
    _locator_classes: list[Any] = [_SerialLocator]


class _Parallel(CompileResultCacheImpl):
    _locator_classes: list[Any] = [_ParallelLocator]


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


def _number_anew() -> None:
    """Let Numba number the functions that it compiles from a place of this process's own.

    It counts 1, 2, 3, ... in every process, and the symbols of two closures of one function differ
    in these numbers only. Of closures that two processes compiled, a third that loads both from the
    cache would take one for the other, without a word.
    """
    identity: Any = FunctionIdentity
    identity._unique_ids = itertools.count(uuid.uuid4().int >> 66)  # 62 bits


_number_anew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_number_anew)


def _describe(value: Any) -> str:
    """Tells a function from others in every process: its name, file's content and what it captures.

    Numba would pickle what it captures, and a function that is jitted, or an intrinsic, is pickled
    under a name that each process makes anew: a kernel that captures one is never found again.
    """
    function = getattr(value, "py_func", getattr(value, "_defn", value))
    if isinstance(function, FunctionType):
        file = Path(function.__code__.co_filename)
        if file.is_file():
            captured = [_describe(cell.cell_contents) for cell in function.__closure__ or ()]
            return f"{function.__module__}.{function.__qualname__} {_content(file)} {captured}"
    return hashlib.sha256(dumps(value)).hexdigest()


@cache
def _content(file: Path) -> str:
    return _fingerprint(file)


class _Cache(FunctionCache):
    """Numba's cache, whose failures cost time and never the computation."""

    def __init__(self, function: Callable[..., Any], parallel: bool) -> None:
        self._impl_class = _Parallel if parallel else _Serial
        super().__init__(function)
        # A private detail of Numba; where it has changed, Numba's own naming stays.
        file = getattr(self, "_cache_file", None)
        pattern = getattr(file, "_data_name_pattern", None)
        if file is not None and isinstance(pattern, str) and "{number" in pattern:
            file._data_name_pattern = _UniqueName(pattern)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        bytecode = hashlib.sha256(self._py_func.__code__.co_code).hexdigest()
        captured = hashlib.sha256(_describe(self._py_func).encode()).hexdigest()
        return sig, codegen.magic_tuple(), (bytecode, captured)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Reading a damaged or vanished file may raise anything: it means "not cached". The index
        # starts afresh, so that what is compiled now can be saved.
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            with contextlib.suppress(Exception):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(Exception):  # disk full, directory removed or made read-only
            super().save_overload(sig, data)


_directory = _cache_directory()


def cache_directory() -> Path | None:
    """Where this process keeps compiled kernels; None where it can write nowhere."""
    return _directory


def _enable_cache(dispatcher: Any, parallel: bool) -> None:
    """Cache `dispatcher` below the project's directory, leaving other users of Numba alone."""
    if _directory is None:
        return
    with contextlib.suppress(RuntimeError, OSError):  # no place that it can write to
        dispatcher._cache = _Cache(dispatcher.py_func, parallel)
