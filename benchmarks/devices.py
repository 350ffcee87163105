"""The same run on other devices: losses, the counts of an evaluation, and checkpoints that another setup resumes.

    python -m benchmarks.devices --out runs/devices --page docs/results/devices.md

Trains a tiny DEQ for 20 steps without an attack, on simulated devices of this CPU: in one process with one device and
with eight, in two processes with four each, and in four with one each. Evaluates the run of the first setup with each
of them. Lets each resume the checkpoint after step 10 of each other one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pages import check_page, made, write_page
from deq_jax._cli import command_line, console
from deq_jax.core import require
from deq_jax.evaluation import EvaluationFolder, read_record
from deq_jax.storage import make_folder, write_json
from deq_jax.training import Workdir, read_metrics

STEPS, HALF, IMAGES = 20, 10, 64
CONFIG = f"""
from deq_jax import Broyden, Dynamics, Phantom, Standard, TrainConfig
from deq_jax.data import Digits
from deq_jax.models import small_deq


def get_config() -> TrainConfig:
    model = small_deq(10, 8, Dynamics(Broyden(4), gradient=Phantom(steps=2, damping=0.5)))
    sizes = dict(epochs=4, batch_size=224, validation_images=64)  # 20 steps
    return TrainConfig(model, Standard(), Digits(), log_every=1, checkpoint_every={HALF}, **sizes)
"""
Row = dict[str, Any]


class Setup(NamedTuple):
    """Processes, and simulated devices of each."""

    processes: int
    devices: int

    def __str__(self) -> str:
        several = "es" if self.processes > 1 else ""
        return f"{self.processes} process{several} x {self.devices}"


SETUPS = (Setup(1, 1), Setup(1, 8), Setup(2, 4), Setup(4, 1))


def main(argv: list[str] | None = None) -> None:
    """Runs the missing parts, prints the tables and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/devices"), metavar="DIR", help="default: runs/devices")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the tables")
    options = parser.parse_args(argv)
    with command_line():
        check_page(options.page, "tables")
        out = make_folder(options.out)
        config = out / "config.py"
        config.write_text(CONFIG)
        numbers: Row = {"made": [made()], "steps": STEPS, "images": IMAGES}
        numbers["alone"] = [alone(out, config, setup) for setup in SETUPS]
        pairs = [(first, then) for first in SETUPS for then in SETUPS if first != then]
        numbers["resumed"] = [resumed(out, config, first, then) for first, then in pairs]
        write_json(out / "devices.json", numbers)
        console.print(tables(numbers))
        if options.page:
            write_page(options.page, numbers, {"tables": tables(numbers)})


def alone(out: Path, config: Path, setup: Setup) -> Row:
    """A run of a setup beside the run of the first one, and its evaluation of that one."""
    train(out, config, setup, folder_of(out, setup))
    first = folder_of(out, SETUPS[0])
    evaluation = out / f"evaluation-{setup.processes}x{setup.devices}"
    sizes = ["--images", str(IMAGES), "--batch-size", str(IMAGES)]
    attack = ["--attack", "pgd", "--set", "steps=10", "--set", "restarts=1"]
    launch(out, setup, ["deq_jax.evaluate", "--workdir", str(first), *attack, *sizes, "--out", str(evaluation)])
    record = read_record(EvaluationFolder(evaluation).record)
    accuracies = {"clean": record.rows["deployed"].clean.accuracy, "robust": record.robust_accuracy or 0.0}
    counts = {name: round(IMAGES * share) for name, share in accuracies.items()}
    return {"setup": str(setup), "difference": difference(folder_of(out, setup), first), **counts}


def resumed(out: Path, config: Path, first: Setup, then: Setup) -> Row:
    """The second half of a run by another setup than the first half."""
    workdir = out / f"{folder_of(out, first).name}-then-{folder_of(out, then).name}"
    if not workdir.exists():
        shutil.copytree(folder_of(out, first), workdir)
        for checkpoint in Workdir(workdir).latest.folder.iterdir():
            if checkpoint.name != str(HALF):
                shutil.rmtree(checkpoint)
    train(out, config, then, workdir)
    return {"first": str(first), "then": str(then), "difference": difference(workdir, folder_of(out, SETUPS[0]))}


def folder_of(out: Path, setup: Setup) -> Path:
    """The workdir of a setup's own run."""
    return out / f"{setup.processes}x{setup.devices}"


def train(out: Path, config: Path, setup: Setup, workdir: Path) -> None:
    """Trains with a setup, or resumes."""
    launch(out, setup, ["deq_jax.train", "--config", str(config), "--workdir", str(workdir)])


def difference(workdir: Path, other: Path) -> float:
    """The largest relative difference of the losses of the same step of two runs."""
    found, expected = (
        [line["loss"] for line in read_metrics(Workdir(folder).metrics) if line["split"] == "train"]
        for folder in (workdir, other)
    )
    require(len(found) == len(expected) == STEPS, f"{workdir}: expected {STEPS} steps, found {len(found)}")
    return float(max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)))


def launch(out: Path, setup: Setup, command: list[str]) -> None:
    """Runs a command of the package in the processes of a setup, to its end."""
    job = []
    if setup.processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        job = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(setup.processes), "--process"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={setup.devices}",
        "JAX_COMPILATION_CACHE_DIR": str((out / "cache").resolve()),
    }
    commands = [[sys.executable, "-m", *command, *(job and [*job, str(number)])] for number in range(setup.processes)]
    started = [
        subprocess.Popen(one, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for one in commands
    ]
    errors = [process.communicate()[1] for process in started]
    codes = [process.returncode for process in started]
    require(not any(codes), f"{' '.join(commands[0])}: exit codes {codes}: {' '.join(errors)[-400:]}")


def tables(numbers: Row) -> str:
    """What each setup gives, and what it gives after it resumed another one, as Markdown."""
    lines = ["| setup | losses differ by at most | correct, clean | correct, attacked |", "|---|---|---|---|"]
    for row in numbers["alone"]:
        lines.append(f"| {row['setup']} | {row['difference']:.0e} | {row['clean']} | {row['robust']} |")
    setups = [row["setup"] for row in numbers["alone"]]
    found = {(row["first"], row["then"]): f"{row['difference']:.0e}" for row in numbers["resumed"]}
    lines += ["", f"| begun by, resumed by | {' | '.join(setups)} |", "|---" * (1 + len(setups)) + "|"]
    for first in setups:
        lines.append(f"| {first} | {' | '.join(found.get((first, then), '') for then in setups)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
