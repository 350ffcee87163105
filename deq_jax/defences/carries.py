"""Carries: the state and memory from which a solver continues when its function changes between two blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from deq_jax.core.errors import require
from deq_jax.core.norms import unit_of
from deq_jax.core.solve import repeat
from deq_jax.core.solvers import Broyden
from deq_jax.core.types import Array, FlatCell, PyTree, Solver


class Carry(Protocol):
    """Passes state and memory from one block to the next."""

    def adapt(self, solver: Solver) -> Solver:
        """The solver that continues from the carried memory."""

    def choose(self, states: Array, residuals: Array) -> Array:
        """The state [B, N], of the block's states [every, B, N], that the next block starts from."""

    def resume(self, solver: Any, f: FlatCell, before: Any, z: Array, u: PyTree) -> Any:
        """The memory at state z for the new injection u, from the memory before the block's last step."""


@dataclass(frozen=True)
class FullCarry:
    """The last state and all of the solver's memory; its last step is corrected for the new function.

    For Broyden: ``dg <- g_new(z) - g_old(z_previous)``, the last secant pair is computed again, and the next step
    is ``-B g_new(z)``. Without updates of the input, the dynamics equal the undefended ones.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.defences import FullCarry
      >>> states, residuals = np.array([[[1.5]], [[2.5]]]), np.array([[0.25], [0.5]])
      >>> FullCarry().choose(states, residuals).tolist()
      [[2.5]]
    """

    def adapt(self, solver: Solver) -> Solver:
        """The same solver."""
        return solver

    def choose(self, states: Array, residuals: Array) -> Array:
        """The last state of the block."""
        return states[-1]

    def resume(self, solver: Solver, f: FlatCell, before: Any, z: Array, u: PyTree) -> Any:
        """The memory before the last step, with that step repeated for the new injection."""
        return repeat(solver, f, before, u)


@dataclass(frozen=True)
class ReferenceCarry:
    """The papers' code: the block's state of lowest residual, and of Broyden's memory only the next step.

    For comparison with it only, with ``Broyden(..., batch_joint=True)``. Where the chosen state is not the last, the
    secant pair joins the last step to the residual of the chosen state, as it does there.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.defences import ReferenceCarry
      >>> states, residuals = np.array([[[1.5]], [[2.5]]]), np.array([[0.25], [0.5]])
      >>> ReferenceCarry().choose(states, residuals).tolist()
      [[1.5]]
    """

    def adapt(self, solver: Solver) -> Solver:
        """Broyden's method that starts every block from an empty memory."""
        require(isinstance(solver, Broyden), f"ReferenceCarry: the solver must be Broyden, got {solver!r}")
        return _RestartedBroyden(**vars(solver))

    def choose(self, states: Array, residuals: Array) -> Array:
        """The state of lowest residual of the block."""
        return lowest_residual(states, residuals)

    def resume(self, solver: Broyden, f: FlatCell, before: _PairMemory, z: Array, u: PyTree) -> _PairMemory:
        """An empty memory at z, with the next step that the old memory gives."""
        memory = repeat(solver, lambda last, u: last + (f(z, u) - z), before, u)
        empty = jnp.zeros_like(memory.u)
        fz = z + (memory.fz - memory.z)
        return memory._replace(z=z, fz=fz, u=empty, v=empty, taken=jnp.zeros_like(memory.taken))


class _PairMemory(NamedTuple):
    """Inverse Jacobian ``B = -I + sum_k u_k v_k^T``; pairs not yet there are 0."""

    z: Array
    fz: Array
    unit: Array
    step: Array  # the next step
    u: Array  # [T, B, N]
    v: Array
    taken: Array


class _RestartedBroyden(Broyden):
    """Broyden's method in its textbook form: its pairs hold for any step, such as one kept from another B."""

    def init(self, f: FlatCell, z: Array, u: PyTree) -> Any:
        fz, pairs = f(z, u), jnp.zeros((self.steps, *z.shape), z.dtype)
        return _PairMemory(z, fz, unit_of(self, fz), fz - z, pairs, pairs, jnp.zeros((), jnp.int32))

    def update(self, f: FlatCell, memory: Any, u: PyTree, active: Array) -> Any:
        def product(left: Array, right: Array, w: Array) -> Array:
            return -w + jnp.sum(left * jnp.sum(right * w, axis=-1, keepdims=True), axis=0)

        dz = jnp.where(active[:, None], memory.step, 0)
        z = memory.z + dz
        fz = f(z, u)
        g, dg = fz - z, (fz - z) - (memory.fz - memory.z)
        v = product(memory.v, memory.u, dz)
        denominator = jnp.sum(v * dg, axis=1, keepdims=True)
        sound = denominator != 0
        new_u = jnp.where(sound, (dz - product(memory.u, memory.v, dg)) / jnp.where(sound, denominator, 1), 0)
        left, right = (pairs.at[memory.taken].set(new) for pairs, new in ((memory.u, new_u), (memory.v, v)))
        return _PairMemory(z, fz, memory.unit, -product(left, right, g), left, right, memory.taken + 1)


def lowest_residual(states: Array, residuals: Array) -> Array:
    """The state [B, N] with the lowest residual of each image, from states [T, B, N] with residuals [T, B]."""
    lowest = jnp.argmin(jnp.where(jnp.isnan(residuals), jnp.inf, residuals), axis=0)
    return states[lowest, jnp.arange(states.shape[1])]
