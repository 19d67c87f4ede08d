"""The contestants: how each library is found, and told how many threads to use.

One table, read by the harness and its workers. What each library computes is said by the suites.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

OURS = "tinynn"
DENSE = "tinynn_dense"  # our dense kernels, where OURS are those of a compressed layer

# Every pool that any of the libraries may start; read when the library is loaded.
_THREAD_VARIABLES = (
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True)
class Library:
    """A contestant: `module` must be importable; `prepare(threads)` runs before any case."""

    name: str
    module: str
    prepare: Callable[[int], None]

    def installed(self) -> bool:
        """Whether its module can be found, without loading it."""
        return importlib.util.find_spec(self.module) is not None


def thread_environment(threads: int) -> dict[str, str]:
    """This process's environment, with every thread pool limited to `threads`."""
    return {**os.environ, **{name: str(threads) for name in _THREAD_VARIABLES}}


def _prepare_tinynn(threads: int) -> None:
    from kernels._jit import set_threads

    set_threads(threads)


def _prepare_numpy(threads: int) -> None:
    pass  # its BLAS has read the environment; scipy's sparse products have no threads


def _prepare_runtime(threads: int) -> None:
    pass  # told for each graph


def _prepare_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)


LIBRARIES = {
    library.name: library
    for library in (
        Library(OURS, "tinynn", _prepare_tinynn),
        Library(DENSE, "tinynn", _prepare_tinynn),
        Library("numpy", "numpy", _prepare_numpy),
        Library("scipy", "scipy", _prepare_numpy),
        Library("torch", "torch", _prepare_torch),
        Library("torch_compile", "torch", _prepare_torch),
        Library("torch_sparse", "torch", _prepare_torch),
        Library("torch_int8", "torch", _prepare_torch),
        Library("onnxruntime", "onnxruntime", _prepare_runtime),
        Library("onnxruntime_int8", "onnxruntime", _prepare_runtime),
        Library("openvino", "openvino", _prepare_runtime),
        Library("openvino_int8", "openvino", _prepare_runtime),
    )
}
