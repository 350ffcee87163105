"""Cost of a training step and a prediction of MDEQ-LARGE: a part of benchmarks/speed.py.

Batch 8 of random 32x32x3 images: one PGD-AT step (PGD-10) and one TRADES step of the CIFAR configs, and one
prediction. "cold" is the first call with an empty compilation cache, "warm" the first call of a new process with
that cache, both with tracing and one run; "run" is the median of the further calls.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pages import Row
from deq_jax import TrainConfig
from deq_jax.storage import load_config
from deq_jax.training import Batch, Phase, TrainState, train_step

WORK = {"PGD-AT step": "cifar10_large_pgd_at", "TRADES step": "cifar10_large_trades", "prediction": None}


def rows(repeats: int, batch_size: int = 8) -> list[Row]:
    """Each piece of work, in two fresh processes: cold, then warm."""
    return [{"work": name, "batch_size": batch_size, **row(name, batch_size, repeats)} for name in WORK]


def row(name: str, batch_size: int, repeats: int) -> Row:
    """Seconds of the first calls, median and range of the further ones, gigabytes of the process."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        cold, warm = (
            json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for count in (repeats // 2, repeats - repeats // 2)
            for command in [[sys.executable, "-m", "benchmarks.steps", name, str(batch_size), str(count)]]
        )
    run = cold["run"] + warm["run"]
    spread = {"run": statistics.median(run), "smallest": min(run), "largest": max(run)}
    return {"cold": cold["first"], "warm": warm["first"], **spread, "process": cold["process"]}


def table(rows: list[Row]) -> str:
    """One line per piece of work, as Markdown."""
    lines = ["| work | batch | cold (s) | warm (s) | run (s) | process (GB) |", "|---|---|---|---|---|---|"]
    for row in rows:
        run = f"{row['run']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})"
        numbers = f"{row['cold']:.1f} | {row['warm']:.1f} | {run} | {row['process']:.1f}"
        lines.append(f"| {row['work']} | {row['batch_size']} | {numbers} |")
    return "\n".join(lines)


def measure(name: str, batch_size: int, repeats: int) -> Row:
    """Seconds of the first call and of the further ones, and the largest size of this process in gigabytes."""
    call = prediction(batch_size) if name == "prediction" else step(f"configs/{WORK[name]}.py", batch_size)
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        value = float(call())
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(value):
            raise RuntimeError(f"{name}: not finite")
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"first": seconds[0], "run": seconds[1:], "process": size}


def step(path: str, batch_size: int) -> Callable[[], jax.Array]:
    """One training step of a config, beyond its pre-training; returns its loss."""
    config = load_config(path, TrainConfig)
    optimizer = config.optimizer.transformation(1000)
    x, labels = images(batch_size)
    variables = jax.jit(config.classifier.init)(jax.random.key(0), x)
    params = variables["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))
    batch = Batch(x, labels, jnp.arange(batch_size))
    config = config.during(Phase.PLAIN)  # a step without Jacobian penalty
    compiled = jax.jit(lambda state, batch: train_step(config, optimizer, state, batch, steps=1000))
    return lambda: compiled(state, batch)[1]["loss"]


def prediction(batch_size: int) -> Callable[[], jax.Array]:
    """The deployed prediction; returns the sum of the logits."""
    classifier = load_config("configs/cifar10_large_pgd_at.py", TrainConfig).classifier
    x, _ = images(batch_size)
    variables = jax.jit(classifier.init)(jax.random.key(0), x)
    compiled = jax.jit(lambda variables, x: classifier(variables, x).logits)
    return lambda: compiled(variables, x).sum()


def images(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels."""
    rng = np.random.default_rng(0)
    return rng.uniform(size=(batch_size, 32, 32, 3)).astype(np.float32), rng.integers(10, size=batch_size)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
