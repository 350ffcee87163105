"""Devices and processes; for contributors."""

from deq_jax.parallel.devices import AXIS, check_batch_size, replicate, replicate_and_split
from deq_jax.parallel.processes import StopRequest, agreed, connect, from_primary, gather, is_primary

__all__ = [
    "AXIS",
    "StopRequest",
    "agreed",
    "check_batch_size",
    "connect",
    "from_primary",
    "gather",
    "is_primary",
    "replicate",
    "replicate_and_split",
]
