"""Evaluations of one training config and defence, grouped over the seeds of its runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deq_jax.evaluation.plan import UNDEFENDED
from deq_jax.evaluation.results import Flag
from deq_jax.evaluation.transfers import Transfer
from deq_jax.reporting.archive import Evaluation, Setting
from deq_jax.reporting.statistics import Estimate, in_percent
from deq_jax.storage.briefs import short_name
from deq_jax.surrogates.base import Direct

T = TypeVar("T")

K = TypeVar("K")

Quantity = Callable[[Evaluation], np.ndarray | None]  # of each image

MOST_NAMES = 4  # of attacks, in a table


@dataclass(frozen=True)
class Group:
    """Evaluations that differ only in the seed of the training run, in the order of the seeds.

    Attributes:
      training, defence: names of the training config and the defence; different ones have different names.
      evaluations: one per seed.

    Examples:
      >>> from deq_jax.reporting import Group
      >>> Group(training="pgd-at", defence="none", evaluations=()).values(lambda evaluation: evaluation.robust)
      {}
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
        return self._names(lambda flag: flag.raised is None and not flag.is_unsure)

    @property
    def unsure(self) -> list[str]:
        """Names of the checks for which some seed has too few images."""
        return self._names(lambda flag: flag.is_unsure)

    def _names(self, chosen: Callable[[Flag], bool]) -> list[str]:
        flags = [flag.name for one in self.evaluations for flag in one.record.red_flags if chosen(flag)]
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
        """The mean of the measurements; accuracies in percent. See `Evaluation.in_state`."""
        found = list(self.values(lambda one: one.in_state(state, condition, quantity)).values())
        if not found:
            return None
        return Estimate.of_accuracies(found) if quantity == "accuracy" else Estimate.of_images(found)


def groups_of(evaluations: Sequence[Evaluation]) -> list[Group]:
    """Groups in the order in which settings and training configs first appear, undefended predictors first.

    Examples:
      >>> from deq_jax.reporting import groups_of
      >>> groups_of([])
      []
    """
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
    return numbered({training: ", ".join(dict.fromkeys(names)) for training, names in stems.items()})


def _defence_names(evaluations: Sequence[Evaluation]) -> dict[tuple[str, Setting, str], str]:
    """Training, setting and predictor -> name of the defence."""
    names: dict[tuple[str, Setting], dict[str, str]] = {}
    for one in evaluations:
        names.setdefault((one.training, one.setting), {})[one.predictor] = one.record.defence
    return {
        (*where, predictor): name
        for where, predictors in names.items()
        for predictor, name in numbered(predictors).items()
    }


def numbered(names: Mapping[K, str]) -> dict[K, str]:
    """The names, with a number behind those that occur for the second time, and so on."""
    seen: Counter[str] = Counter()
    unique = {}
    for key, name in names.items():
        seen[name] += 1
        unique[key] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return unique


def clean(evaluation: Evaluation) -> np.ndarray | None:
    """Clean accuracy of the deployed predictor per image, 0 or 100: its mean is in percent."""
    return _percent(evaluation.clean)


def reference(evaluation: Evaluation) -> np.ndarray | None:
    """Accuracy per image under the reference protocol, 0 or 100: attacks on the undefended predictor."""
    return _percent(evaluation.reference)


def robust(evaluation: Evaluation) -> np.ndarray | None:
    """Accuracy per image under the worst case of all attacks, 0 or 100."""
    return _percent(evaluation.robust)


def overestimate(evaluation: Evaluation) -> np.ndarray | None:
    """The reference protocol minus the worst case of all attacks."""
    upper, lower = reference(evaluation), robust(evaluation)
    return None if upper is None or lower is None else upper - lower


def _percent(correct: np.ndarray | None) -> np.ndarray | None:
    return None if correct is None else in_percent(correct)
