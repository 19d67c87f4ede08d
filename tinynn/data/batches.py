"""Batches of an array data set, shuffled anew each epoch, resumable in the middle of one."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels import memory
from tinynn.errors import ConfigError, DataError, DTypeError
from tinynn.generators import generator_state, set_state
from tinynn.op import Array

_CHECK_BYTES = 1 << 20  # how much of a data set is examined at a time: stays in the cache


class Epoch:
    """One pass over the rows: in which order, from which generator state, and how far it is."""

    __slots__ = ("begun_from", "done", "key", "order")

    def __init__(
        self, order: Array | None, begun_from: dict[str, Any] | None, key: list[int]
    ) -> None:
        self.order = order  # None: as the rows lie
        self.begun_from = begun_from
        self.key = key  # two 64-bit numbers from which batches draw what they need, or none
        self.done = 0  # batches handed out


class Batches:
    """Iterating gives one epoch's (x_batch, y_batch), C-contiguous arrays of their own.

    `x`: (n, ...) float32 or float64. `y`: (n, ...) floats or integer labels, or None where the
    target is the input (auto-encoders): then y_batch is x_batch. The last batch is smaller if
    `size` does not divide n, unless `drop_last`. With `shuffle`, every epoch draws a permutation of
    the rows from `rng`, which other parts of a program may share; without, `rng` may be None.

    The data set is neither copied nor changed (a copy is made once if it is not C-contiguous).

    Raises DataError for no rows, different numbers of rows, or values that are not finite (first
    bad row and count); DTypeError for other dtypes or a missing generator; ConfigError for a size
    that is no whole number >= 1 or leaves no batch, or a generator that is not of NumPy's kinds.
    """

    _x_kinds = "f"

    def __init__(
        self,
        x: npt.ArrayLike,
        y: npt.ArrayLike | None,
        size: int,
        rng: np.random.Generator | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self._x = _examined("x", x, self._x_kinds)
        self._y = None if y is None else _examined("y", y, "fiu")
        if self._y is not None and len(self._y) != len(self._x):
            raise DataError(
                f"Batches: required as many rows in y as in x; came x {self._x.shape}, "
                f"y {self._y.shape}"
            )
        if not is_count(size):
            raise ConfigError(f"Batches: required a whole size >= 1; came {size!r}")
        if drop_last and size > len(self._x):
            raise ConfigError(
                f"Batches: drop_last with size {size} leaves no batch of {len(self._x)} rows"
            )
        if (shuffle or rng is not None) and not isinstance(rng, np.random.Generator):
            raise DTypeError(f"Batches: shuffle requires a numpy.random.Generator; came {rng!r}")
        if rng is not None:
            generator_state(rng)  # refuses a kind whose state cannot be saved
        self.size = int(size)
        self.rng = rng
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._epoch: Epoch | None = None  # the one begun last, until it ends
        self._resume = False  # whether the next iteration continues it

    @property
    def x(self) -> Array:
        """All inputs, (n, ...), read-only."""
        return _read_only(self._x)

    @property
    def y(self) -> Array:
        """All targets, (n, ...), read-only; the inputs if there are no others."""
        return _read_only(self._x if self._y is None else self._y)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        rows = len(self._x)
        return rows // self.size if self.drop_last else -(-rows // self.size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Begin an epoch, or continue the one that `load_state_dict` brought."""
        if self._epoch is None or not self._resume:
            self._epoch = self._begin()
        self._resume = False
        return self._walk(self._epoch)

    def restart(self) -> None:
        """Forget the epoch under way: the next iteration begins a new one.

        An iterator that is still in use goes on to the end of its own epoch.
        """
        self._epoch = None
        self._resume = False

    def take(self, n: int) -> Batches:
        """The first `n` batches as the rows lie, unshuffled; all if there are fewer.

        The result refers to the same arrays and may be iterated any number of times.
        """
        if not is_count(n):
            raise ConfigError(f"Batches.take: required a whole n >= 1; came {n!r}")
        part = copy.copy(self)
        rows = min(n, len(self)) * self.size
        part._x = self._x[:rows]
        part._y = None if self._y is None else self._y[:rows]
        part.shuffle = False
        part.rng = None
        part.restart()
        return part

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as numbers, texts, lists and dicts (fit for JSON).

        `rows`, `size`, `shuffle`, `drop_last` to recognise the data; `rng`, the generator's state
        now; in the middle of an epoch also `done`, the batches handed out so far, and `begun_from`,
        the generator's state from which this epoch's order was drawn.
        """
        state: dict[str, Any] = self._identity()
        if self.rng is not None:
            state["rng"] = generator_state(self.rng)
        if self._epoch is not None:
            state["done"] = self._epoch.done
            state["begun_from"] = self._epoch.begun_from
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`: the next iteration gives the rest of that epoch.

        The generator is set to its state at that moment, whatever else drew from it. Raises
        ConfigError, and changes nothing, if the state belongs to other data or to another kind of
        generator.
        """
        required = self._identity()
        came = {k: state.get(k) for k in required}
        if came != required:
            raise ConfigError(f"Batches: required a state of {required}; came {came}")
        needed = ({"rng"} if self.rng else set()) | ({"begun_from"} if "done" in state else set())
        if not needed <= set(state):
            raise ConfigError(f"Batches: the state lacks {sorted(needed - set(state))}")
        epoch = None
        if "done" in state:
            done = state["done"]
            if type(done) is not int or not 0 <= done <= len(self):
                raise ConfigError(f"Batches: required 0 <= done <= {len(self)}; came {done!r}")
            epoch = self._begin(state["begun_from"])
            epoch.done = done
        if self.rng is not None:
            _set(self.rng, state["rng"])
        self._epoch = epoch
        self._resume = epoch is not None

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": len(self._x),
            "size": self.size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def _begin(self, from_state: dict[str, Any] | None = None) -> Epoch:
        """An epoch whose order is drawn from `rng`, or from a generator in `from_state`."""
        if self.rng is None or not self._is_random():
            return Epoch(None, None, [])
        if from_state is None:
            before = generator_state(self.rng)
            order, key = self._draw(self.rng)
            return Epoch(order, before, key)
        then = copy.deepcopy(self.rng)
        _set(then, from_state)
        order, key = self._draw(then)
        return Epoch(order, from_state, key)

    def _is_random(self) -> bool:
        return self.shuffle

    def _draw(self, rng: np.random.Generator) -> tuple[Array | None, list[int]]:
        """All that an epoch takes from the generator: its order and its key."""
        return rng.permutation(len(self._x)), []

    def _batch(self, epoch: Epoch, number: int) -> tuple[Array, Array]:
        start, stop = number * self.size, (number + 1) * self.size
        x = _gather(self._x, epoch.order, start, stop)
        return x, x if self._y is None else _gather(self._y, epoch.order, start, stop)

    def _walk(self, epoch: Epoch) -> Generator[tuple[Array, Array], None, None]:
        while epoch.done < len(self):
            epoch.done += 1
            yield self._batch(epoch, epoch.done - 1)
        self._end(epoch)

    def _end(self, epoch: Epoch) -> None:
        if self._epoch is epoch:
            self._epoch = None


