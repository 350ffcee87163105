"""The DEQ layer as one pure function: solve, read out, differentiate. The first file to read."""

from __future__ import annotations

from jax import lax

from deq_jax.core.compilation import compiled
from deq_jax.core.readouts import FinalState
from deq_jax.core.solve import solve
from deq_jax.core.types import Cell, Gradient, Keys, Params, PyTree, Readout, Solution, Solver


@compiled("cell", "solver", "readout", "gradient")
def deq(
    cell: Cell,
    params: Params,
    u: PyTree,
    z0: PyTree,
    *,
    solver: Solver | None,
    readout: Readout = FinalState(),
    gradient: Gradient,
    keys: Keys | None = None,
) -> tuple[PyTree, Solution]:
    """A deep equilibrium layer: solves z = cell(params, z, u) and reads out a differentiable state.

    It is compiled once for equal cells, choices and shapes. A function made anew for every call, such as a lambda in a
    loop, is compiled at every call outside `jax.jit`.

    Args:
      cell: ``(params, z, u) -> z``, samples independent; pure. It must not close over traced values.
      params: of the cell; differentiable.
      u: injection, leaves [B, ...]; differentiable.
      z0: start of the solver, leaves [B, ...]; carries no gradient.
      solver: which trajectory; None for none (the readout is z0).
      readout: which state of the trajectory.
      gradient: how that state is differentiated.
      keys: for random readouts, which nothing else is drawn from.

    Returns:
      The state, leaves [B, ...], and the `Solution` (constant) it was read from.

    Raises:
      InputError: z0 or u is no such batch, or the cell returns no such state; see `cells.apply`.
    """
    constant = lax.stop_gradient
    solution = solve(solver, cell, constant(params), constant(z0), constant(u))
    state = readout(solution, keys)
    return gradient(cell, params, u, constant(state)), solution
