"""Regularisers and diagnostics of the cell's Jacobian ``J = df/dz`` at a state, by vector-Jacobian products."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.types import Array, Cell, Keys, Params, PyTree


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
