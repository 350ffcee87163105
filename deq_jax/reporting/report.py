"""A report on many evaluations: everything that a page says, before it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deq_jax.reporting.archive import Evaluation
from deq_jax.reporting.comparisons import (
    Pair,
    by_training,
    defence_pairs,
    labels,
    radius_curves,
    training_pairs,
    undefended_trainings,
)
from deq_jax.reporting.contents import (
    FORMS,
    accuracy_table,
    classes_table,
    cost_table,
    flags_table,
    headline_table,
    pair_table,
    radius_table,
    states_table,
)
from deq_jax.reporting.figures import Picture, dynamics_picture, radius_picture
from deq_jax.reporting.groups import Group, groups_of, robust
from deq_jax.reporting.protocol import protocol_text
from deq_jax.reporting.tables import Table
from deq_jax.reporting.wording import DEFENCE, TRAINING, Quote, Words, quotes, sentences, worst_case

LONGEST = 120  # name of a file


@dataclass(frozen=True)
class Section:
    """A part of the page with a table.

    Attributes:
      title, note: its heading and conditions.
      table: its content.
      pictures: figures of the same numbers.
      is_open: whether the table is shown at once.
    """

    title: str
    note: str
    table: Table
    pictures: tuple[Picture, ...] = ()
    is_open: bool = False


@dataclass(frozen=True)
class Panel:
    """Some images of a group, clean and attacked: heading, conditions and the figure."""

    title: str
    note: str
    picture: Picture


@dataclass(frozen=True)
class Comparison:
    """Pairs of groups.

    Attributes:
      pairs: the pairs that are compared.
      table: a row for each pair.
      sentences: one for each pair.
    """

    pairs: tuple[Pair, ...]
    table: Table
    sentences: tuple[str, ...]

    @classmethod
    def of(cls, name: str, caption: str, pairs: Sequence[Pair], words: Words) -> Comparison:
        """The comparison of pairs, in these words."""
        texts = tuple(sentences(pair, words) for pair in pairs)
        return cls(tuple(pairs), pair_table(name, caption, pairs, words), texts)


@dataclass(frozen=True)
class Protocol:
    """Everything that determines an evaluation: its title, a note on which one it is, and the text."""

    title: str
    note: str
    text: str


@dataclass(frozen=True)
class Report:
    """The content of a page on many evaluations.

    Attributes:
      evaluations: all of them.
      missing: folders that are named as not evaluated.
      groups: the evaluations put together over training seeds.
      quotes: the robust accuracy to quote in each setting.
      warnings: sentences on faults of a model.
      worst_case: name of the worst case of all trials.
      is_defended: whether any group has a defence.
      headline, cost: tables of all groups.
      defences, trainings: comparisons of defences and of training configs.
      accuracies, classes, flags: a section for each group, but without classes in older files, and without flags where
        nothing has attacked.
      panels: images of each group that was attacked, of its first seed that still has them.
      dynamics, radii: sections with figures.
      protocols: one for each evaluation.

    Examples:
      >>> from deq_jax.reporting import Report
      >>> Report.of([]).groups
      ()
    """

    evaluations: tuple[Evaluation, ...]
    missing: tuple[Path, ...]
    groups: tuple[Group, ...]
    quotes: tuple[Quote, ...]
    warnings: tuple[str, ...]
    worst_case: str
    is_defended: bool
    headline: Table
    defences: Comparison
    trainings: Comparison
    accuracies: tuple[Section, ...]
    classes: tuple[Section, ...]
    panels: tuple[Panel, ...]
    dynamics: tuple[Section, ...]
    radii: tuple[Section, ...]
    flags: tuple[Section, ...]
    cost: Table
    protocols: tuple[Protocol, ...]

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation], missing: Sequence[Path] = ()) -> Report:
        """Computes all of it once.

        Args:
          evaluations: as `read_evaluations` gives them.
          missing: folders to be named as not evaluated; see `unfinished`.
        """
        groups = groups_of(evaluations)
        everyone = [(group, one) for group in groups for one in group.evaluations]
        return cls(
            evaluations=tuple(evaluations),
            missing=tuple(missing),
            groups=tuple(groups),
            quotes=tuple(quotes(groups)),
            warnings=tuple(
                f"{group.training}, {group.defence}, seed {one.seed}: {text}"
                for group, one in everyone
                for text in one.record.warnings
            ),
            worst_case=worst_case(groups),
            is_defended=any(group.is_defended for group in groups),
            headline=headline_table(groups),
            defences=Comparison.of(
                "defences", "Every defence minus the undefended predictor", defence_pairs(groups), DEFENCE
            ),
            trainings=Comparison.of("trainings", "Pairs of training configs", training_pairs(groups), TRAINING),
            accuracies=tuple(
                _section(group, accuracy_table(_name("accuracy", i, group.training, group.defence), group))
                for i, group in enumerate(groups, 1)
            ),
            classes=tuple(
                _section(group, classes_table(_name("classes", i, group.training, group.defence), group))
                for i, group in enumerate(groups, 1)
                if any(one.record.classes for one in group.evaluations)
            ),
            panels=tuple(_panels(groups)),
            dynamics=tuple(_dynamics(groups)),
            radii=tuple(_radii(groups)),
            flags=tuple(
                _section(
                    group,
                    flags_table(_name("flags", i, group.training, group.defence), group),
                    is_open=bool(group.raised),
                )
                for i, group in enumerate(groups, 1)
                if group.values(robust)
            ),
            cost=cost_table(groups),
            protocols=tuple(
                Protocol(
                    f"{group.training}, {group.defence}",
                    f"training seed {one.seed}, {one.folder}",
                    protocol_text(one),
                )
                for group, one in everyone
            ),
        )

    @property
    def sections(self) -> tuple[Section, ...]:
        """All sections."""
        return (*self.accuracies, *self.classes, *self.dynamics, *self.radii, *self.flags)

    @property
    def pictures(self) -> list[Picture]:
        """All figures."""
        of_sections = [picture for section in self.sections for picture in section.pictures]
        return [*(panel.picture for panel in self.panels), *of_sections]

    @property
    def tables(self) -> list[Table]:
        """All tables that have rows."""
        comparisons = self.defences.table, self.trainings.table
        tables = [self.headline, *comparisons, *(section.table for section in self.sections), self.cost]
        return [table for table in tables if table.sections]


def _name(kind: str, place: int, *names: str) -> str:
    """A file's name without an ending; the place makes it one of its own."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join([kind, str(place), *names]))[:LONGEST].strip("-")


