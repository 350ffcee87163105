"""Trains and evaluates every digits config over several seeds, and tabulates mean and spread.

    python benchmarks/digits.py --seeds 3 --out runs/digits

Interrupt it at any time: the same command resumes. Each model is evaluated on the test
set by PGD with 50 steps and 5 restarts at epsilon 0.1, the best iterate of each image.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from deq_jax._cli import command_line, console
from deq_jax.evaluation import EvaluationFolder, EvaluationRecord, read_record
from deq_jax.storage import write_json
from deq_jax.training import Workdir

CONFIGS = [
    "digits_standard",
    "digits_pgd_at",
    "digits_trades",
    "digits_standard_random",
    "digits_pgd_at_random",
    "digits_trades_random",
    "digits_cnn_standard",
    "digits_cnn_pgd_at",
    "digits_cnn_trades",
]


def main() -> None:
    """Runs the missing parts, then prints the tables and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1; default: 3")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), metavar="DIR", help="default: runs/digits")
    options = parser.parse_args()
    with command_line():
        for seed in range(options.seeds):
            for config in CONFIGS:
                run(config, seed, options.out / f"{config}-{seed}")
        results = {
            config: [
                read_record(evaluation_of(options.out / f"{config}-{seed}").record) for seed in range(options.seeds)
            ]
            for config in CONFIGS
        }
        rows = {config: [record.to_json()["rows"] for record in records] for config, records in results.items()}
        write_json(options.out / "digits.json", rows)
        for condition in ("clean", "attacked"):
            console.print(table(results, condition))


def evaluation_of(workdir: Path) -> EvaluationFolder:
    """The evaluation by PGD of the run in `workdir`."""
    return Workdir(workdir).evaluation("test-pgd")


def run(config: str, seed: int, workdir: Path) -> None:
    """Trains and evaluates one model, unless it is finished."""
    if evaluation_of(workdir).record.exists():
        return
    command = [sys.executable, "-m"]
    where = ["--workdir", str(workdir)]
    train = ["deq_jax.train", "--config", f"configs/{config}.py", *where, "--set", f"seed={seed}"]
    for arguments in (train, ["deq_jax.evaluate", *where, "--attack", "pgd"]):
        subprocess.run([*command, *arguments], check=True)


def table(results: dict[str, list[EvaluationRecord]], condition: str) -> Table:
    """Accuracy in percent, mean and standard deviation over the seeds, of each row of each config."""
    names = list(results["digits_standard"][0].rows)
    seeds = len(results["digits_standard"])
    grid = Table(title=f"{condition} accuracy (%), mean ± standard deviation over {seeds} seeds")
    grid.add_column("config")
    for name in names:
        grid.add_column(name, justify="right")
    for config, records in results.items():
        cells = []
        for name in names:
            rows = [record.rows[name] for record in records if name in record.rows]
            means = [row.clean if condition == "clean" else row.attacked for row in rows]
            values = [100 * mean.accuracy for mean in means if mean is not None]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}" if values else "-")
        grid.add_row(config, *cells)
    return grid


if __name__ == "__main__":
    main()
