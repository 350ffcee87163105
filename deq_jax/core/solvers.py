"""Fixed-point solvers. A solver chooses the next iterate; `solve` runs the loop.

A solver is a frozen object with two pure functions over flat states ``[B, N]``:

    memory = solver.init(f, z0, u)                  # evaluates f(z0)
    memory = solver.update(f, memory, u, active)    # one new iterate, one evaluation of f

where ``f(z, u)`` is the cell with its parameters; `types.Solver` has the whole contract, and a solver of one's own.
The memories of those in this file also have a ``unit`` (see `unit_of`).

Nothing depends on the scale of a problem: inner products are taken in units of f(z0), in at least float32.

`FixedPoint` is jaxopt's; `Anderson` and `Broyden` are kernels over whole batches with the iterates of
``jaxopt.AndersonAcceleration`` and ``jaxopt.Broyden``, which work on one sample at a time. jaxopt is imported
in this file alone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.core.errors import require, require_count
from deq_jax.core.norms import in_unit, inner, unit_of, wide
from deq_jax.core.types import Array, FlatCell, PyTree, Solver

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
    import jaxopt


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings of all solvers; each solver explains them."""

    steps: int = field(kw_only=False)
    tolerance: float = 1e-3
    batch_joint: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_count(f"{name}: steps", self.steps)
        require(self.tolerance >= 0, f"{name}: tolerance must be >= 0, got {self.tolerance!r}")


class FixedPointMemory(NamedTuple):
    z: Array
    fz: Array
    unit: Array
    proposal: Array


