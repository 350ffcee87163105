"""Data parallelism over local devices: the one place that knows about `jax.pmap`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from deq_jax.types import PyTree, require

AXIS = "batch"


def replicate_and_split(function: Callable, *, joint: bool) -> Callable:
    """``function(state, batch)`` on all local devices, compiled.

    Args:
      function: of a replicated `state` and this device's part of the batch; it may reduce over `AXIS`.
      joint: whether the result is the same on all devices (it is returned once), or one per image
        (its leaves ``[b, ...]`` are joined again to ``[B, ...]``).

    Returns:
      A function of the state, without device axis, and of the whole batch, leaves ``[B, ...]``.
    """
    mapped = jax.pmap(function, AXIS, in_axes=(None, 0), out_axes=None if joint else 0)

    def run(state: PyTree, batch: PyTree) -> PyTree:
        result = mapped(state, jax.tree.map(_split, batch))
        return result if joint else jax.tree.map(_join, result)

    return run


def replicate(state: PyTree) -> PyTree:
    """The state as `replicate_and_split` returns it, so that the first call is compiled like all others."""
    mapped = jax.pmap(lambda state, _: state, AXIS, in_axes=(None, 0), out_axes=None)
    return mapped(state, np.zeros(jax.local_device_count()))


def check_batch_size(batch_size: int) -> None:
    """Raises `InputError` unless the batch divides evenly among the local devices."""
    devices = jax.local_device_count()
    message = f"batch_size {batch_size} is not divisible by the {devices} local devices"
    require(batch_size % devices == 0, message)


def _split(leaf):
    devices = jax.local_device_count()
    return leaf.reshape(devices, leaf.shape[0] // devices, *leaf.shape[1:])


def _join(leaf):
    return np.asarray(leaf).reshape(-1, *leaf.shape[2:])
