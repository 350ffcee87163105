"""Data parallelism over the devices of all processes: the one place that knows about `jax.pmap`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from deq_jax.core.errors import require
from deq_jax.core.types import AnyArray, Array, PyTree
from deq_jax.parallel.processes import gather

AXIS = "batch"

State = TypeVar("State")
Rows = TypeVar("Rows")
Result = TypeVar("Result")


def replicate_and_split(
    function: Callable[[State, Rows], Result], *, joint: bool, donate: bool = False
) -> Callable[[State, Rows], Result]:
    """``function(state, batch)`` on the devices of all processes, compiled.

    Args:
      function: called with a replicated `state` and this device's part of the batch; it may reduce over `AXIS`.
      joint: whether the result is the same on all devices (it is returned once), or one per image
        (its leaves ``[b, ...]`` are joined again to ``[B, ...]``, in every process).
      donate: whether the memory of the state is used again for the result; the state is then gone.

    Returns:
      A function of the state, without device axis, and of the whole batch, leaves ``[B, ...]``. All processes
      call it with the same arguments; each hands only its own rows to its devices.

    Examples:
      >>> import jax, numpy as np
      >>> from deq_jax.parallel import replicate_and_split
      >>> scale = replicate_and_split(lambda state, batch: state * batch, joint=False)
      >>> scale(2.0, np.ones(2 * jax.device_count()))[:2].tolist()
      [2.0, 2.0]
    """
    donated = (0,) if donate else ()
    mapped = jax.pmap(function, AXIS, in_axes=(None, 0), out_axes=None if joint else 0, donate_argnums=donated)

    def run(state: State, batch: Rows) -> Result:
        result: Result = mapped(state, jax.tree.map(_split, batch))
        joined: Result = result if joint else jax.tree.map(_join, result)
        return joined

    return run


def replicate(state: PyTree) -> PyTree:
    """The state as `replicate_and_split` returns it, so that the first call is compiled like all others.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.parallel import replicate
      >>> replicate({"weight": np.ones(3)})["weight"].shape
      (3,)
    """
    mapped = jax.pmap(lambda state, _: state, AXIS, in_axes=(None, 0), out_axes=None)
    return mapped(state, np.zeros(jax.local_device_count()))


def check_batch_size(batch_size: int) -> None:
    """Raises `InputError`, in all processes, unless the batch divides evenly among the devices of all of them.

    Args:
      batch_size: images of a step, over all devices.

    Examples:
      >>> import jax
      >>> from deq_jax.parallel import check_batch_size
      >>> check_batch_size(4 * jax.device_count())
    """
    counts = Counter(device.process_index for device in jax.devices())
    per_process = sorted(set(counts.values()))
    require(len(per_process) == 1, f"processes must have equally many devices, found {per_process}")
    devices = len(jax.devices())
    which = f"{devices} local devices" if len(counts) == 1 else f"{devices} devices of {len(counts)} processes"
    require(batch_size % devices == 0, f"batch_size {batch_size} is not divisible by the {which}")


def _split(leaf: AnyArray) -> AnyArray:
    """[B, ...] to the rows of this process, [devices, b, ...]."""
    devices, own = jax.device_count(), jax.local_device_count()
    rows = leaf.reshape(devices, leaf.shape[0] // devices, *leaf.shape[1:])
    return rows[jax.process_index() * own : (jax.process_index() + 1) * own]


def _join(leaf: Array) -> np.ndarray:
    """[devices, b, ...] of each process to the rows of all of them, [B, ...]."""
    return gather(np.asarray(leaf).reshape(-1, *leaf.shape[2:]))
