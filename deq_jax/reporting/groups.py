"""Evaluations of one training and defence, put together over the training's seeds, and compared with others."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deq_jax.evaluation.plan import UNDEFENDED
from deq_jax.evaluation.transfers import Transfer
from deq_jax.reporting.archive import Evaluation, Setting
from deq_jax.reporting.statistics import Estimate, paired_difference
from deq_jax.storage.briefs import short_name
from deq_jax.surrogates.base import Direct

T = TypeVar("T")

K = TypeVar("K")

Quantity = Callable[[Evaluation], np.ndarray | None]  # of each image

MOST_NAMES = 4  # of attacks, in a table


@dataclass(frozen=True)
class Group:
    """Evaluations that differ in the seed of the training alone, in its order.

    Attributes:
      training, defence: what they are called; no two different ones are called the same.
      evaluations: one per seed.
    """

    training: str
    defence: str
    evaluations: tuple[Evaluation, ...]

    @property
    def setting(self) -> Setting:
        """Setting shared by all evaluations of the group."""
        return self.evaluations[0].setting

    @property
    def attacks(self) -> tuple[str, ...]:
        """Attacks shared by all evaluations of the group."""
        return self.evaluations[0].attacks

    @property
    def is_defended(self) -> bool:
        """Whether anything else is deployed than the classifier as trained."""
        return self.evaluations[0].record.defence != UNDEFENDED

    @property
    def is_adaptive(self) -> bool:
        """Whether a defence was attacked, or a trial had a surrogate's gradients or transferred images."""
        return self.is_defended or any(
            short_name(trial.surrogate) != Direct.__name__ or short_name(trial.attack) == Transfer.__name__
            for trial in self.evaluations[0].record.plan.all_trials
        )

    @property
    def trials(self) -> str:
        """The attacks in a few words: their suites, or the first parts of their names, and how many there are."""
        plan = self.evaluations[0].record.plan
        trials = plan.trials
        heads = list(dict.fromkeys(trial.suite or trial.name.split(".")[0] for trial in trials))
        names = ", ".join(heads[:MOST_NAMES]) + (", …" if len(heads) > MOST_NAMES else "")
        count = f" ({len(trials)} trials)" if len(trials) > 1 else ""
        extra = " and diagnostics" if plan.checks else ""
        return (names or "none") + count + extra

    @property
    def raised(self) -> Counter[str]:
        """Names of the flags that are raised, and for how many seeds."""
        return Counter(flag.name for one in self.evaluations for flag in one.record.red_flags if flag.raised)

    @property
    def unchecked(self) -> list[str]:
        """Names of the checks that were not made for some seed."""
        flags = [flag.name for one in self.evaluations for flag in one.record.red_flags if flag.raised is None]
        return list(dict.fromkeys(flags))

    def values(self, quantity: Callable[[Evaluation], T | None]) -> dict[int, T]:
        """Seed -> value, of the evaluations that have one."""
        found = {one.seed: quantity(one) for one in self.evaluations}
        return {seed: value for seed, value in found.items() if value is not None}

    def accuracy(self, quantity: Quantity) -> Estimate | None:
        """The mean over seeds and images; None if no evaluation has the quantity."""
        found = list(self.values(quantity).values())
        return Estimate.of_accuracies(found) if found else None

    def in_state(self, state: str, condition: str, quantity: str) -> Estimate | None:
        """The mean of what was measured; accuracies in percent. See `Evaluation.in_state`."""
        found = list(self.values(lambda one: one.in_state(state, condition, quantity)).values())
        if not found:
            return None
        return Estimate.of_accuracies(100.0 * np.array(found)) if quantity == "accuracy" else Estimate.of_images(found)


@dataclass(frozen=True)
class Pair:
    """Two groups that are compared seed by seed and image by image: the first one minus the second one."""

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
        """Over the seeds for which both have the quantity; None if there is no such seed."""
        return paired_difference(self.first.values(quantity), self.second.values(quantity))


def groups_of(evaluations: Sequence[Evaluation]) -> list[Group]:
    """Groups in the order in which settings and trainings first appear, undefended predictors before others."""
    parts: dict[Any, list[Evaluation]] = {}
    for one in evaluations:
        parts.setdefault(one.identity, []).append(one)
    trainings, defences = _training_names(evaluations), _defence_names(evaluations)
    settings = list(dict.fromkeys(one.setting for one in evaluations))
    groups = []
    for part in parts.values():
        first, seeds = part[0], sorted(part, key=lambda one: one.seed)
        defence = defences[first.training, first.setting, first.predictor]
        groups.append(Group(trainings[first.training], defence, tuple(seeds)))
    names = list(trainings.values())
    return sorted(
        groups, key=lambda group: (settings.index(group.setting), names.index(group.training), group.is_defended)
    )


