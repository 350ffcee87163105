"""An evaluation as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from deq_jax.evaluation.record import diagnoses


def accuracy_table(report: dict[str, Any]) -> Table:
    """Accuracy of every predictor on the images of every trial, for the terminal."""
    predictors = list(report["rows"])
    grid = Table(title="accuracy (%) of each predictor on the images of each trial", caption=_caption(report))
    grid.add_column("images of")
    for name in predictors:
        grid.add_column(name, justify="right", style="bold" if name == "deployed" else None)
    for name in ("attacked", "seconds"):
        grid.add_column(name, justify="right")
    for name, row in report["accuracy"].items():
        trial = report["trials"].get(name)
        if trial is not None and trial["attacked"] == 0:
            grid.add_row(name, *[""] * len(predictors), "0", "nothing left to attack")
            continue
        cells = [f"{100 * row[predictor]:.2f}" for predictor in predictors]
        cost = ["", ""] if trial is None else [str(trial["attacked"]), f"{trial['seconds']:.1f}"]
        grid.add_row(name, *cells, *cost, style="bold" if name == "union" else None)
    return grid


def _caption(report: dict[str, Any]) -> str:
    judged = f"{report['images']} images; attacks are judged on what is deployed"
    return judged + ("; trials are cumulative" if report["cumulative"] and len(report["trials"]) > 1 else "")


def states_table(report: dict[str, Any]) -> Table:
    """Accuracy, entropy and residual of every state, clean and on the worst case of each image, for the terminal."""
    caption = "attacked: the worst case of each image" + diagnoses(report)
    grid = Table(title="accuracy (%), entropy (nats), relative residual", caption=caption)
    conditions = list(report["rows"]["deployed"])
    grid.add_column("state")
    for condition in conditions:
        for name in ("accuracy", "entropy", "residual"):
            grid.add_column(f"{condition}\n{name}", justify="right")
    for name, row in report["rows"].items():
        cells = []
        for condition in conditions:
            values = row[condition]
            residual = "-" if values["residual"] is None else f"{values['residual']:.2e}"
            cells += [f"{100 * values['accuracy']:.2f}", f"{values['entropy']:.3f}", residual]
        grid.add_row(name, *cells, style="bold" if name == "deployed" else None)
    return grid
