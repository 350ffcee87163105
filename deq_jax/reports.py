"""What an evaluation found, as numbers, tables, files and one headline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from deq_jax.config import to_tree
from deq_jax.evaluation import summary
from deq_jax.plots import plot_accuracies, plot_images, plot_states
from deq_jax.records import write_json, write_npz
from deq_jax.red_flags import red_flags
from deq_jax.results import WorstCase
from deq_jax.trials import gradient_queries


def report_of(result: WorstCase) -> dict[str, Any]:
    """All numbers, as JSON data.

    rows: what was measured in each state, clean and on the worst case of each image; accuracy: of each predictor,
    on the images of each trial, and under all of them; trials: what they did and cost; defence: what the predictor is
    called; cost: of a prediction, in applications of the cell and in seconds per image; spectral_radius: mean and
    largest one of the trained cell at the equilibria of the images as they are; robust_accuracy: of the deployed
    predictor, under all trials, not to be trusted while a red flag is raised.
    """
    flags = red_flags(result) if result.attempts else []
    accuracy = result.accuracies()
    return {
        **summary(result.outcomes),
        "accuracy": accuracy,
        "cumulative": result.config.skip_broken,
        "trials": _trials(result),
        "defence": result.config.defence,
        "cost": _cost(result),
        "spectral_radius": _spectral_radius(result),
        "robust_accuracy": accuracy["union"]["deployed"] if result.attempts else None,
        "red_flags": [dataclasses.asdict(flag) for flag in flags],
        "early_state": result.early_state,
        "evaluation": to_tree(result.config),
    }


def _trials(result: WorstCase) -> dict[str, Any]:
    return {
        trial.name: {
            "attacked": int(np.sum(result.attempts[trial.name].attacked)),
            "broken": int(np.sum(result.broken(trial.name))),
            "seconds": round(result.attempts[trial.name].seconds, 2),
            "gradient_queries": gradient_queries(trial.attack),
        }
        for trial in (*result.config.trials, *result.config.extra_trials)
    }


def _cost(result: WorstCase) -> dict[str, float | None]:
    evaluations = float(np.mean(result.cost.evaluations))
    seconds = float(np.median(result.cost.seconds))
    return {"evaluations": None if np.isnan(evaluations) else evaluations, "seconds": seconds}


def _spectral_radius(result: WorstCase) -> dict[str, float | None]:
    found = {"mean": float(np.mean(result.spectral_radius)), "largest": float(np.max(result.spectral_radius))}
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def headline(report: dict[str, Any]) -> str:
    """The robust accuracy in one line, with what speaks against it."""
    if report["robust_accuracy"] is None:
        clean = report["rows"]["deployed"]["clean"]["accuracy"]
        return f"clean accuracy: {100 * clean:.2f} % of {report['images']} images; nothing has attacked them"
    number = f"{100 * report['robust_accuracy']:.2f} % of {report['images']} images"
    raised = [f"{f['name']} ({f['value']:.3g})" for f in report["red_flags"] if f["raised"]]
    missing = [f["name"] for f in report["red_flags"] if f["raised"] is None]
    unchecked = f"; not checked: {', '.join(missing)}" if missing else ""
    if raised:
        flags = f"flags raised: {', '.join(raised)}{unchecked}"
        return f"robust accuracy: NOT TRUSTWORTHY, an upper bound only: {number} ({flags})"
    return f"robust accuracy: at most {number} (no flags raised{unchecked})"


def write_report(out: Path, report: dict[str, Any], result: WorstCase, x: np.ndarray) -> None:
    """Writes numbers, per-image results and figures into the folder `out`.

    Args:
      out: gets evaluation.json, evaluation.npz, states.png, and, with trials, trials.png and images.png.
      report: of `report_of`, with whatever else was known.
      result: what was found.
      x: the images [N, H, W, C] in [0, 1].
    """
    outcomes = result.outcomes
    correct = {name: row[:, -1] for name, row in result.robust().items()}
    arrays = {"y": outcomes.y, "rows": np.array(list(correct)), "correct": np.stack(list(correct.values()))}
    arrays["spectral_radius"] = result.spectral_radius
    arrays |= {f"clean_{name}": value for name, value in outcomes.clean._asdict().items()}
    if outcomes.attacked is not None:
        arrays |= {f"attacked_{name}": value for name, value in outcomes.attacked._asdict().items()}
        arrays["x_adv"] = outcomes.x_adv
        plot_images(outcomes, x, out / "images.png")
        plot_accuracies(report["accuracy"], out / "trials.png")
    plot_states(outcomes, out / "states.png")
    write_npz(out / "evaluation.npz", arrays)
    write_json(out / "evaluation.json", report)


def accuracy_table(report: dict[str, Any]) -> Table:
    """Accuracy of every predictor on the images of every trial, for the terminal."""
    predictors = list(report["rows"])
    grid = Table(title="accuracy (%) of each predictor on the images of each trial", caption=_caption(report))
    grid.add_column("images of")
    for name in predictors:
        grid.add_column(name, justify="right", style="bold" if name == "deployed" else None)
    grid.add_column("seconds", justify="right")
    for name, row in report["accuracy"].items():
        seconds = f"{report['trials'][name]['seconds']:.1f}" if name in report["trials"] else ""
        cells = [f"{100 * row[predictor]:.2f}" for predictor in predictors]
        grid.add_row(name, *cells, seconds, style="bold" if name == "union" else None)
    return grid


def _caption(report: dict[str, Any]) -> str:
    judged = f"{report['images']} images; attacks are judged on what is deployed"
    return judged + ("; trials are cumulative" if report["cumulative"] and len(report["trials"]) > 1 else "")


def states_table(report: dict[str, Any]) -> Table:
    """Accuracy, entropy and residual of every state, clean and on the worst case of each image, for the terminal."""
    radius = report["spectral_radius"]
    known = "" if radius["mean"] is None else "; spectral radius of the cell: mean {mean:.2f}, largest {largest:.2f}"
    caption = "attacked: the worst case of each image" + known.format(**radius)
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
