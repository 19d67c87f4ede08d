"""How a layer can be run: one class for each kind of kernel, by name.

A kernel gives what the dense one gives but for rounding. The dense kernel runs every layer; the
others run layers whose weights have what they live on: zeros, few different values, few bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kernels import codebook, conv, decoded, half, sparse
from kernels import prepack_compressed as compressed
from kernels.geometry import Window
from kernels.prepack_compressed import Carver
from kernels.program import Program
from tinynn.compress import cluster
from tinynn.deploy.kept import Kept
from tinynn.deploy.steps import Conv, Depthwise, Layer, Linear, Site
from tinynn.op import Array

_ZEROS = 0.2  # the least share of zeros that sparse kernels are tried for


class Stored(NamedTuple):
    """A layer's weights as its kernel stores them."""

    share: float  #: of the weights, that is multiplied
    nbytes: float
    loads: float  #: bytes of activations that indices load for each multiply-add


class Kernel:
    """The dense kernels, which run every step, and the base of the others."""

    name = "dense"
    #: what it can run, for errors
    needs = "a layer"

    def take(self, layer: Layer) -> Layer | None:
        """The layer to be run by it, with weights as it keeps them; None where it cannot."""
        return replace(expanded(layer), kernel=self.name)

    def cut(self, layer: Layer) -> bool:
        """Whether rows of its result may be computed apart, where the layer's step allows that."""
        return True

    def stored(self, layer: Layer) -> Stored:
        """What it reads of a layer that has weights."""
        return Stored(1.0, float(layer.arrays["weight"].nbytes), 0.0)

    def scratch(self, layer: Layer, site: Site) -> int:
        """Bytes that it needs while it runs; `site` has no scratch yet."""
        return layer.step.room(site)

    def emit(self, layer: Layer, site: Site) -> None:
        """Append its calls to the site's program."""
        layer.step.emit(site)


class _Compressed(Kernel):
    """Of linear layers and convolutions."""

    def take(self, layer: Layer) -> Layer | None:
        layer = expanded(layer)
        able = isinstance(layer.step, Linear | Conv) and self._fits(layer)
        return super().take(layer) if able else None

    def cut(self, layer: Layer) -> bool:
        return False

    def _fits(self, layer: Layer) -> bool:
        raise NotImplementedError

    def scratch(self, layer: Layer, site: Site) -> int:
        carve = Carver()
        self._run(layer, site, None, carve)
        return carve.nbytes

    def emit(self, layer: Layer, site: Site) -> None:
        self._run(layer, site, site.program, Carver(site.scratch))

    def _run(self, layer: Layer, site: Site, program: Program | None, carve: Carver) -> None:
        raise NotImplementedError


class _Sparse(_Compressed):
    """Only weights that are not 0, or 4x1 blocks that have such."""

    def __init__(self, name: str, block: int) -> None:
        self.name, self._block = name, block
        self.needs = (
            f"a linear layer or a convolution in float32 with at least {_ZEROS:.0%} zeros among "
            "its weights, all of them finite"
        )

    def _fits(self, layer: Layer) -> bool:
        w = layer.arrays["weight"]
        return bool(np.isfinite(w).all() and np.count_nonzero(w) <= (1 - _ZEROS) * w.size)

    def stored(self, layer: Layer) -> Stored:
        w = layer.arrays["weight"]
        rows = w.reshape(-1, w.shape[-1]) != 0
        starts = np.arange(0, rows.shape[1], self._block)
        blocks = int(np.count_nonzero(np.add.reduceat(rows, starts, axis=1)))
        share = min(1.0, self._block * blocks / w.size)
        return Stored(share, (4.0 * self._block + 1) * blocks, 4.0 / self._block)

    def _run(self, layer: Layer, site: Site, program: Program | None, carve: Carver) -> None:
        step, w, x, y = layer.step, layer.arrays["weight"], site.inputs[0], site.output
        assert isinstance(step, Linear | Conv)
        packed = site.packed.get(self.name, lambda: sparse.pack(w, self._block))
        if isinstance(step, Linear):
            x, y = (s.reshape(s.shape[0], 1, 1, s.shape[1]) for s in (x, y))
        bias, win = layer.arrays.get("bias"), window(layer)
        compressed.sparse2d(
            program, site.packed, x, packed, bias, y, win, step.relu, step.onto, carve
        )


