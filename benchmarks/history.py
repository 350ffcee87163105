"""How the numbers of docs/results/speed-and-memory.json have changed: a figure of every version that git has.

    python -m benchmarks.history

It shows what hardly depends on the machine: ratios within one run, planned memory, and the number of programs.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.pages import Row

ROOT = Path(__file__).parents[1]
NUMBERS = "docs/results/speed-and-memory.json"
FIGURE = ROOT / "docs" / "figures" / "history.svg"


def solvers(rows: list[Row]) -> dict[str, float]:
    """Each solver's time over bare cells."""
    return {f"{row['what']}, {row['against'].split(maxsplit=1)[1]}": row["ratio"] for row in rows}


def memory(rows: list[Row]) -> dict[str, float]:
    """Gigabytes of each training step."""
    return {f"{row['config'].split('_')[1].upper()}, {row['setting']}": row["step"] for row in rows}


def programs(rows: list[Row]) -> dict[str, float]:
    """Programs that each command compiles."""
    return {row["command"]: row["cold"]["programs"] for row in rows}


PANELS: dict[str, tuple[str, Callable[[list[Row]], dict[str, float]]]] = {
    "solvers": ("time over bare cells", solvers),
    "memory": ("training step, batch 96 (GB)", memory),
    "start": ("programs", programs),
}
"""The part of the page, the label of its axis, and its numbers by name."""


def versions(root: Path) -> list[tuple[str, Row]]:
    """Commit and parts of each version, the oldest first; last the file as it lies there."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout

    commits = git("log", "--reverse", "--format=%h", "--", NUMBERS).split()
    every = [(commit, json.loads(git("show", f"{commit}:{NUMBERS}"))["parts"]) for commit in commits]
    found = [(commit, parts) for commit, parts in every if parts]
    now = json.loads((root / NUMBERS).read_text())["parts"]
    return found if found and found[-1][1] == now else [*found, ("now", now)]


def series(found: list[tuple[str, Row]], part: str) -> dict[str, list[tuple[int, float]]]:
    """The numbers of a part by name, each with the number of its version."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for number, (_, parts) in enumerate(found):
        for name, value in PANELS[part][1](parts[part]["rows"] if part in parts else []).items():
            lines.setdefault(name, []).append((number, value))
    return lines


def draw(found: list[tuple[str, Row]], out: Path) -> None:
    """A panel for each part, a line for each name."""
    with matplotlib.rc_context({"svg.hashsalt": out.stem, "font.size": 8}):
        figure = Figure(figsize=(7.6, 8.4), layout="constrained")
        for axes, (part, (label, _)) in zip(figure.subplots(len(PANELS), 1, sharex=True), PANELS.items(), strict=True):
            lines = series(found, part)
            for name, line in lines.items():
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
            axes.set_xticks(range(len(found)), [commit for commit, _ in found])
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if lines:
                axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    draw(versions(ROOT), FIGURE)
