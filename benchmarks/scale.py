"""From one device to many, on paper: bytes that devices exchange, memory of each, and the time of an epoch.

    python -m benchmarks.scale --out runs/bench/scale.json

Compiles a training step of a small DEQ for simulated devices, and sums the results of its all-reduces. Traces steps of
MDEQ-LARGE and -XL, counts their multiplications and additions (a compiler counts the body of a loop once), and scales a
step that was measured on a GPU by published peaks. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import planned_bytes
from benchmarks.pages import check_page, made, write_page
from deq_jax import TrainConfig
from deq_jax._cli import command_line, console
from deq_jax.parallel import AXIS
from deq_jax.storage import load_config, make_folder, read_json, write_json
from deq_jax.training import Batch, Phase, TrainState, train_step

Row = dict[str, Any]

COUNTS = (1, 8, 64, 256)  # devices
IMAGES, EPOCHS, BATCH = 45_000, 220, 96  # images of an epoch of CIFAR, epochs of the recipe, images of a device
MEASURED = Path("docs/results/accelerator.json"), "cifar10_large_pgd_at", "PGD-3"  # a step of LARGE on an H100
PEAK = 494.7e12  # operations a second of an H100 SXM in tensorfloat32, without sparsity
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


class Machine(NamedTuple):
    """Published figures of a machine."""

    name: str
    chips: int
    peak: float  # operations a second of a chip, in the default precision of matrix products of float32
    link: float  # bytes a second that a chip sends to the next one


MACHINES = (
    Machine("v4-8", 4, 275e12, 50e9),  # bfloat16; one link of the torus
    Machine("v5e-8", 8, 197e12, 50e9),  # bfloat16; one link of the torus
    Machine("8 x A100", 8, 156e12, 300e9),  # tensorfloat32; NVLink, 600 GB/s in both directions
    Machine("8 x H100", 8, PEAK, 450e9),  # NVLink, 900 GB/s in both directions
)


def main(argv: list[str] | None = None) -> None:
    """Compiles and traces, prints the tables and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scale.json"), metavar="FILE")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the tables")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.devices:
        print(json.dumps(compiled(options.devices)))
        return
    with command_line():
        check_page(options.page, "tables")
        make_folder(options.out.parent)
        found: Row = {"made": [made("compiled and traced")], "compiled": [in_process(count) for count in COUNTS]}
        found["steps"] = [traced("LARGE", "PGD-3", 3), traced("LARGE", "PGD-10", 10), traced("XL", "PGD-10", 10)]
        found |= {"share_of_peak": share_of_peak(found["steps"][0]), "epochs": []}
        for step in found["steps"][1:]:
            found["epochs"] += [epoch(step, machine, found["share_of_peak"]) for machine in MACHINES]
        write_json(options.out, found)
        console.print(tables(found))
        if options.page:
            write_page(options.page, found, {"tables": tables(found)})


def in_process(devices: int) -> Row:
    """`compiled` in a process with so many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "benchmarks.scale", "--devices", str(devices)]
    run = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True, stdout=subprocess.PIPE, text=True)
    found: Row = json.loads(run.stdout.splitlines()[-1])
    return found


def compiled(devices: int) -> Row:
    """Bytes of the all-reduces of a step that is compiled for all devices, and memory of one device."""
    config = replace(load_config("configs/digits_pgd_at.py", TrainConfig), pretrain_steps=0)
    state, batch = shapes(config, (8, 8, 1), (devices, config.batch_size))
    program = mapped(config).lower(state, batch).compile()
    results = reduced(program.as_text())
    return {
        "devices": devices,
        "all_reduces": len(results),
        "bytes": sum(results),
        "traced_bytes": work(jax.make_jaxpr(mapped(config))(state, batch).jaxpr)["bytes"] if devices == 1 else None,
        "parameters": size_of(state.params),
        "memory": planned_bytes(program),
    }


def reduced(text: str) -> list[int]:
    """Bytes of the result of each all-reduce in a compiled program."""
    lines = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = [re.findall(r"(\w+)\[([\d,]*)\]", line) for line in lines]
    return [sum(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in one) for one in shapes]


def mapped(config: TrainConfig) -> Any:
    """The step on all devices, as `parallel.replicate_and_split` makes it."""
    optimizer = config.optimizer.transformation(1000)
    step = partial(train_step, config.during(Phase.PLAIN), optimizer, axis_name=AXIS, steps=1000)
    return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None)


def shapes(config: TrainConfig, image: tuple[int, ...], batch: tuple[int, ...]) -> tuple[TrainState, Batch]:
    """Shapes of the state and of a batch."""

    def initial() -> TrainState:
        variables = config.classifier.init(jax.random.key(0), jnp.zeros((1, *image)))
        params, optimizer = variables["params"], config.optimizer.transformation(1000)
        return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))

    labels = jax.ShapeDtypeStruct(batch, np.int32)
    return jax.eval_shape(initial), Batch(jax.ShapeDtypeStruct((*batch, *image), np.float32), labels, labels)


def size_of(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def traced(model: str, attack: str, steps: int) -> Row:
    """Operations of a step, and bytes that it reduces over the devices, from its trace."""
    config = load_config(f"configs/cifar10_{model.lower()}_pgd_at.py", TrainConfig)
    attacked = replace(config.objective, attack=replace(config.objective.attack, steps=steps))
    state, batch = shapes(config, (32, 32, 3), (1, BATCH))
    found = work(jax.make_jaxpr(mapped(replace(config, objective=attacked)))(state, batch).jaxpr)
    row = {"model": model, "attack": attack, "parameters": size_of(state.params)}
    return row | {"operations": found["operations"], "bytes": found["bytes"]}


def work(jaxpr: Any) -> Counter[str]:
    """Operations of matrix products and convolutions, and bytes that are reduced over devices, loops included."""
    total: Counter[str] = Counter()
    choices = set()  # variables that choose by platform
    for equation in jaxpr.eqns:
        name, times = equation.primitive.name, 1
        parts = [work(part) for part in _inside(equation)]
        if name == "platform_index":
            choices.update(equation.outvars)
        elif name == "cond":  # of platforms the last one is any accelerator; of branches the longest counts
            by_platform = any(variable in choices for variable in _names(equation.invars[:1]))
            parts = parts[-1:] if by_platform else [max(parts, key=lambda part: part["operations"])]
        elif name == "scan":
            times = equation.params["length"]
        elif name == "while" and any(part["operations"] for part in parts):
            raise ValueError("a loop without a fixed number of steps multiplies matrices")
        elif name in ("dot_general", "conv_general_dilated"):
            total["operations"] += _operations(equation)
        elif name.startswith(("psum", "pmax")):
            total["bytes"] += sum(size_of(variable.aval) for variable in equation.outvars)
        for part in parts:
            total.update({key: times * value for key, value in part.items()})
    return total


def _names(variables: Any) -> list[Any]:
    return [variable for variable in variables if not hasattr(variable, "val")]  # no literals


def _inside(equation: Any) -> Iterator[Any]:
    """The programs within an operation."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "jaxpr") or hasattr(part, "eqns"):
                yield getattr(part, "jaxpr", part)


