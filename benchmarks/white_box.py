"""The white-box evaluation of several trainings, and the mean and spread over them.

    python benchmarks/white_box.py runs/digits/digits_pgd_at-0 runs/digits/digits_pgd_at-1 runs/digits/digits_pgd_at-2

Each training, such as one of several seeds, is evaluated by configs/eval_white_box.py, into its own workdir. Interrupt
it at any time: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from deq_jax.cli import command_line, console
from deq_jax.records import read_json, write_json

CONFIG = "eval_white_box"


def main() -> None:
    """Runs what is missing, then prints the table and the red flags, and writes both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR", help="folder of a training")
    parser.add_argument("--max-images", type=int, metavar="N", help="the first N test images; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/white_box.json"), metavar="FILE")
    options = parser.parse_args()
    with command_line():
        reports = [evaluate(workdir, options.max_images) for workdir in options.workdirs]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        flags = {
            str(workdir): [flag for flag in report["red_flags"] if flag["raised"]]
            for workdir, report in zip(options.workdirs, reports, strict=True)
        }
        write_json(options.out, {"images": reports[0]["images"], "accuracy": averaged(reports), "red_flags": flags})
        console.print(table(reports))
        for workdir, raised in flags.items():
            names = ", ".join(f"{flag['name']} ({flag['value']:.3g})" for flag in raised)
            console.print(f"{workdir}: flags raised: {names or 'none'}")


def evaluate(workdir: Path, max_images: int | None) -> dict[str, Any]:
    """The report of a training's evaluation, made unless it is there."""
    out = workdir / "evaluation" / (f"{CONFIG}-{max_images}" if max_images else CONFIG)
    if not (out / "evaluation.json").exists():
        few = ["--set", f"max_images={max_images}"] if max_images else []
        arguments = ["--workdir", str(workdir), "--config", f"configs/{CONFIG}.py", "--out", str(out), *few]
        subprocess.run([sys.executable, "-m", "deq_jax.evaluate", *arguments], check=True)
    return read_json(out / "evaluation.json")


def averaged(reports: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over the trainings, of each predictor's accuracy on each trial's images."""
    rows = reports[0]["accuracy"]
    return {
        name: {
            predictor: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
            for predictor in rows[name]
            for values in [[report["accuracy"][name][predictor] for report in reports]]
        }
        for name in rows
    }


def table(reports: list[dict[str, Any]]) -> Table:
    """Accuracy in percent, mean ± standard deviation."""
    rows = averaged(reports)
    grid = Table(title=f"accuracy (%), mean ± sd over {len(reports)} trainings, {reports[0]['images']} images each")
    grid.add_column("images of")
    for predictor in rows["clean"]:
        grid.add_column(predictor, justify="right")
    for name, row in rows.items():
        grid.add_row(name, *(f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in row.values()))
    return grid


if __name__ == "__main__":
    main()
