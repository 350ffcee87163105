"""Share of a training step outside of compiled computation, and the time that a checkpoint holds the loop.

    python -m benchmarks.outer_loop --out runs/bench/outer_loop.json

Trains each config on made-up images of its shape, and after each line of the log runs the compiled step alone as often,
on one batch that is on the device already. "loop" goes from one line to the next: images, dispatch, the wait for the
metrics, and the line. Both are seconds of CPU time of all threads, which other programs on the machine hardly change, so
that "share" also counts work that is done while the device computes. Checkpoints are timed by the clock, alone. The
digits are the real ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.pages import with_tables, write_page
from deq_jax import TrainConfig
from deq_jax._cli import command_line, console
from deq_jax.data import Npz
from deq_jax.parallel import AXIS, replicate, replicate_and_split
from deq_jax.storage import environment, load_config, make_folder, write_json
from deq_jax.training import Batch, TrainState, Workdir, fit, initial_state, optimizer_of, train_step

Row = dict[str, Any]

CONFIGS = {"digits_pgd_at": 64, "cifar10_small_pgd_at": 8}  # name -> batch


class MeasuredError(Exception):
    """There are enough lines."""


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/outer_loop.json"), metavar="FILE")
    parser.add_argument("--repeats", type=int, default=6, metavar="N", help="lines of the log; default: 6")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps between two lines; default: 5")
    parser.add_argument("--images", type=int, default=50_000, metavar="N", help="images that are made; default: 50,000")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the table")
    options = parser.parse_args(argv)
    with command_line():
        if options.page:
            with_tables(options.page, "")  # refuses a page without marks
        make_folder(options.out.parent)
        found: Row = {"device": jax.devices()[0].device_kind, "versions": environment()["versions"], "rows": []}
        for name, batch_size in CONFIGS.items():
            with tempfile.TemporaryDirectory() as folder:
                config = configured(name, batch_size, options.steps, made(Path(folder), options.images))
                row = measure(config, Path(folder), options.repeats)
            found["rows"].append({"config": name, **row})
            write_json(options.out, found)
        console.print(table(found))
        if options.page:
            write_page(options.page, found, table(found))


def made(folder: Path, count: int) -> Npz:
    """Random images of 32x32 in three colours."""
    rng, arrays = np.random.default_rng(0), {}
    for split, size in (("train", count), ("test", 16)):
        arrays[f"x_{split}"] = rng.integers(256, size=(size, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = rng.integers(10, size=size, dtype=np.int32)
    np.savez(folder / "made.npz", **arrays)
    return Npz(str(folder / "made.npz"))


def configured(name: str, batch_size: int, steps: int, images: Npz) -> TrainConfig:
    """The config of steps of one phase, without validation and checkpoints before its end."""
    config = load_config(f"configs/{name}.py", TrainConfig)
    dataset = config.dataset if name.startswith("digits") else images
    never = {"pretrain_steps": 0, "epochs": 1000, "validate_every": 1000, "checkpoint_every": 10**9}
    return replace(config, dataset=dataset, batch_size=batch_size, log_every=steps, **never)


def measure(config: TrainConfig, folder: Path, repeats: int) -> Row:
    """Seconds of CPU time of a step in the loop and alone, from alternating runs, and seconds of a checkpoint."""
    run, state = step_alone(config)
    loop: list[float] = []
    alone: list[float] = []
    inputs: list[float] = []
    moment = float("nan")

    def compare(line: Row) -> None:
        nonlocal moment, state
        loop.append((time.process_time() - moment) / config.log_every)
        inputs.append(line["input_share"])
        began = time.process_time()
        for _ in range(config.log_every):
            state = run(state)
        jax.block_until_ready(state)
        alone.append((time.process_time() - began) / config.log_every)
        if len(loop) > 1 + repeats:
            raise MeasuredError
        moment = time.process_time()

    with suppress(MeasuredError):
        fit(config, folder / "run", report=compare)
    shares = [1 - b / a for a, b in zip(loop[2:], alone[2:], strict=True)]
    seconds = [saved(state, Workdir(folder), step) for step in range(1 + repeats)][1:]
    return {
        "batch": config.batch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "loop": statistics.median(loop[2:]),
        "alone": statistics.median(alone[2:]),
        "share": statistics.median(shares),
        "shares": shares,
        "input_share": statistics.median(inputs[1:]),
        "checkpoint": statistics.median(seconds),
        "checkpoints": seconds,
    }


def step_alone(config: TrainConfig) -> tuple[Callable[[TrainState], TrainState], TrainState]:
    """The compiled step on its first batch, and the state before it."""
    data = config.dataset.load()
    steps = config.epochs * (len(data.train.y) // config.batch_size)
    optimizer = optimizer_of(config, steps)
    x, y = (part[: config.batch_size] for part in data.train)
    batch = jax.device_put(Batch(x, y, np.arange(config.batch_size, dtype=np.int32)))
    step = partial(train_step, config, optimizer, axis_name=AXIS, steps=steps)
    run = replicate_and_split(step, joint=True, donate=True)
    return lambda state: run(state, batch)[0], replicate(initial_state(config, optimizer, data))


def saved(state: TrainState, workdir: Workdir, step: int) -> float:
    """Seconds that a checkpoint takes."""
    began = time.perf_counter()
    workdir.latest.save(step, state, {})
    return time.perf_counter() - began


def table(found: Row) -> str:
    """The table, as Markdown."""
    names = [
        "config",
        "batch",
        "parameters",
        "step in the loop (CPU s)",
        "compiled step alone (CPU s)",
        "share outside",
    ]
    names += ["preparing images", "checkpoint (s)"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in found["rows"]:
        lowest, highest = min(row["shares"]), max(row["shares"])
        share = f"{100 * row['share']:.1f} % ({100 * lowest:.1f} to {100 * highest:.1f})".replace("-", "−")
        seconds = [f"{row[name]:.3f}" for name in ("loop", "alone", "checkpoint")]
        cells = [row["config"], str(row["batch"]), f"{row['parameters']:,}", *seconds[:2], share]
        cells += [f"{100 * row['input_share']:.2f} %", seconds[2]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
