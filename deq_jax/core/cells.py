"""The contract of a cell, checked wherever it is applied: f(z; u) is a state like z, and samples form one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from deq_jax.core.errors import require
from deq_jax.core.types import Array, Cell, FlatCell, Params, PyTree


def apply(cell: Cell, params: Params, z: PyTree, u: PyTree) -> PyTree:
    """f(z; u) in the dtypes of z, in whichever dtype the cell computes. An empty batch is returned unchanged.

    Args:
      cell: ``(params, z, u) -> z``.
      params: parameters of the cell.
      z: state, floating leaves [B, ...].
      u: injection, leaves [B, ...].

    Raises:
      InputError: a leaf of z or u is of another kind, or f(z; u) lacks the structure or the shapes of z.
    """
    if batch_size(z, u) == 0:
        return z
    new = cell(params, z, u)
    expected: Any = jax.tree.structure(z)
    structure: Any = jax.tree.structure(new)
    require(structure == expected, f"cell: expected a state of structure {expected}, as z has, got {structure}")
    return jax.tree.map(_conform, _named(new), z, new)


def batch_size(z: PyTree, u: PyTree = None) -> int:
    """How many samples the state z, and the injection u, hold; see `apply`."""
    states = tree_leaves_with_path(z)
    require(len(states) > 0, f"state: expected floating arrays [B, ...], got {jax.tree.structure(z)}")
    for path, leaf in states:
        name, shape, dtype = f"state{keystr(path)}", jnp.shape(leaf), jnp.result_type(leaf)
        require(jnp.issubdtype(dtype, jnp.floating), f"{name}: expected a floating dtype, got {dtype}")
        require(len(shape) > 0, f"{name}: expected a batch axis, got a scalar")
    shapes = [jnp.shape(leaf) for _, leaf in states]
    require(len({shape[0] for shape in shapes}) == 1, f"state leaves need one common batch size, got {shapes}")
    size = shapes[0][0]
    for path, leaf in tree_leaves_with_path(u):
        message = f"injection{keystr(path)}: expected a batch of {size}, as the state is, got shape {jnp.shape(leaf)}"
        require(jnp.shape(leaf)[:1] == (size,), message)
    return size


def flat_cell(cell: Cell, params: Params, z0: PyTree) -> tuple[FlatCell, Array, Callable[[Array], PyTree]]:
    """The input of a solver: ``f(z, u)`` over flat states, z0 as a flat state [B, N], and the way back."""
    unravel = _unraveler(z0)
    return lambda z, u: ravel(apply(cell, params, unravel(z), u)), ravel(z0), unravel


def ravel(tree: PyTree) -> Array:
    """One vector per sample [B, N]."""
    parts = [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(parts, axis=1)


def _unraveler(tree: PyTree) -> Callable[[Array], PyTree]:
    """The way back from one vector per sample [B, N], in the dtypes of the tree."""
    batch_size(tree)
    leaves = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    kinds = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    sizes = [math.prod(shape) for shape, _ in kinds]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]

    def unravel(flat: Array) -> PyTree:
        parts = jnp.split(flat, ends, axis=1)
        shaped = [
            part.reshape(part.shape[0], *shape).astype(dtype) for part, (shape, dtype) in zip(parts, kinds, strict=True)
        ]
        return structure.unflatten(shaped)

    return unravel


def _named(tree: PyTree) -> PyTree:
    """The tree, with its leaves' names as leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: f"f(z){keystr(path)}", tree)


def _conform(name: str, old: Any, new: Any) -> Array:
    shape, dtype = jnp.shape(new), jnp.result_type(new)
    require(shape == jnp.shape(old), f"cell: {name}: expected shape {jnp.shape(old)}, as z has, got {shape}")
    require(jnp.issubdtype(dtype, jnp.floating), f"cell: {name}: expected a floating dtype, got {dtype}")
    return jnp.asarray(new, jnp.result_type(old))
