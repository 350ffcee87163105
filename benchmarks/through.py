"""Training against attacks on the computation: does a DEQ then reach the explicit network of its size?

    python -m benchmarks.through --seeds 3 --out runs/through --page docs/results/through.md

Trains each config with each seed, evaluates it under a budget (`evaluate --budget`), and compares the worst cases seed
by seed and image by image. Interrupt it at any time: the same command resumes. --page writes the tables into the page,
between its two marks, and their numbers beside it, as JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

from deq_jax import evaluate, train
from deq_jax._cli import command_line, console
from deq_jax.core import require
from deq_jax.reporting import Estimate, Group, Pair, groups_of, read_evaluations
from deq_jax.storage import environment, read_json, write_json

# name -> its config, and what differs from it
RUNS: dict[str, tuple[str, list[str]]] = {
    "PGD-AT": ("digits_pgd_at", []),
    "PGD-AT, through the solver": ("digits_pgd_at_through", []),
    "PGD-AT, explicit network": ("digits_cnn_pgd_at", []),
    "TRADES": ("digits_trades", []),
    "TRADES, through the solver": ("digits_trades_through", []),
    "TRADES, explicit network": ("digits_cnn_trades", []),
    "PGD-AT, 16 solver steps": ("digits_pgd_at", ["classifier.dynamics.solver.steps=16"]),
    "PGD-AT, through 4 solver steps": ("digits_pgd_at_through", ["classifier.dynamics.solver.steps=4"]),
}
PAIRS = [
    ("PGD-AT, through the solver", "PGD-AT"),
    ("PGD-AT, explicit network", "PGD-AT, through the solver"),
    ("TRADES, through the solver", "TRADES"),
    ("TRADES, explicit network", "TRADES, through the solver"),
    ("PGD-AT, 16 solver steps", "PGD-AT"),
    ("PGD-AT, through 4 solver steps", "PGD-AT, through the solver"),
]
BEGIN, END = "<!-- tables: made by benchmarks/through.py -->", "<!-- end of tables -->"
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Runs the missing parts and makes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1 (default 3)")
    parser.add_argument(
        "--only", nargs="+", default=list(RUNS), choices=RUNS, metavar="NAME", help=f"of {'; '.join(RUNS)}"
    )
    parser.add_argument("--budget", default="quick", help="attacks of the evaluations (default quick)")
    parser.add_argument("--out", type=Path, default=Path("runs/through"), metavar="DIR", help="default: runs/through")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the tables")
    options = parser.parse_args(argv)
    with command_line():
        if options.page:
            with_tables(read_text(options.page), {"rows": [], "differences": []})  # refuses a page without marks
        workdirs = {name: [options.out / f"{slug(name)}-{seed}" for seed in range(options.seeds)] for name in RUNS}
        for seed in range(options.seeds):
            for name in options.only:
                config, changes = RUNS[name]
                where = ["--workdir", str(workdirs[name][seed])]
                fields = [argument for change in (f"seed={seed}", *changes) for argument in ("--set", change)]
                train.main(["--config", f"configs/{config}.py", *where, *fields])
                evaluate.main([*where, "--budget", options.budget])
        numbers = numbers_of({name: workdirs[name] for name in options.only}, f"test-{options.budget}")
        write_json(options.out / "tables.json", numbers)
        console.print(tables(numbers), markup=False)
        if options.page:
            write_json(options.page.with_suffix(".json"), numbers)
            options.page.write_text(with_tables(read_text(options.page), numbers))


def slug(name: str) -> str:
    """The first part of a workdir's name: that of the config, and what differs."""
    config, changes = RUNS[name]
    return "-".join([config, *(change.rpartition(".")[2].replace("=", "-") for change in changes)])


def numbers_of(workdirs: dict[str, list[Path]], evaluation: str) -> dict[str, Any]:
    """What the page says, as JSON data: accuracies in percent, differences in points, each with its interval."""
    groups: dict[str, Group] = {}
    for name, folders in workdirs.items():
        (groups[name],) = groups_of(read_evaluations([folder / "evaluation" / evaluation for folder in folders]))
    one = next(iter(groups.values())).evaluations[0].record
    return {
        "evaluation": evaluation,
        "images": one.images,
        "versions": environment()["versions"] | {"python": platform.python_version()},
        "processors": os.cpu_count(),
        "rows": [_row(name, group) for name, group in groups.items()],
        "differences": [_difference(a, b, groups) for a, b in PAIRS if a in groups and b in groups],
    }


def _row(name: str, group: Group) -> Row:
    residual = group.in_state("deployed", "clean", "residual")
    return {
        "training": name,
        "seeds": [one.seed for one in group.evaluations],
        "clean": _json(group.accuracy(lambda one: one.clean)),
        "robust": _json(group.accuracy(lambda one: one.robust)),
        "of_seeds": [one.record.robust_accuracy for one in group.evaluations],
        "residual": residual and residual.value,
        "flags": dict(group.raised),
    }


def _difference(first: str, second: str, groups: dict[str, Group]) -> Row:
    pair = Pair(groups[first], groups[second])
    return {
        "first": first,
        "second": second,
        "clean": _json(pair.difference(lambda one: one.clean)),
        "robust": _json(pair.difference(lambda one: one.robust)),
    }


def _json(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else {"value": estimate.value, "interval": estimate.interval}


def tables(numbers: dict[str, Any]) -> str:
    """Both tables, as Markdown."""
    rows = ["| training | clean | **worst case** | of each seed | residual | flags |", "|---|---|---|---|---|---|"]
    for row in numbers["rows"]:
        seeds = ", ".join(f"{100 * value:.1f}" for value in row["of_seeds"])
        residual = "" if row["residual"] is None else f"{row['residual']:.3f}"
        flags = ", ".join(f"{name} {count}/{len(row['seeds'])}" for name, count in row["flags"].items())
        clean, robust = (_shown(row[what]) for what in ("clean", "robust"))
        rows.append(f"| {row['training']} | {clean} | {robust} | {seeds} | {residual} | {flags} |")
    rows += ["", "| points | clean | **worst case** |", "|---|---|---|"]
    for row in numbers["differences"]:
        clean, robust = (_shown(row[what], "+") for what in ("clean", "robust"))
        rows.append(f"| {row['first']}, minus {row['second']} | {clean} | {robust} |")
    return "\n".join(rows)


def _shown(estimate: dict[str, Any] | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    interval = estimate["interval"]
    ends = "" if interval is None else " [{:{s}.1f}, {:{s}.1f}]".format(*interval, s=sign)
    return f"{estimate['value']:{sign}.1f}{ends}".replace("-", "−")


def with_tables(page: str, numbers: dict[str, Any]) -> str:
    """The page with these tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    require(bool(mark), f"the page has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{tables(numbers)}\n\n{END}{after}"


def stored(page: Path) -> str:
    """The page as its JSON file makes it."""
    return with_tables(page.read_text(), read_json(page.with_suffix(".json")))


def read_text(page: Path) -> str:
    """The text of a page."""
    require(page.is_file(), f"{page}: no such file")
    return page.read_text()


if __name__ == "__main__":
    main()
