"""Lengths and residuals of flat states, at any scale and in any dtype."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import lax

from deq_jax.core.cells import ravel
from deq_jax.core.types import Array, Memory, PyTree

RESIDUAL_FLOOR = 1e-9  # in units of f(z0); keeps an equilibrium at 0 within reach


class MeasuredMemory(Memory, Protocol):
    """A solver's memory with the unit of its residuals, [B, 1]; see `Memory` and `unit_of`."""

    @property
    def unit(self) -> Array: ...


class Measured(NamedTuple):
    """The memory of a solver that keeps no unit, with the unit in which its residuals are measured.

    Attributes:
      z, fz: see `Memory`.
      unit: [B, 1], see `unit_of`.
      own: the solver's memory.
    """

    z: Array
    fz: Array
    unit: Array
    own: Any


def measured(solver: Any, memory: Any) -> MeasuredMemory:
    """A solver's memory with a unit: the unit of f(z0) for the memory at the start."""
    if hasattr(memory, "unit"):
        known: MeasuredMemory = memory
        return known
    return Measured(memory.z, memory.fz, unit_of(solver, memory.fz), memory)


def unit_of(solver: Any, fz: Array) -> Array:
    """The unit of each sample's inner products, [B, 1]: the power of two next to the largest entry of f(z0).

    Squares of tiny or huge states are out of the range of their dtype; in this unit they are not. Scaling by a power of
    two rounds nothing. The unit is 1 where f(z0) is 0 or not finite.
    """
    largest = jnp.max(jnp.abs(lax.stop_gradient(wide(fz))), axis=1, keepdims=True, initial=0)
    if getattr(solver, "batch_joint", False):
        largest = jnp.broadcast_to(jnp.max(largest), largest.shape)
    return power_of_two(largest)


def relative_distance(a: PyTree, b: PyTree) -> Array:
    """``||a - b|| / ||b||`` per sample, [B], at any scale of b; 0 where a is b.

    Args:
      a, b: leaves [B, ...].
    """
    a, b = (wide(ravel(tree)) for tree in (a, b))
    unit = power_of_two(jnp.max(jnp.abs(b), axis=1, keepdims=True, initial=0))
    difference, size = (jnp.linalg.norm(x / unit, axis=1) for x in (a - b, b))
    ratio: Array = jnp.where(difference == 0, 0, difference / size)
    return ratio


def residual_of(solver: Any, memory: MeasuredMemory) -> Array:
    """Relative residuals [B]; see `Solution`.

    Norms are taken in a unit that holds f(z) itself. In the unit of f(z0) the square of a state that has grown 2e19
    times is infinite, and any change would be small beside it.
    """
    z, fz = lax.stop_gradient((wide(memory.z), wide(memory.fz)))  # a diagnostic; its gradient at 0 would be NaN
    unit = jnp.maximum(lax.stop_gradient(memory.unit), unit_of(solver, fz))
    difference, scale = (fz - z) * (1 / unit), fz * (1 / unit)
    difference, scale = inner(difference, difference)[:, 0], inner(scale, scale)[:, 0]
    if getattr(solver, "batch_joint", False):
        difference, scale = (jnp.broadcast_to(jnp.sum(norm), norm.shape) for norm in (difference, scale))
    floor = RESIDUAL_FLOOR * (memory.unit / unit)[:, 0]
    return jnp.sqrt(difference) / (jnp.sqrt(scale) + floor)


def inner(a: Array, b: Array) -> Array:
    """Per-sample inner products, [B, 1]."""
    return jnp.sum(a * b, axis=1, keepdims=True)


def in_unit(memory: MeasuredMemory, x: Array) -> Array:
    """x in each sample's unit."""
    return x * (1 / memory.unit)


def power_of_two(size: Array) -> Array:
    """The power of two next to a positive size; 1 where it is 0 or not finite. Its inverse is a normal number."""
    limits = jnp.finfo(size.dtype)
    size = jnp.where((size > 0) & (size < jnp.inf), size, 1)
    return lax.reduce_precision(jnp.clip(size, 2 * limits.tiny, 0.5 / limits.tiny), limits.nexp, 0)


def wide(x: Array) -> Array:
    """x in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
