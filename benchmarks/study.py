"""Shared by the studies: trains configs with several seeds, evaluates them, compares them seed by seed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple, cast

from benchmarks.pages import check_page, distinct, made, write_page
from deq_jax import evaluate, train
from deq_jax._cli import add_set_option, command_line, console
from deq_jax.reporting import Estimate, Group, Pair, groups_of, read_evaluations
from deq_jax.storage import read_json, write_json
from deq_jax.training import Workdir, read_metrics

Row = dict[str, Any]


class Training(NamedTuple):
    """A training config of a study.

    Attributes:
      config: name of its config in configs/.
      changes: changed fields, as for --set.
      evaluation: further arguments of its evaluation.
    """

    config: str
    changes: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The first part of a workdir's name: the name of the config, and its changes."""
        return "-".join([self.config, *(change.rpartition(".")[2].replace("=", "-") for change in self.changes)])


class Study(NamedTuple):
    """The training configs of a study, and the pairs of them that are compared.

    Attributes:
      trainings: training configs by name, in the order of the table.
      pairs: the accuracies of the second are subtracted from the accuracies of the first.
      details: whether there are tables of the states of DEQs and of the validation after each epoch.
    """

    trainings: dict[str, Training]
    pairs: list[tuple[str, str]]
    details: bool = False


def run(study: Study, about: str, argv: list[str] | None = None) -> None:
    """The command line of a study: runs the missing parts and makes the tables.

    Args:
      study: the configs to train and to compare.
      about: docstring of the command.
      argv: arguments; None for the arguments of the process.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(study.trainings)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1 (default 3)")
    parser.add_argument(
        "--only", nargs="+", default=names, choices=names, metavar="NAME", help=f"of {'; '.join(names)}"
    )
    parser.add_argument("--budget", default="quick", help="attacks of the evaluations (default quick)")
    parser.add_argument("--images", type=int, metavar="N", help="the first N test images (default all)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the tables")
    add_set_option(parser, "replace a field of every config, as for deq_jax.train; repeatable")
    options = parser.parse_args(argv)
    with command_line():
        check_page(options.page, "tables")
        images = [] if options.images is None else ["--images", str(options.images)]
        folders: dict[str, list[Path]] = {name: [] for name in options.only}
        for seed in range(options.seeds):
            for name in options.only:
                training = study.trainings[name]
                workdir = options.out / f"{training.slug}-{seed}"
                where = ["--workdir", str(workdir)]
                changes = (f"seed={seed}", *training.changes, *options.assignments)
                fields = [argument for change in changes for argument in ("--set", change)]
                train.main(["--config", f"configs/{training.config}.py", *where, *fields])
                evaluate.main([*where, "--budget", options.budget, *images, *training.evaluation])
                evaluation = "-".join(["test", options.budget, *(["images", str(options.images)] if images else [])])
                folders[name].append(Workdir(workdir).evaluation(evaluation).path)
        numbers = numbers_of(study, folders, options.budget)
        write_json(options.out / "tables.json", numbers)
        console.print(tables(numbers))
        if options.page:
            write_page(options.page, numbers, {"tables": tables(numbers)})


def numbers_of(study: Study, folders: dict[str, list[Path]], budget: str) -> dict[str, Any]:
    """The content of the page, as JSON data: accuracies in percent, differences in points, each with its interval.

    Args:
      study: the configs that are compared.
      folders: folders of the evaluations of each config, one per seed.
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
        "states": [row for name, group in groups.items() for row in _states(name, group)] if study.details else [],
        "curves": [_curve(name, found[0].parents[1]) for name, found in folders.items()] if study.details else [],
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
    if len(group.evaluations[0].states) == 1:  # an explicit network
        return []
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
    return "\n".join(rows)


def _shown(estimate: dict[str, Any] | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    interval = estimate["interval"]
    ends = "" if interval is None else " [{:{s}.1f}, {:{s}.1f}]".format(*interval, s=sign)
    return f"{estimate['value']:{sign}.1f}{ends}".replace("-", "−")
