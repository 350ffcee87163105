"""The figures of a report."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deq_jax.evaluation.figures import literal
from deq_jax.reporting.archive import CONDITIONS
from deq_jax.reporting.comparisons import Curve
from deq_jax.reporting.groups import Group, clean, robust
from deq_jax.reporting.statistics import Estimate
from deq_jax.reporting.wording import worst_case

COLORS = ("#2a6f97", "#c8553d", "#3d8b5f", "#8a5aa3", "#b9851f", "#5c677d")

STYLES = {"clean": "-", "attacked": "--"}

TITLES = {"accuracy": "accuracy (%)", "entropy": "prediction entropy (nats)", "residual": "relative residual"}

SHORT = {"deployed": "dep.", "ensemble": "ens."}

PIXELS_PER_INCH = 160


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
      name: name of its PNG file.
      alt: description for readers who do not see it.
      png: the file.
    """

    name: str
    alt: str
    png: bytes

    @property
    def uri(self) -> str:
        """The file itself as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def dynamics_picture(name: str, title: str, quantity: str, groups: Mapping[str, Group]) -> Picture:
    """A quantity of the states, clean and attacked; each labelled group has a colour."""
    figure, axis = _figure(groups)
    states = list(dict.fromkeys(state for group in groups.values() for state in group.evaluations[0].states))
    states.sort(key=lambda state: state in SHORT)
    for color, (label, group) in zip(_colors(groups), groups.items(), strict=True):
        for condition in CONDITIONS:
            means = [group.in_state(state, condition, quantity) for state in states]
            if any(means):
                raw = sum(state not in SHORT for state in states)
                look = {"color": color, "linestyle": STYLES[condition]}
                shown_label = _wrapped(label) if condition == CONDITIONS[0] else None
                _plot(axis, range(raw), means[:raw], marker="o", label=shown_label, **look)
                _plot(axis, range(raw, len(states)), means[raw:], marker="D", **(look | {"linestyle": "none"}))
    every = max(1, len(states) // 12)
    shown = [i for i, state in enumerate(states) if state in SHORT or i % every == 0]
    axis.set_xticks(shown, [SHORT.get(states[i], states[i]) for i in shown], fontsize=7)
    axis.set_title(f"{TITLES[quantity]}; dashed: attacked", fontsize=9)
    if quantity == "residual":
        axis.set_yscale("log")
    what = f"{TITLES[quantity]} of the states, clean and attacked; {title}: {', '.join(groups)}"
    alt = f"{what}. The numbers are in the table below."
    return Picture(f"{name}-{quantity}", alt, _png(figure))


def radius_picture(name: str, training: str, curves: Sequence[Curve]) -> Picture:
    """Clean and robust accuracy against the radius; each curve has a colour."""
    figure, axis = _figure([curve.label for curve in curves])
    for color, curve in zip(_colors(curves), curves, strict=True):
        radii = [0.0, *(group.setting.epsilon for group in curve.groups)]
        means = [curve.groups[0].accuracy(clean), *(group.accuracy(robust) for group in curve.groups)]
        _plot(axis, radii, means, color=color, linestyle="-", marker="o", label=_wrapped(curve.label))
        flagged = [i for i, group in enumerate(curve.groups, 1) if group.raised]
        hollow = {"color": color, "linestyle": "none", "marker": "o", "markerfacecolor": "white", "zorder": 3}
        _plot(axis, [radii[i] for i in flagged], [means[i] for i in flagged], **hollow)
    title = worst_case([group for curve in curves for group in curve.groups])
    axis.set_title(f"accuracy (%), {title}; hollow: flagged", fontsize=9)
    axis.set_xlabel("epsilon", fontsize=8)
    axis.set_ylim(bottom=0)
    alt = f"Robust accuracy of {training} against the radius epsilon; defences: "
    return Picture(name, alt + ", ".join(curve.label for curve in curves) + ".", _png(figure))


def _plot(axis: Axes, x: Iterable[float], means: Sequence[Estimate | None], **look: Any) -> None:
    y = [np.nan if mean is None else mean.value for mean in means]
    ends = [
        (value, value) if mean is None or mean.interval is None else mean.interval
        for mean, value in zip(means, y, strict=True)
    ]
    errors = np.abs(np.transpose(ends) - y)
    axis.errorbar(list(x), y, errors, markersize=3.5, linewidth=1.3, elinewidth=0.8, capsize=2, **look)


def _wrapped(label: str) -> str:
    """Wraps a label to the width of a figure."""
    return literal(textwrap.fill(label, 54))


def _figure(labels: Iterable[str]) -> tuple[Figure, Axes]:
    """A figure with room for a legend below."""
    lines = sum(1 + _wrapped(label).count("\n") for label in labels)
    figure = Figure(figsize=(3.7, 2.9 + 0.15 * lines), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    axis.tick_params(which="both", labelsize=8)
    return figure, axis


def _png(figure: Figure) -> bytes:
    figure.legend(loc="outside lower center", fontsize=7, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, dpi=PIXELS_PER_INCH, format="png")
    return file.getvalue()


def _colors(things: Sized) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(things))]
