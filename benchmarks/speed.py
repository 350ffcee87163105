"""Speed and memory on this machine: training steps, solvers, convolutions, entropy reduction, planned memory.

    python -m benchmarks.speed --page docs/results/speed-and-memory.md

Run it on a quiet machine. Each part is written as soon as it is measured: into the page and the JSON file beside it, or
into --out alone. --only measures some parts; the others stay, with their own stamps. The part `memory` takes no times:
it may run on a busy machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import entropy, kernels, memory, start, steps
from benchmarks.pages import Row, check_page, made, write_page
from deq_jax._cli import command_line, console
from deq_jax.storage import make_folder, read_json, write_json


class Part(NamedTuple):
    """A table of the page: measured with so many repetitions, and shown as Markdown."""

    rows: Callable[[int], list[Row]]
    table: Callable[[list[Row]], str]


PARTS = {
    "start": Part(start.rows, start.table),
    "steps": Part(steps.rows, steps.table),
    "solvers": Part(kernels.solver_rows, kernels.solver_table),
    "convolutions": Part(kernels.convolution_rows, kernels.convolution_table),
    "entropy": Part(entropy.rows, entropy.table),
    "memory": Part(lambda repeats: memory.rows(), memory.table),
}


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the tables and writes JSON after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/speed.json"), metavar="FILE", help="without --page"
    )
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="pairs of runs, further steps; default: 5")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the tables")
    options = parser.parse_args(argv)
    with command_line():
        check_page(options.page, *PARTS)
        file = options.page.with_suffix(".json") if options.page else options.out
        make_folder(file.parent)
        found = read_json(file) if file.exists() else {"made": [], "parts": {}}
        for name in options.only:
            rows = PARTS[name].rows(options.repeats)
            found["parts"][name] = {"record": made(), "rows": rows}
            found["made"] = records(found["parts"])
            console.print(PARTS[name].table(rows))
            if options.page:
                write_page(options.page, found, tables(found))
            else:
                write_json(file, found)


def records(parts: dict[str, Row]) -> list[Row]:
    """The records for the stamp: one, or one for each group of parts that were measured alike."""
    alike: dict[str, tuple[Row, list[str]]] = {}
    for name, part in parts.items():
        record = {key: value for key, value in part["record"].items() if key != "command"}
        alike.setdefault(repr(record), (record, []))[1].append(name)
    several = len(alike) > 1
    return [
        record | {"work": f"{', '.join(names)} measured"} if several else record for record, names in alike.values()
    ]


def tables(found: Row) -> dict[str, str]:
    """The table of each part, as Markdown."""
    measured = found["parts"]
    return {
        name: part.table(measured[name]["rows"]) if name in measured else "Not measured yet."
        for name, part in PARTS.items()
    }


if __name__ == "__main__":
    main()
