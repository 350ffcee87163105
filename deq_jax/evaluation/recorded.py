"""Configs of files, read without importing the classes that they name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from deq_jax.core.errors import InputError
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.storage.briefs import brief, short_name
from deq_jax.storage.files import read_json
from deq_jax.storage.trees import Json

T = TypeVar("T")

SCHEDULE = ("epochs", "batch_size", "pretrain_steps", "optimizer", "augmentation")

KINDS = {"str": str, "bool": bool, "int": int, "float": int | float, "None": type(None)}  # JSON may write 1.0 as 1

# Errors of a parser that meets something else.
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class RecordedTrial:
    """A trial of an evaluation.

    Attributes:
      name, suite, from_worst: as in `Trial`.
      attack, surrogate: config trees.
      text: all of it as text, but for paths: images may be transferred from any folder.
    """

    name: str
    suite: str | None
    attack: Json
    surrogate: Json
    from_worst: bool
    text: str

    @classmethod
    def of(cls, tree: Any) -> RecordedTrial:
        """The trial that `to_tree` wrote."""
        text = canonical(_without_paths(tree))
        parts = {name: tree[name] for name in ("name", "suite", "attack", "surrogate", "from_worst")}
        return checked(cls, parts | {"text": text})

    def __str__(self) -> str:
        suite = f" [{self.suite}]" if self.suite else ""
        start = ", from the worst image so far" if self.from_worst else ""
        return f"{self.name}{suite}: {brief(self.attack)}{start}, gradients: {brief(self.surrogate)}"


@dataclass(frozen=True)
class RecordedPlan:
    """The config of an evaluation.

    Attributes:
      threat: config tree of the threat model; its class is its `norm`, its radius is `epsilon`.
      trials: in their order.
      checks: trials of the diagnostics by their roles; empty without diagnostics.
      predictor: config tree of the deployed predictor; None for the classifier as trained.
      draws, budget, batch_size, seed, skip_broken: as in `EvalConfig`.
    """

    threat: Json
    norm: str
    epsilon: float
    trials: tuple[RecordedTrial, ...]
    checks: dict[str, RecordedTrial]
    predictor: Json
    draws: int | None
    budget: str | None
    batch_size: int
    seed: int
    skip_broken: bool

    @classmethod
    def of(cls, tree: Any) -> RecordedPlan:
        """The `EvalConfig` that `to_tree` wrote, in this version or an older one."""
        threat, diagnostics, epsilon = tree["threat"], tree["diagnostics"] or {}, float(tree["threat"]["epsilon"])
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"a radius of {epsilon}")
        return cls(
            threat=threat,
            norm=short_name(threat),
            epsilon=epsilon,
            trials=tuple(map(RecordedTrial.of, tree["trials"])),
            checks={role: RecordedTrial.of(trial) for role, trial in diagnostics.items() if role != "class"},
            predictor=tree["predictor"],
            draws=None if tree["draws"] is None else int(tree["draws"]),
            budget=None if tree.get("budget") is None else str(tree["budget"]),
            batch_size=int(tree["batch_size"]),
            seed=int(tree["seed"]),
            skip_broken=bool(tree["skip_broken"]),
        )

    @property
    def all_trials(self) -> tuple[RecordedTrial, ...]:
        """Trials of the evaluation, then trials of its diagnostics."""
        return (*self.trials, *self.checks.values())


@dataclass(frozen=True)
class RecordedRun:
    """The training run of the evaluated classifier, by its config.

    Attributes:
      seed: random seed of the run.
      dataset, objective, classifier: config trees.
      schedule: config trees of the settings that determine the order and number of its steps.
      text: the config without its seed, as text.
    """

    seed: int
    dataset: Mapping[str, Json]
    objective: Json
    classifier: Mapping[str, Json]
    schedule: Mapping[str, Json]
    text: str

    @classmethod
    def of(cls, tree: Any) -> RecordedRun:
        """The `TrainConfig` that `to_tree` wrote, in this version or an older one."""
        schedule = {name: tree[name] for name in SCHEDULE}
        text = canonical({name: value for name, value in tree.items() if name != "seed"})
        dataset, classifier = dict(tree["dataset"]), dict(tree["classifier"])
        return cls(int(tree["seed"]), dataset, tree["objective"], classifier, schedule, text)


def checked(kind: type[T], tree: Mapping[str, Any]) -> T:
    """The dataclass with these fields; raises `TypeError` where one is missing, unknown or of another type.

    A number that no float can hold raises `OverflowError`.
    """
    for field in dataclasses.fields(cast(Any, kind)):
        kinds = tuple(KINDS[name] for name in str(field.type).split(" | ") if name in KINDS)
        if field.name in tree and kinds and not isinstance(tree[field.name], kinds):
            raise TypeError(f"{field.name} is {tree[field.name]!r}, expected {field.type}")
        if KINDS["float"] in kinds:
            float(tree.get(field.name) or 0)
    return kind(**tree)


def parsed(path: Path, parser: Callable[[Any], T]) -> T:
    """The result of the parser on a JSON file.

    Raises:
      InputError: there is no such file, or it holds something else.
    """
    tree = read_json(path)
    try:
        return parser(tree)
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not an evaluation as this version writes it ({reason})") from None


def read_plan(folder: EvaluationFolder) -> RecordedPlan:
    """The plan of an evaluation that has begun, by its manifest; raises `InputError` as `parsed` does."""
    return parsed(folder.manifest, lambda manifest: RecordedPlan.of(manifest["config"]))


def canonical(tree: Json) -> str:
    """JSON data as text; the order of names does not matter."""
    return json.dumps(tree, sort_keys=True)


def _without_paths(tree: Json) -> Json:
    if isinstance(tree, list):
        return [_without_paths(item) for item in tree]
    if isinstance(tree, dict):
        return {name: _without_paths(value) for name, value in tree.items() if name != "path"}
    return tree
