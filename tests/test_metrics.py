"""Metrics against counts made by hand and by plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinynn import metrics
from tinynn.errors import DataError, DTypeError, NonFiniteError, ShapeError

SCORES = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [-1, -3, -2], [0.0, 1.0, 0.5]], np.float32)
LABELS = np.array([0, 1, 0, 1])  # predicted 0, 2, 0, 1


def test_accuracy_of_scores_and_of_predictions():
    assert metrics.accuracy(SCORES, LABELS) == 0.75
    assert metrics.accuracy(SCORES.argmax(axis=1), LABELS.astype(np.uint8)) == 0.75


def test_confusion_matrix_and_class_scores():
    counts = metrics.confusion_matrix(SCORES, LABELS)
    assert counts.tolist() == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]
    scores = metrics.class_scores(SCORES, LABELS)
    np.testing.assert_array_equal(scores.precision, [1, 1, 0])
    np.testing.assert_array_equal(scores.recall, [1, 0.5, np.nan])
    np.testing.assert_array_equal(scores.f1, [1, 2 / 3, 0])
    assert scores.support.tolist() == [2, 2, 0]


def test_an_absent_class_that_is_never_predicted_has_no_scores():
    scores = metrics.class_scores([0, 0], [0, 0], classes=2)
    assert np.isnan([scores.precision[1], scores.recall[1], scores.f1[1]]).all()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60),
    st.sampled_from([np.int64, np.uint8, np.uint64, np.int32]),
)
def test_against_plain_loops(pairs, dtype):
    truth = np.array([t for t, _ in pairs], dtype)
    called = np.array([c for _, c in pairs], dtype)
    counts = metrics.confusion_matrix(called, truth, classes=5)
    scores = metrics.class_scores(called, truth, classes=5)
    for i in range(5):
        for j in range(5):
            assert counts[i, j] == pairs.count((i, j))
        hits = pairs.count((i, i))
        called_i, true_i = sum(c == i for _, c in pairs), sum(t == i for t, _ in pairs)
        np.testing.assert_equal(scores.precision[i], hits / called_i if called_i else np.nan)
        np.testing.assert_equal(scores.recall[i], hits / true_i if true_i else np.nan)
        if hits:
            p, r = scores.precision[i], scores.recall[i]
            assert scores.f1[i] == pytest.approx(2 * p * r / (p + r))
    assert metrics.accuracy(called, truth) == pytest.approx(np.trace(counts) / len(pairs))


@pytest.mark.parametrize("measure", [metrics.accuracy, metrics.confusion_matrix])
@pytest.mark.parametrize(
    ("outputs", "labels", "error", "message"),
    [
        (SCORES, LABELS[:3], ShapeError, r"\(4, 3\).*\(3,\)"),
        (SCORES[:, 0], LABELS, ShapeError, r"\(4,\)"),
        (LABELS[:, None], LABELS, ShapeError, r"\(4, 1\)"),
        (SCORES, np.eye(4, dtype=int), ShapeError, r"\(4, 4\)"),
        (SCORES, LABELS.astype(float), DTypeError, "float64"),
        (SCORES.astype(complex), LABELS, DTypeError, "complex"),
        (SCORES, np.array([0, 1, 3, 2]), DataError, "< 3; came 0 to 3"),
        (SCORES, np.array([0, 1, -1, 2]), DataError, "came -1 to 2"),
        (LABELS - 1, LABELS, DataError, "predictions >= 0"),
        (SCORES[:0], LABELS[:0], DataError, r"\(0, 3\)"),
        (np.where(SCORES == 0.9, np.nan, SCORES), LABELS, NonFiniteError, "row 0"),
    ],
)
def test_unusable_operands_are_refused(measure, outputs, labels, error, message):
    options = {"classes": 3} if measure is metrics.confusion_matrix else {}
    with pytest.raises(error, match=message):
        measure(outputs, labels, **options)


def test_the_number_of_classes_must_be_known_and_fit():
    with pytest.raises(ShapeError, match="number of classes"):
        metrics.confusion_matrix(LABELS, LABELS)
    with pytest.raises(ShapeError, match="required 4 classes"):
        metrics.confusion_matrix(SCORES, LABELS, classes=4)


def test_rmse():
    assert metrics.rmse([[1.0, 2.0]], [[4.0, -2.0]]) == pytest.approx(np.sqrt(12.5))
    assert metrics.rmse(np.ones(3, np.float32), np.ones(3, np.float64)) == 0
    # Accumulated in float32, a million small terms would lose digits.
    small = np.full(1_000_003, 1e-4, np.float32)
    assert metrics.rmse(small, np.zeros_like(small)) == pytest.approx(float(small[0]), rel=1e-12)


def test_rmse_refuses_what_it_cannot_measure():
    with pytest.raises(ShapeError, match=r"\(3,\), \(3, 1\)"):
        metrics.rmse(np.ones(3), np.ones((3, 1)))
    with pytest.raises(DataError, match=r"\(0, 2\)"):
        metrics.rmse(np.ones((0, 2)), np.ones((0, 2)))
    for bad in (np.nan, np.inf):
        with pytest.raises(NonFiniteError, match="finite"):
            metrics.rmse([bad, 1.0], [bad, 1.0])
