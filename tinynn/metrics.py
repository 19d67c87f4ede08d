"""Measures of a model's outputs, as arrays, against the truth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from tinynn.errors import DataError, DTypeError, NonFiniteError, ShapeError
from tinynn.nn.module import Module
from tinynn.op import Array
from tinynn.train import Runs, predict


class ClassScores(NamedTuple):
    """One value a class, float64; NaN where the quotient is 0 / 0."""

    precision: Array  #: of the rows called this class, the share that are; 0 / 0: never called so
    recall: Array  #: of the rows of this class, the share found; 0 / 0: no such row
    f1: Array  #: the harmonic mean of the two, 2 TP / (2 TP + FP + FN)
    support: Array  #: the rows of this class, int64


def accuracy(
    outputs: npt.ArrayLike | Module | Runs, labels: npt.ArrayLike | Iterable[Any]
) -> float:
    """The share of rows for which the largest output is the label's.

    `outputs`: (n, classes) floats, any scores of which the largest wins (the first among equals),
    or (n,) integers, the predicted classes. `labels`: (n,) integers. Or a model or plan, which is
    run in eval mode, and batches (x, labels): `accuracy(plan, test.batches(100))`.
    Raises ShapeError, DTypeError, DataError (no rows, labels out of range), NonFiniteError.
    """
    if callable(outputs):
        outputs, labels = predict(outputs, cast(Iterable[Any], labels))
    arrays = cast(npt.ArrayLike, outputs), cast(npt.ArrayLike, labels)
    predicted, truth, _ = _predictions("accuracy", *arrays, None)
    return float(np.mean(predicted == truth))


def confusion_matrix(
    outputs: npt.ArrayLike, labels: npt.ArrayLike, classes: int | None = None
) -> Array:
    """Counts (classes, classes), int64: row = true class, column = predicted class.

    Operands and errors as for `accuracy`; integer predictions need the number of `classes`.
    """
    predicted, truth, found = _predictions("confusion_matrix", outputs, labels, classes)
    if found is None:
        raise ShapeError("confusion_matrix: integer predictions need the number of classes")
    cells = truth.astype(np.int64) * found + predicted.astype(np.int64)
    counts = np.bincount(cells, minlength=found * found)
    return counts.reshape(found, found)


def class_scores(
    outputs: npt.ArrayLike, labels: npt.ArrayLike, classes: int | None = None
) -> ClassScores:
    """Precision, recall, F1 and support of each class; operands as for `confusion_matrix`."""
    counts = confusion_matrix(outputs, labels, classes)
    hits = np.diagonal(counts).astype(np.float64)
    called, support = counts.sum(axis=0), counts.sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as documented
        return ClassScores(hits / called, hits / support, 2 * hits / (called + support), support)


def rmse(outputs: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Root of the mean over all elements of (output - target)^2, accumulated in float64.

    Raises ShapeError unless the shapes are equal (nothing is broadcast), DataError for no
    elements, NonFiniteError for NaN or infinity.
    """
    a, b = np.asarray(outputs), np.asarray(targets)
    if a.shape != b.shape:
        raise ShapeError(f"rmse: required equal shapes; came {a.shape}, {b.shape}")
    if a.size == 0:
        raise DataError(f"rmse: required at least one element; came shape {a.shape}")
    with np.errstate(invalid="ignore", over="ignore"):  # reported below
        # Not a dot product: the linear algebra library's sums depend on its thread count.
        result = math.sqrt(np.square(np.subtract(a, b, dtype=np.float64)).mean())
    if not math.isfinite(result):
        raise NonFiniteError(f"rmse: required finite outputs and targets; came a result {result}")
    return result


def _predictions(
    name: str, outputs: npt.ArrayLike, labels: npt.ArrayLike, classes: int | None
) -> tuple[Array, Array, int | None]:
    """(predicted classes, labels, number of classes if known), checked."""
    out, truth = np.asarray(outputs), np.asarray(labels)
    wanted = 2 if out.dtype.kind == "f" else 1
    if out.dtype.kind not in "fiu" or truth.dtype.kind not in "iu":
        raise DTypeError(
            f"{name}: required float scores or integer predictions, and integer labels; came "
            f"{out.dtype}, {truth.dtype}"
        )
    if out.ndim != wanted or truth.ndim != 1 or len(out) != len(truth):
        raise ShapeError(
            f"{name}: required scores (n, classes) or predictions (n,), and labels (n,); came "
            f"{out.dtype} {out.shape}, {truth.dtype} {truth.shape}"
        )
    if out.size == 0:
        raise DataError(f"{name}: required at least one row and class; came {out.shape}")
    if wanted == 2:
        if not np.isfinite(out).all():
            row = int(np.flatnonzero(~np.isfinite(out).all(axis=1))[0])
            raise NonFiniteError(f"{name}: required finite scores; row {row} has NaN or infinity")
        if classes not in (None, out.shape[1]):
            raise ShapeError(f"{name}: required {classes} classes; came scores {out.shape}")
        classes = out.shape[1]
        out = out.argmax(axis=1)
    for what, values in (("labels", truth), ("predictions", out)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or (classes is not None and high >= classes):
            limit = "" if classes is None else f" and < {classes}"
            raise DataError(f"{name}: required {what} >= 0{limit}; came {low} to {high}")
    return out, truth, classes
