"""How much a channel matters: a group and what was observed of it -> one score per channel.

Every function here takes (group, observer, parameters by path) and returns scores in which larger
means more important; `select` decides which scores stay. A group that several layers read is judged
by the reader that needs the channel most, one that none reads by what it computes last. A group of
which nothing was observed has no activations: PruneError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tinynn.compress.saliency import Gates
from tinynn.errors import ConfigError, PruneError
from tinynn.graph import Group
from tinynn.observe import Observer, Statistics
from tinynn.op import Array

Importance = Callable[[Group, Observer, Mapping[str, Array]], Array]


def activation_count(group: Group, seen: Observer, parameters: Mapping[str, Array]) -> Array:
    """On how many samples the channel was above zero (Çallı 2017, section 2.1.3)."""
    return np.max([s.count for s in _watched(group, seen)], axis=0)


def activation_rate(group: Group, seen: Observer, parameters: Mapping[str, Array]) -> Array:
    """On which share of the samples the channel was above zero."""
    return np.max([s.rate for s in _watched(group, seen)], axis=0)


def activation_variance(group: Group, seen: Observer, parameters: Mapping[str, Array]) -> Array:
    """The variance of the channel over the samples (Çallı 2017, section 2.1.3)."""
    return np.max([s.variance for s in _watched(group, seen)], axis=0)


def l1(group: Group, seen: Observer, parameters: Mapping[str, Array]) -> Array:
    """Sum of absolute weights that make the channel (Li et al. 2017, "Pruning Filters")."""
    return _norm(group, parameters, 1)


def l2(group: Group, seen: Observer, parameters: Mapping[str, Array]) -> Array:
    """Root of the summed squared weights that make the channel."""
    return _norm(group, parameters, 2)


def batchnorm_scale(group: Group, seen: Observer, parameters: Mapping[str, Array]) -> Array:
    """|gamma| of the batch normalisations of the channel, the largest if there are several.

    Liu et al. 2017, "Learning efficient convolutional networks through network slimming", section
    3. Raises PruneError for a group without batch normalisation.
    """
    norms = [n for n in seen.graph.nodes if n.op.name == "batch_norm_eval"]
    gammas = {node.inputs[1].name for node in norms}
    members = [m for m in group.writers if m.name in gammas and m.name in parameters]
    if not members:
        raise PruneError(
            f"importance.batchnorm_scale: {group.name} has no batch normalisation; leave such "
            "groups out by `only`"
        )
    scores = np.zeros(group.size)
    for member in members:
        inside = member.index >= 0
        np.maximum.at(scores, member.index[inside], np.abs(parameters[member.name][inside]))
    return scores


def taylor(gates: Gates) -> Importance:
    """The mean over batches of |dL/dgate|: the first-order change of the loss without the channel.

    Molchanov et al. 2017, eq. 8, where a batch is one example; larger batches let examples cancel.
    """
    return lambda group, seen, parameters: np.abs(_gradients(group, gates)).mean(axis=0)


def fisher(gates: Gates) -> Importance:
    """Half the mean over batches of (dL/dgate)^2, which for batches of one row is Fisher's.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", eq. 7.
    """
    return lambda group, seen, parameters: np.square(_gradients(group, gates)).mean(axis=0) / 2


def random(rng: np.random.Generator) -> Importance:
    """Scores that know nothing: the control of every criterion."""

    def score(group: Group, seen: Observer, parameters: Mapping[str, Array]) -> Array:
        return rng.random(group.size)

    return score


def by_name(name: str, rng: np.random.Generator) -> Importance:
    """The criterion of this name, for instance from a command line; `rng` is for "random"."""
    known: dict[str, Importance] = {
        "count": activation_count,
        "rate": activation_rate,
        "variance": activation_variance,
        "l1": l1,
        "l2": l2,
        "scale": batchnorm_scale,
        "random": random(rng),
    }
    if name not in known:
        raise ConfigError(f"importance: required one of {sorted(known)}; came {name!r}")
    return known[name]


def _watched(group: Group, seen: Observer) -> list[Statistics]:
    read = [r.value for r in group.readers] or group.values[-1:]
    found = [seen[v].pooled(group.places[v.index], group.size) for v in read if v in seen]
    if not found:
        raise PruneError(f"importance: nothing was observed of the channels of {group.name}")
    return found


def _gradients(group: Group, gates: Gates) -> Array:
    """(batches, channels): the loss' gradient by a factor on all that reads a channel."""
    total: Array = np.zeros(())
    for member in (reader.weight for reader in group.readers):
        rows = gates.rows.get(member.name)
        if rows is None or rows.shape[1] != len(member.index):
            came = "none" if rows is None else f"{rows.shape[1]}"
            raise PruneError(
                f"importance: required gates for the {len(member.index)} channels that "
                f"{member.name} reads; came {came}"
            )
        inside = member.index >= 0
        sums = np.zeros((group.size, len(rows)))
        np.add.at(sums, member.index[inside], rows[:, inside].T)
        total = total + sums.T
    if not group.readers:
        raise PruneError(f"importance: no layer reads the channels of {group.name}")
    return total


def _norm(group: Group, parameters: Mapping[str, Array], order: int) -> Array:
    total = np.zeros(group.size)
    for member in group.writers:
        if (
            member.name in parameters and parameters[member.name].ndim > 1
        ):  # biases say where, not how much
            rows = np.moveaxis(parameters[member.name], member.axis, 0)[member.index >= 0]
            sums = (np.abs(rows.astype(np.float64)) ** order).reshape(len(rows), -1).sum(axis=1)
            total += np.bincount(member.index[member.index >= 0], sums, group.size)
    return total ** (1 / order)
