"""The tape: what is recorded, what is accumulated, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tinynn import nn, ops
from tinynn.diagnose import find_non_finite, require_finite
from tinynn.errors import (
    DTypeError,
    GraphError,
    NonFiniteError,
    ShapeError,
    StaleArrayError,
)
from tinynn.tensor import Tensor, no_grad


def leaf(*values: float) -> Tensor:
    return Tensor(np.array(values, np.float64), requires_grad=True)


def test_plain_numbers_become_float32_and_float64_arrays_stay() -> None:
    assert Tensor([1, 2]).dtype == np.float32
    assert Tensor(3).dtype == np.float32
    assert Tensor(np.zeros(2)).dtype == np.float64
    assert (Tensor([1.0]) * 2.5).dtype == np.float32
    assert (2.5 / Tensor(np.ones(1))).dtype == np.float64


def test_a_tensor_used_twice_collects_both_gradients() -> None:
    x = leaf(3.0)
    (x * x + x).backward(np.ones(1))
    assert x.grad is not None and x.grad[0] == 7.0


def test_gradients_accumulate_over_backward_calls() -> None:
    x = leaf(1.0, 2.0)
    (x * 3).sum().backward()
    (x * 4).sum().backward()
    np.testing.assert_array_equal(x.grad, [7, 7])


def test_diamond_graph() -> None:
    x = leaf(2.0)
    a, b = x * 3, x * 5
    (a * b).sum().backward()
    np.testing.assert_array_equal(x.grad, [60.0])


def test_backward_walks_a_very_deep_graph() -> None:
    x = leaf(1.0)
    y = x
    for _ in range(20_000):
        y = y + 1
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1.0])


def test_no_grad_records_nothing() -> None:
    x = leaf(1.0)
    with no_grad():
        y = x * 2
    assert not y.requires_grad
    with pytest.raises(GraphError, match="requires a gradient"):
        y.sum().backward()


def test_second_backward_is_refused_unless_retained() -> None:
    x = leaf(2.0)
    y = (x * x).sum()
    y.backward(retain=True)
    y.backward()
    np.testing.assert_array_equal(x.grad, [8.0])
    with pytest.raises(GraphError, match="retain=True"):
        y.backward()


def test_backward_of_many_elements_needs_a_gradient_of_that_shape() -> None:
    y = leaf(1.0, 2.0) * 2
    with pytest.raises(ShapeError, match="explicit grad"):
        y.backward()
    with pytest.raises(ShapeError, match=r"\(2,\); came \(3,\)"):
        y.backward(np.ones(3))


def test_gradient_flows_from_the_middle_of_a_graph() -> None:
    x = leaf(2.0)
    y = x * x
    _ = (y * 100).sum()
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [4.0])


def test_mutating_a_saved_array_is_detected() -> None:
    x = leaf(2.0)
    y = (x * x).sum()
    x.mutate()[...] = 5
    with pytest.raises(StaleArrayError, match="Mul"):
        y.backward()


def test_mutating_a_result_that_its_own_rule_needs_is_detected() -> None:
    x = leaf(2.0)
    e = x.exp()
    y = e.sum()
    e.mutate()[...] = 0
    with pytest.raises(StaleArrayError, match="Exp"):
        y.backward()


def test_mutating_through_a_view_is_detected() -> None:
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    view = x.reshape(3, 2)
    y = (view * view).sum()
    x.mutate()[...] = 7
    with pytest.raises(StaleArrayError):
        y.backward()


def test_mutating_a_detached_twin_is_detected() -> None:
    x = leaf(2.0)
    y = (x * x).sum()
    x.detach().mutate()[...] = 7
    with pytest.raises(StaleArrayError):
        y.backward()


def test_mutating_what_no_rule_needs_is_fine() -> None:
    x = leaf(2.0)
    y = (x + 1).sum()
    x.mutate()[...] = 7
    y.backward()
    np.testing.assert_array_equal(x.grad, [1.0])


def test_data_and_grad_cannot_be_written_from_outside() -> None:
    x = leaf(2.0)
    (x * x).sum().backward()
    with pytest.raises(ValueError, match="read-only"):
        x.data[0] = 1
    assert x.grad is not None
    with pytest.raises(ValueError, match="read-only"):
        x.grad[0] = 1


def test_read_only_views_cannot_be_made_writable() -> None:
    x = leaf(2.0)
    with pytest.raises(ValueError, match="WRITEABLE"):
        x.data.flags.writeable = True
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(x)[0] = 1
    g = np.ones(1)
    x.grad = g
    g[0] = 9
    assert x.grad is not None and x.grad[0] == 1


def test_switches_hold_for_one_thread() -> None:
    import threading

    x, results = leaf(1.0), []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with no_grad():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    results.append((x * 2).requires_grad)
    with no_grad():
        results.append((x * 2).requires_grad)
        done.set()
        thread.join()
    results.append((x * 2).requires_grad)
    assert results == [True, False, True]


def test_a_deep_copy_is_a_leaf() -> None:
    import copy

    x = leaf(2.0)
    y = x * x
    for _ in range(3000):
        y = y + 1
    twin = copy.deepcopy(y)
    assert twin.item() == y.item() and twin.requires_grad and twin._node is None


def test_a_tensor_does_not_share_memory_with_the_array_it_was_made_from() -> None:
    a = np.ones(2)
    x = Tensor(a, requires_grad=True)
    y = (x * x).sum()
    a[...] = 100
    y.backward()
    np.testing.assert_array_equal(x.grad, [2, 2])


def test_mixed_floating_dtypes_are_refused_by_name() -> None:
    with pytest.raises(DTypeError, match=r"Add.*float32, float64"):
        Tensor([1.0]) + Tensor(np.ones(1))
    with pytest.raises(DTypeError, match="numbers"):
        Tensor(np.array(["a"]))
    with pytest.raises(DTypeError, match="gradients"):
        Tensor(np.arange(3), requires_grad=True)


def test_iteration_and_length_end() -> None:
    x = Tensor(np.arange(3.0))
    assert [t.item() for t in x] == [0, 1, 2]
    assert len(x) == 3


def test_numpy_leaves_mixed_arithmetic_to_the_tensor() -> None:
    out = np.ones(2, np.float32) * Tensor([1.0, 2.0])
    assert isinstance(out, Tensor)
    np.testing.assert_array_equal(out.data, [1, 2])


def test_the_first_op_that_made_a_nan_is_named() -> None:
    x = Tensor([-1.0, 4.0], requires_grad=True)
    y = (x.log() * 2 + 1).sum()
    found = find_non_finite(y)
    assert found is not None and "Log" in found and "1 of 2" in found
    with pytest.raises(NonFiniteError, match="Log"):
        require_finite(y, "test")
    assert find_non_finite((x * 2).sum()) is None


def test_a_bad_leaf_is_blamed_before_any_op() -> None:
    x = Tensor([np.nan, 4.0], requires_grad=True)
    found = find_non_finite((x * 2).sum())
    assert found is not None and "input or parameter" in found


def test_parameters_stay_whole_when_a_graph_is_dropped_without_backward() -> None:
    rng = np.random.default_rng(0)
    net = nn.Linear(3, 2, rng=rng)
    before = net.state_dict()
    ops.sum(net(Tensor(rng.random((4, 3), dtype=np.float32))))
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
