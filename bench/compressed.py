"""Single layers whose weights are compressed: every technique beside the dense layer.

A technique is a family of cases; all its contestants compute with the same numbers, those that it
leaves of the weights (zeros, few values, low rank), so that their answers agree. Peers without a
kernel for it run the dense layer; they are raced once a shape, in the family `dense`.

Arrays are those of the suites `matmul` and `conv`: x (M, K) and w (K, N), or x (B, H, W, C) and
w (KH, KW, C, N).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench import compressed_int8, layers
from bench.case import Case
from bench.libraries import DENSE, OURS
from bench.suites import Built, Work, conv, matmul

_INT8 = ("int8_product", "int8_conv")
FAMILIES = ("dense", "sparse", "sparse4x1", "codebook", "float16", "lowrank", *_INT8)
LIBRARIES = (
    *(OURS, DENSE, "scipy", "torch", "torch_sparse", "onnxruntime", "openvino"),
    *compressed_int8.PEERS,
)

#: Shares of weights (or of blocks of them) that are not zero.
DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
_QUICK_DENSITIES = (0.1, 0.7)
_PEERS_UP_TO = 0.4  # of density: libraries are slower than any dense product long before
_BITS = (4, 8)
_SPREAD = 3.0  # code books cover weights from -3 to 3 standard deviations


def cases(quick: bool) -> list[Case]:
    """Every shape of shapes/compress.txt by every technique that has a kernel for it."""
    found = []
    for layer in layers.cases("compress", lambda line: ["dense"], quick):
        found.append(layer)
        for density in _QUICK_DENSITIES if quick else DENSITIES:
            found += [_extended(layer, f, density=density) for f in ("sparse", "sparse4x1")]
        found += [_extended(layer, "codebook", bits=b) for b in _BITS[: 1 if quick else None]]
        found.append(_extended(layer, "float16"))
        found.append(_extended(layer, "lowrank", rank=half_rank(*matrix(layer))))
        family = _INT8[0 if is_product(layer) else 1]
        found.append(dataclasses.replace(layer, family=family, dtype="int8"))
    if quick:
        found = [case for case in found if _is_quick(case)]
    return sorted(found, key=lambda case: FAMILIES.index(case.family))  # stable: shapes in order


def _is_quick(case: Case) -> bool:
    """Few enough for a minute: a product by nearly every technique, a convolution by two."""
    densities = {"sparse": _QUICK_DENSITIES, "sparse4x1": _QUICK_DENSITIES[1:]}
    if not is_product(case):
        return case.family == _INT8[1] or (
            case.family == "sparse" and _density(case) == _QUICK_DENSITIES[0]
        )
    if case.family in densities:
        return _density(case) in densities[case.family]
    return case.family != "float16"


def _extended(layer: Case, family: str, **attributes: Any) -> Case:
    return Case(family, layer.shapes, (*attributes.items(), *layer.attributes))


def contestants(case: Case) -> Sequence[str]:
    """Ours by the technique and dense; libraries that have the technique, or dense ones."""
    if case.family == "dense":
        return OURS, "torch", "onnxruntime", "openvino"
    if case.family in _INT8:
        return OURS, DENSE, *compressed_int8.PEERS
    peers = {"sparse": ("scipy", "torch_sparse"), "sparse4x1": ("scipy",)}.get(case.family, ())
    if not peers or not is_product(case) or _density(case) > _PEERS_UP_TO:
        return OURS, DENSE
    return OURS, DENSE, *peers


def is_product(case: Case) -> bool:
    """Whether the layer is x (M, K) times w (K, N), no convolution with a window."""
    return len(case.shape("w")) == 2


def matrix(case: Case) -> tuple[int, int]:
    """(inputs of an output, outputs): the weights as a matrix."""
    *inputs, outputs = case.shape("w")
    return math.prod(inputs), outputs


def half_rank(inputs: int, outputs: int) -> int:
    """The rank at which two factors have half the weights of the whole."""
    return max(1, inputs * outputs // (2 * (inputs + outputs)))


def work(case: Case) -> Work:
    """Multiply-adds with the weights that are left; arrays moved once, weights as they are packed.

    Stored sparse, a weight has an index of one byte, which a block of four shares. In 8 bits all
    is bytes.
    """
    whole = _dense_suite(case).work(plain(case))
    size = math.prod(case.shape("w"))
    moved = whole.bytes - 4 * size
    if case.family in ("sparse", "sparse4x1"):
        density = _density(case)
        each = 5.0 if case.family == "sparse" else 4.25
        return Work(whole.flops * density, moved + each * density * size)
    if case.family == "lowrank":
        inputs, outputs = matrix(case)
        share = case.integer("rank") * (inputs + outputs) / size
        return Work(whole.flops * share, moved + 4 * share * size)
    if case.family in _INT8:
        return Work(whole.flops, whole.bytes / 4)
    bits = {"codebook": lambda: case.integer("bits"), "float16": lambda: 16}
    return Work(whole.flops, moved + size * bits.get(case.family, lambda: 32)() / 8)


def plain(case: Case) -> Case:
    """The dense layer as a case of the suite `matmul` or `conv`."""
    family = "matmul" if is_product(case) else "conv"
    return dataclasses.replace(case, family=family, dtype="float32")


def _dense_suite(case: Case) -> Any:
    return matmul if is_product(case) else conv


def _density(case: Case) -> float:
    density = case["density"]
    if isinstance(density, tuple | str) or not 0 < density <= 1:
        raise ValueError(f"density={density}: required a number, 0 < density <= 1")
    return float(density)


def build(library: str, case: Case) -> Built:
    """The layer without a bias; but with one where it is a dense convolution, as in `conv`."""
    if case.family == "dense" and library != OURS:
        return _dense_suite(case).build(library, plain(case))
    x, w, bias = layers.numbers(case.shape("x"), case.shape("w"), case.shape("w")[-1:])
    if case.family in _INT8:
        problem = compressed_int8.problem(case, x, w)
        if library != DENSE:
            peers = {OURS: compressed_int8.ours, **compressed_int8.PEERS}
            return peers[library](case, problem)
        x, w = problem.real_x, problem.real_w
    w = changed(case, w)
    if library in ("scipy", "torch_sparse"):
        return dict(_SPARSE_PEERS[library](case, x, w))
    (x,) = layers.pooled(x)
    if library == DENSE or case.family == "dense":
        return _dense(case, x, w, None if library == DENSE or is_product(case) else bias)
    return {"": _TECHNIQUES[case.family](case, x, w)}


# --- what a technique leaves of the weights -------------------------------------------------------


def changed(case: Case, w: Any) -> Any:
    """The weights w (..., N) as the case's technique leaves them, float32 and dense."""
    if case.family in ("sparse", "sparse4x1"):
        return thinned(w, _density(case), 4 if case.family == "sparse4x1" else 1)
    if case.family == "codebook":
        book, codes = coded(w, case.integer("bits"))
        return book[codes]
    if case.family == "float16":
        return w.astype("float16").astype("float32")
    if case.family == "lowrank":
        first, second = _factors(case)
        return (first @ second).reshape(w.shape)
    return w


