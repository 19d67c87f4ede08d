"""What a compressed model costs: bytes of its file, arithmetic, an estimate of its energy.

Energy of one inference, of the operations and the bytes that it moves, by M. Horowitz, "Computing's
energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9 (45 nm, 0.9 V): an addition
and a product of float32 0.9 and 3.7 pJ, of int8 with an int32 sum 0.1 and 0.2 pJ; 64 bits from a
cache of 1 MB 100 pJ, from DRAM at least 1300 pJ. Counted are: the multiply-adds that kernels carry
out; the weights' file, read from DRAM once for each image; every activation written to a cache of
1 MB and read from it once. It is an estimate of a chip of that time, to compare models with: no
instruction, no address and nothing of this machine is in it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import tinynn as tn
from experiments.runner import Record
from kernels.codebook import unpack_bits
from tinynn.compress import integers
from tinynn.deploy.file import describe
from tinynn.errors import CompileError
from tinynn.nn.module import Module
from tinynn.nn.quantized import ActivationQuantizer, DynamicQuantizer
from tinynn.tensor import Tensor

Array = np.ndarray[Any, Any]

MULTIPLY_ADD = {"float32": 3.7e-12 + 0.9e-12, "int8": 0.2e-12 + 0.1e-12}  #: J
ADDITION = 0.9e-12  #: J, float32
CACHE_BYTE = 100e-12 / 8  #: J
DRAM_BYTE = 1300e-12 / 8  #: J

_BLOCKS = {"sparse": 1, "sparse4x1": 4}


@dataclass(frozen=True)
class Executable:
    """What really runs for a model: its plan, or the model itself where no plan can express it."""

    model: Module
    plan: tn.Plan | None

    @classmethod
    def of(cls, model: Module, example: Array) -> Executable:
        """The plan of the model for single images, if there is one."""
        try:
            return cls(model, tn.compile(model.eval(), example))
        except CompileError:
            return cls(model.eval(), None)

    @property
    def kind(self) -> str:
        """Which of the two."""
        return "model" if self.plan is None else "plan"

    def __call__(self, x: Array) -> Array:
        if self.plan is not None:
            return self.plan(x)
        with tn.no_grad():
            return self.model(Tensor(x, copy=False)).numpy()


def costs(runs: Executable, example: Array) -> Record:
    """Bytes, parameters, multiply-adds and energy of one inference on an image like the example."""
    counted = tn.count(runs.model, example)
    executed = counted.macs if runs.plan is None else executed_multiply_adds(runs.plan)
    nbytes = integers.nbytes(runs.model) if runs.plan is None else runs.plan.nbytes
    whole = [np.asarray(p.data) for p in runs.model.parameters()]
    return {
        "executed_as": runs.kind,
        "bytes": nbytes,
        "content_bytes": nbytes if runs.plan is None else content(runs.plan),
        "deflated_bytes": None if runs.plan is None else deflated(runs.plan),
        "parameters": sum(a.size for a in whole),
        "non_zeros": sum(int(np.count_nonzero(a)) for a in whole),
        "multiply_adds": counted.macs,
        "executed_multiply_adds": executed,
        "energy_joules": energy(runs.model, counted, executed, nbytes),
        "kernels": None if runs.plan is None else _kernels(runs.plan),
    }


def content(plan: tn.Plan) -> int:
    """The bytes of the plan's numbers alone, packed as in its file: without its list of layers."""
    return len(describe(plan.network)[1])


def executed_multiply_adds(plan: tn.Plan) -> int:
    """Those of one image, without the ones that sparse kernels leave out."""
    total = 0
    for layer in plan.network.layers:
        shape = plan.network.shapes[layer.output]
        macs = layer.step.macs(plan.network.inputs(layer), layer.arrays, shape)
        if layer.kernel in _BLOCKS:
            weight = layer.arrays["weight"]
            macs = macs * _stored(weight, _BLOCKS[layer.kernel]) // weight.size
        total += macs
    return total


def _stored(weight: Array, block: int) -> int:
    """The weights in blocks of neighbouring outputs that are not all zero."""
    rows = weight.reshape(-1, weight.shape[-1]) != 0
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block)))
    return block * int(padded.reshape(len(rows), -1, block).any(axis=2).sum())


def _kernels(plan: tn.Plan) -> dict[str, int]:
    """How many layers with weights each kernel runs."""
    names = [layer.kernel for layer in plan.network.layers if "weight" in layer.arrays]
    return {name: names.count(name) for name in sorted(set(names))}


# --- energy ---------------------------------------------------------------------------------------


def energy(model: Module, counted: tn.Count, multiply_adds: int, nbytes: int) -> dict[str, float]:
    """Joules of one inference: see the head of this file."""
    quantizers = [m for _, m in model.named_modules()]
    whole = any(isinstance(m, ActivationQuantizer | DynamicQuantizer) for m in quantizers)
    kind, width = ("int8", 1) if whole else ("float32", 4)
    additions = sum(layer.macs for layer in counted.layers if _is_additive(layer.ops))
    return {
        "arithmetic": (multiply_adds - additions) * MULTIPLY_ADD[kind] + additions * ADDITION,
        "weights": nbytes * DRAM_BYTE,
        "activations": 2 * counted.activation_bytes * width / 4 * CACHE_BYTE,
    }


def _is_additive(ops: list[str]) -> bool:
    return any(name.startswith("additive") for name in ops)


# --- entropy coding -------------------------------------------------------------------------------


def deflated(plan: tn.Plan) -> int:
    """Bytes of the plan's content if each stream of it went through DEFLATE by itself.

    Packed streams are taken apart first, a number a byte, so that Huffman's codes are of the
    numbers: the last stage of Han, Mao & Dally 2016, "Deep Compression", section 4. What gets no
    smaller stays as it is. No file is written so: it is what storage or a download could save.
    """
    text, data = describe(plan.network)
    total, seen = _deflated(text.encode()), set()
    for head in _forms(json.loads(text)):
        for part, (dtype, start, count) in head["parts"].items():
            if start not in seen:
                seen.add(start)
                stream = data[start : start + np.dtype(dtype).itemsize * count]
                bits = (head if part == "gaps" else head.get("inner", head)).get("bits", 8)
                apart = stream
                if part in ("gaps", "codes") and bits < 8:
                    packed = np.frombuffer(stream, np.uint8)
                    apart = unpack_bits(packed, bits, packed.size * 8 // bits).tobytes()
                total += min(len(stream), _deflated(apart))
    return total


def _deflated(stream: bytes) -> int:
    """The smaller of DEFLATE with and without looking for repetitions."""
    sizes = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        coder = zlib.compressobj(9, strategy=strategy)
        sizes.append(len(coder.compress(stream)) + len(coder.flush()))
    return min(sizes)


def _forms(value: Any) -> Iterator[Record]:
    """All descriptions of arrays in the plan's text."""
    if isinstance(value, dict):
        if "parts" in value:
            yield value
        for inner in value.values():
            yield from _forms(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _forms(inner)
