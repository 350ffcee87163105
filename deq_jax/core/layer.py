"""The DEQ layer as one pure function: solve, read out, differentiate. The first file to read."""

from __future__ import annotations

from jax import lax

from deq_jax.core.compilation import compiled
from deq_jax.core.errors import InputError, described, require_role
from deq_jax.core.gradients import Backprop
from deq_jax.core.keys import Keys
from deq_jax.core.readouts import FinalState
from deq_jax.core.solve import solve
from deq_jax.core.solvers import differentiable
from deq_jax.core.types import Cell, Gradient, Params, PyTree, Readout, Solution, Solver


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

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Broyden, Implicit, deq
      >>> def cell(params, z, u):
      ...     return params * jnp.tanh(z) + u
      >>> u = jnp.ones((2, 3))
      >>> z, solution = deq(cell, 0.5, u, jnp.zeros_like(u), solver=Broyden(8), gradient=Implicit())
      >>> z.shape, solution.states.shape, bool((solution.residuals[-1] < 1e-3).all())
      ((2, 3), (8, 2, 3), True)

    Args:
      cell: ``(params, z, u) -> z``, samples independent; pure. It must not close over traced values.
      params: parameters of the cell; differentiable.
      u: injection, leaves [B, ...]; differentiable.
      z0: start of the solver, leaves [B, ...]; carries no gradient.
      solver: computes the trajectory; None for no solver (the readout is z0).
      readout: chooses a state of the trajectory.
      gradient: differentiates that state.
      keys: randomness of random readouts; nothing else draws from them.

    Returns:
      The state, leaves [B, ...], and the `Solution` (constant) it was read from.

    Raises:
      InputError: z0 or u is not such a batch; the cell does not return such a state, see `cells.apply`; `Backprop` is
        given without a solver; a solver, readout or gradient is not an object of that kind; keys are not `Keys`.
    """
    require_role("deq: readout", readout, ("__call__",), "a readout, such as FinalState()")
    if keys is not None and not isinstance(keys, Keys):
        raise InputError(f"deq: keys: expected Keys, such as Keys.of(seed, batch_size), got {described(keys)}")
    constant = lax.stop_gradient
    if isinstance(gradient, Backprop):
        if solver is None:
            raise InputError("deq: Backprop differentiates a solver's steps, got solver=None; expected Unrolled")
        solution = solve(differentiable(solver), cell, params, constant(z0), u)
        return gradient.through(cell, params, u, readout(solution, keys)), constant(solution)
    require_role("deq: gradient", gradient, ("__call__",), "a gradient estimator, such as Implicit()")
    solution = solve(solver, cell, constant(params), constant(z0), constant(u))
    state = readout(solution, keys)
    return gradient(cell, params, u, constant(state)), solution