def _training_names(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Training -> names of its workdirs, without their seeds."""
    stems: dict[str, list[str]] = {}
    for one in evaluations:
        name = Path(one.provenance.workdir).name or "training"
        stem = re.sub(rf"([-_.]|[-_.]?seed[-_.=]?){one.seed}$", "", name) or name
        stems.setdefault(one.training, []).append(stem)
    return _numbered({training: ", ".join(dict.fromkeys(names)) for training, names in stems.items()})


def _defence_names(evaluations: Sequence[Evaluation]) -> dict[tuple[str, Setting, str], str]:
    """Training, setting and predictor -> name of the defence."""
    names: dict[tuple[str, Setting], dict[str, str]] = {}
    for one in evaluations:
        names.setdefault((one.training, one.setting), {})[one.predictor] = one.record.defence
    return {
        (*where, predictor): name
        for where, predictors in names.items()
        for predictor, name in _numbered(predictors).items()
    }


def _numbered(names: Mapping[K, str]) -> dict[K, str]:
    seen: Counter[str] = Counter()
    unique = {}
    for key, name in names.items():
        seen[name] += 1
        unique[key] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return unique


def undefended(group: Group, groups: Sequence[Group]) -> Group | None:
    """The undefended predictor of the same training and setting; of several evaluations the one that has most attacks
    in common."""
    alike = [
        other
        for other in groups
        if not other.is_defended and (other.training, other.setting) == (group.training, group.setting)
    ]
    return max(alike, key=lambda other: len(set(other.attacks) & set(group.attacks)), default=None)


def defence_pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every defence against the undefended predictor of the same training and setting."""
    found = [(group, undefended(group, groups)) for group in groups if group.is_defended]
    return [Pair(group, base) for group, base in found if base is not None]


def training_pairs(groups: Sequence[Group]) -> list[Pair]:
    """All pairs of trainings with the same defence, setting and attacks."""
    pairs = [Pair(later, earlier) for earlier, later in combinations(groups, 2)]
    return [pair for pair in pairs if _differ_in_training(pair.first, pair.second)]


def _differ_in_training(a: Group, b: Group) -> bool:
    same = (a.defence, a.setting, a.attacks) == (b.defence, b.setting, b.attacks)
    return same and a.training != b.training


@dataclass(frozen=True)
class Curve:
    """Evaluations of one training and defence by the same trials at several radii.

    Attributes:
      label: of the defence, and of the trials where that is not enough.
      groups: one per radius, in increasing order.
    """

    label: str
    groups: tuple[Group, ...]


def by_training(groups: Sequence[Group]) -> dict[tuple[str, Setting], list[Group]]:
    """The groups of each training in each setting."""
    parts: dict[tuple[str, Setting], list[Group]] = {}
    for group in groups:
        parts.setdefault((group.training, group.setting), []).append(group)
    return parts


def undefended_trainings(groups: Sequence[Group]) -> list[dict[str, Group]]:
    """For each setting with several trainings: training -> its undefended predictor, of the most seeds and then under
    the most attacks."""
    parts: dict[Setting, dict[str, Group]] = {}
    for group in sorted(groups, key=lambda group: (len(group.evaluations), len(group.attacks))):
        if not group.is_defended:
            parts.setdefault(group.setting, {})[group.training] = group
    return [trainings for trainings in parts.values() if len(trainings) > 1]


def labels(groups: Sequence[Group]) -> list[str]:
    """The defences of a training's groups, with their trials where one occurs more than once; no two are the same."""
    count = Counter(group.defence for group in groups)
    names = [group.defence if count[group.defence] == 1 else f"{group.defence}: {group.trials}" for group in groups]
    return list(_numbered(dict(enumerate(names))).values())


def radius_curves(groups: Sequence[Group]) -> dict[tuple[str, Setting], list[Curve]]:
    """Training and setting (of radius 0) -> curves of at least two radii.

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


def clean(evaluation: Evaluation) -> np.ndarray | None:
    """Clean accuracy of the deployed predictor per image, 0 or 100: its mean is in percent."""
    return _percent(evaluation.clean)


def reference(evaluation: Evaluation) -> np.ndarray | None:
    """The same under the reference protocol: attacks on the undefended predictor."""
    return _percent(evaluation.reference)


def robust(evaluation: Evaluation) -> np.ndarray | None:
    """The same under the worst case of all attacks."""
    return _percent(evaluation.robust)


def overestimate(evaluation: Evaluation) -> np.ndarray | None:
    """The reference protocol minus the worst case of all attacks."""
    upper, lower = reference(evaluation), robust(evaluation)
    return None if upper is None or lower is None else upper - lower


def _percent(correct: np.ndarray | None) -> np.ndarray | None:
    return None if correct is None else 100.0 * correct
