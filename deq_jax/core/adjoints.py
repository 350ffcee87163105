"""Gradients that solve the adjoint equation of an equilibrium, exactly or by a series, and how well they solve it.

With J the cell's Jacobian at z* and g the incoming cotangent, the implicit function theorem gives the gradient
``w^T df/d(params, u)`` where ``w = (I - J^T)^{-1} g``. `Implicit` solves for w, `Neumann` sums the first terms of its
(damped) series. One ``custom_vjp`` serves both; higher derivatives are right in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.core.cells import apply
from deq_jax.core.compilation import compiled
from deq_jax.core.errors import require, require_count
from deq_jax.core.gradients import has_adjoint, innermost, straight_through
from deq_jax.core.norms import relative_distance
from deq_jax.core.solve import solve
from deq_jax.core.solvers import Broyden
from deq_jax.core.types import Array, Cell, Params, PyTree, Solution, Solver, check_solver

LinearMap = Callable[[PyTree], tuple[PyTree]]
"""``w -> (J^T w,)``, as `jax.vjp` gives it."""


@dataclass(frozen=True)
class Implicit:
    """The exact gradient: value f(z*), backward pass by solving ``w = J^T w + g`` from w = 0.

    Where g is not finite, neither is the gradient. JAX refuses forward mode: take ``jax.jacrev(jax.jacrev(f))`` in
    place of ``jax.hessian(f)``, or `Phantom` or `Unrolled` where a ``jax.jvp`` is needed.

    Attributes:
      solver: solves the adjoint equation. Few steps can be far from its solution; see `adjoint_residual`.

    References: Bai et al. 2019, theorem 1.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax import Broyden, Implicit, deq
      >>> def cell(a, z, u):
      ...     return a * z + u
      >>> def equilibrium(a):  # 1 / (1 - a), with derivative 1 / (1 - a)^2
      ...     one = jnp.ones((1, 1))
      ...     return deq(cell, a, one, 0 * one, solver=Broyden(8), gradient=Implicit())[0].sum()
      >>> round(float(jax.grad(equilibrium)(0.5)), 3)
      4.0
    """

    solver: Solver = Broyden(7)

    def __post_init__(self) -> None:
        check_solver("Implicit: solver", self.solver)

    @property
    def applications(self) -> int:
        """Number of cell applications in the forward pass; see `Gradient`."""
        return 1

    @compiled("self", "cell")
    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        return _apply_with_adjoint(partial(apply, cell), self, params, u, z)

    def solve_adjoint(self, vjp: LinearMap, cotangent: PyTree) -> Solution:
        """Solution w of ``w = vjp(w) + cotangent``."""

        def linear_cell(vjp: LinearMap, w: PyTree, cotangent: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, vjp(w)[0], cotangent)

        start = jax.tree.map(jnp.zeros_like, cotangent)
        return solve(self.solver, linear_cell, vjp, start, cotangent)

    def adjoint(self, vjp: LinearMap, cotangent: PyTree) -> PyTree:
        solution = self.solve_adjoint(vjp, cotangent)
        finite = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(cotangent)]
        is_finite = jnp.stack(finite).all(axis=0)

        def where_finite(w: Array, g: Array) -> Array:
            return jnp.where(is_finite.reshape(-1, *[1] * (w.ndim - 1)), w, g)

        return jax.tree.map(where_finite, solution.z, cotangent)


@dataclass(frozen=True)
class Neumann:
    """Value f(z*), backward pass ``w = damping * sum_{i=0..terms} (J_d^T)^i g`` with the damped Jacobian
    ``J_d = (1 - damping) I + damping J``. Forward mode is refused, as by `Implicit`.

    Attributes:
      terms: number of terms after the first; each costs a vector-Jacobian product.
      damping: weight of J, in (0, 1].

    References: Geng et al. 2021, eq. 12 (Neumann-series phantom gradient).

    Examples:
      >>> from deq_jax import Broyden, Dynamics, Neumann
      >>> Dynamics(Broyden(8), gradient=Neumann(terms=5)).gradient.terms
      5
    """

    terms: int = 8
    damping: float = 0.5

    def __post_init__(self) -> None:
        require_count("Neumann: terms", self.terms, 0)
        require(0 < self.damping <= 1, f"Neumann: damping must be in (0, 1], got {self.damping!r}")

    @property
    def applications(self) -> int:
        """Number of cell applications in the forward pass; see `Gradient`."""
        return 1

    @compiled("self", "cell")
    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        return _apply_with_adjoint(partial(apply, cell), self, params, u, z)

    def adjoint(self, vjp: LinearMap, cotangent: PyTree) -> PyTree:
        def add_term(w: PyTree, _: None) -> tuple[PyTree, None]:
            def damped(w: Array, jw: Array, g: Array) -> Array:
                return g + (1 - self.damping) * w + self.damping * jw

            return jax.tree.map(damped, w, vjp(w)[0], cotangent), None

        w = lax.scan(add_term, cotangent, length=self.terms)[0]
        return jax.tree.map(lambda leaf: self.damping * leaf, w)


def adjoint_residual(gradient: Any, cell: Cell, params: Params, u: PyTree, z: PyTree, cotangent: PyTree) -> Array:
    """Relative residual of an estimator's adjoint equation, per sample, at any scale.

    Args:
      gradient: `Implicit`, `Neumann`, or `AtState` of one of them; see `has_adjoint`.
      cell: ``(params, z, u) -> z``.
      params: parameters of the cell.
      u: injection, leaves [B, ...].
      z: solved state, leaves [B, ...].
      cotangent: g, the gradient of a loss with respect to the state, leaves [B, ...].

    Returns:
      [B], ``||g + J^T w - w|| / ||w||``; 0 where g is 0.

    Raises:
      InputError: the estimator has no adjoint state.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import Neumann, adjoint_residual
      >>> def cell(a, z, u):
      ...     return a * z + u
      >>> one = jnp.ones((1, 1))
      >>> adjoint_residual(Neumann(terms=0, damping=1.0), cell, 0.5, one, 2 * one, cotangent=one).tolist()
      [0.5]
    """
    require(has_adjoint(gradient), f"adjoint_residual: expected Implicit or Neumann, got {gradient!r}")
    gradient = innermost(gradient)
    vjp = jax.vjp(lambda z: cell(params, z, u), z)[1]
    w = gradient.adjoint(vjp, cotangent)
    following = jax.tree.map(jnp.add, vjp(w)[0], cotangent)
    return relative_distance(following, w)


class _Adjoint(Protocol):
    def adjoint(self, vjp: LinearMap, cotangent: PyTree) -> PyTree: ...


class _Point(NamedTuple):
    """The point at which a cell is linearised."""

    params: Params
    u: PyTree
    z: PyTree


@dataclass(frozen=True)
class _Jacobian:
    """``x -> J^T x`` of a cell, or ``x -> J x``; both by reverse mode, the only one that every cell has."""

    cell: Cell
    transposed: bool = True

    def at(self, point: _Point) -> LinearMap:
        """The linear map at a point, which is visited once."""
        vjp = jax.vjp(lambda z: self.cell(point.params, z, point.u), point.z)[1]
        if self.transposed:
            return vjp
        return jax.vjp(lambda w: vjp(w)[0], jax.tree.map(jnp.zeros_like, point.z))[1]

    @property
    def transpose(self) -> _Jacobian:
        return _Jacobian(self.cell, not self.transposed)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply_with_adjoint(cell: Cell, method: _Adjoint, params: Params, u: PyTree, z: PyTree) -> PyTree:
    """f(z); its cotangent is first replaced by the method's adjoint state."""
    return cell(params, z, u)