class _Decoded(_Compressed):
    """Weights of few bits, kept so in memory and decoded while the layer runs."""

    needs = "a linear layer or a convolution in float32 (of depthwise ones those of 16 channels on)"

    def take(self, layer: Layer) -> Layer | None:
        if not isinstance(layer.step, Linear | Conv | Depthwise):
            return None
        if layer.kernel == self.name and isinstance(layer.arrays["weight"], Kept):
            return layer
        layer = expanded(layer)
        weight = layer.arrays["weight"]
        if isinstance(layer.step, Depthwise) and (weight.shape[2] < 16 or weight.shape[3] > 1):
            return None  # they are few
        stream = self._stream(weight.reshape(-1, weight.shape[-1]))
        if stream is None:
            return None
        kept: Any = Kept(weight.shape, stream)
        return replace(layer, kernel=self.name, arrays={**layer.arrays, "weight": kept})

    def cut(self, layer: Layer) -> bool:
        return not conv.is_pointwise(window(layer))

    def stored(self, layer: Layer) -> Stored:
        w = _kept(layer)
        stream, columns = w.source, w.shape[-1]
        books = stream.book.nbytes * columns / stream.columns if stream.kind < 0 else 0.0
        return Stored(1.0, len(stream.data) - decoded.SLACK + books, 0.0)

    def scratch(self, layer: Layer, site: Site) -> int:
        parts = site.program.team if self.cut(layer) else 1  # each decodes for itself
        return super().scratch(layer, site) * parts

    def _stream(self, w: Array) -> decoded.Stream | None:
        """Weights (K, N) as it keeps them; None where they are not what it is for."""
        raise NotImplementedError

    def _run(self, layer: Layer, site: Site, program: Program | None, carve: Carver) -> None:
        step, w, win = layer.step, _kept(layer), window(layer)
        x, y, bias = site.inputs[0], site.output, layer.arrays.get("bias")
        if isinstance(step, Depthwise):
            compressed.decoded_depthwise2d(
                program, site.packed, x, w, bias, y, win, step.relu, carve
            )
            return
        assert isinstance(step, Linear | Conv)
        if not conv.is_pointwise(win):
            compressed.decoded_conv2d(
                program, site.packed, x, w, bias, y, win, step.relu, step.onto, carve
            )
            return
        K, N = w.shape[-2:]
        x, y = x.reshape(-1, K), y.reshape(-1, N)
        compressed.decoded_linear(
            program, site.packed, x, w.source, bias, y, step.relu, step.onto, carve
        )


class _CodeBook(_Decoded):
    name = "codebook"
    needs = (
        f"{_Decoded.needs} with at most 256 values, for the layer or for each channel, that "
        "weights share"
    )

    def _stream(self, w: Array) -> decoded.Stream | None:
        book, codes = np.unique(w, return_inverse=True)
        if np.isnan(book).any():
            return None
        if 2 <= len(book) <= min(256, w.size // 2):
            return codebook.pack(codes.reshape(w.shape), book).source
        if len(np.unique(w[:, 0])) > min(256, len(w) - 1):
            return None  # nothing is shared: the usual case, and quick to see
        packed = cluster.pack(w)
        shared = packed is not None and packed.book.ndim == 2  # of a channel
        return packed.source if packed is not None and shared else None


class _Half(_Decoded):
    name = "float16"
    needs = f"{_Decoded.needs} with weights that float16 holds"

    def _stream(self, w: Array) -> decoded.Stream | None:
        return half.pack(w).source if np.array_equal(rounded(w), w) else None


def expanded(layer: Layer) -> Layer:
    """The layer as any kernel can take it, with all its weights as an array."""
    weight: Any = layer.arrays.get("weight")
    if not isinstance(weight, Kept):
        return layer
    return replace(layer, kernel="dense", arrays={**layer.arrays, "weight": np.asarray(weight)})


def rounded(weights: Array) -> Array:
    """The weights rounded to float16, as float32."""
    with np.errstate(over="ignore"):
        return weights.astype(np.float16).astype(np.float32)


def _kept(layer: Layer) -> Kept:
    """The weights of a layer that a kernel took which decodes them."""
    weight: Any = layer.arrays["weight"]
    assert isinstance(weight, Kept)
    return weight


def window(layer: Layer) -> Window:
    """The window of a convolution; a linear layer slides one of 1x1 over one pixel."""
    step = layer.step
    if not isinstance(step, Conv | Depthwise):
        return Window((1, 1))
    w = layer.arrays["weight"]
    return Window((w.shape[0], w.shape[1]), step.stride, step.padding, step.dilation)


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(), _Sparse("sparse", 1), _Sparse("sparse4x1", 4), _CodeBook(), _Half(),
    )
}  # fmt: skip
