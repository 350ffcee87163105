"""Cost of a training step and a prediction of MDEQ-LARGE: compile time, seconds, memory.

    python benchmarks/steps.py --out runs/bench/steps.json

Batch 8 of random 32x32x3 images: one PGD-AT step (PGD-10) and one TRADES step of the CIFAR configs, and one
prediction. "cold" is the first call with an empty compilation cache, "warm" the first call of a new process with
that cache, both with tracing and one run; "run" is the median of the further calls.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from deq_jax import TrainConfig
from deq_jax._cli import command_line, console
from deq_jax.storage import load_config, make_folder, write_json
from deq_jax.training import Batch, Phase, TrainState, train_step

WORK = {"PGD-AT step": "cifar10_large_pgd_at", "TRADES step": "cifar10_large_trades", "prediction": None}


def main() -> None:
    """Measures each piece of work in two fresh processes, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/steps.json"), metavar="FILE")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="further calls; default: 3")
    parser.add_argument("--one", choices=list(WORK), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.batch_size, options.repeats)))
        return
    with command_line():
        make_folder(options.out.parent)
        rows = [row(name, options.batch_size, options.repeats) for name in WORK]
        device = jax.devices()[0].device_kind
        write_json(
            options.out, {"jax": jax.__version__, "device": device, "batch_size": options.batch_size, "rows": rows}
        )
        table = Table("work", "cold (s)", "warm (s)", "run (s)", "smallest", "largest", "process (GB)")
        for line in rows:
            numbers = ("cold", "warm", "run", "smallest", "largest", "process")
            table.add_row(line["work"], *(f"{line[key]:.2f}" for key in numbers))
        console.print(table)


def row(name: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Cold, then warm."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--one", name, "--batch-size", str(batch_size), "--repeats", str(repeats)]
        cold, warm = (
            json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
            for _ in range(2)
        )
    run = cold["run"] + warm["run"]
    spread = {"run": statistics.median(run), "smallest": min(run), "largest": max(run)}
    return {"work": name, "cold": cold["first"], "warm": warm["first"], **spread, "process": cold["process"]}


def measure(name: str, batch_size: int, repeats: int) -> dict[str, Any]:
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
    compiled = jax.jit(lambda state, batch: train_step(config, optimizer, state, batch))
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
    main()
