"""Evaluates a trained classifier, clean and attacked, at every state of its dynamics.

python -m deq_jax.evaluate --workdir runs/a
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from rich.table import Table

from deq_jax.attacks.pgd import PGD
from deq_jax.cli import command_line, console
from deq_jax.config import TrainConfig, set_fields, to_tree
from deq_jax.data import to_unit
from deq_jax.evaluation import Outcomes, evaluator, summary
from deq_jax.plots import plot_images, plot_states
from deq_jax.records import make_folder, write_json, write_npz
from deq_jax.training import load_run
from deq_jax.types import Attack, InputError, require

EPILOG = """\
Writes into the output folder: evaluation.json (means, and what was run), evaluation.npz (per image: labels,
predictions, entropies and residuals of every state, adversarial images), states.png, images.png.

An image counts as correct under attack only if it is also correct without. PGD alone is an upper bound of
robustness. Row z_t is the raw state after t solver steps; "deployed" is the classifier's own prediction,
which the attack was aimed at; its residual is the lowest of the trajectory.

examples:
  python -m deq_jax.evaluate --workdir runs/a
  python -m deq_jax.evaluate --workdir runs/a --attack pgd --set steps=1000 --set epsilon=0.05 --out runs/a/pgd1000
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deq_jax.evaluate",
        description="Clean accuracy, accuracy under attack, entropy and residual of a trained classifier.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training")
    parser.add_argument(
        "--attack",
        choices=["none", "pgd"],
        default="pgd",
        help="default: pgd, 50 steps, 5 restarts, best of all iterates",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="assignments",
        help="replace a field of the attack: epsilon, step_size, steps, restarts; repeatable",
    )
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test", help="default: test")
    parser.add_argument("--checkpoint", choices=["best", "latest"], default="best", help="default: best")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time; default: as in training")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the attack's randomness; default: 0")
    parser.add_argument("--out", metavar="DIR", help="default: WORKDIR/evaluation/SPLIT-ATTACK")
    options = parser.parse_args(arguments)
    with command_line():
        config, variables, step = load_run(options.workdir, best=options.checkpoint == "best")
        attack = choose_attack(config, options.attack, options.assignments)
        batch_size = config.batch_size if options.batch_size is None else options.batch_size
        require(batch_size > 0, f"--batch-size must be positive, got {batch_size}")
        require(options.seed >= 0, f"--seed must be >= 0, got {options.seed}")
        run = evaluator(config.classifier, attack, batch_size=batch_size, seed=options.seed)
        default = Path(options.workdir) / "evaluation" / f"{options.split}-{options.attack}"
        out = make_folder(Path(options.out) if options.out else default)
        images = getattr(config.dataset.load(), options.split)
        started = time.perf_counter()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("evaluating", total=len(images.y))
            outcomes = run(variables, images, lambda done, total: progress.update(task, completed=done))
        result = {
            **summary(outcomes),
            "workdir": str(options.workdir),
            "checkpoint": {"name": options.checkpoint, "step": step},
            "split": options.split,
            "attack": to_tree(attack),
            "seed": options.seed,
            "batch_size": batch_size,
            "seconds": round(time.perf_counter() - started, 2),
            "versions": {name: version(name) for name in ("deq_jax", "jax", "flax")},
            "config": to_tree(config),
        }
        write_results(out, result, outcomes, np.asarray(to_unit(images.x)))
        console.print(table(result))
        console.print(f"results: {out}")


def choose_attack(config: TrainConfig, name: str, assignments: list[str]) -> Attack | None:
    """The attack that the command line names, at the radius that the config validates with."""
    if name == "none":
        require(not assignments, "--set goes with an attack, not with --attack none")
        return None
    validation = config.validation_attack
    if not isinstance(validation, PGD):
        raise InputError("--attack pgd: the config's validation_attack is no PGD and gives no radius")
    attack = dataclasses.replace(
        validation, step_size=max(validation.epsilon / 10, 1e-6), steps=50, restarts=5, best_of=True
    )
    return set_fields(attack, assignments)


def write_results(out: Path, result: dict[str, Any], outcomes: Outcomes, x: np.ndarray) -> None:
    """Writes numbers, per-image outcomes and figures into the folder `out`."""
    conditions = {"clean": outcomes.clean, "attacked": outcomes.attacked}
    arrays = {"y": outcomes.y}
    for condition, measured in conditions.items():
        if measured is not None:
            arrays |= {f"{condition}_{name}": value for name, value in measured._asdict().items()}
    if outcomes.x_adv is not None:
        arrays["x_adv"] = outcomes.x_adv
        plot_images(outcomes, x, out / "images.png")
    plot_states(outcomes, out / "states.png")
    write_npz(out / "evaluation.npz", arrays)
    write_json(out / "evaluation.json", result)


def table(result: dict[str, Any]) -> Table:
    """The result as a table for the terminal."""
    attack = result["attack"]
    caption = f"{result['images']} {result['split']} images"
    if attack is not None:
        caption += f"; PGD epsilon {attack['epsilon']:g}, {attack['steps']} steps, {attack['restarts']} restarts"
    grid = Table(title="accuracy (%), entropy (nats), relative residual", caption=caption)
    conditions = list(next(iter(result["rows"].values())))
    grid.add_column("state")
    for condition in conditions:
        for name in ("accuracy", "entropy", "residual"):
            grid.add_column(f"{condition}\n{name}", justify="right")
    for name, row in result["rows"].items():
        cells = []
        for condition in conditions:
            values = row[condition]
            residual = "-" if values["residual"] is None else f"{values['residual']:.2e}"
            cells += [f"{100 * values['accuracy']:.2f}", f"{values['entropy']:.3f}", residual]
        grid.add_row(name, *cells, style="bold" if name == "deployed" else None)
    return grid


if __name__ == "__main__":
    main()
