"""An accelerator beside the CPU: the same numbers, and the cost of training steps.

    python -m benchmarks.accelerator --out runs/accelerator --minutes 5

Parity: logits, a phantom gradient and an implicit one of a small MDEQ, on the CPU and on the accelerator at each
precision of its matrix units. A relative difference beyond its bound is exit code 1. Cost: compile time, seconds of a
step, images a second and memory of PGD-AT and of its shorter attacks, for MDEQ-SMALL, LARGE and XL. A row that does not
begin within the minutes is left out, and the table says so. Without an accelerator all numbers are the CPU's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.pages import check_page, made, write_page
from configs.cifar import EPSILON
from deq_jax import Broyden, Dynamics, Equilibrium, Implicit, Phantom, TrainConfig
from deq_jax._cli import command_line, console, fail
from deq_jax.core import cross_entropy
from deq_jax.models import Classifier, mdeq
from deq_jax.storage import load_config, make_folder, write_json
from deq_jax.training import Batch, Phase, TrainState, train_step

GIGABYTE = 2**30
BOUNDS = {"float32": 1e-3, "tensorfloat32": 3e-2, "bfloat16": 2e-1}
"""The largest relative difference at each precision; Broyden's steps amplify rounding."""
COMPARED = ("logits", "phantom gradient", "implicit gradient")
ATTACKS = {
    "PGD-10": {},
    "PGD-3": {"steps": 3, "step_size": EPSILON / 2},
    "one step": {"steps": 1, "step_size": 1.25 * EPSILON},
}
Row = dict[str, Any]


class Work(NamedTuple):
    """A training step to measure: a config, its attack, and how its dynamics are computed."""

    config: str
    attack: str
    batch_size: int
    precision: str = "tensorfloat32"
    compute_dtype: str | None = None
    rematerialize: bool = False


def works(small: int, large: int) -> list[Work]:
    """The rows in the order of their use, with these batch sizes."""
    return [
        Work("cifar10_small_pgd_at", "PGD-3", small),
        Work("cifar10_small_pgd_at", "PGD-3", small, compute_dtype="bfloat16"),
        Work("cifar10_large_pgd_at", "PGD-3", large),
        Work("cifar10_large_pgd_at", "PGD-10", large),
        Work("cifar10_xl_pgd_at", "PGD-10", large, compute_dtype="bfloat16", rematerialize=True),
        Work("cifar10_large_pgd_at", "PGD-10", large, compute_dtype="bfloat16"),
        Work("cifar10_small_pgd_at", "one step", small),
        Work("cifar10_small_pgd_at", "PGD-3", small, precision="float32"),
        Work("cifar10_small_pgd_at", "PGD-10", small),
        Work("cifar10_large_pgd_at", "one step", large),
        Work("cifar10_large_pgd_at", "PGD-10", large, rematerialize=True),
        Work("cifar10_large_pgd_at", "PGD-10", large, precision="float32"),
        Work("cifar10_xl_pgd_at", "PGD-3", large, compute_dtype="bfloat16", rematerialize=True),
        Work("cifar10_xl_pgd_at", "PGD-10", large, rematerialize=True),
        Work("cifar10_xl_pgd_at", "one step", large, compute_dtype="bfloat16", rematerialize=True),
        Work("cifar10_xl_pgd_at", "PGD-10", large),
    ]


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the tables and writes JSON after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="no row begins later; default: 5")
    parser.add_argument("--rows", type=int, metavar="N", help="the first rows alone; default: all")
    parser.add_argument("--small", type=int, default=256, metavar="N", help="batch of MDEQ-SMALL; default: 256")
    parser.add_argument("--large", type=int, default=96, metavar="N", help="batch of LARGE and XL; default: 96")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="steps after the first; default: 5")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the tables")
    parser.add_argument("--parity", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    options = parser.parse_args(argv)
    end = time.monotonic() + 60 * options.minutes
    with command_line():
        check_page(options.page, "tables")
        make_folder(options.out)
        found: Row = {"made": [made()], "parity": parity() if options.parity else [], "cost": [], "left_out": []}
        for work in works(options.small, options.large)[: options.rows]:
            if time.monotonic() > end:
                found["left_out"].append(work._asdict())
            else:
                found["cost"].append(work._asdict() | cost(work, options.repeats))
            write_json(options.out / "accelerator.json", found)
        console.print(tables(found))
        if options.page:
            write_page(options.page, found, {"tables": tables(found)})
        names = [row["precision"] for row in found["parity"] if max(row[name] for name in COMPARED) > row["bound"]]
        if names:
            fail(f"the difference from the CPU is beyond its bound: {', '.join(names)}", 1)


def parity() -> list[Row]:
    """Relative differences between the accelerator at each precision and the CPU at full precision."""
    cpu = jax.devices("cpu")[0]
    expected = outcomes(cpu, "float32")
    rows = []
    for precision, bound in BOUNDS.items():
        got = outcomes(jax.devices()[0], precision)
        differences = {name: _relative(got[name], expected[name]) for name in expected}
        rows.append({"precision": precision, "bound": bound, **differences})
    return rows


def outcomes(device: jax.Device, precision: str) -> dict[str, np.ndarray]:
    """Flat arrays to compare, computed on a device: a small MDEQ of two branches, and images of 16x16."""
    dynamics = Dynamics(Broyden(4), gradient=Phantom(steps=2, damping=0.5))
    deq = Equilibrium(*mdeq(10, (16, 32), (8, 16), 64, expansion=2), dynamics=dynamics)
    exact = deq.with_dynamics(gradient=Implicit(Broyden(4)))
    x, labels = (jnp.asarray(part) for part in images(4, 16))

    def loss(model: Equilibrium, params: Any, rest: Any) -> jax.Array:
        return cross_entropy(model({"params": params, "batch_stats": rest}, x / 255.0).logits, labels).mean()

    def compared(state: TrainState) -> Row:
        params, rest = state.params, state.batch_stats
        return {
            "logits": deq(state.variables, x / 255.0).logits,
            "phantom gradient": jax.grad(lambda p: loss(deq, p, rest))(params),
            "implicit gradient": jax.grad(lambda p: loss(exact, p, rest))(params),
        }

    with jax.default_device(device), jax.default_matmul_precision(precision):
        found = jax.jit(compared)(jax.device_put(start(deq, optax.identity(), 16), device))
    return {name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(part)]) for name, part in found.items()}


