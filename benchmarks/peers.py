"""Our operations beside their limits in bare JAX and their peers in PyTorch, with one thread and with two.

    pip install torch torchdeq torchattacks foolbox
    python -m benchmarks.peers --out runs/peers.json --page docs/results/peers.md

Run it on a quiet machine. Each row is measured in a process of its own (benchmarks/peer_rows.py) and written as soon as
it is there. --only measures some rows; the others stay as --out has them, with their own stamps. Libraries that are
not installed are named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.bare import ATTACK_STEPS, BACKWARD, PHANTOM, STEPS
from benchmarks.kernels import shown
from benchmarks.pages import Row, check_page, made, write_page
from benchmarks.peer_cases import MODELS, installed
from benchmarks.speed import records
from deq_jax._cli import command_line, console
from deq_jax.core import require
from deq_jax.storage import make_folder, read_json, write_json

PACKAGES = ("torch", "torchdeq", "torchattacks", "foolbox")

GOALS = {"limit": 1.25, "peer": 1.0}
"""The largest ratio that is aimed at."""

BOTH = tuple(MODELS)


class Shown(NamedTuple):
    """A row of the table.

    Attributes:
      operation: in words.
      sizes: the networks that are measured.
      most: the largest number of alternating runs.
    """

    operation: str
    sizes: tuple[str, ...] = ("small",)
    most: int = 20


TABLE = {
    "prediction": Shown(f"prediction: Broyden, {STEPS} steps, {PHANTOM} phantom cells", BOTH),
    "fixed-point": Shown(f"solver alone: fixed point, {STEPS} steps"),
    "anderson": Shown(f"solver alone: Anderson, {STEPS} steps"),
    "broyden": Shown(f"solver alone: Broyden, {STEPS} steps", BOTH),
    "phantom": Shown(f"layer and phantom gradient, {PHANTOM} cells", BOTH),
    "implicit": Shown(f"layer and implicit gradient, {BACKWARD} backward steps"),
    "pgd-at": Shown(f"PGD-AT step, PGD-{ATTACK_STEPS['step']}", most=3),
    "trades": Shown(f"TRADES step, PGD-{ATTACK_STEPS['step']}", most=3),
    "entropy": Shown("prediction with entropy reduction, 40 updates"),
    "pgd": Shown(f"PGD-{ATTACK_STEPS['plain']} on a plain network", ("plain",)),
}


def main(argv: list[str] | None = None) -> None:
    """Measures the rows, prints their lines and writes JSON and page after each."""
    options = parse_args(argv)
    with command_line():
        check_page(options.page, "table")
        make_folder(options.out.parent)
        found = read_json(options.out) if options.out.exists() else {"made": [], "parts": {}}
        found["not_installed"] = [package for package in PACKAGES if not installed(package)]
        for name in options.only:
            rows = []
            for row in measured(name, options.threads, options.repeats):
                rows.append(row)
                console.print("\n".join(lines(name, row)))
            found["parts"][name] = {"record": made(), "rows": rows}
            found["made"] = records(found["parts"])
            write_json(options.out, found)
            if options.page:
                write_page(options.page, found, {"table": table(found)})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/peers.json"), metavar="FILE", help="where the JSON goes")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the table")
    parser.add_argument("--only", nargs="+", default=list(TABLE), choices=list(TABLE), metavar="ROW")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="alternating runs, of training steps at most three; default: 5",
    )
    return parser.parse_args(argv)


def measured(name: str, threads: list[int], repeats: int) -> Iterator[Row]:
    """A row for each size and number of threads, from a process of its own."""
    repeats = min(repeats, TABLE[name].most)
    for size in TABLE[name].sizes:
        for count in threads:
            command = [sys.executable, "-m", "benchmarks.peer_rows", name, size, str(repeats)]
            with cores(count):
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            yield {"size": size, "threads": count, **json.loads(output.splitlines()[-1])}


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Processes that are started in it have so many cores, and so many threads; Linux only."""
    before = os.sched_getaffinity(0)
    require(1 <= count <= len(before), f"threads: this process may use {len(before)} cores, got {count}")
    os.sched_setaffinity(0, sorted(before)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def table(found: Row) -> str:
    """The table and what misses its goal, as Markdown."""
    parts = {name: found["parts"][name]["rows"] for name in TABLE if name in found["parts"]}
    if not parts:
        return "Not measured yet."
    columns = ["operation", "network, batch", "threads", "ours (s)", "ours / limit", "peer", "ours / peer"]
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    text = [*head, *(line for name, rows in parts.items() for row in rows for line in lines(name, row))]
    if found["not_installed"]:
        text += ["", f"Not installed: {', '.join(found['not_installed'])}."]
    for kind, goal in GOALS.items():
        above = [text for name, rows in parts.items() for row in rows for text in misses(name, row, kind)]
        text += ["", f"**Above {goal:.2f} x the {kind}**: {'; '.join(above) or 'none'}."]
    return "\n".join(text)


def lines(name: str, row: Row) -> list[str]:
    """A line for each peer, the first with the limit."""
    ratios = dict(row["ratios"])
    first = [TABLE[name].operation, network(row), str(row["threads"]), f"{row['seconds']:.3f}"]
    start = [*first, shown(ratios.pop("limit"))]
    peers = [[peer, shown(ratio)] for peer, ratio in ratios.items()] or [["", ""]]
    starts = [start, *[[*first, ""]] * (len(peers) - 1)]
    return [f"| {' | '.join([*start, *peer])} |" for start, peer in zip(starts, peers, strict=True)]


def misses(name: str, row: Row, kind: str) -> list[str]:
    """What of a row is above its goal: over the limit, or over a peer."""
    where = f"{TABLE[name].operation}, {network(row)}, threads {row['threads']}"
    above = {other: one["ratio"] for other, one in row["ratios"].items() if (other == "limit") == (kind == "limit")}
    named = {other: f"{where}" + ("" if kind == "limit" else f", {other}") for other in above}
    return [f"{named[other]} ({ratio:.2f})" for other, ratio in above.items() if ratio > GOALS[kind]]


def network(row: Row) -> str:
    """The network of a row and its batch."""
    names = {"small": "small MDEQ", "LARGE": "MDEQ-LARGE", "plain": "convolutions"}
    return f"{names[row['size']]}, {row['batch']}"


if __name__ == "__main__":
    main()
