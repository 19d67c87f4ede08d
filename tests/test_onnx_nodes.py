"""ONNX's own node tests, for every operator that is read: each passes, or is refused as listed."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinynn as tn
from tinynn.errors import UnsupportedError
from tinynn.onnx.operators import OPERATORS
from tinynn.onnx.source import NEWEST

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore")

#: Operands that the node tests feed, but that models keep as initialisers, as which the adapter
#: gives them: a module's weights are its Parameters, and its shapes do not depend on data.
INITIALIZERS = {
    "BatchNormalization": (1, 2, 3, 4),
    "Clip": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Dropout": (1, 2),
    "Gather": (1,),
    "Pad": (1, 2, 3),
    "Pow": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}

#: Why a test is refused, in the words of the error, and which tests are. Besides these all that
#: feed other than float32 and float64: tinynn computes in nothing else.
EXCLUDED = {
    "only images": (
        "averagepool_1d_default",
        "averagepool_3d_default",
        "averagepool_3d_dilations_large_count_include_pad_is_0_ceil_mode_is_False",
        "averagepool_3d_dilations_large_count_include_pad_is_0_ceil_mode_is_True",
        "averagepool_3d_dilations_large_count_include_pad_is_1_ceil_mode_is_False",
        "averagepool_3d_dilations_large_count_include_pad_is_1_ceil_mode_is_True",
        "averagepool_3d_dilations_small",
        "convtranspose_1d",
        "convtranspose_3d",
        "maxpool_1d_default",
        "maxpool_3d_default",
        "maxpool_3d_dilations",
        "maxpool_3d_dilations_use_ref_impl",
        "maxpool_3d_dilations_use_ref_impl_large",
    ),
    # pools and transposed convolutions here have no dilation
    "attribute dilations": (
        "averagepool_2d_dilations",
        "convtranspose_dilations",
        "maxpool_2d_dilations",
    ),
    "attribute group": ("convtranspose_group_2", "convtranspose_group_2_image_3"),
    # inference only
    "attribute training_mode": (
        "batchnorm_epsilon_training_mode",
        "batchnorm_example_training_mode",
    ),
    "operand training_mode": (
        "training_dropout",
        "training_dropout_default",
        "training_dropout_default_mask",
        "training_dropout_mask",
        "training_dropout_zero_ratio",
        "training_dropout_zero_ratio_mask",
    ),
    # masks of a dropout and places of maxima are no results here
    "output 'z' besides the first": (
        "dropout_default_mask",
        "dropout_default_mask_ratio",
        "maxpool_with_argmax_2d_precomputed_pads",
    ),
    "attribute storage_order": ("maxpool_with_argmax_2d_precomputed_strides",),
    # products are of matrices, or of as many on both sides
    "leading axes differ": ("matmul_bcast",),
    "an operand of one axis": ("matmul_1d_1d", "matmul_1d_3d", "matmul_4d_1d"),
    # the exponent is one number
    "exponent of shape": (
        "pow",
        "pow_bcast_array",
        "pow_example",
        "pow_types_float32_int32",
        "pow_types_float32_int64",
    ),
    "is of UINT": ("pow_types_float32_uint32", "pow_types_float32_uint64"),
    # a size of 0 keeps the operand's own
    "attribute allowzero": ("reshape_allowzero_reordered",),
    # tinynn refuses the maximum of nothing when it runs; ONNX has -infinity
    "required axes with at least one element": ("reduce_max_empty_set",),
}
REASONS = {f"test_{name}": reason for reason, names in EXCLUDED.items() for name in names}

#: Read in pairs around floats only, see test_onnx_quantized; their own tests are of integers.
OF_INTEGERS = ("DequantizeLinear", "QuantizeLinear")

Cases = dict[str, list[Any]]


@pytest.fixture(scope="module")
def cases() -> Cases:
    """The node tests whose graphs have none but operators that are read, by the first of them."""
    from onnx.backend.test.case.node import collect_testcases

    found: Cases = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    for case in collected:
        nodes = case.model.graph.node
        read = OPERATORS.keys() - OF_INTEGERS
        known = all(not n.domain and n.op_type in read for n in nodes)
        if nodes and known and all(o.version <= NEWEST for o in case.model.opset_import):
            found[nodes[0].op_type].append(case)
    return found


def bind(model: Any, inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The model with the INITIALIZERS among these inputs as such, and the other inputs."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    bound = {
        node.input[i]
        for node in own.graph.node
        for i in INITIALIZERS.get(node.op_type, ())
        if i < len(node.input)
    }
    fed = []
    for value, array in zip(own.graph.input, inputs, strict=True):
        if value.name in bound:
            values = onnx.numpy_helper.from_array(np.asarray(array), value.name)
            own.graph.initializer.append(values)
        else:
            fed.append(array)
    return own, fed


def run_model(model: Any, inputs: Sequence[Any], path: Path) -> tuple[Any, ...]:
    """The adapter: what `tn.onnx.load` makes of the model computes from these inputs."""
    own, fed = bind(model, inputs)
    path.write_bytes(own.SerializeToString())
    result = tn.onnx.load(path)(*map(tn.Tensor, fed))
    return result if isinstance(result, tuple) else (result,)


def is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype in (np.float32, np.float64)


def check(case: Any, path: Path) -> None:
    for inputs, outputs in case.data_sets:
        results = run_model(case.model, inputs, path)
        for result, expected in zip(results, outputs, strict=True):
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype), case.name
            np.testing.assert_allclose(
                result.data, expected, rtol=case.rtol, atol=case.atol, err_msg=case.name
            )


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_node_tests_pass_or_are_refused_for_the_reason_that_is_listed(
    operator: str, cases: Cases, tmp_path: Path
) -> None:
    passed = 0
    for case in cases[operator]:
        reason = REASONS.get(case.name)
        (inputs, _), *_ = case.data_sets
        if reason is None and not all(map(is_float, bind(case.model, inputs)[1])):
            reason = "input '.*' is of "
        if reason is None:
            check(case, tmp_path / "model.onnx")
            passed += 1
            continue
        with pytest.raises((UnsupportedError, tn.errors.ShapeError), match=reason):
            run_model(case.model, inputs, tmp_path / "model.onnx")
    # at least one of each operator that has tests of its own passes
    assert passed or not cases[operator]


def test_most_node_tests_pass_and_no_exclusion_is_stale(cases: Cases) -> None:
    names = {case.name for group in cases.values() for case in group}
    assert names >= REASONS.keys()
