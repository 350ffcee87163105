"""Surrogates that take gradients from the dynamics of a DEQ.

The papers' names: the unrolled-intermediate attacks of Yang et al. 2022 (section 4.2) are `Intermediate`
and `MeanOverStates`, their simultaneous adjoint (section 4.1) is `SimultaneousAdjoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.attacks.oracles import Oracle, oracle_of
from deq_jax.core.cells import flat_cell
from deq_jax.core.compilation import compiled
from deq_jax.core.errors import require
from deq_jax.core.gradients import Backprop, PhantomUpTo
from deq_jax.core.keys import Keys
from deq_jax.core.readouts import FinalState
from deq_jax.core.solve import advance
from deq_jax.core.solvers import Broyden, BroydenMemory
from deq_jax.core.types import Array, Cell, Loss, Params, PyTree, Solution
from deq_jax.models.base import Classifier, Variables
from deq_jax.models.classifiers import Equilibrium, require_deq, zero_state
from deq_jax.surrogates.base import classifier_oracle

_Carry = tuple[BroydenMemory, Array]
"""The solver's memory and the adjoint states."""


def simultaneous_adjoint(
    solver: Broyden, cell: Cell, params: Params, u: PyTree, z0: PyTree, cotangent: Callable[[PyTree], PyTree]
) -> tuple[PyTree, PyTree]:
    """Adjoint states that run along with Broyden's iterates and share its quasi-Newton matrices.

    ``u_{n+1}^T = u_n^T - (u_n^T J_g(z_n) + dL/dz_n) B_n`` with ``J_g = J - I`` and u_0 = 0, where B_n holds
    the first n pairs. u_n tends to the exact adjoint ``(I - J^T)^{-1} dL/dz`` at the equilibrium, and
    ``u_n^T df(z_n; .)`` to the exact gradient. Each step costs a cell evaluation and a vector-Jacobian product.

    Args:
      solver: solver of the states. A converged sample no longer moves, while its adjoint continues. With
        ``tolerance=0`` it moves within rounding, which tells nothing of the Jacobian, and the adjoint can grow.
      cell, params, u, z0: as in `deq`.
      cotangent: ``z -> dL/dz`` of the loss at a state, leaves [B, ...].

    Returns:
      The states z_1 .. z_T and the adjoint states u_1 .. u_T, leaves [T, B, ...].

    References: Yang et al. 2022, section 4.1, reconstructed from its description: no code was published.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Broyden
      >>> from deq_jax.surrogates import simultaneous_adjoint
      >>> def cell(a, z, u):
      ...     return a * z + u
      >>> one = jnp.ones((1, 1))
      >>> states, adjoints = simultaneous_adjoint(Broyden(3), cell, 0.5, one, 0 * one, jnp.ones_like)
      >>> adjoints[-1].round(3).tolist()  # (I - J^T)^{-1} 1
      [[2.0]]
    """
    f, start, unravel = flat_cell(cell, params, z0)

    def step(carry: _Carry, _: None) -> tuple[_Carry, tuple[Array, Array]]:
        memory, adjoint = carry
        vjp = jax.vjp(lambda z: f(z, u), memory.z)[1]
        z, flatten = jax.vjp(unravel, memory.z)
        defect = vjp(adjoint.astype(start.dtype))[0] - adjoint + flatten(cotangent(z))[0]
        adjoint -= solver.left_multiply(memory, defect)
        memory, *_ = advance(solver, f, memory, u)
        return (memory, adjoint), (memory.z, adjoint)

    memory = solver.init(f, start, u)
    carry = memory, jnp.zeros_like(memory.step)
    _, (states, adjoints) = lax.scan(step, carry, length=solver.steps)
    return jax.vmap(unravel)(states), jax.vmap(unravel)(adjoints)


MAX_STEPS = 9
"""Most damped steps of a surrogate; those beyond its own number are skipped."""