def _operations(equation: Any) -> int:
    """Multiplications and additions, each counted as one."""
    first, second = (variable.aval.shape for variable in equation.invars[:2])
    results: int = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        return 2 * results * int(math.prod(first[axis] for axis in equation.params["dimension_numbers"][0][0]))
    outputs: int = second[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * results * int(math.prod(second)) // outputs


def share_of_peak(step: Row) -> float:
    """Share of the GPU's peak that the measured step reaches."""
    path, config, attack = MEASURED
    rows = [row for row in read_json(path)["cost"] if (row["config"], row["attack"]) == (config, attack)]
    seconds = next(row["step_seconds"] for row in rows if row["batch_size"] == BATCH and row["compute_dtype"] is None)
    return float(step["operations"] / seconds / PEAK)


def epoch(step: Row, machine: Machine, share: float) -> Row:
    """Seconds of an epoch at the same share of the peak, and of its all-reduces in a ring."""
    computing = step["operations"] / BATCH * IMAGES / (machine.chips * machine.peak * share)
    steps = IMAGES // (BATCH * machine.chips)
    sent = 2 * (machine.chips - 1) / machine.chips * step["bytes"]
    return {
        "model": step["model"],
        "machine": machine.name,
        "computing": computing,
        "exchanging": steps * sent / machine.link,
        "run_hours": EPOCHS * (computing + steps * sent / machine.link) / 3600,
    }


def tables(found: Row) -> str:
    """All tables, as Markdown."""
    lines = ["| devices | all-reduces | MB reduced in a step | parameters (MB) | MB sent by a device | MB of memory |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found["compiled"]:
        sent = 2 * (row["devices"] - 1) / row["devices"] * row["bytes"]
        sizes = [f"{value / 1e6:.4f}" for value in (row["bytes"], row["parameters"], sent)]
        lines.append(f"| {row['devices']} | {row['all_reduces']} | {' | '.join(sizes)} | {row['memory'] / 1e6:.1f} |")
    lines += [
        "",
        "| model | attack | parameters (MB) | MB reduced in a step | TFLOP of a step |",
        "|---|---|---|---|---|",
    ]
    for row in found["steps"]:
        sizes = [f"{row[name] / 1e6:.1f}" for name in ("parameters", "bytes")]
        lines.append(f"| {row['model']} | {row['attack']} | {' | '.join(sizes)} | {row['operations'] / 1e12:.2f} |")
    lines += ["", "| model | machine | epoch (s) | exchange in it (s) | 220 epochs (h) |", "|---|---|---|---|---|"]
    for row in found["epochs"]:
        seconds = f"{row['computing'] + row['exchanging']:.1f} | {row['exchanging']:.2f}"
        lines.append(f"| {row['model']} | {row['machine']} | {seconds} | {row['run_hours']:.1f} |")
    lines += ["", f"Share of the peak that the measured step reaches: {100 * found['share_of_peak']:.1f} %."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
