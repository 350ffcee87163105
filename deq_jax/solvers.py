"""Fixed-point solvers: what is tried next is the solver's, the loop is `solve`'s.

A solver is a frozen object with two pure functions over flat states ``[B, N]``:

    memory = solver.init(f, z0, u)                  # evaluates f(z0)
    memory = solver.update(f, memory, u, active)    # one new iterate, one evaluation of f

where ``f(z, u)`` is the cell with its parameters. Every memory has the fields ``z`` (the last iterate)
and ``fz`` (``f(z)``), so that T steps cost T + 1 evaluations. A sample that is not `active` has
converged: it must stay where it is.

`FixedPoint` and `Anderson` run jaxopt's updates sample by sample; `Broyden` is a batched kernel with
the iterates of ``jaxopt.Broyden`` that touches only the pairs there are. jaxopt is imported in this file
alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.types import Array, Cell, Params, PyTree, Solution, Solver, require

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
    import jaxopt

RESIDUAL_FLOOR = 1e-9


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

    Once all samples have converged, the remaining steps cost nothing.

    Args:
      solver: which trajectory; None for none: the solution is z0 and T is 0.
      cell: ``(params, z, u) -> z``.
      params: of the cell.
      z0: start, leaves [B, ...]. Not read where `memory` is given.
      u: injection, leaves [B, ...].
      memory: of an earlier solution, to go on from there.

    Returns:
      `Solution` with T = solver.steps; see there for shapes. Failure to converge is told by its
      residuals, never by an exception. A sample whose every residual is NaN keeps its start as z.

    Differs from the reference: convergence, choice of the lowest residual and the low-rank updates are
    each sample's own (the reference stops and chooses by the norm of the whole batch).
    """
    flat, unravel = _ravel(z0)
    if solver is None:
        empty = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), z0)
        batch = flat.shape[0]
        return Solution(z0, empty, jnp.zeros((0, batch), flat.dtype), jnp.zeros(batch, jnp.int32), None)

    def f(z: Array, u: PyTree) -> Array:
        return _ravel(cell(params, unravel(z), u))[0]

    tolerance = max(solver.tolerance, float(jnp.finfo(flat.dtype).eps))
    first_evaluation = 1 if memory is None else 0
    if memory is None:
        memory = solver.init(f, flat, u)

    def step(carry, _):
        memory, best, lowest = carry
        active = ~(_residual(solver, memory.z, memory.fz) < tolerance)
        update = partial(solver.update, f)
        memory = lax.cond(jnp.any(active), update, lambda memory, u, active: memory, memory, u, active)
        residual = _residual(solver, memory.z, memory.fz)
        better = residual < lowest
        best = jnp.where(better[:, None], memory.z, best)
        lowest = jnp.where(better, residual, lowest)
        return (memory, best, lowest), (memory.z, residual, active)

    carry = memory, memory.z, jnp.full(flat.shape[0], jnp.inf, flat.dtype)
    (memory, best, _), (states, residuals, active) = lax.scan(step, carry, length=solver.steps)
    evaluations = first_evaluation + jnp.sum(active, axis=0, dtype=jnp.int32)
    return Solution(unravel(best), jax.vmap(unravel)(states), residuals, evaluations, memory)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What all solvers share.

    Attributes:
      steps: T, number of iterates.
      tolerance: relative residual below which a sample has converged and is left as it is; at least
        the rounding unit of its numbers.
      batch_joint: judge residuals by the norm over the whole batch, as the papers' code does; for
        comparison with it only, since an image's prediction then depends on its batch.
    """

    tolerance: float = 1e-3
    batch_joint: bool = False

    def __post_init__(self):
        name, steps = type(self).__name__, getattr(self, "steps", None)
        require(_positive_int(steps), f"{name}: steps must be a positive integer, got {steps!r}")
        require(self.tolerance >= 0, f"{name}: tolerance must be >= 0, got {self.tolerance!r}")


class FixedPointMemory(NamedTuple):
    z: Array
    fz: Array
    proposal: Array


@dataclass(frozen=True)
class FixedPoint(_Settings):
    """(Damped) fixed-point iteration ``z <- (1 - damping) z + damping f(z)``, by jaxopt.

    Attributes:
      steps: T.
      damping: weight of f(z), in (0, 1].
    """

    steps: int
    damping: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.damping <= 1, f"FixedPoint: damping must be in (0, 1], got {self.damping!r}")

    def init(self, f: Callable, z: Array, u: PyTree) -> FixedPointMemory:
        return jax.vmap(partial(self._evaluate, f))(z, u)

    def update(self, f: Callable, memory: FixedPointMemory, u: PyTree, active: Array) -> FixedPointMemory:
        return _where(active, jax.vmap(partial(self._evaluate, f))(memory.proposal, u), memory)

    def _evaluate(self, f: Callable, z: Array, u: PyTree) -> FixedPointMemory:
        def damped(z, u):
            fz = _single(f)(z, u)
            return z + self.damping * (fz - z) if self.damping < 1 else fz, fz

        iteration = jaxopt.FixedPointIteration(damped, has_aux=True)
        proposal, state = iteration.update(z, iteration.init_state(z, u), u)
        return FixedPointMemory(z, state.aux, proposal)


class AndersonMemory(NamedTuple):
    z: Array
    fz: Array
    states: Array
    residuals: Array
    gram: Array
    taken: Array  # steps


@dataclass(frozen=True)
class Anderson(_Settings):
    """Anderson acceleration, by jaxopt: ``z_k = sum_i alpha_i (f(z_i) + (beta - 1)(f(z_i) - z_i))`` over
    the last ``min(k, history_size)`` pairs, alpha minimising the residual of the combination.

    Attributes:
      steps: T.
      history_size: number of pairs kept, at least 2.
      ridge: added to the diagonal of the residuals' Gram matrix.
      beta: mixing.

    Differs from jaxopt: it accelerates from the first two pairs on, where jaxopt's own start makes
    `history_size` plain steps first.
    """

    steps: int
    history_size: int = 6
    ridge: float = 1e-4
    beta: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        size_is_valid = _positive_int(self.history_size) and self.history_size >= 2
        require(size_is_valid, f"Anderson: history_size must be an integer >= 2, got {self.history_size!r}")
        require(self.ridge > 0, f"Anderson: ridge must be > 0, got {self.ridge!r}")
        require(0 < self.beta <= 1, f"Anderson: beta must be in (0, 1], got {self.beta!r}")

    def init(self, f: Callable, z: Array, u: PyTree) -> AndersonMemory:
        size, dtype = self.history_size, z.dtype
        # A place not yet filled has a residual so large that its weight rounds to nothing.
        unfilled = jnp.eye(size, dtype=dtype) / jnp.finfo(dtype).eps ** 2
        history = jnp.broadcast_to(z[:, None], (z.shape[0], size, z.shape[1]))
        gram = jnp.broadcast_to(unfilled, (z.shape[0], size, size))
        count = jnp.zeros(z.shape[0], jnp.int32)
        memory = AndersonMemory(z, z, history, jnp.zeros_like(history), gram, count)
        return jax.vmap(partial(self._evaluate, f))(memory, u)

    def update(self, f: Callable, memory: AndersonMemory, u: PyTree, active: Array) -> AndersonMemory:
        return _where(active, jax.vmap(partial(self._evaluate, f))(memory, u), memory)

    def _evaluate(self, f: Callable, memory: AndersonMemory, u: PyTree) -> AndersonMemory:
        dtype, size = memory.z.dtype, self.history_size
        precision = jnp.promote_types(dtype, jnp.result_type(float))  # jaxopt mixes in jax's default precision

        def single(z: Array, u: PyTree) -> Array:
            return _single(f)(z.astype(dtype), u).astype(precision)

        acceleration = jaxopt.AndersonAcceleration(single, history_size=size, ridge=self.ridge, beta=self.beta)
        state = acceleration.init_state(memory.z, u)._replace(
            iter_num=memory.taken + size,  # from `size` on, jaxopt extrapolates
            params_history=memory.states.astype(precision),
            residuals_history=memory.residuals.astype(precision),
            residual_gram=memory.gram.astype(precision),
        )
        fz, state = acceleration.update(memory.fz.astype(precision), state, u)
        z = state.params_history[memory.taken % size]
        found = AndersonMemory(
            z, fz, state.params_history, state.residuals_history, state.residual_gram, memory.taken + 1
        )
        return jax.tree.map(lambda new, old: new.astype(old.dtype), found, memory)


class BroydenMemory(NamedTuple):
    """Inverse Jacobian of g(z) = f(z) - z: ``B = -I + sum_k u_k v_k^T``, pairs in ``[H, B, N]`` rings."""

    z: Array
    fz: Array
    step: Array  # -B g(z), the next step
    u: Array
    v: Array
    taken: Array  # steps, of which each computed a pair


@dataclass(frozen=True)
class Broyden(_Settings):
    """Broyden's good method on g(z) = f(z) - z, inverse form, full steps, from B = -I.

    Attributes:
      steps: T.
      history_size: number of rank-one pairs kept; None keeps all T. Memory per sample is
        ``2 * history_size`` states.

    References: Broyden 1965; Bai et al. 2020, appendix A. Iterates equal those of
    ``jaxopt.Broyden(gamma=-1, stepsize=1.0)``, except that a pair with a vanishing denominator is
    dropped where jaxopt divides by it.
    """

    steps: int
    history_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        valid = self.history_size is None or _positive_int(self.history_size)
        require(valid, f"Broyden: history_size must be a positive integer or None, got {self.history_size!r}")

    def init(self, f: Callable, z: Array, u: PyTree) -> BroydenMemory:
        fz = f(z, u)
        pairs = jnp.zeros((self.history_size or self.steps, *z.shape), z.dtype)
        return BroydenMemory(z, fz, fz - z, pairs, pairs, jnp.zeros((), jnp.int32))

    def update(self, f: Callable, memory: BroydenMemory, u: PyTree, active: Array) -> BroydenMemory:
        dz = jnp.where(active[:, None], memory.step, 0)
        z = memory.z + dz
        fz = f(z, u)
        g = fz - z
        dg = g - (memory.fz - memory.z)

        def add_pair(k, products):
            bg, v = products
            bg += memory.u[k] * _dot(memory.v[k], g)
            v += memory.v[k] * _dot(memory.u[k], dz)
            return bg, v

        size = memory.u.shape[0]
        bg, v = lax.fori_loop(0, jnp.minimum(memory.taken, size), add_pair, (-g, -dz))  # B g and dz^T B
        denominator = _dot(v, dg)
        vanishing = jnp.finfo(z.dtype).eps * jnp.sqrt(_dot(v, v) * _dot(dg, dg))
        sound = active[:, None] & (jnp.abs(denominator) > vanishing)
        # (dz - B dg) / (v . dg), where B dg = B g - B g_old = B g + dz
        new_u = jnp.where(sound, -bg / jnp.where(sound, denominator, 1), 0)
        new_v = jnp.where(sound, v, 0)
        slot = memory.taken % size
        bg += new_u * _dot(new_v, g) - memory.u[slot] * _dot(memory.v[slot], g)  # the oldest pair leaves
        pairs = memory.u.at[slot].set(new_u), memory.v.at[slot].set(new_v)
        return BroydenMemory(z, fz, -bg, *pairs, memory.taken + 1)


def _residual(solver: Any, z: Array, fz: Array) -> Array:
    """Relative residuals [B]."""
    difference, scale = _dot(fz - z, fz - z)[:, 0], _dot(fz, fz)[:, 0]
    if solver.batch_joint:
        difference, scale = (jnp.broadcast_to(jnp.sum(norm), norm.shape) for norm in (difference, scale))
    return jnp.sqrt(difference) / (jnp.sqrt(scale) + RESIDUAL_FLOOR)


def _dot(a: Array, b: Array) -> Array:
    """Per-sample inner products, [B, 1]."""
    return jnp.sum(a * b, axis=1, keepdims=True)


def _where(active: Array, new: PyTree, old: PyTree) -> PyTree:
    """Per sample the new memory or the old one; leaves [B, ...]."""
    return jax.tree.map(lambda n, o: jnp.where(active.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def _single(f: Callable) -> Callable:
    """f for one sample, without the batch axis."""
    return lambda z, u: f(z[None], jax.tree.map(lambda leaf: leaf[None], u))[0]


def _ravel(tree: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """One vector per sample [B, N], and the way back."""
    leaves = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    shapes = [leaf.shape for leaf in leaves]
    require(len({shape[0] for shape in shapes}) == 1, f"state leaves need one common batch size, got {shapes}")
    flat = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
    ends = [sum(leaf[0].size for leaf in leaves[: i + 1]) for i in range(len(leaves) - 1)]

    def unravel(flat: Array) -> PyTree:
        parts = jnp.split(flat, ends, axis=1)
        return structure.unflatten(
            [part.reshape(part.shape[0], *shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
        )

    return flat, unravel


def _positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
