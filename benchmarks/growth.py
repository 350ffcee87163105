"""How time and memory grow with the solver's steps, the batch, the image, the branches and the devices.

    python -m benchmarks.growth --out runs/growth.json --page docs/results/growth.md

Predictions and training steps of small networks with random weights; benchmarks/series.py has them. Seconds are of
single calls, one size after another in each repetition. Memory is planned by the compiler. An exponent is the slope of
a line through the three largest sizes, both axes in logarithms. Devices are simulated: they share this machine's
processors. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.pages import Row, check_page, made, write_page
from benchmarks.series import ALL, Series, measured
from benchmarks.speed import records
from deq_jax._cli import command_line, console
from deq_jax.storage import make_folder, read_json, write_json

FITTED = 3  # sizes, the largest ones
LINEAR = 1.05  # exponents above it are worse than linear
COLORS = ("#2a6f97", "#c8553d", "#3d8b5f", "#8a5aa3", "#b9851f", "#5c677d", "#d08ba6")


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the tables and writes JSON and figures after each series."""
    options = parse_args(argv)
    if options.devices:
        print(json.dumps(measured(ALL["devices"], (options.devices,), options.repeats)))
        return
    with command_line():
        jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
        check_page(options.page, *ALL)
        make_folder(options.out.parent)
        found = read_json(options.out) if options.out.exists() else {"made": [], "parts": {}}
        for name in options.only:
            found["parts"][name] = {"record": made(), "rows": rows(name, options.repeats)}
            found["made"] = records(found["parts"])
            console.print(part(name, found))
            write_json(options.out, found)
            if options.page:
                show(options.page, found)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/growth.json"), metavar="FILE", help="its other series stay"
    )
    parser.add_argument("--only", nargs="+", default=list(ALL), choices=list(ALL), metavar="SERIES")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="calls of each program; default: 5")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the tables")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def rows(name: str, repeats: int) -> list[Row]:
    """The rows of a series; each number of devices has a process of its own."""
    series = ALL[name]
    if name != "devices":
        return measured(series, series.sizes, repeats)
    found = [row for devices in series.sizes for row in in_process(devices, repeats)]
    return sorted(found, key=lambda row: list(series.works).index(row["work"]))


def in_process(devices: int, repeats: int) -> list[Row]:
    """The rows of a process with so many simulated devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.growth", "--devices", str(devices), "--repeats", str(repeats)]
    run = subprocess.run(command, env={**os.environ, **flags}, check=True, stdout=subprocess.PIPE, text=True)
    found: list[Row] = json.loads(run.stdout.splitlines()[-1])
    return found


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of the line by least squares through the points, both axes in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def by_work(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each piece of work."""
    return {name: [row for row in rows if row["work"] == name] for name in dict.fromkeys(row["work"] for row in rows)}


def exponents(rows: list[Row], power: int) -> Row:
    """The exponents of a piece of work over its largest sizes; those of seconds also of each repetition."""
    largest = rows[-FITTED:]
    sizes = [float(row["size"] ** power) for row in largest]
    found: Row = {
        name: exponent(sizes, [row[name] for row in largest]) for name in ("operations", "memory", "compiling")
    }
    rounds = [exponent(sizes, list(times)) for times in zip(*(row["seconds"] for row in largest), strict=True)]
    found["seconds"] = exponent(sizes, [statistics.median(row["seconds"]) for row in largest])
    return found | {"smallest": min(rounds), "largest": max(rounds)}


def verdict(found: Row) -> str:
    """What grows faster than linearly, for seconds in every repetition."""
    grows = {"time": found["smallest"] > LINEAR, "memory": found["memory"] > LINEAR}
    return ", ".join(name for name, more in grows.items() if more)


def shown(value: float) -> str:
    """A number to three digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def part(name: str, found: Row) -> str:
    """The setting of a series, its table, its exponents and its figure, as Markdown."""
    if name not in found["parts"]:
        return "Not measured yet."
    series, rows = ALL[name], found["parts"][name]["rows"]
    alt = f"Seconds and memory against {series.size}. The numbers are in the table."
    setting = f"{series.setting[0].upper()}{series.setting[1:]}."
    return f"{setting}\n\n{table(series, rows)}\n\n{fits(series, rows)}\n\n![{alt}](../figures/{picture(name)})"


def table(series: Series, rows: list[Row]) -> str:
    """Seconds, memory, compilation and operations of each row, as Markdown."""
    columns = ["work", series.size, "seconds", "memory (MB)", "compilation (s)", "GFLOP"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        times = [shown(pick(row["seconds"])) for pick in (statistics.median, min, max)]
        numbers = [shown(row["memory"] / 1e6), f"{row['compiling']:.1f}", shown(row["operations"] / 1e9)]
        time = "{} ({} to {})".format(*times)
        lines.append(f"| {row['work']} | {row['size']} | {time} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def fits(series: Series, rows: list[Row]) -> str:
    """The exponents of each piece of work, as Markdown."""
    columns = ["exponent of", "seconds", "memory", "compilation", "operations", f"worse than linear: above {LINEAR}"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, some in by_work(rows).items():
        found = exponents(some, series.power)
        time = "{seconds:.2f} ({smallest:.2f} to {largest:.2f})".format(**found)
        others = [f"{round(found[key], 2) + 0:.2f}" for key in ("memory", "compiling", "operations")]  # no -0.00
        lines.append(f"| {name} | {time} | {' | '.join(others)} | {verdict(found)} |")
    return "\n".join(lines)


def show(page: Path, found: Row) -> None:
    """Writes the page, the JSON file beside it, and the figures."""
    figures = make_folder(page.resolve().parents[1] / "figures")
    for name in found["parts"]:
        draw(ALL[name], found["parts"][name]["rows"], figures / picture(name))
    write_page(page, found, {name: part(name, found) for name in ALL})


def picture(name: str) -> str:
    """The name of the file of a series' figure."""
    return f"growth-{name}.svg"


def draw(series: Series, rows: list[Row], out: Path) -> None:
    """Seconds and memory against the size; each piece of work has a colour, and a dotted line is linear."""
    with matplotlib.rc_context({"svg.hashsalt": out.stem, "font.size": 9}):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        for axes, quantity in zip(figure.subplots(1, 2), ("seconds", "memory (MB)"), strict=True):
            for color, (name, some) in zip(COLORS, by_work(rows).items(), strict=False):
                sizes = np.array([row["size"] for row in some])
                values = [statistics.median(row["seconds"]) for row in some]
                values = values if quantity == "seconds" else [row["memory"] / 1e6 for row in some]
                linear = values[-1] * (sizes / sizes[-1]) ** float(series.power)
                axes.loglog(sizes, values, "o-", color=color, markersize=3.5, linewidth=1.3, label=name)
                axes.loglog(sizes, linear, ":", color=color, linewidth=0.8)
            axes.set(xlabel=series.size, ylabel=quantity)
            axes.set_xticks(series.sizes, [str(size) for size in series.sizes])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=7, frameon=False, ncols=3)
        figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
