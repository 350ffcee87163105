"""Regularisers and diagnostics of the cell's Jacobian ``J = df/dz`` at a state, by vector-Jacobian products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.types import Array, Cell, Keys, Params, PyTree, require

PROBES = 29  # purpose of a forward pass's randomness, beside dropout and readout


@dataclass(frozen=True)
class JacobianRegularization:
    """Penalty ``weight * ||J||_F^2 / N`` on randomly drawn training steps, N the state's size.

    Attributes:
      weight: of the penalty.
      probability: with which a training step is penalised.
      epochs: after which no step is penalised any more.
      probes: Gaussian vectors of Hutchinson's estimate.
      fewer, more: a penalised training pass reads out the state after T - fewer .. T + more solver steps,
        drawn at random, where it would have read out the final one.

    References: Bai et al. 2021, eq. 6 and section 4.2.
    """

    weight: float = 0.4
    probability: float = 0.02
    epochs: int = 90
    probes: int = 2
    fewer: int = 2
    more: int = 1

    def __post_init__(self):
        require(self.weight >= 0, f"JacobianRegularization: weight must be >= 0, got {self.weight!r}")
        valid = 0 <= self.probability <= 1
        require(valid, f"JacobianRegularization: probability must be in [0, 1], got {self.probability!r}")
        require(self.probes >= 1, f"JacobianRegularization: probes must be >= 1, got {self.probes!r}")
        counts = self.epochs >= 0 and self.fewer >= 0 and self.more >= 0
        require(counts, f"JacobianRegularization: epochs, fewer and more must be >= 0, got {self}")

    def is_drawn(self, seed: int, step: int, epoch: int) -> bool:
        """Whether training step `step`, in epoch `epoch` (both from 0), is penalised."""
        return epoch < self.epochs and np.random.default_rng((seed, step, PROBES)).random() < self.probability

    def penalty(self, cell: Cell, params: Params, u: PyTree, z: PyTree, keys: Keys) -> Array:
        """The penalty of each image, [B]; see `jacobian_norm`."""
        probes = gaussian_probes(keys.fold(PROBES), z, self.probes)
        return self.weight * jacobian_norm(cell, params, u, z, probes)


def gaussian_probes(keys: Keys, z: PyTree, count: int = 2) -> PyTree:
    """Standard normal probes ``[count, B, ...]``, shaped like z, each image's own.

    Args:
      keys: one per image.
      z: state, leaves [B, ...].
      count: number of probes.
    """
    leaves, structure = jax.tree.flatten(z)

    def draw(number: int, leaf: Array) -> Array:
        shape = (count, *leaf.shape[1:])
        return keys.fold(number).draw(lambda key: jax.random.normal(key, shape, leaf.dtype)).swapaxes(0, 1)

    return jax.tree.unflatten(structure, [draw(number, leaf) for number, leaf in enumerate(leaves)])


def jacobian_norm(cell: Cell, params: Params, u: PyTree, z: PyTree, probes: PyTree) -> Array:
    """Hutchinson's estimate of ``||J||_F^2 / N`` per sample, N the state's size.

    Args:
      cell: ``(params, z, u) -> z``.
      params: of the cell; differentiable.
      u: injection, leaves [B, ...]; differentiable.
      z: state at which J is taken, leaves [B, ...]; carries no gradient.
      probes: leaves [count, B, ...], standard normal.

    Returns:
      [B], the mean over the probes of ``||v^T J||^2 / N``; its expectation is the estimated quantity.

    References: Bai et al. 2021, eq. 6.
    """
    vjp = jax.vjp(lambda z: cell(params, z, u), lax.stop_gradient(z))[1]
    products = jax.vmap(lambda v: vjp(v)[0])(probes)
    size = sum(leaf[0].size for leaf in jax.tree.leaves(z))
    return jnp.mean(jax.vmap(_dot)(products, products), axis=0) / size


def spectral_radius(cell: Cell, params: Params, u: PyTree, z: PyTree, v: PyTree, steps: int) -> tuple[Array, PyTree]:
    """Estimates the largest eigenvalue modulus of J, per sample, by power iteration on J^T.

    Args:
      cell: ``(params, z, u) -> z``.
      params: of the cell.
      u: injection, leaves [B, ...].
      z: state at which J is taken, leaves [B, ...].
      v: start vector, leaves [B, ...], not zero.
      steps: number of iterations.

    Returns:
      ``[steps, B]``, after each iteration ``|v^T J v| / v^T v`` with the vector v before it (a complex
      dominant pair shows as estimates that do not settle); and the last vector, of norm 1.
    """
    vjp = jax.vjp(lambda z: cell(params, z, u), z)[1]

    def step(v, _):
        w = vjp(v)[0]
        estimate = jnp.abs(_dot(w, v)) / _dot(v, v)
        return jax.tree.map(partial(_scale, lax.rsqrt(_dot(w, w))), w), estimate

    v, estimates = lax.scan(step, v, length=steps)
    return estimates, v


def _dot(a: PyTree, b: PyTree) -> Array:
    """Inner product per sample, [B]."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y, axis=tuple(range(1, x.ndim))), a, b)
    return jax.tree.reduce(jnp.add, products)


def _scale(factor: Array, leaf: Array) -> Array:
    return leaf * factor.reshape(-1, *[1] * (leaf.ndim - 1))