@dataclass(frozen=True)
class FixedPoint(_Settings):
    """(Damped) fixed-point iteration ``z <- (1 - damping) z + damping f(z)``, by jaxopt.

    Attributes:
      steps: T, number of iterates.
      tolerance: relative residual below which a sample has converged and no longer moves; at least the rounding unit of
        its numbers.
      batch_joint: take residuals over the whole batch, as the papers' code does; for comparison with it only, since an
        image's prediction then depends on its batch.
      damping: weight of f(z), in (0, 1].

    Examples:
      >>> from deq_jax import Dynamics, FixedPoint
      >>> Dynamics(FixedPoint(steps=20, damping=0.5)).solver.damping
      0.5
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.damping <= 1, f"FixedPoint: damping must be in (0, 1], got {self.damping!r}")

    def init(self, f: FlatCell, z: Array, u: PyTree) -> FixedPointMemory:
        def damped(z: Array, u: PyTree) -> tuple[Array, Array]:
            fz = f(z, u)
            return z + self.damping * (fz - z) if self.damping < 1 else fz, fz

        iteration = jaxopt.FixedPointIteration(damped, has_aux=True)
        proposal, state = iteration.update(z, iteration.init_state(z, u), u)
        return FixedPointMemory(z, state.aux, unit_of(self, state.aux), proposal)

    def update(self, f: FlatCell, memory: FixedPointMemory, u: PyTree, active: Array) -> FixedPointMemory:
        following = self.init(f, jnp.where(active[:, None], memory.proposal, memory.z), u)
        return following._replace(unit=memory.unit)


class AndersonMemory(NamedTuple):
    """Residuals r_i = f(z_i) - z_i and targets z_i + beta r_i of the last points z_i, in ``[m, B, N]`` rings, and the
    Gram matrix of the residuals. Residuals are kept in the sample's unit.
    """

    z: Array
    fz: Array
    unit: Array
    targets: Array
    residuals: Array
    gram: Array  # [B, m, m]
    taken: Array  # [B], points


@dataclass(frozen=True)
class Anderson(_Settings):
    """Anderson acceleration: ``z_k = sum_i alpha_i (z_i + beta (f(z_i) - z_i))`` over the last
    ``min(k, history_size)`` points, alpha summing to 1 and minimising the residual of the combination.

    Attributes:
      steps: T, number of iterates.
      tolerance: relative residual below which a sample has converged and no longer moves; at least the rounding unit of
        its numbers.
      batch_joint: take residuals over the whole batch, as the papers' code does; for comparison with it only, since an
        image's prediction then depends on its batch.
      history_size: number of points kept, at least 2.
      ridge: relative increase of the diagonal of the residuals' Gram matrix; at least its rounding error.
      beta: mixing, in (0, 1]; 1 takes f(z_i) for z_i.
      absolute_ridge: add the ridge itself to the diagonal, as the papers' code does; for comparison with it only,
        since the iterates then depend on the scale of the problem.

    References: Walker & Ni 2011. With the absolute ridge the iterates equal the
    iterates of ``jaxopt.AndersonAcceleration``, with one exception: jaxopt makes `history_size` plain steps first.

    Differs from the reference: the ridge is relative, so that the iterates do not depend on the scale of the problem.

    Examples:
      >>> from deq_jax import Anderson, Dynamics
      >>> Dynamics(Anderson(steps=10, history_size=4)).solver.history_size
      4
    """

    history_size: int = 6
    ridge: float = 1e-5
    beta: float = 1.0
    absolute_ridge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("Anderson: history_size", self.history_size, 2)
        require(self.ridge > 0, f"Anderson: ridge must be > 0, got {self.ridge!r}")
        require(0 < self.beta <= 1, f"Anderson: beta must be in (0, 1], got {self.beta!r}")

    def init(self, f: FlatCell, z: Array, u: PyTree) -> AndersonMemory:
        size, batch = self.history_size, len(z)
        fz, unit = f(z, u), jnp.ones((batch, 1), wide(z).dtype)
        empty = jnp.zeros((size, *z.shape), unit.dtype)
        gram, taken = jnp.zeros((batch, size, size), unit.dtype), jnp.zeros(batch, jnp.int32)
        memory = AndersonMemory(z, fz, unit_of(self, fz), empty, empty, gram, taken)
        return self._visit(memory, z, fz, jnp.ones(batch, bool))

    def update(self, f: FlatCell, memory: AndersonMemory, u: PyTree, active: Array) -> AndersonMemory:
        z = jnp.where(active[:, None], self._mixed(memory).astype(memory.z.dtype), memory.z)
        return self._visit(memory, z, f(z, u), active)

    def _mixed(self, memory: AndersonMemory) -> Array:
        """The combination, its system scaled so that the diagonal is 1."""
        size, limits = self.history_size, jnp.finfo(memory.gram.dtype)
        diagonal = jnp.diagonal(memory.gram, axis1=1, axis2=2)
        share = max(self.ridge, 2 * size * float(limits.eps))  # keeps the rounded matrix positive definite
        ridge = self.ridge / memory.unit**2 if self.absolute_ridge else share * diagonal
        is_filled = jnp.arange(size) < memory.taken[:, None]
        # The floor keeps the squares of these norms, which derivatives divide by, in range.
        norms = jnp.sqrt(jnp.where(is_filled, jnp.maximum(diagonal + ridge, float(limits.tiny) ** 0.5), 1))
        smallest = jnp.min(jnp.where(is_filled, norms, jnp.inf), axis=1, keepdims=True)
        weights = jnp.where(is_filled, smallest / norms, 0)
        off_diagonal = memory.gram * (1 - jnp.eye(size, dtype=memory.gram.dtype))
        system = off_diagonal / (norms[:, :, None] * norms[:, None]) + jnp.eye(size, dtype=memory.gram.dtype)
        alpha = weights * jnp.linalg.solve(system, weights[:, :, None])[:, :, 0]
        alpha /= jnp.sum(alpha, axis=1, keepdims=True)
        mixed: Array = sum(alpha[:, i : i + 1] * memory.targets[i] for i in range(size))
        return mixed

    def _visit(self, memory: AndersonMemory, z: Array, fz: Array, active: Array) -> AndersonMemory:
        """The memory with z as its newest point; where a sample is not active, as its last one once more."""
        taken, samples = memory.taken + active, jnp.arange(z.shape[0])
        slot, residual = (taken - 1) % self.history_size, wide(fz) - wide(z)
        targets = memory.targets.at[slot, samples].set(wide(z) + self.beta * residual)
        residual = in_unit(memory, residual)
        residuals = memory.residuals.at[slot, samples].set(residual)
        products = jnp.stack([jnp.sum(row * residual, axis=1) for row in residuals], axis=1)
        gram = memory.gram.at[samples, slot].set(products).at[samples, :, slot].set(products)
        return AndersonMemory(z, fz, memory.unit, targets, residuals, gram, taken)


class BroydenMemory(NamedTuple):
    """Inverse Jacobian of g(z) = f(z) - z, as the steps s_k that were taken, in a ring [H + 1, B, N]; see `Broyden`."""

    z: Array
    fz: Array
    unit: Array
    step: Array  # -B g(z), the next step
    steps: Array  # in the sample's unit
    weights: Array  # [H + 1, B], 1 / ||s_k||^2 in that unit, or 0 for a pair that is left out
    taken: Array  # steps


@dataclass(frozen=True)
class Broyden(_Settings):
    """Broyden's good method on g(z) = f(z) - z, inverse form, full steps, from B = -I.

    With full steps ``s_{n+1} = -B_n g(z_n)`` the rank-one correction of the inverse Jacobian is a factor,
    ``B_n = (I + s_{n+1} s_n^T / ||s_n||^2) B_{n-1}``. So only the steps need to be kept. A product with B costs one
    inner product and one addition for each of them.

    Attributes:
      steps: T, number of iterates.
      tolerance: relative residual below which a sample has converged and no longer moves; at least the rounding unit of
        its numbers.
      batch_joint: take residuals over the whole batch, as the papers' code does; for comparison with it only, since an
        image's prediction then depends on its batch.
      history_size: number of factors kept, the newest; None keeps all T. Memory per sample is
        ``history_size + 1`` states.
      history_dtype: dtype of the kept steps, e.g. ``jax.numpy.bfloat16``; None: as the states.

    References: Broyden 1965; Kelley 1995, section 7.3; Bai et al. 2020, appendix A. Iterates equal the iterates of
    ``jaxopt.Broyden(gamma=-1, stepsize=1.0)``, with two exceptions: a pair with a vanishing denominator is left out
    (jaxopt divides by it), and a shorter history forgets factors (jaxopt forgets terms).

    Examples:
      >>> from deq_jax import Broyden, Dynamics
      >>> Dynamics(Broyden(steps=8, tolerance=1e-4)).solver.tolerance
      0.0001
    """

    history_size: int | None = None
    history_dtype: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("Broyden: history_size", self.history_size, optional=True)

    def init(self, f: FlatCell, z: Array, u: PyTree) -> BroydenMemory:
        fz = f(z, u)
        size, step, unit = 1 + (self.history_size or self.steps), wide(fz) - wide(z), unit_of(self, fz)
        steps = jnp.zeros((size, *z.shape), self.history_dtype or z.dtype)
        weights = jnp.zeros((size, len(z)), unit.dtype)
        return BroydenMemory(z, fz, unit, step, steps, weights, jnp.zeros((), jnp.int32))

    def update(self, f: FlatCell, memory: BroydenMemory, u: PyTree, active: Array) -> BroydenMemory:
        steps = self._with_next_step(memory)
        z = jnp.where(active[:, None], (memory.z + memory.step).astype(memory.z.dtype), memory.z)
        fz = f(z, u)
        step, bg = in_unit(memory, memory.step), self._multiply(steps, memory, in_unit(memory, wide(fz) - wide(z)))
        square, product = inner(step, step), inner(step, bg)
        denominator = square + product  # s^T B dg, where B dg = B g - B g_old = bg + s
        sound = active[:, None] & (jnp.abs(denominator) > jnp.finfo(bg.dtype).eps * (square + jnp.abs(product)))
        square, denominator = jnp.where(sound, square, 1), jnp.where(sound, denominator, 1)
        weights = memory.weights.at[memory.taken % len(steps)].set((sound / square)[:, 0])
        following = bg * (-square / denominator * memory.unit)
        return BroydenMemory(z, fz, memory.unit, following, steps, weights, memory.taken + 1)

    def multiply(self, memory: BroydenMemory, g: Array) -> Array:
        """``B g`` for vectors g [B, N]."""
        return self._multiply(self._with_next_step(memory), memory, g)

    def left_multiply(self, memory: BroydenMemory, w: Array) -> Array:
        """``w^T B`` for vectors w [B, N]."""
        steps, count = self._with_next_step(memory), self.count(memory)

        def apply(k: Array, w: Array) -> Array:
            step, following, weight = _pair(steps, memory, 1 + k)
            return w + step * (weight * inner(following, w))

        product: Array = lax.fori_loop(0, count, apply, -wide(w))
        return product

    def count(self, memory: BroydenMemory) -> Array | int:
        """How many pairs of consecutive steps the memory holds, the next step included."""
        return jnp.minimum(memory.taken, len(memory.steps) - 1)

    def reverse_mode(self) -> Broyden:
        """The same solver, with loops of static length; see `Solver`."""
        kind: Any = type(self)
        return _with_static_loops(kind)(**vars(self))

    def _multiply(self, steps: Array, memory: BroydenMemory, g: Array) -> Array:
        count = self.count(memory)

        def apply(k: Array, product: Array) -> Array:
            step, following, weight = _pair(steps, memory, count - k)
            return product + following * (weight * inner(step, product))

        product: Array = lax.fori_loop(0, count, apply, -wide(g))
        return product

    def _with_next_step(self, memory: BroydenMemory) -> Array:
        step = in_unit(memory, memory.step).astype(memory.steps.dtype)
        return memory.steps.at[memory.taken % len(memory.steps)].set(step)


def differentiable(solver: Any) -> Solver:
    """The solver in a form that JAX can differentiate in reverse mode; see `Solver`."""
    form: Solver = solver.reverse_mode() if hasattr(solver, "reverse_mode") else solver
    return form


@cache
def _with_static_loops(kind: Any) -> type[Broyden]:
    """The class, with loops over all places for pairs: those not filled do nothing.

    A product with B keeps only its input for the backward pass: its loop would keep a state for each pair.
    """

    def count(self: Broyden, memory: BroydenMemory) -> int:
        return len(memory.steps) - 1

    def multiply(self: Broyden, steps: Array, memory: BroydenMemory, g: Array) -> Array:
        product: Array = jax.checkpoint(partial(kind._multiply, self), prevent_cse=False)(steps, memory, g)
        return product

    return type(kind.__name__, (kind,), {"count": count, "_multiply": multiply, "reverse_mode": lambda self: self})


def _pair(steps: Array, memory: BroydenMemory, age: Array | int) -> tuple[Array, Array, Array]:
    """A step, the one after it, and the step's weight [B, 1]; at age 1 the one after it is the next step."""
    size, dtype = len(steps), memory.weights.dtype
    first, second = (memory.taken - age) % size, (memory.taken - age + 1) % size
    return steps[first].astype(dtype), steps[second].astype(dtype), memory.weights[first][:, None]