def start(classifier: Classifier, optimizer: optax.GradientTransformation, size: int) -> TrainState:
    """The state before the first step, computed on the CPU so that it is the same everywhere."""
    with jax.default_device(jax.devices("cpu")[0]):
        variables = jax.jit(classifier.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
        params = variables["params"]
        state = TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))
        return cast(TrainState, jax.device_get(state))


def cost(work: Work, repeats: int) -> Row:
    """Seconds, images a second and memory of a training step."""
    config = configured(work)
    optimizer = config.optimizer.transformation(1000)
    x, labels = images(work.batch_size, 32)
    batch = jax.device_put(Batch(x, labels, np.arange(work.batch_size, dtype=np.int32)))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        after, metrics = train_step(config, optimizer, state, batch, steps=1000)
        return after, metrics["loss"]

    state = jax.device_put(start(config.classifier, optimizer, 32))
    with jax.default_matmul_precision(work.precision):
        began = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - began
    plan = compiled.memory_analysis()
    assert plan is not None, "XLA plans no memory on this device"
    memory = (plan.temp_size_in_bytes + plan.argument_size_in_bytes) / GIGABYTE
    found: Row = {"compile_seconds": round(compile_seconds, 2), "planned_gigabytes": round(memory, 3)}
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        try:
            state, loss = compiled(state, batch)
            finite = bool(np.isfinite(float(loss)))
        except jax.errors.JaxRuntimeError as error:  # most likely out of memory
            return found | {"failed": str(error).splitlines()[0]}
        seconds.append(time.perf_counter() - began)
    further = seconds[1:] or seconds
    median = statistics.median(further)
    speed = {"step_seconds": median, "spread": [min(further), max(further)], "finite": finite}
    return found | speed | {"images_per_second": round(work.batch_size / median, 1)}


def configured(work: Work) -> TrainConfig:
    """The config of a step beyond pre-training, without penalty."""
    config = load_config(f"configs/{work.config}.py", TrainConfig).during(Phase.PLAIN)
    dtype = None if work.compute_dtype is None else jnp.dtype(work.compute_dtype)
    deq = cast(Equilibrium, config.classifier).with_dynamics(compute_dtype=dtype, rematerialize=work.rematerialize)
    attack = replace(config.objective.attack, **ATTACKS[work.attack])
    return replace(config, classifier=deq, objective=replace(config.objective, attack=attack))


def images(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8, and labels."""
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(count, size, size, 3), dtype=np.uint8)
    return x, rng.integers(10, size=count, dtype=np.int32)


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def tables(found: Row) -> str:
    """Both tables, as Markdown: the differences from the CPU, beside the bound; and the cost of each step."""
    lines = [f"| precision | {' | '.join(COMPARED)} | bound |", "|---|---|---|---|---|"]
    for row in found["parity"]:
        differences = " | ".join(f"{row[name]:.1e}" for name in COMPARED)
        lines.append(f"| {row['precision']} | {differences} | {row['bound']:g} |")
    lines += ["", "| config | attack | batch | precision | compile (s) | step (s) | images/s | memory (GB) |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in found["cost"]:
        speed = ["failed"] * 2 if "failed" in row else [f"{row['step_seconds']:.3f}", f"{row['images_per_second']:.0f}"]
        lines.append(_line(row, [f"{row['compile_seconds']:.0f}", *speed, f"{row['planned_gigabytes']:.1f}"]))
    lines += [_line(row, ["left out"] * 4) for row in found["left_out"]]
    return "\n".join(lines)


def _line(row: Row, numbers: list[str]) -> str:
    how = ", ".join([row["compute_dtype"] or row["precision"], *(["rematerialised"] if row["rematerialize"] else [])])
    return f"| {' | '.join([row['config'], row['attack'], str(row['batch_size']), how, *numbers])} |"


if __name__ == "__main__":
    main()
