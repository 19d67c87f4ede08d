"""Compilation policy: cache, threads, choice of variants."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from kernels import _jit, conv, program


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory that functions jitted in the test use."""
    monkeypatch.setenv("TINYNN_CACHE", str(tmp_path))
    directory = _jit._cache_directory()
    assert directory == tmp_path / "kernels"
    monkeypatch.setattr(_jit, "_directory", directory)
    return directory


def make():
    @_jit.jit
    def double(x):
        return x + x

    return double


def test_compiled_code_is_found_again(cache):
    assert make()(1.5) == 3.0
    again = make()
    assert again(2.5) == 5.0
    assert sum(again.stats.cache_hits.values()) == 1


def test_serial_and_parallel_versions_do_not_share_code(cache):
    def total(x, parts):
        for i in numba.prange(parts.size):
            parts[i] = x[i]

    variants = _jit.Variants(total)
    parts = np.zeros(4)
    variants.serial(np.ones(4), parts)
    parts[:] = 0
    variants.parallel(np.ones(4), parts)
    assert sum(variants.parallel.stats.cache_hits.values()) == 0
    np.testing.assert_array_equal(parts, 1)


def test_no_cycles_are_collected_while_a_kernel_is_compiled(cache):
    double, happened = make(), []

    def collect(phase, _):
        happened.append(phase)

    gc.collect()
    threshold = gc.get_threshold()
    gc.set_threshold(100)
    gc.callbacks.append(collect)
    try:
        double._compiler.compile((numba.types.float64,), None)
        during = len(happened)
        assert gc.isenabled()
        with pytest.raises(numba.TypingError):
            double._compiler.compile((numba.types.pyobject,), None)
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(collect)
        gc.set_threshold(*threshold)
    assert during < 20  # before and after; else hundreds


def test_a_kernel_that_captures_functions_is_found_again(cache):
    def add(typingctx, x, y):
        return x(x, y), lambda context, builder, signature, args: builder.fadd(*args)

    def multiple(count):
        @_jit.jit
        def times(x):
            return count * x

        return times

    def capture(count):
        inner, plus = multiple(count), numba.extending.intrinsic(add)

        @_jit.jit
        def outer(x):
            return plus(inner(x), 1.0)

        return outer

    kernels = [capture(count) for count in (2, 3, 3)]
    assert [kernel(1.5) for kernel in kernels] == [4.0, 5.5, 5.5]
    assert [sum(kernel.stats.cache_hits.values()) for kernel in kernels] == [0, 0, 1]


def test_programs_find_what_calls_have_compiled(cache):
    def make_clear():
        @_jit.jit
        def clear(x):
            x[0] = 0

        return clear

    make_clear()(np.ones(1))
    again = make_clear()
    program._entry(again, [numba.types.Array(numba.types.float64, 1, "C")])
    assert sum(again.stats.cache_hits.values()) == 1


def test_other_users_of_numba_keep_their_cache(cache):
    before = numba.config.CACHE_DIR
    make()
    assert before == numba.config.CACHE_DIR


def test_unwritable_directory_means_no_cache(tmp_path, monkeypatch):
    occupied = tmp_path / "file"
    occupied.write_text("not a directory")
    monkeypatch.setenv("TINYNN_CACHE", str(occupied))
    assert _jit._cache_directory() is None
    monkeypatch.setattr(_jit, "_directory", None)
    assert make()(1.5) == 3.0


def test_directory_lost_before_saving(cache):
    double = make()
    for path in sorted(cache.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    cache.rmdir()
    cache.write_text("in the way")
    assert double(1.5) == 3.0


def test_full_disk(cache, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "_save_data", refuse)
    assert make()(1.5) == 3.0


@pytest.mark.parametrize("pattern", ["*.nbc", "*.nbi"])
def test_damaged_cache_file(cache, pattern):
    make()(1.5)
    files = list(cache.rglob(pattern))
    assert files
    for file in files:
        file.write_bytes(b"\x80garbage")
    again = make()
    assert again(1.5) == 3.0
    assert sum(again.stats.cache_hits.values()) == 0


def test_caches_unused_for_a_month_are_removed(cache):
    old, recent = cache / "old", cache / "recent"
    for folder, days in ((old, 31), (recent, 29)):
        folder.mkdir()
        (folder / "code.nbc").write_bytes(b"x")
        then = time.time() - days * 24 * 3600
        os.utime(folder, (then, then))
    assert _jit._cache_directory() == cache
    assert not old.exists()
    assert recent.exists()


def test_a_kernel_depends_on_what_it_imports_and_on_nothing_else() -> None:
    names = {source.stem for source in _jit._sources(Path(conv.__file__))}
    assert {"conv", "_jit", "simd", "_emit", "product", "geometry", "memory"} <= names
    assert not {"pool", "loss", "optimizer"} & names


def test_the_place_follows_the_sources(tmp_path, monkeypatch):
    for name, imports in (("a", "from kernels import b"), ("b", "import kernels.c"), ("c", "")):
        (tmp_path / f"{name}.py").write_text(imports)
    monkeypatch.setattr(_jit, "_HERE", tmp_path)
    before = _jit._fingerprint(tmp_path / "a.py")
    assert before == _jit._fingerprint(tmp_path / "a.py")
    (tmp_path / "d.py").write_text("x = 1")
    assert before == _jit._fingerprint(tmp_path / "a.py")
    (tmp_path / "c.py").write_text("x = 1")
    assert before != _jit._fingerprint(tmp_path / "a.py")


def test_a_copy_of_the_sources_uses_the_same_code(tmp_path):
    root = Path(_jit.__file__).parents[1]
    shutil.copytree(root / "kernels", tmp_path / "kernels")
    environment = {**os.environ, "TINYNN_CACHE": str(tmp_path / "cache")}
    hits = []
    for folder in (root, tmp_path):
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            env={**environment, "PYTHONPATH": str(folder)},
            input="float32\n",
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
        )
        hits.append(int(child.stdout.split()[-1]))
    assert hits == [0, 1]


