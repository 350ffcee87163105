"""Share of a training step outside of compiled computation, and the time that a checkpoint holds the loop.

    python -m benchmarks.outer_loop --page docs/results/outer-loop.md

Trains each config for some steps on made-up images of its shape; the digits are the real ones. Compiled computation
runs in threads of its own. The main thread prepares images, dispatches steps, reads metrics and writes lines of the
log. Both are measured in CPU time, which other programs on the machine hardly change. Checkpoints are of random numbers
in the shapes of the state.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.pages import check_page, made, write_page
from deq_jax import TrainConfig
from deq_jax._cli import command_line, console
from deq_jax.data import Npz
from deq_jax.storage import load_config, make_folder, write_json
from deq_jax.training import Workdir, fit, initial_state, optimizer_of

Row = dict[str, Any]

CONFIGS = {"digits_pgd_at": 64, "cifar10_small_pgd_at": 16}  # name -> batch


class MeasuredError(Exception):
    """There are enough lines."""


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/outer_loop.json"), metavar="FILE")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="intervals of the log; default: 3")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps of an interval; default: 5")
    parser.add_argument("--images", type=int, default=50_000, metavar="N", help="images that are made; default: 50,000")
    parser.add_argument("--only", nargs="+", default=list(CONFIGS), choices=list(CONFIGS), metavar="CONFIG")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the table")
    options = parser.parse_args(argv)
    with command_line():
        check_page(options.page, "tables")
        make_folder(options.out.parent)
        found: Row = {"made": [made()], "cores": os.cpu_count(), "steps": [], "writes": []}
        for name in options.only:
            with tempfile.TemporaryDirectory() as folder:
                images = random_images(Path(folder), options.images)
                config = configured(name, CONFIGS[name], options.steps, images)
                found["writes"].append({"config": name, **saved(config, Workdir(Path(folder)))})
                found["steps"].append({"config": name, **measure(config, Path(folder) / "run", options.repeats)})
            write_json(options.out, found)
        console.print(tables(found))
        if options.page:
            write_page(options.page, found, {"tables": tables(found)})


def random_images(folder: Path, count: int) -> Npz:
    """Random images of 32x32 in three colours."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, size in (("train", count), ("test", 16)):
        arrays[f"x_{split}"] = rng.integers(256, size=(size, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = rng.integers(10, size=size, dtype=np.int32)
    np.savez(folder / "images.npz", **arrays)
    return Npz(str(folder / "images.npz"))


def configured(name: str, batch_size: int, steps: int, images: Npz) -> TrainConfig:
    """The config of steps of one phase, without validation and checkpoints before its end."""
    config = load_config(f"configs/{name}.py", TrainConfig)
    dataset = config.dataset if name.startswith("digits") else images
    never = {"pretrain_steps": 0, "epochs": 1000, "validate_every": 1000, "checkpoint_every": 10**9}
    return replace(config, dataset=dataset, batch_size=batch_size, log_every=steps, **never)


def measure(config: TrainConfig, workdir: Path, repeats: int) -> Row:
    """Seconds of CPU time of a step, in the main thread and in all of them."""
    moments: list[tuple[float, float]] = []
    inputs: list[float] = []

    def note(line: Row) -> None:
        moments.append((time.thread_time(), time.process_time()))
        inputs.append(line["input_share"])
        if len(moments) > repeats:
            raise MeasuredError

    with suppress(MeasuredError):
        fit(config, workdir, report=note)
    steps = [[(b - a) / config.log_every for a, b in zip(*pair, strict=True)] for pair in pairwise(moments)]
    main, every = zip(*steps, strict=True)
    return {"batch": config.batch_size, "main": main, "all": every, "input_share": statistics.median(inputs[1:])}


def saved(config: TrainConfig, workdir: Workdir) -> Row:
    """Seconds of checkpoints, by the clock and of CPU time."""
    shapes = jax.eval_shape(partial(initial_state, config, optimizer_of(config, 1000), config.dataset.load()))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    moments = [(time.perf_counter(), time.process_time())]
    for step in range(6):
        workdir.latest.save(step, state, {})
        moments.append((time.perf_counter(), time.process_time()))
    seconds = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(moments)]
    clock, cpu = zip(*seconds[1:], strict=True)
    return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)), "clock": clock, "cpu": cpu}


def tables(found: Row) -> str:
    """Both tables, as Markdown."""
    lines = ["| config | batch | main thread (ms) | all threads (s) | share outside, at most | preparing images |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found["steps"]:
        shares = [100 * found["cores"] * main / every for main, every in zip(row["main"], row["all"], strict=True)]
        seconds = [f"{1000 * statistics.median(row['main']):.1f}", f"{statistics.median(row['all']):.2f}"]
        share = f"{statistics.median(shares):.1f} % ({min(shares):.1f} to {max(shares):.1f})"
        cells = [row["config"], str(row["batch"]), *seconds, share, f"{100 * row['input_share']:.2f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| config | parameters | checkpoint (CPU s) | by the clock (s) |", "|---|---|---|---|"]
    for row in found["writes"]:
        seconds = [f"{statistics.median(row[name]):.2f}" for name in ("cpu", "clock")]
        lines.append(f"| {row['config']} | {row['parameters']:,} | {' | '.join(seconds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
