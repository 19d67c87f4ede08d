"""Whole networks as plans: every technique beside the dense plan and the runtimes of others.

A technique is a family, `plan_NAME`. All contestants of a case run the same model: the technique
changes its weights, and the runtimes get it as the ONNX file that `tinynn.onnx` writes. A process
of its own writes that, since one that times a library must not load another:

    python -m bench.compressed_networks CASE FILE
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench import compressed, image_step, layers, networks
from bench.case import Case
from bench.libraries import DENSE, OURS
from bench.suites import Built, Work

_NAMES = ("dense", "sparse", "sparse4x1", "codebook", "float16", "lowrank", "int8")
FAMILIES = tuple(f"plan_{name}" for name in _NAMES)
_QUICK = ("plan_dense", "plan_int8")
_INT8_PEERS = ("onnxruntime_int8", "openvino_int8")
LIBRARIES = (OURS, DENSE, "torch", "onnxruntime", "openvino", *_INT8_PEERS)

#: Each model with the shapes of images (B, H, W, C) that it is timed on.
_LISTED = {
    "small_cifar": ((1, 32, 32, 3), (64, 32, 32, 3)),
    "baseline": ((1, 24, 24, 3), (64, 24, 24, 3)),
    "baseline_composing": ((1, 24, 24, 3),),
    "baseline_separable": ((1, 24, 24, 3),),
}
#: Those that `bench.networks` has no list of layers for: torch has no part in their cases.
_LARGE = dict.fromkeys(("resnet34", "separable_resnet34"), ((1, 224, 224, 3),))
MODELS = {**_LISTED, **_LARGE}
_DENSITIES = (0.1, 0.3)
_SEEN = 16  # images that ranges of activations are taken from
#: `variant` of a case: the technique wherever it can run, or for each layer the fastest kernel
_FORCED, _MEASURED = "default", "measured"


def cases(quick: bool) -> list[Case]:
    """Every network dense, and by every technique that has kernels for most of its layers."""
    found = []
    for family in _QUICK if quick else FAMILIES:
        for name in _models(family)[: 1 if quick else None]:
            for x in MODELS[name][: 1 if quick else None]:
                found += [
                    Case.of(
                        family, variant=variant, dtype=_dtype(family), x=x, model=name, **attributes
                    )
                    for attributes, variant in _choices(family)
                ]
    return found


def _dtype(family: str) -> str:
    return "int8" if family == "plan_int8" else "float32"


def _models(family: str) -> list[str]:
    if family == "plan_dense":
        return list(MODELS)
    large = ["separable_resnet34"] if family == "plan_int8" else []
    return ["small_cifar", "baseline", *large]


def _choices(family: str) -> list[tuple[dict[str, Any], str]]:
    """What the technique can be told, and how kernels are chosen."""
    if not family.startswith("plan_sparse"):
        return [({"bits": 4} if family == "plan_codebook" else {}, _FORCED)]
    return [({"density": d}, v) for d in _DENSITIES for v in (_FORCED, _MEASURED)]


def contestants(case: Case) -> Sequence[str]:
    """Runtimes of others run the dense model, the factors of low rank, and the model in 8 bits.

    They get what OURS runs; DENSE runs the network whole and in float32.
    """
    if case.family == "plan_dense":
        torch = () if case["model"] in _LARGE else ("torch",)
        return OURS, *torch, "onnxruntime", "openvino"
    runtimes = {"plan_lowrank": ("onnxruntime", "openvino"), "plan_int8": _INT8_PEERS}
    return OURS, DENSE, *runtimes.get(case.family, ())


def work(case: Case) -> Work:
    """The dense network's multiply-adds; images, result and float32 weights moved once.

    Raises KeyError or ValueError where the case does not say which network.
    """
    x, name, variant = case.shape("x"), str(case["model"]), case.variant
    if name not in MODELS or len(x) != 4 or x[3] != 3 or variant not in (_FORCED, _MEASURED):
        raise ValueError(
            f"required a model of {', '.join(MODELS)}, images (B, H, W, 3), a variant {_FORCED} or "
            f"{_MEASURED}; came {name}, {x}, {variant}"
        )
    if name in _LARGE:
        macs, size, classes = _counted(name, x)
    else:
        network = _layers(name)
        macs, classes = sum(networks.multiply_adds(network, x)), image_step.CLASSES
        size = sum(math.prod(shape) for shape in networks.parameters(network))
    return Work(flops=2 * macs, bytes=4 * (math.prod(x) + x[0] * classes + size))


@cache
def _counted(name: str, x: tuple[int, ...]) -> tuple[int, int, int]:
    """Multiply-adds, parameters and classes, as tinynn counts them."""
    import numpy as np

    from tinynn.count import count

    found = count(_published(name), np.zeros(x, np.float32))
    return found.macs, found.parameters, found.layers[-1].output[-1]


def _layers(name: str) -> list[networks.Layer]:
    if name == "small_cifar":
        return networks.small_cifar()
    return networks.baseline(name.partition("_")[2] or "conv")


def build(library: str, case: Case) -> Built:
    """The network in eval mode on images (B, H, W, 3), which gives (B, 10)."""
    (x,) = layers.numbers(case.shape("x"))
    if library in (OURS, DENSE):
        return _silent(case, _plan(case, x, dense=library == DENSE))
    if library == "torch":
        return _torch(case, x)
    nchw = x.transpose(0, 3, 1, 2).copy()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.onnx"
        command = [sys.executable, "-m", "bench.compressed_networks", str(case), str(file)]
        subprocess.run(command, check=True, stdout=sys.stderr.fileno())
        content = file.read_bytes()
    onnxruntime = library.startswith("onnxruntime")
    run = layers.onnxruntime_network if onnxruntime else layers.openvino_network
    return _silent(case, run(case.threads, content, nchw))


def _silent(case: Case, call: layers.Call) -> layers.Call:
    """Without an answer to compare in 8 bits, which round the result of every layer."""
    if case.family != "plan_int8":
        return call

    def without() -> None:
        call()

    return without


# --- ours -----------------------------------------------------------------------------------------


def model(case: Case, *, dense: bool = False) -> Any:
    """The network as the technique leaves it, in eval mode, with the weights it was drawn with.

    `dense` in float32, where the technique is to compute in 8 bits, and with whole layers, where it
    is to compute with factors: their weights are the factors' products, so that answers agree.
    """
    import numpy as np

    from tinynn.compress import factorize, quantize

    net = _published(str(case["model"]))
    technique = case.family.removeprefix("plan_")
    if technique == "lowrank":
        factors = factorize.layers(net, np.zeros(case.shape("x"), np.float32), _half_rank)
        if dense:
            _multiplied(net, factors)
        else:
            net = factors
    elif technique == "int8":
        seen = layers.numbers(case.shape("x"))[0][:_SEEN]
        net = net if dense else quantize.int8(net, [seen])
    elif technique != "dense":
        for _, layer in _mixing(net):
            weight = layer.weight
            weight.mutate()[...] = _changed(case, technique, weight.data)
    return net.eval()


def _published(name: str) -> Any:
    import numpy as np

    from tinynn.models import KNOWN

    return KNOWN[name].build(np.random.default_rng(0))


def _half_rank(values: Any, size: int) -> int:
    """The rank at which two factors have half the weights of the whole."""
    return compressed.half_rank(len(values), size // len(values))


def _multiplied(net: Any, factors: Any) -> None:
    """Give each layer of `net` that is two in `factors` the product of their weights."""
    from tinynn import nn

    found = dict(factors.named_modules())
    for path, whole in _mixing(net):
        if isinstance(found[path], nn.Sequential):
            first, second = (m.weight.data.reshape(-1, m.weight.shape[-1]) for m in found[path])
            whole.weight.mutate()[...] = (first @ second).reshape(whole.weight.shape)


def _mixing(net: Any) -> list[tuple[str, Any]]:
    """The products and convolutions that mix channels: what techniques have kernels for."""
    from tinynn import nn

    return [(path, m) for path, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def _changed(case: Case, technique: str, w: Any) -> Any:
    import numpy as np

    scale = w.std() if technique == "codebook" else np.float32(1)  # books are for deviation 1
    layer = Case(technique, (("w", w.shape),), case.attributes)
    return compressed.changed(layer, w / scale) * scale


def _plan(case: Case, x: Any, *, dense: bool) -> layers.Call:
    import tinynn as tn

    technique = case.family.removeprefix("plan_")
    choose = "dense" if dense or technique in ("dense", "lowrank", "int8") else technique
    if not dense and case.variant == _MEASURED:
        choose = "measure"
    plan = tn.compile(model(case, dense=dense), x, choose=choose)
    return lambda: plan(x)


# --- peers ----------------------------------------------------------------------------------------


def _torch(case: Case, x: Any) -> dict[str, layers.Call]:
    """Eager; its weights are others, drawn anew, as its answer has no say in its time."""

    def build(image: Any) -> layers.Call:
        net, images = networks.torch_network(_layers(str(case["model"]))).eval(), image(x)

        def call() -> None:
            net(images)

        return call

    return layers.torch_layouts(build)


def export(case: Case, path: str) -> None:
    """Write the case's model for other runtimes, for images in NCHW, the layout they work in."""
    import numpy as np
    import onnx

    import tinynn as tn

    x = np.zeros(case.shape("x"), np.float32)
    tn.onnx.export(model(case), x, path)
    content = onnx.load(path)
    _without_transpose(content.graph, x.shape)
    onnx.save(content, path)


def _without_transpose(graph: Any, shape: Sequence[int]) -> None:
    """Let the graph take (B, C, H, W): its first node turns (B, H, W, C) into that."""
    batch, height, width, channels = shape
    node = next(node for node in graph.node if node.op_type == "Transpose")
    graph.node.remove(node)
    for other in graph.node:
        for i, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[i] = node.input[0]
    for axis, size in zip(
        graph.input[0].type.tensor_type.shape.dim, (batch, channels, height, width), strict=True
    ):
        axis.dim_value = size


if __name__ == "__main__":
    export(Case.parse(sys.argv[1]), sys.argv[2])