Number = Any  # a Python number, checked when the surrogate is built, or a scalar array, which is not


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ThroughSolver:
    """The gradient of the actual computation: the solver's own steps are differentiated, converged or not.

    Where the equilibrium is not reached within the solver's steps, estimators of its gradient, exact ones included,
    can miss how the prediction depends on the image. Costs a backward pass through all steps.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.evaluation import Trial
      >>> from deq_jax.surrogates import ThroughSolver
      >>> Trial("pgd-10", PGD(Linf(0.1)), ThroughSolver()).surrogate
      ThroughSolver()
    """

    def __call__(self, classifier: Classifier, variables: Variables) -> Oracle:
        model, _ = require_deq(classifier, type(self).__name__)
        gradient = model.dynamics.gradient
        through = gradient if isinstance(gradient, Backprop) else Backprop(gradient)
        return classifier_oracle(model.with_dynamics(gradient=through), variables)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Intermediate:
    """Unrolled-intermediate gradient: f(z_i), then `steps` times ``z <- (1 - damping) z + damping f(z)``.

    The loss of that state is differentiated through these applications of f; the solver is not.

    Attributes:
      state: i, counts the solver's steps from 1 to T.
      steps: K, damped steps after the plain one, at most `MAX_STEPS`.
      damping: weight of f(z), in (0, 1].

    References: Yang et al. 2022, section 4.2.

    Examples:
      >>> from deq_jax.surrogates import Intermediate
      >>> Intermediate(state=3, steps=9, damping=0.5).steps
      9
    """

    state: Number
    steps: Number = 5
    damping: Number = 0.5

    def __post_init__(self) -> None:
        _check_count("Intermediate: state", self.state, 1, np.inf)
        _check_damped_steps(self)

    def __call__(self, classifier: Classifier, variables: Variables) -> Oracle:
        model, solver = require_deq(classifier, type(self).__name__)
        _check_count("Intermediate: state", self.state, 1, solver.steps)
        gradient = PhantomUpTo(MAX_STEPS, self.steps, self.damping)
        unrolled = model.with_dynamics(readout=_RawState(self.state), gradient=gradient)
        return classifier_oracle(unrolled, variables)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeanOverStates:
    """Gradient of the loss of mean logits: of f(z_2) .. f(z_T), and of f(z*) followed by damped steps.

    Attributes:
      steps: K, damped steps of the final state, at most `MAX_STEPS`.
      damping: weight of f(z) in them, in (0, 1].

    References: Yang et al. 2022, section 4.2.

    Examples:
      >>> from deq_jax.surrogates import MeanOverStates
      >>> MeanOverStates(steps=5).damping
      0.5
    """

    steps: Number = 9
    damping: Number = 0.5

    def __post_init__(self) -> None:
        _check_damped_steps(self)

    def __call__(self, classifier: Classifier, variables: Variables) -> Oracle:
        model, _ = require_deq(classifier, type(self).__name__)
        return oracle_of(partial(self._logits, model, variables))

    @compiled("model")
    def _logits(self, model: Equilibrium, variables: Variables, x: Array, keys: Keys) -> Array:
        gradient = PhantomUpTo(MAX_STEPS, self.steps, self.damping)
        unrolled = model.with_dynamics(readout=FinalState(), gradient=gradient)
        final, u = unrolled(variables, x), model.encode(variables, x)
        solution: Any = final.solution

        def lead_on(z: PyTree) -> Array:
            return model.decode(variables, model.apply_cell(variables["params"]["cell"], z, u))

        later = lax.map(lead_on, jax.tree.map(lambda states: states[1:], solution.states))
        return (final.logits + jnp.sum(later, axis=0)) / (1 + len(later))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SimultaneousAdjoint:
    """Our reconstruction of the simultaneous adjoint; its code was never published.

    Adjoint states u_n run along with the solver's iterates z_n and share its quasi-Newton matrices; see
    `simultaneous_adjoint`. The loss is taken at the decoded z_n, its gradient is
    ``u_n^T df(z_n; x)/dx``, which tends to the exact one as the steps grow.

    Attributes:
      state: n, counts the solver's steps from 1 to T; the solver must be `Broyden`.

    References: Yang et al. 2022, section 4.1 (a reconstruction from its description).

    Examples:
      >>> from deq_jax.surrogates import SimultaneousAdjoint
      >>> SimultaneousAdjoint(state=5).state
      5
    """

    state: Number

    def __post_init__(self) -> None:
        _check_count("SimultaneousAdjoint: state", self.state, 1, np.inf)

    def __call__(self, classifier: Classifier, variables: Variables) -> Oracle:
        model, solver = require_deq(classifier, type(self).__name__)
        require(isinstance(solver, Broyden), f"SimultaneousAdjoint: the solver must be Broyden, got {solver!r}")
        _check_count("SimultaneousAdjoint: state", self.state, 1, solver.steps)
        return Oracle(partial(self._logits, model, variables), partial(self._grad, model, variables))

    def _logits(self, model: Equilibrium, variables: Variables, x: Array, keys: Keys) -> Array:
        solution: Any = model(variables, x).solution
        return model.decode(variables, _RawState(self.state)(solution))

    @compiled("model", "loss")
    def _grad(
        self, model: Equilibrium, variables: Variables, loss: Loss, x: Array, labels: Array, keys: Keys
    ) -> tuple[Array, Array, Array]:
        solver: Any = model.dynamics.solver
        u, params = model.encode(variables, x), variables["params"]["cell"]

        def total(z: PyTree) -> tuple[Array, tuple[Array, Array]]:
            logits = model.decode(variables, z)
            losses = loss(logits, labels)
            return jnp.sum(losses), (losses, logits)

        def cotangent(z: PyTree) -> PyTree:
            return jax.grad(total, has_aux=True)(z)[0]

        run = simultaneous_adjoint(solver, model.apply_cell, params, u, zero_state(u), cotangent)
        z, adjoint = jax.tree.map(lambda leaf: leaf[self.state - 1], run)
        _, vjp = jax.vjp(lambda x: model.apply_cell(params, z, model.encode(variables, x)), x)
        return *total(z)[1], vjp(adjoint)[0]


@dataclass(frozen=True)
class _RawState:
    """The state z_t, where t may be traced, unlike in `IntermediateState`."""

    state: Number

    def __call__(self, solution: Solution, keys: Keys | None = None) -> PyTree:
        return jax.tree.map(lambda states: states[self.state - 1], solution.states)


def _check_damped_steps(surrogate: Intermediate | MeanOverStates) -> None:
    name, damping = type(surrogate).__name__, surrogate.damping
    _check_count(f"{name}: steps", surrogate.steps, 0, MAX_STEPS)
    if isinstance(damping, int | float):
        require(0 < damping <= 1, f"{name}: damping must be in (0, 1], got {damping!r}")
        object.__setattr__(surrogate, "damping", float(damping))  # 1 and 0.5 compile to the same


def _check_count(name: str, value: Number, low: int, high: float) -> None:
    """Refuses a Python number that is not an integer from low to high; arrays and JAX's placeholders pass."""
    if isinstance(value, int | float):
        valid = isinstance(value, int) and low <= value <= high
        expected = f"from {low} to {high}" if high < np.inf else f">= {low}"
        require(valid, f"{name} must be an integer {expected}, got {value!r}")
