"""Memory of a training step of the CIFAR configs, as the compiler plans it: a part of benchmarks/speed.py.

Nothing is run. Compiled for this machine's default device. "step" is a whole training step; "state" are parameters,
batch statistics and Adam's moments; "an image" is the rest divided by the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from benchmarks.pages import Row
from deq_jax import Equilibrium, TrainConfig
from deq_jax.storage import load_config
from deq_jax.training import Batch, Phase, TrainState, train_step

GIGABYTE = 2**30
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "as configured": ({}, True),
    "as configured, the old state kept": ({}, False),
    "`rematerialize`": ({"rematerialize": True}, True),
}
"""Changed dynamics, and whether the step may overwrite the state that it is given, as the training loop lets it."""


def rows(configs: tuple[str, ...] = ("cifar10_large_pgd_at", "cifar10_xl_pgd_at"), batch_size: int = 96) -> list[Row]:
    """Each config with each setting."""
    found = []
    for name in configs:
        for setting, (changes, donate) in SETTINGS.items():
            base = load_config(f"configs/{name}.py", TrainConfig)
            classifier = cast(Equilibrium, base.classifier).with_dynamics(**changes)
            config = replace(base, classifier=classifier, batch_size=batch_size)
            planned = planned_memory(config, donate)
            found.append({"config": name, "setting": setting, "batch_size": batch_size, **planned})
    return found


def table(rows: list[Row]) -> str:
    """Gigabytes of each step, as Markdown."""
    lines = ["| config | setting | batch | step (GB) | state (GB) | an image (MB) |", "|---|---|---|---|---|---|"]
    for row in rows:
        image = (row["step"] - row["state"]) / row["batch_size"] * 1024
        numbers = f"{row['step']:.2f} | {row['state']:.2f} | {image:.1f}"
        lines.append(f"| `{row['config']}` | {row['setting']} | {row['batch_size']} | {numbers} |")
    return "\n".join(lines)


def planned_memory(config: TrainConfig, donate: bool = True) -> dict[str, float]:
    """Gigabytes of a training step, whole and of its state alone.

    Args:
      config: the training's config.
      donate: whether the step may overwrite the state.
    """
    optimizer = config.optimizer.transformation(1000)
    x = jax.ShapeDtypeStruct((config.batch_size, 32, 32, 3), jnp.uint8)
    label = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)

    def initial() -> TrainState:
        variables = config.classifier.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        params = variables["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(config.during(Phase.PLAIN), optimizer, state, batch, steps=1000)

    state = jax.eval_shape(initial)
    compiled = jax.jit(step, donate_argnums=0 if donate else ()).lower(state, Batch(x, label, label)).compile()
    whole = planned_bytes(compiled)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return {"step": whole / GIGABYTE, "state": size / GIGABYTE}


def planned_bytes(program: Any) -> int:
    """Bytes of a compiled program on one device: arguments, results and all that lies between."""
    plan = program.memory_analysis()
    assert plan is not None, "XLA plans no memory on this device"
    whole = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    return int(whole - plan.alias_size_in_bytes)
