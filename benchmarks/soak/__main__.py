"""A fault campaign: tiny training runs and evaluations are killed, stopped and damaged at random, then run again.

    python -m benchmarks.soak --injections 200 --out runs/soak
    python -m benchmarks.soak --minutes 30 --out runs/soak

Allowed are two outcomes. The result is bitwise that of an undisturbed run, after the same command was run again where
it was stopped. Or the command refuses in one line, with a documented exit code, and resumes once the cause is undone.
Anything else is counted, and gives exit code 1. The same command resumes a campaign and repeats no injection.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path

import jax

from benchmarks.pages import check_page, distinct, made, write_page
from benchmarks.soak.campaign import LIMIT, Campaign, Injection, carry_out, drawn
from benchmarks.soak.jobs import FAST, IMPORTED, ROOT
from benchmarks.soak.kinds import KINDS
from benchmarks.soak.results import numbers_of, tables
from deq_jax._cli import command_line, console, fail
from deq_jax.storage import make_folder, write_json

KINDS_HELP = f"kinds of faults, of: {'; '.join(KINDS)}; default: all"

FORK = multiprocessing.get_context("fork")


def main(argv: list[str] | None = None) -> None:
    """Makes the injections that are missing, prints the table, and writes it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, metavar="N", help="number of injections; default: 200, or no end")
    parser.add_argument("--minutes", type=float, metavar="M", help="no injection begins later; default: no end")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of all choices; default: 0")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help=KINDS_HELP)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="injections at a time; default: 1")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), metavar="DIR", help="default: runs/soak")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the table")
    options = parser.parse_args(argv)
    with command_line():
        check_page(options.page, "tables")
        begin_at(make_folder(options.out))
        campaign = Campaign(options.out, options.seed)
        campaign.prepare(chosen(campaign, options, stop=options.injections or 200))
        several(options.workers, lambda worker: work(campaign, options, worker))
        rows = campaign.outcomes()
        about = {"made": [*distinct("injected", rows), made("tabulated")], "seed": options.seed, "limit": LIMIT}
        found = about | {"left_out": sorted(campaign.left_out)} | numbers_of(rows)
        write_json(options.out / "failures.json", found)
        console.print(tables(found))
        if options.page:
            write_page(options.page, found, {"tables": tables(found)})
        faults = [row for row in found["injections"] if row["problems"]]
        if faults:
            fail(f"{len(faults)} of {len(found['injections'])} injections had an outcome that is not allowed", 1)


def begin_at(out: Path) -> None:
    """Imports what all processes need, and chooses how these compute and where they keep compiled code."""
    os.environ |= {
        "XLA_FLAGS": FAST,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(out.absolute() / "cache"),
    }
    jax.config.update("jax_platforms", "cpu")  # it was imported before
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(ROOT)
    for name in IMPORTED:
        import_module(name)


def several(workers: int, do: Callable[[int], None]) -> None:
    """Does the work in so many processes."""
    processes = [FORK.Process(target=do, args=(worker,)) for worker in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def work(campaign: Campaign, options: argparse.Namespace, worker: int) -> None:
    """Carries out each of the worker's injections that has no outcome yet."""
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    count = options.injections or (200 if options.minutes is None else None)
    for injection in chosen(campaign, options, worker, count, options.workers):
        if time.monotonic() > end:
            break
        file = campaign.outcome_file(injection.number)
        if not file.exists():
            row = carry_out(campaign, injection)
            file.parent.mkdir(exist_ok=True)
            write_json(file, row)
            told = f"{injection.number:4d} {row['kind']}, {row['command']}, {row['processes']}: {row['about']}: "
            console.print(told + (", ".join(row["problems"]).upper() or row["outcome"]))


def chosen(
    campaign: Campaign, options: argparse.Namespace, start: int = 0, stop: int | None = None, step: int = 1
) -> Iterator[Injection]:
    """Some of the injections of the kinds that are asked for and possible here."""
    return islice(drawn(campaign.seed, set(options.only) - campaign.left_out), start, stop, step)


if __name__ == "__main__":
    main()
