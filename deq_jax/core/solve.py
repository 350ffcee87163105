"""The loop around any solver: T steps, each sample on its own, and the best state kept."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.core.cells import flat_cell
from deq_jax.core.compilation import compiled
from deq_jax.core.errors import require_role
from deq_jax.core.norms import Measured, MeasuredMemory, measured, residual_of, wide
from deq_jax.core.types import Array, Cell, FlatCell, Params, PyTree, Solution, Solver, check_solver

AnyMemory = TypeVar("AnyMemory", bound=MeasuredMemory)

Carry = tuple[MeasuredMemory, Array, Array]
"""The memory, and of each sample the best state [B, N] and its residual [B]."""


@compiled("solver", "cell")
def solve(
    solver: Solver | None,
    cell: Cell,
    params: Params,
    z0: PyTree,
    u: PyTree,
    *,
    memory: Any = None,
) -> Solution:
    """Runs `solver` on z = cell(params, z, u), each sample on its own; not differentiable.

    Once all samples have converged, the remaining steps do not evaluate the cell.

    Args:
      solver: computes the trajectory; None for no solver: the solution is z0 and T is 0.
      cell: ``(params, z, u) -> z``; pure. It is compiled once for equal cells; see `deq`.
      params: parameters of the cell.
      z0: start, leaves [B, ...]. Not read where `memory` is given.
      u: injection, leaves [B, ...].
      memory: memory of an earlier solution, to continue from it.

    Returns:
      `Solution` with T = solver.steps; see there for shapes. Failure to converge shows in the residuals;
      there is no exception. If all residuals of a sample are NaN, z is its start.

    Raises:
      InputError: z0 or u is not such a batch, or the cell does not return such a state; see `cells.apply`. Or the
        solver is not one.

    Differs from the reference: convergence, the choice of the lowest residual and the low-rank updates are each
    sample's own, and a diverging iteration is not cut short.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import FixedPoint, solve
      >>> def cell(params, z, u):
      ...     return params * z + u
      >>> u = jnp.ones((2, 3))
      >>> first = solve(FixedPoint(2), cell, 0.5, jnp.zeros_like(u), u)
      >>> first.states[:, 0, 0].tolist()
      [1.0, 1.5]
      >>> solve(FixedPoint(2), cell, 0.5, first.z, u, memory=first.memory).states[:, 0, 0].tolist()
      [1.75, 1.875]
    """
    if solver is not None:
        check_solver("solve: solver", solver)
    f, flat, unravel = flat_cell(cell, params, z0)
    if solver is None:
        empty = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), z0)
        batch = flat.shape[0]
        return Solution(z0, empty, jnp.zeros((0, batch), wide(flat).dtype), jnp.zeros(batch, jnp.int32), None)

    first_evaluation = 1 if memory is None else 0
    memory = begin(solver, f, flat, u) if memory is None else measured(solver, memory)

    def step(carry: Carry, _: None) -> tuple[Carry, tuple[Array, Array, Array]]:
        memory, best, lowest = carry
        memory, residual, active = advance(solver, f, memory, u)
        better = residual < lowest
        best = jnp.where(better[:, None], memory.z, best)
        lowest = jnp.where(better, residual, lowest)
        return (memory, best, lowest), (memory.z, residual, active)

    carry = memory, memory.z, jnp.full(flat.shape[0], jnp.inf, memory.unit.dtype)
    (memory, best, _), (states, residuals, active) = lax.scan(step, carry, length=solver.steps)
    evaluations = first_evaluation + jnp.sum(active, axis=0, dtype=jnp.int32)
    return Solution(unravel(best), jax.vmap(unravel)(states), residuals, evaluations, memory)


def begin(solver: Solver, f: FlatCell, z: Array, u: PyTree) -> MeasuredMemory:
    """The memory of a solver at its start z [B, N], ready for `advance` and `repeat`.

    Args:
      solver: any; see `types.Solver`.
      f: over flat states; see `cells.flat_cell`.
      z: start, [B, N].
      u: injection, leaves [B, ...].
    """
    memory = solver.init(f, z, u)
    name = type(solver).__name__
    require_role(f"{name}.init", memory, ("z", "fz"), "a memory with fields z and fz, such as a NamedTuple")
    return measured(solver, memory)


def advance(solver: Solver, f: FlatCell, memory: AnyMemory, u: PyTree) -> tuple[AnyMemory, Array, Array]:
    """One step in which converged samples stay where they are; f is not evaluated once all have converged.

    Args:
      solver: the solver that takes the step.
      f: over flat states; see `cells.flat_cell`.
      memory: as `begin` or an earlier step returned it.
      u: injection, leaves [B, ...].

    Returns:
      The memory, its relative residuals [B], and which samples moved [B].
    """
    active = _active(solver, memory)

    def unless_all_converged(z: Array, u: PyTree) -> Array:
        fz: Array = lax.cond(jnp.any(active), f, lambda z, u: memory.fz, z, u)
        return fz

    memory = _updated(solver, unless_all_converged, memory, u, active)
    return memory, residual_of(solver, memory), active


def repeat(solver: Solver, f: FlatCell, before: AnyMemory, u: PyTree) -> AnyMemory:
    """The last step once more, for another function: the warm start after the injection has changed.

    The iterate is the same. f(z; u) is evaluated again, also if a sample had converged, and the step's lesson
    (Broyden's secant pair, Anderson's residual) now comes from the new function.

    Args:
      solver: the solver that takes the step.
      f: the cell over flat states; see `cells.flat_cell`.
      before: the memory before that step.
      u: the new injection, leaves [B, ...].
    """
    after: AnyMemory = _updated(solver, f, before, u, _active(solver, before))
    return after


def _updated(solver: Solver, f: FlatCell, memory: Any, u: PyTree, active: Array) -> Any:
    if not isinstance(memory, Measured):
        return solver.update(f, memory, u, active)
    own = solver.update(f, memory.own, u, active)
    return Measured(own.z, own.fz, memory.unit, own)


def _active(solver: Solver, memory: MeasuredMemory) -> Array:
    tolerance = max(solver.tolerance, float(jnp.finfo(memory.z.dtype).eps))
    return ~(residual_of(solver, memory) < tolerance)
