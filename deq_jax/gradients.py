"""The DEQ layer, and how gradients pass through its equilibrium.

The solver is never differentiated. A gradient estimator takes the solved state, held constant, and
returns a state of the same value, or a few steps further on, that carries gradients to the cell's
parameters and to the injection: ``gradient(cell, params, u, z) -> state``.

With J the cell's Jacobian at z* and g the incoming cotangent, the implicit function theorem gives the
gradient ``w^T df/d(params, u)`` where ``w = (I - J^T)^{-1} g``. `Implicit` solves for w, `Neumann` sums
the first terms of its (damped) series, `Phantom` differentiates a few damped steps, which is a
truncation of the same series, and `Unrolled` differentiates plain steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.readouts import FinalState
from deq_jax.solvers import Broyden, solve
from deq_jax.types import Cell, Gradient, Keys, Params, PyTree, Readout, Solution, Solver, require


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

    Args:
      cell: ``(params, z, u) -> z``, samples independent. It must not close over traced values.
      params: of the cell; differentiable.
      u: injection, leaves [B, ...]; differentiable.
      z0: start of the solver, leaves [B, ...]; carries no gradient.
      solver: which trajectory; None for none (the readout is z0).
      readout: which state of the trajectory.
      gradient: how that state is differentiated.
      keys: for random readouts.

    Returns:
      The state, leaves [B, ...], and the `Solution` (constant) it was read from.
    """
    constant = lax.stop_gradient
    solution = solve(solver, cell, constant(params), constant(z0), constant(u))
    state = readout(solution, keys)
    return gradient(cell, params, u, constant(state)), solution


@dataclass(frozen=True)
class Phantom:
    """``z <- f(z)``, then `steps` times ``z <- (1 - damping) z + damping f(z)``, all differentiated.

    Attributes:
      steps: K, damped steps after the plain one.
      damping: weight of f(z), in (0, 1].

    References: Geng et al. 2021, eq. 9 (unrolling-based phantom gradient).
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self):
        require(self.steps >= 0, f"Phantom: steps must be >= 0, got {self.steps!r}")
        require(0 < self.damping <= 1, f"Phantom: damping must be in (0, 1], got {self.damping!r}")

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        def damped_step(z, damping):
            fz = cell(params, z, u)
            return jax.tree.map(lambda a, b: (1 - damping) * a + damping * b, z, fz), None

        # The plain step is a step of damping 1, so that the cell is compiled once.
        damping = jnp.full(self.steps + 1, self.damping, _dtype(z)).at[0].set(1)
        return lax.scan(damped_step, z, damping)[0]


@dataclass(frozen=True)
class Unrolled:
    """`steps` times ``z <- f(z)``, differentiated; memory grows with the steps.

    With ``solver=None`` it is plain backpropagation through f^steps(z0): shallow pre-training, and a
    second way to the exact gradient in tests.
    """

    steps: int

    def __post_init__(self):
        require(self.steps >= 1, f"Unrolled: steps must be >= 1, got {self.steps!r}")

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        return Phantom(self.steps - 1, damping=1.0)(cell, params, u, z)


@dataclass(frozen=True)
class Implicit:
    """The exact gradient: value f(z*), backward pass by solving ``w = J^T w + g`` from w = 0.

    Attributes:
      solver: of the adjoint equation. Few steps can be far from its solution; `adjoint` returns the
        residuals.

    References: Bai et al. 2019, theorem 1.
    """

    solver: Solver = Broyden(7)

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        return _apply_with_adjoint(cell, self, params, u, z)

    def solve_adjoint(self, vjp: Callable, cotangent: PyTree) -> Solution:
        """Solution w of ``w = vjp(w) + cotangent``."""

        def linear_cell(vjp, w, cotangent):
            return jax.tree.map(jnp.add, vjp(w)[0], cotangent)

        start = jax.tree.map(jnp.zeros_like, cotangent)
        return solve(self.solver, linear_cell, vjp, start, cotangent)

    def adjoint(self, vjp: Callable, cotangent: PyTree) -> PyTree:
        return self.solve_adjoint(vjp, cotangent).z


@dataclass(frozen=True)
class Neumann:
    """Value f(z*), backward pass ``w = damping * sum_{i=0..terms} (J_d^T)^i g`` with the damped Jacobian
    ``J_d = (1 - damping) I + damping J``.

    References: Geng et al. 2021, eq. 12 (Neumann-series phantom gradient).
    """

    terms: int = 8
    damping: float = 0.5

    def __post_init__(self):
        require(self.terms >= 0, f"Neumann: terms must be >= 0, got {self.terms!r}")
        require(0 < self.damping <= 1, f"Neumann: damping must be in (0, 1], got {self.damping!r}")

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        return _apply_with_adjoint(cell, self, params, u, z)

    def adjoint(self, vjp: Callable, cotangent: PyTree) -> PyTree:
        def add_term(w, _):
            def damped(w, jw, g):
                return g + (1 - self.damping) * w + self.damping * jw

            return jax.tree.map(damped, w, vjp(w)[0], cotangent), None

        w = lax.scan(add_term, cotangent, length=self.terms)[0]
        return jax.tree.map(lambda leaf: self.damping * leaf, w)


class _Adjoint(Protocol):
    def adjoint(self, vjp: Callable, cotangent: PyTree) -> PyTree: ...


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply_with_adjoint(cell: Cell, method: _Adjoint, params: Params, u: PyTree, z: PyTree) -> PyTree:
    """f(z), whose cotangent is first replaced by the method's adjoint state."""
    return cell(params, z, u)


def _forward(cell, method, params, u, z):
    return cell(params, z, u), (params, u, z)


def _backward(cell, method, saved, cotangent):
    params, u, z = saved
    w = method.adjoint(jax.vjp(lambda z: cell(params, z, u), z)[1], cotangent)
    gradient = jax.vjp(lambda params, u: cell(params, z, u), params, u)[1](w)
    return *gradient, jax.tree.map(jnp.zeros_like, z)


_apply_with_adjoint.defvjp(_forward, _backward)


def _dtype(tree: PyTree):
    return jnp.result_type(*jax.tree.leaves(tree))
