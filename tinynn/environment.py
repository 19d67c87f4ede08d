"""What a figure was measured on: the machine, the versions, the state of the checkout."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba

from kernels._jit import max_threads

# Instruction-set extensions that decide how fast a kernel can be.
_FEATURES = (
    *("sse4.2", "avx", "avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512vnni", "avx512bf16", "avx512fp16", "amx-tile", "amx-int8", "amx-bf16"),
    *("neon", "dotprod", "fullfp16", "bf16", "i8mm", "sve", "sve2", "sme"),
)

_DISTRIBUTIONS = (
    *("tinynn", "numpy", "numba", "llvmlite", "scipy", "matplotlib", "safetensors"),
    *("torch", "onnxruntime", "openvino", "dask"),
)

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}


def environment() -> dict[str, Any]:
    """A JSON-ready record of the machine, the versions and the commit.

    Keys: `cpu` (name, architecture, LLVM's name, features, cores, cores this process may use, cache
    sizes in bytes), `threads` (Numba's limit, the threading layer), `versions`, `python`, `os`,
    `commit` (with "+" where tracked files were changed; None outside a git checkout),
    `load_average` (over 1, 5 and 15 minutes; None where the system has none).
    """
    return {
        "cpu": {
            "name": cpu_name(),
            "architecture": platform.machine(),
            "llvm_name": llvm.get_host_cpu_name(),
            "features": cpu_features(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "caches": cache_sizes(),
        },
        "threads": {"limit": max_threads(), "layer": threading_layer()},
        "versions": versions(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": platform.platform(),
        "commit": commit(),
        "load_average": load_average(),
    }


def cpu_name() -> str:
    """The processor's name as it names itself; the architecture where it does not."""
    try:
        if sys.platform == "linux":
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                key, _, value = line.partition(":")
                if key.strip() == "model name" and value.strip():
                    return value.strip()
        elif sys.platform == "darwin":
            return _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction-set extensions present, of those that decide how fast a kernel can be."""
    present = llvm.get_host_cpu_features()
    return [name for name in _FEATURES if present.get(name)]


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_sizes() -> dict[str, int]:
    """Bytes of the first core's data caches L1, L2, L3; usual sizes where the system is silent."""
    sizes = dict(_USUAL_CACHES)
    try:
        for entry in sorted(_CACHES.glob("index*")):
            if (entry / "type").read_text().strip() != "Instruction":
                level = "L" + (entry / "level").read_text().strip()
                sizes[level] = _bytes((entry / "size").read_text().strip())
    except (OSError, ValueError):
        return dict(_USUAL_CACHES)
    return sizes


def threading_layer() -> str | None:
    """Numba's threading layer ("omp", "tbb", "workqueue"); None before the first parallel loop."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


def versions() -> dict[str, str]:
    """Versions of this package, of what it stands on, and of its peers, as far as installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """The checkout's commit, with "+" if tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # do not name some repository further up
        return None
    try:
        head = _output("git", "-C", str(root), "rev-parse", "HEAD").strip()
        changed = _output("git", "-C", str(root), "status", "--porcelain", "-uno").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def load_average() -> list[float] | None:
    """Runnable processes over the last 1, 5 and 15 minutes; None where the system has no count."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout


def _bytes(size: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
    return int(size.rstrip("KMG")) * unit