def _forward(cell: Cell, method: _Adjoint, params: Params, u: PyTree, z: PyTree) -> tuple[PyTree, _Point]:
    fz = _apply_with_adjoint(cell, method, params, u, z)
    # To further derivatives the saved z is the equilibrium, which depends on params and u as the output does.
    return fz, _Point(params, u, straight_through(z, fz))


def _backward(cell: Cell, method: _Adjoint, point: _Point, cotangent: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    w = _linear_solution(method, _Jacobian(cell), point, cotangent)
    gradient = jax.vjp(lambda params, u: cell(params, point.z, u), point.params, point.u)[1](w)
    return *gradient, jax.tree.map(jnp.zeros_like, point.z)


_apply_with_adjoint.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_solution(method: _Adjoint, jacobian: _Jacobian, point: _Point, g: PyTree) -> PyTree:
    """x = A x + g with A = J^T (or J), as the method solves it; differentiated as the solution that it is."""
    return method.adjoint(jacobian.at(point), g)


def _linear_forward(
    method: _Adjoint, jacobian: _Jacobian, point: _Point, g: PyTree
) -> tuple[PyTree, tuple[_Point, PyTree]]:
    x = _linear_solution(method, jacobian, point, g)
    return x, (point, x)


def _linear_backward(
    method: _Adjoint, jacobian: _Jacobian, saved: tuple[_Point, PyTree], cotangent: PyTree
) -> tuple[_Point, PyTree]:
    point, x = saved
    t = _linear_solution(method, jacobian.transpose, point, cotangent)
    return jax.vjp(lambda point: jacobian.at(point)(x)[0], point)[1](t)[0], t


_linear_solution.defvjp(_linear_forward, _linear_backward)
