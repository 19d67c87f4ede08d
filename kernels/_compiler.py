"""How kernels are compiled: as by Numba, but without work whose result nothing uses.

Python's collector of cycles would pass over all objects many times while a kernel is compiled, up
to a tenth of the time, and next to nothing could be freed. It waits until the kernel is done.

Of a parallel loop Numba makes a function of the body and two wrappers around it, each in a library
of its own, which it links into the kernel. It would optimise all of them and turn all of them into
machine code, a quarter of the time, but nothing runs them there: only the body is optimised before
it is linked, then the kernel (`_levels.LINKS_ONCE`).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

import gc
from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeParforLowering
from numba.parfors.parfor import Parfor

from kernels import _levels


class KernelCompiler(Compiler):
    """What `numba.njit(pipeline_class=...)` takes."""

    def compile_extra(self, func: Any) -> Any:
        collects = gc.isenabled()
        gc.disable()
        try:
            return super().compile_extra(func)
        finally:
            if collects:
                gc.enable()

    def define_pipelines(self) -> Any:
        pipelines = super().define_pipelines()
        for manager in pipelines if _levels.LINKS_ONCE else []:
            manager.passes = [
                (_LowerParallel if step is NativeParforLowering else step, about)
                for step, about in manager.passes
            ]
            manager.finalize()
        return pipelines


class _Library(JITCodeLibrary):
    """Becomes machine code when an address in it is asked for; to be linked, it need not."""

    _emitted = False

    def _optimize_final_module(self) -> None:
        # The wrappers, by the names that Numba gives them. What has another is optimised.
        if self.name != "parallelgufuncwrapper" and "_GufuncWrapper" not in self.name:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> Any:
        self._ensure_finalized()
        if not self._emitted:
            self._emitted = True
            super()._finalize_final_module()
        return super().get_pointer_to_function(name)


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerParallel(NativeParforLowering):
    _name = "kernel_parfor_lowering"

    def run_pass(self, state: Any) -> Any:
        for block in state.func_ir.blocks.values():
            for loop in block.body:
                if isinstance(loop, Parfor):
                    loop.flags = loop.flags.copy()
                    loop.flags.no_compile = True
                    loop.flags.no_cpython_wrapper = True
                    loop.flags.no_cfunc_wrapper = True
        codegen = state.targetctx.codegen()
        usual = codegen._library_class
        codegen._library_class = _Library  # of what is made below; Numba compiles under a lock
        try:
            return super().run_pass(state)
        finally:
            codegen._library_class = usual
