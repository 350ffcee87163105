"""Shared by the studies: trains configs with several seeds, evaluates them, compares them seed by seed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax

from benchmarks.pages import check_page, distinct, made, write_page
from deq_jax import evaluate, train
from deq_jax._cli import add_set_option, command_line, console
from deq_jax.reporting import Estimate, Group, Pair, groups_of, read_evaluations
from deq_jax.storage import read_json, write_json
from deq_jax.training import Workdir, read_metrics

Row = dict[str, Any]


class Entry(NamedTuple):
    """A row of a study: a training config, and how its runs are evaluated. Entries may share their runs.

    Attributes:
      config: name of its config in configs/.
      changes: changed fields, as for --set.
      evaluation: further arguments of its evaluation; with --config among them, the budget of the command is not used.
      transfers: suite -> entry, evaluated before, whose final images are tried on this one.
      seeds: how many of the command's seeds are evaluated, if it is a costly one.
    """

    config: str
    changes: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    transfers: Mapping[str, str] = MappingProxyType({})
    seeds: int | None = None

    @property
    def slug(self) -> str:
        """The first part of a workdir's name: the name of the config, and its changes."""
        return "-".join([self.config, *(change.rpartition(".")[2].replace("=", "-") for change in self.changes)])


def other_states(name: str, entry: Entry, **further: str) -> dict[str, Entry]:
    """The entry `name` with other states deployed, which also meet the images made for it, and those of others."""
    return {
        f"{name}, {readout} state": _met(name, entry, ("--readout", readout), further)
        for readout in ("early", "ensemble")
    }


def reduced(name: str, entry: Entry, **further: str) -> dict[str, Entry]:
    """The entry `name` with input entropy reduction, which also meets the images made for it, and those of others."""
    return {f"{name}, entropy reduction": _met(name, entry, ("--config", "configs/eval_entropy_quick.py"), further)}


def _met(name: str, entry: Entry, arguments: tuple[str, ...], further: dict[str, str]) -> Entry:
    return entry._replace(evaluation=(*entry.evaluation, *arguments), transfers={"reference": name, **further})


class Study(NamedTuple):
    """The rows of a study, and the pairs of them that are compared.

    Attributes:
      entries: rows by name, in the order of the table.
      pairs: the accuracies of the second are subtracted from the accuracies of the first.
      states: the DEQs whose states have a table.
      curves: the entries whose validation after each epoch has a table.
      attacks: the entries whose attacks have a table.
    """

    entries: dict[str, Entry]
    pairs: list[tuple[str, str]]
    states: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()