def _gather(rows: Array, order: Array | None, start: int, stop: int) -> Array:
    """rows[order[start:stop]] as a writable array of its own."""
    if order is None:
        part = rows[start:stop]
        out = memory.empty(part.shape, part.dtype)
        out[...] = part
        return out
    chosen = order[start:stop]
    out = memory.empty((len(chosen), *rows.shape[1:]), rows.dtype)
    # All indices are valid; "clip" spares the copy through which "raise" keeps `out` whole.
    return np.take(rows, chosen, axis=0, out=out, mode="clip")


def _examined(name: str, values: npt.ArrayLike, kinds: str) -> Array:
    """The values as a C-contiguous array of a permitted dtype, at least one row, all finite."""
    array = np.asarray(values)
    floats = array.dtype.kind == "f" and array.dtype.itemsize in (4, 8)
    if array.dtype.kind not in kinds or (array.dtype.kind == "f" and not floats):
        allowed = "float32 or float64" + (" or integers" if "i" in kinds else "")
        raise DTypeError(f"Batches: required {name} of {allowed}; came {array.dtype}")
    if array.ndim == 0 or array.size == 0:
        raise DataError(f"Batches: required {name} with at least one row; came {array.shape}")
    array = np.ascontiguousarray(array)
    if floats:
        _check_finite(name, array.reshape(len(array), -1))
    return array


def _check_finite(name: str, rows: Array) -> None:
    step = max(1, _CHECK_BYTES // rows[0].nbytes)
    first, count = -1, 0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        finite = np.isfinite(part)
        if not finite.all():
            bad = np.flatnonzero(~finite.all(axis=1))
            first = start + int(bad[0]) if first < 0 else first
            count += bad.size
    if count:
        raise DataError(
            f"Batches: required finite {name}; row {first} is the first of {count} (of "
            f"{len(rows)}) with NaN or infinity"
        )


def _set(rng: np.random.Generator, state: Any) -> None:
    try:
        set_state(rng, state)
    except ConfigError as error:
        raise ConfigError(f"Batches: {error}") from error


def is_count(value: object) -> bool:
    """Whether the value is a whole number >= 1."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and value >= 1  # type: ignore[operator]


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
