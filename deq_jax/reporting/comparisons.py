"""Groups beside each other: pairs to compare, and evaluations at several radii."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from deq_jax.reporting.archive import Setting
from deq_jax.reporting.groups import Group, Quantity, numbered, reference, robust
from deq_jax.reporting.statistics import Estimate, paired_difference


@dataclass(frozen=True)
class Pair:
    """Two groups that are compared seed by seed and image by image: the first one minus the second one.

    Attributes:
      first: the group from which is subtracted.
      second: the group that is subtracted.

    Examples:
      >>> from deq_jax.reporting import Group, Pair
      >>> pair = Pair(Group("trades", "none", ()), Group("pgd-at", "none", ()))
      >>> pair.is_flagged, pair.difference(lambda evaluation: evaluation.robust)
      (False, None)
    """

    first: Group
    second: Group

    @property
    def is_fair(self) -> bool:
        """Whether both have met comparable attacks: a defended predictor also the images that broke the other one."""
        shown, attacked = (self.first.values(quantity).keys() for quantity in (reference, robust))
        return self.first.is_defended == self.second.is_defended or shown >= attacked

    @property
    def is_flagged(self) -> bool:
        """Whether a red flag is raised for either."""
        return bool(self.first.raised or self.second.raised)

    def difference(self, quantity: Quantity) -> Estimate | None:
        """The mean over the seeds for which both have the quantity; None without such a seed."""
        return paired_difference(self.first.values(quantity), self.second.values(quantity))


def undefended(group: Group, groups: Sequence[Group]) -> Group | None:
    """The undefended predictor of the same training config and setting; the one with most attacks in common."""
    alike = [
        other
        for other in groups
        if not other.is_defended and (other.training, other.setting) == (group.training, group.setting)
    ]
    return max(alike, key=lambda other: len(set(other.attacks) & set(group.attacks)), default=None)


def defence_pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every defence against the undefended predictor of the same training config and setting."""
    found = [(group, undefended(group, groups)) for group in groups if group.is_defended]
    return [Pair(group, base) for group, base in found if base is not None]


def training_pairs(groups: Sequence[Group]) -> list[Pair]:
    """All pairs of training configs with the same defence, setting and attacks."""
    pairs = [Pair(later, earlier) for earlier, later in combinations(groups, 2)]
    return [pair for pair in pairs if _differ_in_training(pair.first, pair.second)]


def _differ_in_training(a: Group, b: Group) -> bool:
    same = (a.defence, a.setting, a.attacks) == (b.defence, b.setting, b.attacks)
    return same and a.training != b.training


@dataclass(frozen=True)
class Curve:
    """Evaluations of one training config and defence by the same trials at several radii.

    Attributes:
      label: name of the defence, with the trials where that is not enough.
      groups: one per radius, in increasing order.
    """

    label: str
    groups: tuple[Group, ...]


def by_training(groups: Sequence[Group]) -> dict[tuple[str, Setting], list[Group]]:
    """The groups of each training config in each setting."""
    parts: dict[tuple[str, Setting], list[Group]] = {}
    for group in groups:
        parts.setdefault((group.training, group.setting), []).append(group)
    return parts


def undefended_trainings(groups: Sequence[Group]) -> list[dict[str, Group]]:
    """For each setting with several training configs: name -> undefended predictor with most seeds, then attacks."""
    parts: dict[Setting, dict[str, Group]] = {}
    for group in sorted(groups, key=lambda group: (len(group.evaluations), len(group.attacks))):
        if not group.is_defended:
            parts.setdefault(group.setting, {})[group.training] = group
    return [trainings for trainings in parts.values() if len(trainings) > 1]


def labels(groups: Sequence[Group]) -> list[str]:
    """Different names for the defences of these groups, with their trials where one occurs more than once."""
    count = Counter(group.defence for group in groups)
    names = [group.defence if count[group.defence] == 1 else f"{group.defence}: {group.trials}" for group in groups]
    return list(numbered(dict(enumerate(names))).values())


def radius_curves(groups: Sequence[Group]) -> dict[tuple[str, Setting], list[Curve]]:
    """Training config and setting (of radius 0) -> curves of at least two radii.

    Where two evaluations by trials of the same names have the same radius, the stronger one counts.
    """
    parts: dict[tuple[str, Setting], dict[Any, dict[float, Group]]] = {}
    for group in groups:
        if group.values(robust):
            names = tuple(trial.name for trial in group.evaluations[0].record.plan.all_trials)
            curves = parts.setdefault((group.training, replace(group.setting, epsilon=0.0)), {})
            radii = curves.setdefault((group.defence, names), {})
            radii[group.setting.epsilon] = min(radii.get(group.setting.epsilon, group), group, key=_mean_robust)
    found = {where: [radii for radii in curves.values() if len(radii) > 1] for where, curves in parts.items()}
    return {where: _curves(several) for where, several in found.items() if several}


def _curves(several: list[dict[float, Group]]) -> list[Curve]:
    ordered = [tuple(radii[epsilon] for epsilon in sorted(radii)) for radii in several]
    return [Curve(label, part) for label, part in zip(labels([part[0] for part in ordered]), ordered, strict=True)]


def _mean_robust(group: Group) -> float:
    found = group.accuracy(robust)
    return math.inf if found is None else found.value
