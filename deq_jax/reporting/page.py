"""One self-contained HTML page on many evaluations, and the files with the same figures and tables."""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deq_jax.reporting.archive import CONDITIONS, Evaluation
from deq_jax.reporting.contents import (
    FORMS,
    accuracy_table,
    cost_table,
    flags_table,
    headline_table,
    pair_table,
    radius_table,
    states_table,
)
from deq_jax.reporting.groups import (
    Curve,
    Group,
    by_training,
    clean,
    defence_pairs,
    groups_of,
    labels,
    radius_curves,
    robust,
    undefended_trainings,
)
from deq_jax.reporting.groups import training_pairs as pairs_of_trainings
from deq_jax.reporting.protocol import protocol_text
from deq_jax.reporting.statistics import Estimate
from deq_jax.reporting.tables import Table
from deq_jax.reporting.wording import DEFENCE, TRAINING, quotes, sentences, worst_case

COLORS = ("#2a6f97", "#c8553d", "#3d8b5f", "#8a5aa3", "#b9851f", "#5c677d")

STYLES = {"clean": "-", "attacked": "--"}

TITLES = {"accuracy": "accuracy (%)", "entropy": "prediction entropy (nats)", "residual": "relative residual"}

SHORT = {"deployed": "dep.", "ensemble": "ens."}

PIXELS_PER_INCH = 160


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
      name: of its PNG file.
      alt: what it shows, for those who do not see it.
      png: the file.
    """

    name: str
    alt: str
    png: bytes

    @property
    def uri(self) -> str:
        """The file itself as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page with a table.

    Attributes:
      title, note: its heading, and under which conditions.
      table: what it tells.
      pictures: that show the same.
      is_open: whether the table is shown at once.
    """

    title: str
    note: str
    table: Table
    pictures: tuple[Picture, ...] = ()
    is_open: bool = False


def report_files(evaluations: Sequence[Evaluation], missing: Sequence[Path] = ()) -> dict[str, bytes]:
    """The page, as index.html, and the PNG and CSV files of its figures and tables: name -> content.

    Args:
      evaluations: as `read_evaluations` gives them.
      missing: folders to be named as not evaluated; see `unfinished`.
    """
    groups = groups_of(evaluations)
    defences = pair_table("defences", "Every defence minus the undefended predictor", defence_pairs(groups), DEFENCE)
    trainings = pair_table("trainings", "Pairs of trainings", pairs_of_trainings(groups), TRAINING)
    names = [(i, group.training, group.defence) for i, group in enumerate(groups, 1)]
    accuracies = [
        _section(group, accuracy_table(_name("accuracy", *name), group))
        for name, group in zip(names, groups, strict=True)
    ]
    flags = [
        _section(group, flags_table(_name("flags", *name), group), is_open=bool(group.raised))
        for name, group in zip(names, groups, strict=True)
        if group.values(robust)
    ]
    dynamics, radii, cost, headline = _dynamics(groups), _radii(groups), cost_table(groups), headline_table(groups)
    page = _template().render(
        evaluations=evaluations,
        missing=missing,
        quotes=quotes(groups),
        warnings=[
            f"{g.training}, {g.defence}, seed {e.seed}: {t}"
            for g in groups
            for e in g.evaluations
            for t in e.record.warnings
        ],
        worst_case=worst_case(groups),
        is_defended=any(group.is_defended for group in groups),
        headline=headline,
        defences=defences,
        defence_sentences=[sentences(pair, DEFENCE) for pair in defence_pairs(groups)],
        trainings=trainings,
        training_sentences=[sentences(pair, TRAINING) for pair in pairs_of_trainings(groups)],
        accuracies=accuracies,
        dynamics=dynamics,
        radii=radii,
        flags=flags,
        cost=cost,
        protocols=[(f"{g.training}, {g.defence}", one, protocol_text(one)) for g in groups for one in g.evaluations],
    )
    sections = [*accuracies, *dynamics, *radii, *flags]
    tables = [headline, defences, trainings, *(section.table for section in sections), cost]
    files = {f"{table.name}.csv": table.csv().encode() for table in tables if table.sections}
    files |= {f"{picture.name}.png": picture.png for section in sections for picture in section.pictures}
    return files | {"index.html": page.encode()}


def _template():
    loader = PackageLoader("deq_jax.reporting")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _name(kind: str, place: int, *names: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join([kind, str(place), *names])).strip("-")


def _section(group: Group, table: Table, is_open: bool = False) -> Section:
    note = f"{group.setting}; attacks: {group.trials}"
    return Section(f"{group.training}, {group.defence}", note, table, is_open=is_open)


def _dynamics(groups: Sequence[Group]) -> list[Section]:
    """Sections on the states: one for the defences of each run, one for all runs without a defence."""
    known = [group for group in groups if len(group.evaluations[0].states) > 1]
    shown = [
        (training, dict(zip(labels(alike), alike, strict=True))) for (training, _), alike in by_training(known).items()
    ]
    shown += [("trainings without a defence", trainings) for trainings in undefended_trainings(known)]
    sections: list[Section] = []
    for title, labelled in shown:
        name = _name("dynamics", len(sections) + 1, title)
        pictures = tuple(_dynamics_picture(name, title, quantity, labelled) for quantity in FORMS)
        note = str(next(iter(labelled.values())).setting)
        sections.append(Section(title, note, states_table(name, labelled), pictures))
    return sections


def _dynamics_picture(name: str, title: str, quantity: str, groups: Mapping[str, Group]) -> Picture:
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


def _radii(groups: Sequence[Group]) -> list[Section]:
    sections: list[Section] = []
    for (training, setting), curves in radius_curves(groups).items():
        name = _name("radius", len(sections) + 1, training)
        picture = _radius_picture(name, training, curves)
        note = f"{setting.images_text}, {setting.norm}"
        sections.append(Section(training, note, radius_table(name, curves), (picture,)))
    return sections


def _radius_picture(name: str, training: str, curves: Sequence[Curve]) -> Picture:
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
    """As wide as a figure."""
    return textwrap.fill(label, 54)


def _figure(labels: Iterable[str]) -> tuple[Figure, Axes]:
    """With room for a legend below."""
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
