"""Cost of the solvers beside the cell, and of the convolution's gradients inside a loop: parts of benchmarks/speed.py.

Solvers: seconds of `solve` with 8 steps, all states kept, over seconds of 9 applications of the bare cell: the small
one (32 channels, 16x16, expansion 2, batch 32) and the cell of MDEQ-LARGE (32x32 images, batch 8). Convolutions: XLA's
own gradients over this project's, in `lax.scan`, batch 8. Medians of alternating runs, with the smallest and
largest ratio of a pair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from benchmarks.pages import Row
from deq_jax import Anderson, Broyden, FixedPoint, solve
from deq_jax.core import Cell, Injection, Solver
from deq_jax.core.solvers import jaxopt
from deq_jax.core.types import Params, PyTree
from deq_jax.models import SmallCell, mdeq_large
from deq_jax.models.convolution import loop_conv_gradients, native_conv_gradients

STEPS, BATCH, SIZE, CHANNELS = 8, 32, 16, 32

Gradients = tuple[jax.Array, jax.Array]
"""Gradients of a convolution: by its images, by its kernel."""

CONVOLUTIONS = [(32, 160, 32, 1), (160, 32, 32, 1), (32, 64, 32, 2), (128, 640, 8, 1)]  # in, out, side, stride


def solver_rows(repeats: int) -> list[Row]:
    """Each solver on both cells, and jaxopt's Broyden under vmap on the small one, against bare applications."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, CHANNELS)), jnp.float32)
    images = jnp.asarray(rng.uniform(size=(8, 32, 32, 3)), jnp.float32)
    encoder, large, _ = mdeq_large(num_classes=10)
    injection = encoder.init_with_output(jax.random.key(0), images)[0]
    rows = []
    for name, cell, u in (("small", SmallCell(CHANNELS), Injection(features)), ("LARGE", large, injection)):
        z = jax.tree.map(jnp.zeros_like, u.features)
        params = cell.init(jax.random.key(1), z, u)

        bare = partial(cells, cell.apply, STEPS + 1)

        def kept(params: Params, z: PyTree, u: PyTree, cell: nn.Module = cell) -> tuple[PyTree, PyTree]:
            return lax.scan(lambda z, _: (cell.apply(params, z, u), z), z, length=STEPS + 1)

        def ours(
            solver: Solver, params: Params, z: PyTree, u: PyTree, cell: nn.Module = cell
        ) -> tuple[PyTree, PyTree, jax.Array]:
            solution = solve(solver, cell.apply, params, z, u)
            return solution.z, solution.states, solution.residuals

        kernels: dict[str, Callable[..., PyTree]] = {"the cells, each state kept": kept}
        kernels |= {
            type(solver).__name__: partial(ours, solver)
            for solver in (FixedPoint(STEPS, tolerance=0), Anderson(STEPS, tolerance=0), Broyden(STEPS, tolerance=0))
        }
        if name == "small":
            kernels["jaxopt.Broyden under vmap"] = partial(vmapped_jaxopt, cell)
        for kernel, function in kernels.items():
            against = f"{STEPS + 1} {name} cells"
            rows.append(compare(kernel, function, against, bare, (params, z, u), repeats))
    return rows


def cells(apply: Cell, count: int, params: Params, z: PyTree, u: PyTree) -> PyTree:
    """Bare applications of the cell, one after the other."""
    return lax.scan(lambda z, _: (apply(params, z, u), None), z, length=count)[0]


def jaxopt_broyden(f: Callable[[jax.Array], jax.Array]) -> Any:
    """jaxopt.Broyden for the fixed point of f."""
    return jaxopt.Broyden(lambda z: f(z) - z, gamma=-1.0, stepsize=1.0, history_size=STEPS)


def jaxopt_anderson(f: Callable[[jax.Array], jax.Array]) -> Any:
    """jaxopt.AndersonAcceleration for the fixed point of f."""
    return jaxopt.AndersonAcceleration(f, history_size=6)


def vmapped_jaxopt(
    cell: nn.Module, params: Params, z: PyTree, u: Injection, make: Callable[..., Any] = jaxopt_broyden
) -> PyTree:
    """All iterates of a solver of jaxopt, one sample at a time under vmap."""

    def single(z: PyTree, u: Injection) -> jax.Array:
        start, unravel = ravel_pytree(z)

        def apply(flat: jax.Array) -> jax.Array:
            batch_of_one = jax.tree.map(lambda leaf: leaf[None], (unravel(flat), u))
            return ravel_pytree(cell.apply(params, *batch_of_one))[0]

        solver = make(apply)

        def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], jax.Array]:
            z, state = solver.update(*carry)
            return (z, state), z

        return lax.scan(step, (start, solver.init_state(start)), length=STEPS)[1]

    return jax.vmap(single)(z, u)


def convolution_rows(repeats: int) -> list[Row]:
    """XLA's convolution gradients against this project's, three times in a scan."""
    rows = []
    rng = np.random.default_rng(0)
    for channels, features, side, stride in CONVOLUTIONS:
        strides, padding = (stride, stride), ((1, 1), (1, 1))
        arrays = [
            jnp.asarray(rng.normal(size=shape), jnp.float32)
            for shape in (
                (8, side, side, channels),
                (3, 3, channels, features),
                (8, side // stride, side // stride, features),
            )
        ]

        def in_scan(
            gradients: Callable[..., Gradients],
            x: jax.Array,
            kernel: jax.Array,
            dy: jax.Array,
            strides: tuple[int, int] = strides,
            padding: tuple[tuple[int, int], tuple[int, int]] = padding,
        ) -> Gradients:
            def add(carry: Gradients, _: None) -> tuple[Gradients, None]:
                dx, dkernel = gradients(strides, padding, carry[0], kernel, dy)
                return (carry[0] + 1e-3 * dx, carry[1] + dkernel), None

            return lax.scan(add, (x, jnp.zeros_like(kernel)), length=3)[0]

        native, ours = partial(in_scan, native_conv_gradients), partial(in_scan, loop_conv_gradients)
        name = f"3x3 stride {stride}, {channels} to {features} at {side}x{side}"
        rows.append(compare(name, native, "loop_conv_gradients", ours, arrays, repeats))
    return rows


def solver_table(rows: list[Row]) -> str:
    """The ratio of each solver to bare cells, as Markdown."""
    lines = ["| solver | over | ratio |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row['what']} | {row['against']} | {shown(row)} |" for row in rows)])


def convolution_table(rows: list[Row]) -> str:
    """The ratio of XLA's gradients to this project's, as Markdown."""
    lines = ["| convolution | ratio |", "|---|---|"]
    return "\n".join([*lines, *(f"| {row['what']} | {shown(row, 1)} |" for row in rows)])


def shown(row: Row, digits: int = 2) -> str:
    """A ratio and its range."""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(row["ratio"], row["smallest"], row["largest"], d=digits)


def compare(
    what: str,
    function: Callable[..., PyTree],
    against: str,
    baseline: Callable[..., PyTree],
    arguments: Sequence[PyTree],
    repeats: int,
) -> Row:
    """Ratio of seconds, from alternating runs."""
    compiled = [jax.jit(function), jax.jit(baseline)]
    times = [[seconds(run, arguments) for run in compiled] for _ in range(repeats + 1)][1:]  # the first compiles
    ratios = [a / b for a, b in times]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    row = {"what": what, "against": against, "ratio": medians[0] / medians[1], "seconds": medians}
    return row | {"smallest": min(ratios), "largest": max(ratios)}


def seconds(run: Callable[..., PyTree], arguments: Sequence[PyTree]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - started
