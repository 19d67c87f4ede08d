"""Operators that slide a window over images: convolutions and pools."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.geometry import Padding, Pair
from tinynn import nn
from tinynn.onnx.builder import Call
from tinynn.onnx.grids import on_grid
from tinynn.onnx.network import Border
from tinynn.op import Array


def conv(call: Call) -> None:
    """Conv with one group, or one group a channel (depthwise)."""
    weight = _weight(call)
    made, taken, *kernel = weight.shape
    group = call.attribute("group", 1)
    stride, dilation = call.sizes("strides", 2, 1), call.sizes("dilations", 2, 1)
    _same_kernel(call, kernel)
    padding = _padding(call, kernel, stride, dilation)
    options: dict[str, Any] = {
        "stride": _pair(stride),
        "dilation": _pair(dilation),
        "padding": padding,
    }
    if group == 1:
        form, values = "conv", weight.transpose(2, 3, 1, 0)
        layer: Any = nn.Conv2d(taken, made, _pair(kernel), **options, **_given(values))
    elif taken == 1 and made % group == 0:
        form = f"depthwise {group}"
        values = weight.reshape(group, made // group, *kernel).transpose(2, 3, 0, 1)
        layer = nn.DepthwiseConv2d(
            group, _pair(kernel), multiplier=made // group, **options, **_given(values)
        )
    else:
        raise call.refuse(
            f"attribute group={group} with weights {weight.shape}: only 1 or depthwise"
        )
    _finish(call, layer, form, values)


def conv_transpose(call: Call) -> None:
    """ConvTranspose with one group and no dilation."""
    weight = _weight(call)
    taken, made, *kernel = weight.shape
    call.only("group", 1)
    call.only("dilations", (1, 1))
    _same_kernel(call, kernel)
    stride = call.sizes("strides", 2, 1)
    beyond, wanted = call.sizes("output_padding", 2, 0), call.attribute("output_shape")
    auto = call.attribute("auto_pad", "NOTSET")
    pads = call.sizes("pads", 4, 0)
    image = _image(call)
    sides: list[Pair] = []
    output: list[int] = []
    for i in range(2):
        n, s, k, begin, end = image[i], stride[i], kernel[i], pads[i], pads[i + 2]
        size, extra = None, beyond[i]
        if wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
            # the padding follows from the size of the result (operator's text, "total_padding")
            if n is None and wanted is not None:
                raise call.refuse("attribute output_shape of an image whose size is not known")
            total = extra + k - s
            if wanted is not None and n is not None:
                size = int(wanted[i - 2])
                total = s * (n - 1) + extra + k - size
            extra, total = extra + max(0, -total), max(0, total)
            half, rest = total // 2, total - total // 2
            begin, end = (rest, half) if auto == "SAME_LOWER" else (half, rest)
            if wanted is not None and auto == "NOTSET":
                begin, end = rest, half
        elif auto == "VALID":
            begin = end = 0
        if extra >= s:
            raise call.refuse(f"attribute output_padding={beyond} of stride {stride}")
        grown = extra + k - begin - end - s  # the result's size less the stride times the image's
        if grown and n is None:
            raise call.refuse("attribute pads that need an image whose size is known")
        output.append(0 if not grown or n is None else s * n + grown)
        sides.append((begin, end))
    if any(o < 0 for o in output):
        raise call.refuse(f"attribute pads={pads}: nothing is left of the result")
    values = weight.transpose(2, 3, 0, 1)
    layer = nn.ConvTranspose2d(
        taken,
        made,
        _pair(kernel),
        stride=_pair(stride),
        padding=(sides[0], sides[1]),
        output=(output[0], output[1]),
        **_given(values),
    )
    _finish(call, layer, "transposed", values)


def max_pool(call: Call) -> None:
    """MaxPool without dilation; its second output, the places of the maxima, is refused."""
    call.only("storage_order", 0)
    kernel, stride, padding = _pooling(call)
    layer = nn.MaxPool2d(_pair(kernel), stride=_pair(stride), padding=padding)
    call.result(call.add(layer, [call.image(0)], "image"))


def average_pool(call: Call) -> None:
    """AveragePool without dilation; padding that counts becomes zeros around the image."""
    counted = call.attribute("count_include_pad", 0)
    explicit = call.attributes.get("pads")
    given = tuple(explicit.ints) if explicit is not None else (0, 0, 0, 0)
    kernel, stride, padding = _pooling(call)
    x = call.image(0)
    if counted and padding != "valid":
        sides = _explicit(call, padding, kernel, stride, (1, 1))
        own = sides
        if explicit is not None:  # what is beyond these is there for ceil_mode, and never counts
            own = ((given[0], given[2]), (given[1], given[3]))
        beyond = [(0, after - mine[1]) for (_, after), mine in zip(sides, own, strict=True)]
        if any(map(any, own)):
            x = call.add(Border([(0, 0), *own, (0, 0)]), [x], "image")
        padding = (beyond[0], beyond[1])
    layer = nn.AvgPool2d(_pair(kernel), stride=_pair(stride), padding=padding)
    call.result(call.add(layer, [x], "image"))


def _pooling(call: Call) -> tuple[Any, Any, Padding]:
    count = len(call.attributes["kernel_shape"].ints) if "kernel_shape" in call.attributes else 0
    if count != 2:
        raise call.refuse(f"attribute kernel_shape of {count} sizes: only images (2) are pooled")
    kernel, stride = call.sizes("kernel_shape", 2), call.sizes("strides", 2, 1)
    call.only("dilations", (1, 1))
    ceil = bool(call.attribute("ceil_mode", 0))
    padding = _padding(call, kernel, stride, (1, 1))
    if not ceil:
        return kernel, stride, padding
    sides = []
    for n, k, s, (before, after) in zip(
        _image(call), kernel, stride, _explicit(call, padding, kernel, stride, (1, 1)), strict=True
    ):
        if n is None:
            raise call.refuse("attribute ceil_mode=1 of an image whose size is not known")
        room = n + before + after - k
        steps = -(-room // s)
        if steps * s >= n + before:  # a window that begins beyond the image is left out
            steps -= 1
        sides.append((before, after + max(0, steps * s - room)))
    return kernel, stride, (sides[0], sides[1])


def _padding(call: Call, kernel: Any, stride: Any, dilation: Any) -> Padding:
    """The padding as layers take it: explicit, or "same" where that needs no size."""
    auto = call.attribute("auto_pad", "NOTSET")
    pads = call.sizes("pads", 4, 0)
    if auto == "NOTSET":
        return ((pads[0], pads[2]), (pads[1], pads[3])) if any(pads) else "valid"
    if auto == "VALID":
        return "valid"
    if auto == "SAME_UPPER":
        return "same"
    if auto != "SAME_LOWER":
        raise call.refuse(f"attribute auto_pad={auto!r}")
    upper = _explicit(call, "same", kernel, stride, dilation)
    return (upper[0][::-1], upper[1][::-1])


def _explicit(call: Call, padding: Padding, kernel: Any, stride: Any, dilation: Any) -> Any:
    """The padding in numbers."""
    if padding == "valid":
        return ((0, 0), (0, 0))
    if padding != "same":
        return padding
    sides = []
    for n, k, s, d in zip(_image(call), kernel, stride, dilation, strict=True):
        if s == 1:
            total = (k - 1) * d
        elif n is None:
            raise call.refuse("attribute auto_pad of an image whose size is not known")
        else:
            total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        sides.append((total // 2, total - total // 2))
    return (sides[0], sides[1])


def _image(call: Call) -> tuple[int | None, int | None]:
    """Rows and columns of the image, as far as they are known."""
    shape = call.shape(0)
    return (shape[2], shape[3]) if shape is not None and len(shape) == 4 else (None, None)


def _weight(call: Call) -> Array:
    weight = call.constant(1, "weights")
    if weight.ndim != 4:
        raise call.refuse(f"weights of {weight.ndim - 2} dimensions; only images (2) are convolved")
    return weight


def _same_kernel(call: Call, kernel: Any) -> None:
    came = call.attribute("kernel_shape", tuple(kernel))
    if came != tuple(kernel):
        raise call.refuse(f"attribute kernel_shape={came} of weights with {tuple(kernel)}")


def _given(values: Array) -> dict[str, Any]:
    """The options of a layer whose weights are put in afterwards."""
    return {
        "bias": False,
        "weight_init": lambda shape, rng, dtype: np.zeros(shape, dtype),
        "rng": np.random.default_rng(0),
        "dtype": values.dtype,
    }


def _finish(call: Call, layer: Any, form: str, values: Array) -> None:
    layer.weight = call.parameter(1, form, values)
    if call.has(2):
        layer.bias = call.parameter(2, "bias", call.constant(2, "bias"))
    layer.check()
    call.result(call.add(on_grid(call, layer), [call.image(0)], "image"))


def _pair(sizes: Any) -> Pair:
    return (int(sizes[0]), int(sizes[1]))
