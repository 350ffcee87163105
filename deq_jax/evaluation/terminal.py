"""An evaluation as tables on the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from deq_jax.evaluation.record import EvaluationRecord
from deq_jax.evaluation.rows import Means
from deq_jax.evaluation.wording import diagnoses


def accuracy_table(record: EvaluationRecord) -> Table:
    """Accuracy of every predictor on the images of every trial, for the terminal."""
    predictors = list(record.rows)
    caption = f"{record.images} images; success is measured on the deployed predictor"
    cumulative = "; trials are cumulative" if record.cumulative and len(record.trials) > 1 else ""
    grid = Table(title="accuracy (%) of each predictor on the images of each trial", caption=caption + cumulative)
    grid.add_column("images of")
    for name in predictors:
        grid.add_column(name, justify="right", style="bold" if name == "deployed" else None)
    for name in ("attacked", "seconds"):
        grid.add_column(name, justify="right")
    for name, row in record.accuracy.items():
        trial = record.trials.get(name)
        if trial is not None and trial.attacked == 0:
            grid.add_row(name, *[""] * len(predictors), "0", "nothing left to attack")
            continue
        cells = [f"{100 * row[predictor]:.2f}" for predictor in predictors]
        cost = ["", ""] if trial is None else [str(trial.attacked), f"{trial.seconds:.1f}"]
        grid.add_row(name, *cells, *cost, style="bold" if name == "union" else None)
    return grid


def classes_table(record: EvaluationRecord) -> Table:
    """Accuracy of the deployed predictor on each class, clean and on the worst case of each image, for the terminal."""
    grid = Table(title="accuracy (%) of each class", caption="attacked: the worst case of each image")
    grid.add_column("class")
    for name in ("images", "clean", "attacked"):
        grid.add_column(name, justify="right")
    for one in record.classes:
        attacked = "-" if one.attacked is None else f"{100 * one.attacked:.2f}"
        grid.add_row(Text(one.name), str(one.images), f"{100 * one.clean:.2f}", attacked)
    return grid


def states_table(record: EvaluationRecord) -> Table:
    """Accuracy, entropy and residual of every state, clean and on the worst case of each image, for the terminal."""
    caption = "attacked: the worst case of each image" + diagnoses(record)
    grid = Table(title="accuracy (%), entropy (nats), relative residual", caption=caption)
    is_attacked = record.rows["deployed"].attacked is not None
    grid.add_column("state")
    for condition in ("clean", "attacked") if is_attacked else ("clean",):
        for name in ("accuracy", "entropy", "residual"):
            grid.add_column(f"{condition}\n{name}", justify="right")
    for name, row in record.rows.items():
        attacked = [] if row.attacked is None else _cells(row.attacked)
        grid.add_row(name, *_cells(row.clean), *attacked, style="bold" if name == "deployed" else None)
    return grid


def _cells(means: Means) -> list[str]:
    residual = "-" if means.residual is None else f"{means.residual:.2e}"
    return [f"{100 * means.accuracy:.2f}", f"{means.entropy:.3f}", residual]
