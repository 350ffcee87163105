"""An evaluation as numbers, files and one headline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from deq_jax.evaluation.figures import plot_accuracies, plot_images, plot_states
from deq_jax.evaluation.measure import mean_and_largest, summary
from deq_jax.evaluation.red_flags import red_flags
from deq_jax.evaluation.results import WorstCase
from deq_jax.evaluation.verdicts import exact_interval, warnings_of
from deq_jax.storage.files import write_json, write_npz
from deq_jax.storage.trees import to_tree


def report_of(result: WorstCase) -> dict[str, Any]:
    """All numbers, as JSON data.

    rows: what was measured in each state, clean and on the worst case of each image; accuracy: of each predictor,
    on the images of each trial, and under all of them; trials: what they did and cost, and which threat model they
    declare, None if their images alone were checked; defence: what the predictor is
    called; cost: of a prediction, in applications of the cell and in seconds per image; spectral_radius: mean and
    largest one of the trained cell at the equilibria of the images as they are, and how many have not settled;
    adjoint_residual: mean and largest one of the trained estimator's adjoint states; robust_accuracy: of the deployed
    predictor, under all trials, not to be trusted while a red flag is raised; intervals: of the deployed predictor's
    accuracies, clean and under all trials, for other images; warnings: sentences on what is wrong with the model.
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
        "adjoint_residual": mean_and_largest(result.adjoint_residual),
        "robust_accuracy": accuracy["union"]["deployed"] if result.attempts else None,
        "intervals": {
            name: exact_interval(accuracy[name]["deployed"], len(result.y))
            for name in ("clean", "union")
            if name in accuracy
        },
        "warnings": warnings_of(result),
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
            "threat": to_tree(getattr(trial.attack, "threat", None)),
            "gradient_queries": getattr(trial.attack, "gradient_queries", None),
        }
        for trial in (*result.config.trials, *result.config.extra_trials)
    }


def _cost(result: WorstCase) -> dict[str, float | None]:
    evaluations = float(np.mean(result.cost.evaluations))
    seconds = float(np.median(result.cost.seconds))
    return {"evaluations": None if np.isnan(evaluations) else evaluations, "seconds": seconds}


def _spectral_radius(result: WorstCase) -> dict[str, float | None]:
    found = mean_and_largest(result.spectral_radius)
    settled = result.radius_settled
    return found | {"unsettled": None if found["mean"] is None or settled is None else int(np.sum(~settled))}


def headline(report: dict[str, Any]) -> str:
    """The robust accuracy in one line, with what speaks against it; then a line for each raised flag and warning."""
    raised = [flag for flag in report["red_flags"] if flag["raised"]]
    explained = [f"{flag['name']}: {flag['explanation']}" for flag in raised]
    warned = [f"warning: {text}" for text in report["warnings"]]
    return "\n".join([_number_line(report, raised), *explained, *warned])


def _number_line(report: dict[str, Any], raised: list[dict[str, Any]]) -> str:
    if report["robust_accuracy"] is None:
        clean = _accuracy_text(report, report["rows"]["deployed"]["clean"]["accuracy"], "clean")
        return f"clean accuracy: {clean}; nothing has attacked them"
    number = _accuracy_text(report, report["robust_accuracy"], "union")
    missing = [flag["name"] for flag in report["red_flags"] if flag["raised"] is None]
    unchecked = f"; not checked: {', '.join(missing)}" if missing else ""
    if raised:
        flags = ", ".join(f"{flag['name']} ({flag['value']:.3g})" for flag in raised)
        return f"robust accuracy: NOT TRUSTWORTHY, an upper bound only: {number}; flags raised: {flags}{unchecked}"
    return f"robust accuracy: at most {number}; no flags raised{unchecked}"


def _accuracy_text(report: dict[str, Any], accuracy: float, name: str) -> str:
    low, high = (100 * end for end in report["intervals"][name])
    return f"{100 * accuracy:.2f} % of {report['images']} images (95 %: {low:.1f} to {high:.1f})"


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
    further = {"radius_settled": result.radius_settled, "adjoint_residual": result.adjoint_residual}
    arrays |= {name: values for name, values in further.items() if values is not None}
    arrays |= {f"clean_{name}": value for name, value in outcomes.clean._asdict().items()}
    if outcomes.attacked is not None:
        arrays |= {f"attacked_{name}": value for name, value in outcomes.attacked._asdict().items()}
        arrays["x_adv"] = outcomes.x_adv
        plot_images(outcomes, x, out / "images.png")
        plot_accuracies(report["accuracy"], out / "trials.png")
    plot_states(outcomes, out / "states.png")
    write_npz(out / "evaluation.npz", arrays)
    write_json(out / "evaluation.json", report)


def diagnoses(report: dict[str, Any]) -> str:
    """Spectral radius and adjoint residual, where they are known, for a caption."""
    radius, adjoint, known = report["spectral_radius"], report["adjoint_residual"], ""
    if radius["mean"] is not None:
        known += "; spectral radius of the cell: mean {mean:.2f}, largest {largest:.2f}".format(**radius)
        known += f" ({radius['unsettled']} not settled)" if radius["unsettled"] else ""
    if adjoint["mean"] is not None:
        known += "; adjoint residual: mean {mean:.2e}, largest {largest:.2e}".format(**adjoint)
    return known