def test_data_files_have_names_of_their_own(cache):
    double = make()
    double(1.5)
    double(2)
    names = {p.name for p in cache.rglob("*.nbc")}
    make_other = _jit._UniqueName("f-1.py311.{number:d}.nbc")
    assert len(names) == 2
    assert make_other.format(number=1) != make_other.format(number=1)
    assert make_other.format(number=1).startswith("f-1.py311.")


def test_signatures_saved_at_once_keep_their_code(cache, monkeypatch):
    first, second = make(), make()
    save, load = IndexDataCacheFile._save_data, IndexDataCacheFile._load_index
    names = []

    def save_while_another_process_does(self, name, data):
        names.append(name)
        if len(names) == 1:  # the other has read the index before this one wrote it
            monkeypatch.setattr(IndexDataCacheFile, "_load_index", lambda _: {})
            assert second(2) == 4
            monkeypatch.setattr(IndexDataCacheFile, "_load_index", load)
        save(self, name, data)

    monkeypatch.setattr(IndexDataCacheFile, "_save_data", save_while_another_process_does)
    assert first(1.5) == 3.0
    assert len(set(names)) == 2
    later = make()
    assert later(3) == 6
    assert sum(later.stats.cache_hits.values()) == 1


CHILD = """
import sys
import numpy as np
from kernels import loss
print("ready", flush=True)
dtypes = sys.stdin.readline().split()
for dtype in dtypes:
    a, b = np.arange(5).astype(dtype), np.zeros(5, dtype)
    assert loss._mse(a, b) == 6.0, dtype
print(sum(loss._mse.stats.cache_hits.values()), flush=True)
"""


def test_four_processes_compile_different_signatures_at_once(tmp_path):
    root = Path(_jit.__file__).parents[1]
    environment = {**os.environ, "TINYNN_CACHE": str(tmp_path), "PYTHONPATH": str(root)}

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    dtypes = ["float32", "float64", "int32", "int64"]
    children = [start() for _ in dtypes]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child, dtype in zip(children, dtypes, strict=True):
        child.stdin.write(dtype + "\n")
        child.stdin.flush()
    for child in children:
        child.communicate()
        assert child.returncode == 0
    # Whatever the index lists by now, no signature may get the machine code of another.
    last = start()
    output, _ = last.communicate(" ".join(dtypes) + "\n")
    assert last.returncode == 0
    assert int(output.split()[-1]) >= 1


CLOSURES = """
import os
import sys
import numpy as np
from numba import types
from numba.core.bytecode import FunctionIdentity
from kernels import _jit, program

def make(k):
    @_jit.jit
    def put(x):
        x[0] = k
    return put

closures, x = [make(int(k)) for k in sys.argv[1:]], np.zeros(1)
for put in closures:
    put(x)
kinds = [types.Array(types.float64, 1, "C")]
print(*(program._entry(put, kinds) for put in closures), flush=True)
child = os.fork() if hasattr(os, "fork") else None
os.write(1, b"%d\\n" % next(FunctionIdentity._unique_ids))
if child:
    os.waitpid(child, 0)
"""


def test_closures_that_other_processes_compiled_are_told_apart(tmp_path):
    file = tmp_path / "closures.py"
    file.write_text(CLOSURES)
    root = Path(_jit.__file__).parents[1]
    environment = {**os.environ, "TINYNN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(root)}
    numbers: list[str] = []
    for constants in (["2"], ["3"], ["2", "3"]):
        command = [sys.executable, str(file), *constants]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        addresses, *counts = child.stdout.splitlines()
        assert len(set(addresses.split())) == len(constants)
        numbers += counts
    assert len(set(numbers)) == len(numbers)  # after a fork, too


def test_threads_can_be_set_and_read():
    before = _jit.get_threads()
    try:
        _jit.set_threads(1)
        assert _jit.get_threads() == 1
        _jit.set_threads(np.int64(_jit.max_threads()))
        assert _jit.get_threads() == _jit.max_threads()
    finally:
        _jit.set_threads(before)


@pytest.mark.parametrize("count", [0, -1, _jit.max_threads() + 1, True])
def test_thread_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"1 <= n <= {_jit.max_threads()}.*got {count}"):
        _jit.set_threads(count)


@pytest.mark.parametrize("count", [1.5, "2", None])
def test_thread_count_of_a_wrong_type(count):
    with pytest.raises(TypeError, match="expected an integer, got"):
        _jit.set_threads(count)


def test_variant_depends_on_the_work_only():
    def nothing(x):
        for _ in numba.prange(1):
            pass

    variants = _jit.Variants(nothing)
    assert variants.choose(_jit.PARALLEL_BYTES) is variants.parallel
    assert variants.choose(_jit.PARALLEL_BYTES - 1) is variants.serial


def test_prepared_arrays():
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    same, transposed, fixed = a, a.T, a.view()
    fixed.flags.writeable = False
    out = _jit.prepared("name", same, transposed, fixed)
    assert out[0] is a
    for before, after in zip((same, transposed, fixed), out, strict=True):
        assert after.flags.carray
        np.testing.assert_array_equal(before, after)
    for wrong in (np.zeros(2), np.zeros(2, np.int32), np.zeros(2, ">f4")):
        with pytest.raises(TypeError, match="name: expected arrays of one dtype"):
            _jit.prepared("name", a, wrong)
