"""Memory of a training step of the CIFAR configs, as the compiler plans it; nothing is run.

    python benchmarks/memory.py --out runs/bench/memory.json

Compiled for this machine's default device. "step" is a whole PGD-AT or TRADES step; "state" are parameters, batch
statistics and Adam's moments; "per image" is the rest divided by the batch.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from rich.table import Table

from deq_jax import Equilibrium, TrainConfig
from deq_jax._cli import command_line, console
from deq_jax.storage import load_config, make_folder, write_json
from deq_jax.training import Batch, Phase, TrainState, train_step

GIGABYTE = 2**30
SETTINGS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "rematerialize": {"rematerialize": True},
    "rematerialize, bfloat16": {"rematerialize": True, "compute_dtype": jnp.bfloat16},
}


def main() -> None:
    """Compiles, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/memory.json"), metavar="FILE")
    parser.add_argument("--configs", nargs="+", default=["cifar10_large_pgd_at", "cifar10_xl_pgd_at"], metavar="NAME")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[96], metavar="N")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="parts of each batch; default: 1")
    options = parser.parse_args()
    with command_line():
        make_folder(options.out.parent)
        rows = []
        table = Table("config", "setting", "batch", "step (GB)", "state (GB)", "per image (MB)")
        for name in options.configs:
            for setting, changes in SETTINGS.items():
                for batch_size in options.batch_sizes:
                    base = load_config(f"configs/{name}.py", TrainConfig)
                    config = with_settings(base, changes, batch_size, options.accumulate)
                    row = {"config": name, "setting": setting, "batch": batch_size, **planned_memory(config)}
                    rows.append(row)
                    per_image = (row["step"] - row["state"]) / batch_size * 1024
                    numbers = f"{row['step']:.2f}", f"{row['state']:.2f}", f"{per_image:.1f}"
                    table.add_row(name, setting, str(batch_size), *numbers)
                    write_json(options.out, {"device": jax.devices()[0].device_kind, "rows": rows})
        console.print(table)


def with_settings(config: TrainConfig, changes: dict[str, Any], batch_size: int, accumulate: int) -> TrainConfig:
    """The config with other dynamics and another batch."""
    classifier = cast(Equilibrium, config.classifier).with_dynamics(**changes)
    return replace(config, classifier=classifier, batch_size=batch_size, accumulate=accumulate)


def planned_memory(config: TrainConfig) -> dict[str, float]:
    """Gigabytes of a training step, whole and of its state alone."""
    optimizer = config.optimizer.transformation(1000)
    x = jax.ShapeDtypeStruct((config.batch_size, 32, 32, 3), jnp.uint8)
    label = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)

    def initial() -> TrainState:
        variables = config.classifier.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        params = variables["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(config.during(Phase.PLAIN), optimizer, state, batch)

    state = jax.eval_shape(initial)
    plan = jax.jit(step, donate_argnums=0).lower(state, Batch(x, label, label)).compile().memory_analysis()
    assert plan is not None, "XLA plans no memory on this device"
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    whole = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {"step": whole / GIGABYTE, "state": size / GIGABYTE}


if __name__ == "__main__":
    main()
