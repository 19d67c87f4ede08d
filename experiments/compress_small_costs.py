"""What a compressed model costs: bytes of its file, arithmetic, an estimate of its energy.

Energy of one inference, of the operations and the bytes that it moves, by M. Horowitz, "Computing's
energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9 (45 nm, 0.9 V): an addition
and a product of float32 0.9 and 3.7 pJ, of int8 with an int32 sum 0.1 and 0.2 pJ; 64 bits from a
cache of 1 MB 100 pJ, from DRAM at least 1300 pJ. Counted are: the multiply-adds that kernels carry
out, by the numbers that their kernels multiply; the weights' file, read from DRAM once for each
image; the image and every layer's result, as many bytes as it has in the plan, written to a cache
of 1 MB and read from it once (a model without a plan: the results of its ops). It is an estimate of
a chip of that time, to compare models with: no instruction, no address and nothing of this machine
is in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

import tinynn as tn
from experiments.runner import Record
from tinynn.compress import integers
from tinynn.deploy.file import describe
from tinynn.deploy.kernels import KERNELS
from tinynn.deploy.steps import Reshape
from tinynn.errors import CompileError
from tinynn.nn.module import Module
from tinynn.nn.quantized import ActivationQuantizer, DynamicQuantizer
from tinynn.tensor import Tensor

Array = np.ndarray[Any, Any]

Products = dict[str, int]  #: multiply-adds by the kind of numbers: the keys of JOULES

#: of a multiply-add; the ef-operator's are two additions, which `macs` counts one by one
JOULES = {"float32": 3.7e-12 + 0.9e-12, "int8": 0.2e-12 + 0.1e-12, "additive": 0.9e-12}
CACHE_BYTE = 100e-12 / 8  #: J
DRAM_BYTE = 1300e-12 / 8  #: J


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
    products = _of_model(runs.model, counted) if runs.plan is None else _of_plan(runs.plan)
    moved = counted.activation_bytes if runs.plan is None else result_bytes(runs.plan)
    nbytes = integers.nbytes(runs.model) if runs.plan is None else runs.plan.nbytes
    whole = [np.asarray(p.data) for p in runs.model.parameters()]
    return {
        "executed_as": runs.kind,
        "bytes": nbytes,
        "content_bytes": nbytes if runs.plan is None else content(runs.plan),
        "deflated_bytes": None if runs.plan is None else runs.plan.deflated_nbytes,
        "parameters": sum(a.size for a in whole),
        "non_zeros": sum(int(np.count_nonzero(a)) for a in whole),
        "multiply_adds": counted.macs,
        "executed_multiply_adds": sum(products.values()),
        "energy_joules": energy(products, nbytes, moved),
        "kernels": None if runs.plan is None else _kernels(runs.plan),
    }


def content(plan: tn.Plan) -> int:
    """The bytes of the plan's numbers alone, packed as in its file: without its list of layers."""
    return len(describe(plan.network)[1])


def executed_multiply_adds(plan: tn.Plan) -> int:
    """Those of one image, without the ones that sparse kernels leave out."""
    return sum(_of_plan(plan).values())


def _of_plan(plan: tn.Plan) -> Products:
    """The same by the kind of numbers."""
    total = dict.fromkeys(JOULES, 0)
    for layer, macs in zip(plan.network.layers, plan.network.macs, strict=True):
        weight = layer.arrays.get("weight")
        if weight is not None:
            macs = round(macs * KERNELS[layer.kernel].stored(layer).share)
        whole = weight is not None and weight.dtype == np.int8
        kind = "additive" if layer.step.kind.startswith("additive") else "float32"
        total["int8" if whole else kind] += macs
    return total


def _of_model(model: Module, counted: tn.Count) -> Products:
    """What `_of_plan` gives, of a model that no plan can express, by what its modules are."""
    quantizers = ActivationQuantizer | DynamicQuantizer
    kind = "int8" if any(isinstance(m, quantizers) for _, m in model.named_modules()) else "float32"
    additions = sum(a.macs for a in counted.layers if any("additive" in name for name in a.ops))
    return {kind: counted.macs - additions, "additive": additions}


def _kernels(plan: tn.Plan) -> dict[str, int]:
    """How many layers with weights each kernel runs."""
    names = [layer.kernel for layer in plan.network.layers if "weight" in layer.arrays]
    return {name: names.count(name) for name in sorted(set(names))}


# --- energy ---------------------------------------------------------------------------------------


def energy(products: Products, nbytes: int, moved: int) -> dict[str, float]:
    """Joules of one inference: see the head of this file."""
    return {
        "arithmetic": sum(JOULES[kind] * number for kind, number in products.items()),
        "weights": nbytes * DRAM_BYTE,
        "activations": 2 * moved * CACHE_BYTE,
    }


def result_bytes(plan: tn.Plan) -> int:
    """The bytes of the image and of all layers' results that are not another name of an operand."""
    network = plan.network
    values = [0, *(a.output for a in network.layers if not isinstance(a.step, Reshape))]
    return sum(math.prod(network.shapes[v]) * network.dtypes[v].itemsize for v in values)