def _section(group: Group, table: Table, is_open: bool = False) -> Section:
    note = f"{group.setting}; attacks: {group.trials}"
    return Section(f"{group.training}, {group.defence}", note, table, is_open=is_open)


def _panels(groups: Sequence[Group]) -> list[Panel]:
    panels = []
    for i, group in enumerate(groups, 1):
        seed, png = next(iter(group.values(lambda one: one.panel).items()), (0, None))
        if png is not None:
            title = f"{group.training}, {group.defence}"
            alt = f"Some images of {title}: each with its prediction, the noise, and the attacked image with its own."
            picture = Picture(_name("images", i, group.training, group.defence), alt, png)
            panels.append(Panel(title, f"training seed {seed}; {group.setting}; attacks: {group.trials}", picture))
    return panels


def _dynamics(groups: Sequence[Group]) -> list[Section]:
    """Sections on the states: one for the defences of each run, one for all runs without a defence."""
    known = [group for group in groups if len(group.evaluations[0].states) > 1]
    shown = [
        (training, dict(zip(labels(alike), alike, strict=True))) for (training, _), alike in by_training(known).items()
    ]
    shown += [("training configs without a defence", trainings) for trainings in undefended_trainings(known)]
    sections: list[Section] = []
    for title, labelled in shown:
        name = _name("dynamics", len(sections) + 1, title)
        pictures = tuple(dynamics_picture(name, title, quantity, labelled) for quantity in FORMS)
        note = str(next(iter(labelled.values())).setting)
        sections.append(Section(title, note, states_table(name, labelled), pictures))
    return sections


def _radii(groups: Sequence[Group]) -> list[Section]:
    sections: list[Section] = []
    for (training, setting), curves in radius_curves(groups).items():
        name = _name("radius", len(sections) + 1, training)
        picture = radius_picture(name, training, curves)
        note = f"{setting.images_text}, {setting.norm}"
        sections.append(Section(training, note, radius_table(name, curves), (picture,)))
    return sections
