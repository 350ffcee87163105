"""Figures of an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deq_jax.core.errors import escaped
from deq_jax.evaluation.rows import Outcomes, correctness, named

CLEAN, ATTACKED = "#2a6f97", "#c8553d"

SHORT = {"deployed": "dep.", "ensemble": "ens."}


def literal(text: str) -> str:
    """The text as a label of a figure that shows it literally: not as a formula, and with escapes as `escaped` has."""
    return escaped(text).replace("$", r"\$")


def plot_states(outcomes: Outcomes, path: Path) -> None:
    """Accuracy, prediction entropy and residual along the dynamics, clean and attacked, as a PNG."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 3))
    names = list(named(outcomes.clean))
    single = [name for name in names if name in SHORT]
    clean, robust = correctness(outcomes)
    conditions = [("clean", CLEAN, clean, outcomes.clean)]
    if robust is not None and outcomes.attacked is not None:
        conditions.append(("attacked", ATTACKED, robust, outcomes.attacked))
    for label, color, correct, measured in conditions:
        right, seen = named(correct), named(measured)
        quantities = (
            {name: 100 * np.mean(right[name]) for name in names},
            {name: np.mean(row.entropy) for name, row in seen.items()},
            {name: np.mean(row.residual) for name, row in seen.items()},
        )
        for axis, means in zip(axes, quantities, strict=True):
            states = [name for name in names if name not in SHORT]
            axis.plot([names.index(name) for name in states], [means[name] for name in states], "o-", color=color)
            places = [names.index(name) for name in single]
            axis.plot(places, [means[name] for name in single], "D", color=color, label=label)
    titles = ["accuracy (%)", "prediction entropy (nats)", "relative residual"]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xticks(range(len(names)), [SHORT.get(name, name) for name in names])
        axis.set_xlabel("state")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 102)
    if not np.isnan(outcomes.clean.deployed.residual).all():
        axes[2].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=130)


def plot_accuracies(accuracies: dict[str, dict[str, float]], path: Path) -> None:
    """A grid of accuracies in percent, as a PNG.

    Args:
      accuracies: name of the images (clean, or a trial) -> name of the predictor -> accuracy.
      path: the PNG file.
    """
    names = list(next(iter(accuracies.values())))
    values = 100 * np.array([[row[name] for name in names] for row in accuracies.values()])
    figure = Figure(figsize=(2.4 + 0.55 * len(names), 1 + 0.26 * len(values)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(values, vmin=0, vmax=150, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(names)), [SHORT.get(name, name) for name in names])
    axis.set_yticks(range(len(values)), list(map(literal, accuracies)), fontsize=8)
    axis.set_title("accuracy (%) of each predictor on each trial's images", fontsize=9)
    figure.savefig(path, dpi=130)


def plot_images(outcomes: Outcomes, x: np.ndarray, path: Path, count: int = 8) -> None:
    """Some images, their adversarial noise (scaled to the full range) and the sum, as a PNG.

    Broken images come first.

    Args:
      outcomes: results of an evaluation with an attack.
      x: the images [N, H, W, C] in [0, 1].
      path: the PNG file.
      count: largest number of images.

    Raises:
      ValueError: the evaluation was without attack.
    """
    clean, robust = correctness(outcomes)
    if robust is None or outcomes.attacked is None:
        raise ValueError("plot_images: expected an evaluation with an attack")
    is_broken = clean.deployed & ~robust.deployed
    chosen = np.concatenate([np.flatnonzero(is_broken), np.flatnonzero(~is_broken)])[:count]
    figure = Figure(figsize=(1.3 * len(chosen), 4.4), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    scale = max(float(np.abs(outcomes.x_adv - x).max()), 1e-9)
    for column, i in enumerate(chosen):
        noise = (outcomes.x_adv[i] - x[i]) / (2 * scale) + 0.5
        pictures = [x[i], noise, outcomes.x_adv[i]]
        titles = [f"{outcomes.clean.deployed.label[i]}", "noise", f"{outcomes.attacked.deployed.label[i]}"]
        for axis, picture, title in zip(axes[:, column], pictures, titles, strict=True):
            axis.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    figure.suptitle(f"image and prediction, noise (at most {scale:.3f}), attacked image and prediction", fontsize=9)
    figure.savefig(path, dpi=130)