def run(study: Study, about: str, argv: list[str] | None = None) -> None:
    """The command line of a study: runs the missing parts and makes the tables.

    Args:
      study: its rows, and the pairs that are compared.
      about: docstring of the command.
      argv: arguments; None for the arguments of the process.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(study.entries)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="K", help="the first of them (default 0)")
    parser.add_argument(
        "--only", nargs="+", default=names, choices=names, metavar="NAME", help=f"of {'; '.join(names)}"
    )
    parser.add_argument("--budget", default="quick", help="attacks of the evaluations (default quick)")
    parser.add_argument("--images", type=int, metavar="N", help="the first N test images (default all)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time in the evaluations")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the tables")
    add_set_option(parser, "replace a field of every config, as for deq_jax.train; repeatable")
    options = parser.parse_args(argv)
    with command_line():
        check_page(options.page, "tables")
        folders: dict[str, list[Path]] = {name: [] for name in options.only}
        for i in range(options.seeds):
            for name in [name for name in options.only if i < (study.entries[name].seeds or options.seeds)]:
                run_entry(study, name, options.first_seed + i, options)
                folders[name].append(folder_of(study, name, options.first_seed + i, options))
        numbers = numbers_of(study, folders, options.budget)
        write_json(options.out / "tables.json", numbers)
        console.print(tables(numbers))
        if options.page:
            write_page(options.page, numbers, {"tables": tables(numbers)})


def run_entry(study: Study, name: str, seed: int, options: argparse.Namespace) -> None:
    """Trains and evaluates an entry with one seed; finished parts are not computed again."""
    entry = study.entries[name]
    changes = (f"seed={seed}", *entry.changes, *options.assignments)
    fields = [argument for change in changes for argument in ("--set", change)]
    workdir = ["--workdir", str(options.out / f"{entry.slug}-{seed}")]
    train.main(["--config", f"configs/{entry.config}.py", *workdir, *fields])
    sources = {suite: folder_of(study, other, seed, options) for suite, other in entry.transfers.items()}
    transfers = [argument for suite, path in sources.items() for argument in ("--transfer", f"{suite}={path}")]
    evaluate.main([*evaluation_arguments(entry, seed, options), *transfers])
    jax.clear_caches()


def evaluation_arguments(entry: Entry, seed: int, options: argparse.Namespace) -> list[str]:
    """The arguments of the evaluation of an entry, but for transferred images."""
    budget = [] if "--config" in entry.evaluation else ["--budget", options.budget]
    sizes = {"--images": options.images, "--batch-size": options.batch_size}
    given = [argument for option, size in sizes.items() if size is not None for argument in (option, str(size))]
    return ["--workdir", str(options.out / f"{entry.slug}-{seed}"), *budget, *given, *entry.evaluation]


def folder_of(study: Study, name: str, seed: int, options: argparse.Namespace) -> Path:
    """Folder of the evaluation of an entry."""
    chosen = evaluate.parse(evaluation_arguments(study.entries[name], seed, options))
    return evaluate.folder_of(chosen)


def numbers_of(study: Study, folders: dict[str, list[Path]], budget: str) -> dict[str, Any]:
    """The content of the page, as JSON data: accuracies in percent, differences in points, each with its interval.

    Args:
      study: its rows, and the pairs that are compared.
      folders: folders of the evaluations of each row, one per seed.
      budget: budget of the evaluations.
    """
    groups = {name: groups_of(read_evaluations(found))[0] for name, found in folders.items()}
    one = next(iter(groups.values())).evaluations[0].record
    return {
        "budget": budget,
        "images": one.images,
        "made": [*_made(groups), made("tabulated")],
        "rows": [_row(name, group) for name, group in groups.items()],
        "differences": [_difference(a, b, groups) for a, b in study.pairs if a in groups and b in groups],
        "states": [row for name in study.states if name in groups for row in _states(name, groups[name])],
        "curves": [_curve(name, folders[name][0].parents[1]) for name in study.curves if name in folders],
        "attacks": [row for name in study.attacks if name in groups for row in _attacks(name, groups[name])],
    }


def _made(groups: dict[str, Group]) -> list[Row]:
    """The environments of the runs and of their evaluations, each once. Older runs have none."""
    evaluations = [one for group in groups.values() for one in group.evaluations]
    files = [Workdir(one.folder.parents[1]).environment for one in evaluations]
    trained = [record for file in files if file.exists() for record in cast(list[Row], read_json(file))]
    evaluated = [cast(Row, one.provenance.environment or {}) for one in evaluations]
    return [*distinct("trained", trained), *distinct("evaluated", evaluated)]


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


def _states(name: str, group: Group) -> list[Row]:
    """Accuracy in percent, entropy and residual of each state of a DEQ, on clean images and on the worst ones."""
    return [
        {"training": name, "state": state}
        | {
            f"{condition} {quantity}": estimate and estimate.value
            for quantity in ("accuracy", "entropy", "residual")
            for condition in ("clean", "attacked")
            for estimate in [group.in_state(state, condition, quantity)]
        }
        for state in group.evaluations[0].states
    ]


def _curve(name: str, workdir: Path) -> Row:
    """Accuracies after each epoch of the run of the first seed, on held-out images."""
    lines = [line for line in read_metrics(Workdir(workdir).metrics) if line["split"] == "validation"]
    return {"training": name} | {key: [line[key] for line in lines] for key in ("accuracy", "adversarial_accuracy")}


def _attacks(name: str, group: Group) -> list[Row]:
    """Accuracy of the deployed predictor under each attack, mean over the seeds in percent.

    Of the attacks on one intermediate state, which differ in their unrolling, the strongest of each seed counts.
    """
    tables = [one.record.accuracy for one in group.evaluations]
    kinds: dict[str, list[str]] = {}
    for attack in tables[0]:
        kinds.setdefault(attack.rsplit("-", 2)[0] if "Intermediate" in attack else attack, []).append(attack)
    strongest = {
        kind: [min(table[attack]["deployed"] for attack in attacks) for table in tables]
        for kind, attacks in kinds.items()
    }
    return [
        {"training": name, "attack": kind, "of": len(kinds[kind]), "accuracy": 100 * sum(found) / len(found)}
        for kind, found in strongest.items()
    ]


def _json(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else {"value": estimate.value, "interval": estimate.interval}


def tables(numbers: dict[str, Any]) -> str:
    """The tables of training configs, of differences and, where there are some, of states and epochs, as Markdown."""
    rows = ["| training | clean | **worst case** | of each seed | residual | flags |", "|---|---|---|---|---|---|"]
    for row in numbers["rows"]:
        seeds = ", ".join(f"{100 * value:.1f}" for value in row["of_seeds"])
        residual = "" if row["residual"] is None else f"{row['residual']:.3f}"
        flags = ", ".join(f"{name} {count}/{len(row['seeds'])}" for name, count in row["flags"].items())
        clean, robust = (_shown(row[what]) for what in ("clean", "robust"))
        rows.append(f"| {row['training']} | {clean} | {robust} | {seeds} | {residual} | {flags} |")
    if numbers["differences"]:
        rows += ["", "| points | clean | **worst case** |", "|---|---|---|"]
    for row in numbers["differences"]:
        clean, robust = (_shown(row[what], "+") for what in ("clean", "robust"))
        rows.append(f"| {row['first']}, minus {row['second']} | {clean} | {robust} |")
    if numbers["states"]:
        rows += ["", "| training | state | accuracy | on worst images | entropy | on worst images | residual |"]
        rows.append("|---|---|---|---|---|---|---|")
    for row in numbers["states"]:
        accuracies = [f"{row[f'{condition} accuracy']:.1f}" for condition in ("clean", "attacked")]
        others = [row["clean entropy"], row["attacked entropy"], row["clean residual"]]
        cells = [*accuracies, *("" if value is None else f"{value:.2f}" for value in others)]
        rows.append(f"| {row['training']} | {row['state']} | {' | '.join(cells)} |")
    if numbers["curves"]:
        epochs = range(1, 1 + max(len(row["accuracy"]) for row in numbers["curves"]))
        rows += ["", "| clean / under attack, after epoch | " + " | ".join(map(str, epochs)) + " |"]
        rows.append("|---" * (1 + len(epochs)) + "|")
    for row in numbers["curves"]:
        both = zip(row["accuracy"], row["adversarial_accuracy"], strict=True)
        rows.append(f"| {row['training']} | " + " | ".join(f"{100 * a:.1f} / {100 * b:.1f}" for a, b in both) + " |")
    if numbers.get("attacks"):
        rows += ["", "| training | images of | accuracy |", "|---|---|---|"]
    for row in numbers.get("attacks", []):
        attack = row["attack"] if row["of"] == 1 else f"{row['attack']}, strongest of {row['of']}"
        rows.append(f"| {row['training']} | {attack} | {row['accuracy']:.1f} |")
    return "\n".join(rows)


def _shown(estimate: dict[str, Any] | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    interval = estimate["interval"]
    ends = "" if interval is None else " [{:{s}.1f}, {:{s}.1f}]".format(*interval, s=sign)
    return f"{estimate['value']:{sign}.1f}{ends}".replace("-", "−")
