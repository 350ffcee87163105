"""Cost of input entropy reduction at inference, beside the ratio of cell evaluations: a part of benchmarks/speed.py.

An application of the cell counts as one evaluation, and so does a vector-Jacobian product of it with respect to the
input: undefended T + 1 by the solver and K + 1 by the phantom steps; defended T + 1 by the solver, and in each block
two for every update of the input and one for the corrected memory. Encoder and decoder count for nothing, though an
update runs them forwards and backwards. The parts of the cell that do not depend on the injection are computed once for
all updates of a block. Beside it, the undefended prediction over its encoder and as many bare cells: the share of
solver and decoder. Seconds are medians of alternating runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels import cells, compare
from benchmarks.pages import Row
from deq_jax import Broyden, Dynamics, EntropyReduced, Equilibrium, Phantom
from deq_jax.models import Variables, mdeq, small_deq

DYNAMICS = Dynamics(Broyden(8, tolerance=0), gradient=Phantom(steps=5, damping=0.5))
MODELS = {
    "digits": (small_deq(10, 12, DYNAMICS), (64, 8, 8, 1)),
    "small MDEQ": (
        Equilibrium(*mdeq(10, (8, 16, 32, 64), (4, 8, 16, 32), final_channels=64, expansion=2), DYNAMICS),
        (8, 32, 32, 3),
    ),
}
COLUMNS = {
    "ratio": "seconds",
    "smallest": "smallest",
    "largest": "largest",
    "evaluations": "cell evaluations",
    "excess": "seconds / evaluations",
    "overhead": "undefended / its bare cells",
}


def rows(repeats: int) -> list[Row]:
    """Each model."""
    return [measure(name, *model, repeats) for name, model in MODELS.items()]


def table(rows: list[Row]) -> str:
    """Ratios, as Markdown."""
    lines = [f"| model | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        lines.append(f"| {row['what']} | {' | '.join(f'{row[column]:.2f}' for column in COLUMNS)} |")
    return "\n".join(lines)


def measure(name: str, base: Equilibrium, shape: tuple[int, ...], repeats: int) -> Row:
    """Defended over undefended: seconds, and cell evaluations; undefended over its bare cells: seconds."""
    x = jax.random.uniform(jax.random.key(0), shape)
    variables = base.init(jax.random.key(1), x)
    defended, undefended = (partial(logits, classifier) for classifier in (EntropyReduced(base), base))
    row: Row = compare(name, defended, "undefended", undefended, (variables, x), repeats)
    counts = [evaluations(classifier, variables, x) for classifier in (EntropyReduced(base), base)]

    def bare(variables: Variables, x: jax.Array) -> Any:
        u = base.encode(variables, x)
        z = jax.tree.map(jnp.zeros_like, u.features)
        return cells(base.apply_cell, round(counts[1]), variables["params"]["cell"], z, u)

    overhead = compare("undefended", undefended, "bare cells", bare, (variables, x), repeats)["ratio"]
    ratio = counts[0] / counts[1]
    return row | {"evaluations": ratio, "excess": row["ratio"] / ratio, "overhead": overhead}


def evaluations(classifier: Any, variables: Any, x: jax.Array) -> float:
    """Cell evaluations of a prediction of the deployed predictor."""
    return float(jnp.mean(jax.jit(classifier)(variables, x).solution.evaluations))


def logits(classifier: Any, variables: Any, x: jax.Array) -> jax.Array:
    """Logits of the deployed predictor."""
    found: jax.Array = classifier(variables, x).logits
    return found