def thinned(w: Any, density: float, block: int) -> Any:
    """Zeros at random places, in whole blocks of neighbours along the last axis."""
    import numpy as np

    rows = w.reshape(-1, w.shape[-1])
    groups = -(-rows.shape[1] // block)
    places = np.random.default_rng(1).permutation(len(rows) * groups)
    kept = np.zeros(len(places), bool)
    kept[places[: max(1, round(density * len(places)))]] = True
    mask = np.repeat(kept.reshape(-1, groups), block, axis=1)[:, : rows.shape[1]]
    return np.where(mask, rows, np.float32(0)).reshape(w.shape)


def coded(w: Any, bits: int) -> tuple[Any, Any]:
    """A code book (2**bits,) of equally spaced values, and each weight's place in it."""
    import numpy as np

    entries = 1 << bits
    book = np.linspace(-_SPREAD, _SPREAD, entries).astype(np.float32)
    places = np.rint((w / (2 * _SPREAD) + 0.5) * (entries - 1))
    return book, np.clip(places, 0, entries - 1).astype(np.int64)


def _factors(case: Case) -> list[Any]:
    (inputs, outputs), rank = matrix(case), case.integer("rank")
    return layers.numbers((inputs, rank), (rank, outputs))


# --- ours -----------------------------------------------------------------------------------------


def _dense(case: Case, x: Any, w: Any, bias: Any) -> Built:
    """As training calls it, and as a plan does, with weights packed before."""
    from kernels import conv as convolution
    from kernels import pointwise

    if is_product(case):
        return {"kernel": lambda: pointwise.matmul(x, w), "plan": _plan(case, x, w, bias, "dense")}
    win = layers.Geometry.of(case).window()
    return {
        "kernel": lambda: convolution.conv2d(x, w, bias, win, False),
        "plan": _plan(case, x, w, bias, "dense"),
    }


def _plan(case: Case, x: Any, w: Any, bias: Any, kernel: str) -> layers.Call:
    import numpy as np

    import tinynn as tn
    from tinynn import nn

    rng = np.random.default_rng(0)
    layer: nn.Linear | nn.Conv2d
    if is_product(case):
        layer = nn.Linear(*w.shape, bias=False, rng=rng)
    else:
        win, (*_, m_in, m_out) = layers.Geometry.of(case).window(), w.shape
        options: Any = {"stride": win.stride, "padding": win.padding, "bias": bias is not None}
        layer = nn.Conv2d(m_in, m_out, win.kernel, rng=rng, **options)
    layer.weight.mutate()[...] = w
    if bias is not None and layer.bias is not None:
        layer.bias.mutate()[...] = bias
    plan = tn.compile(nn.Sequential(layer), x, choose=kernel)
    return lambda: plan(x)


def _sparse(case: Case, x: Any, w: Any) -> layers.Call:
    from kernels import sparse

    packed = sparse.pack(w, 4 if case.family == "sparse4x1" else 1)
    if is_product(case):
        return lambda: sparse.linear(x, packed)
    win = layers.Geometry.of(case).window()
    return lambda: sparse.conv2d(x, packed, None, win)


def _codebook(case: Case, x: Any, w: Any) -> layers.Call:
    from kernels import codebook

    if not is_product(case):
        return _plan(case, x, w, None, case.family)
    book, codes = coded(layers.numbers(case.shape("x"), w.shape)[1], case.integer("bits"))
    packed = codebook.pack(codes, book)
    return lambda: codebook.linear(x, packed)


def _half(case: Case, x: Any, w: Any) -> layers.Call:
    from kernels import half

    if not is_product(case):
        return _plan(case, x, w, None, case.family)
    packed = half.pack(w)
    return lambda: half.linear(x, packed)


def _low_rank(case: Case, x: Any, w: Any) -> layers.Call:
    from kernels import conv as convolution
    from kernels import pointwise

    first, second = _factors(case)
    if is_product(case):
        return lambda: pointwise.matmul(pointwise.matmul(x, first), second)
    win = layers.Geometry.of(case).window()
    first = first.reshape(*w.shape[:3], -1)

    def call() -> object:
        thin = convolution.conv2d(x, first, None, win, False)
        return pointwise.matmul(thin.reshape(-1, thin.shape[3]), second)

    return call


_TECHNIQUES: dict[str, Callable[[Case, Any, Any], layers.Call]] = {
    "sparse": _sparse,
    "sparse4x1": _sparse,
    "codebook": _codebook,
    "float16": _half,
    "lowrank": _low_rank,
}


# --- peers with sparse kernels: products, in either layout of the activations ---------------------


def _scipy(case: Case, x: Any, w: Any) -> Iterator[tuple[str, layers.Call]]:
    from scipy import sparse

    columns, by_rows = x.T.copy(), sparse.csr_matrix(w.T)
    yield "csr, features first", lambda: by_rows @ columns
    by_columns = sparse.csc_matrix(w)
    yield "csc, rows first", lambda: x @ by_columns
    if case.family == "sparse4x1" and w.shape[1] % 4 == 0:
        blocks = sparse.bsr_matrix(w.T, blocksize=(4, 1))
        yield "bsr, features first", lambda: blocks @ columns


def _torch_sparse(case: Case, x: Any, w: Any) -> Iterator[tuple[str, layers.Call]]:
    import torch

    columns = torch.from_numpy(x.T.copy())
    by_rows = torch.from_numpy(w.T.copy()).to_sparse_csr()
    yield "csr, features first", lambda: torch.mm(by_rows, columns)
    rows = torch.from_numpy(x)
    by_columns = torch.from_numpy(w).to_sparse_csc()
    yield "csc, rows first", lambda: torch.mm(rows, by_columns)


_SPARSE_PEERS = {"scipy": _scipy, "torch_sparse": _torch_sparse}
