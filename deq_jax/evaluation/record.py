"""The numbers of an evaluation: the content of evaluation.json, written and read here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deq_jax.evaluation.classes import ClassAccuracy, class_accuracies
from deq_jax.evaluation.plan import UNDEFENDED, Trial
from deq_jax.evaluation.recorded import RecordedPlan, RecordedRun, checked, parsed
from deq_jax.evaluation.red_flags import red_flags
from deq_jax.evaluation.results import Flag, WorstCase
from deq_jax.evaluation.rows import Means, RowMeans, Spread, spread, summary
from deq_jax.evaluation.verdicts import exact_interval, warnings_of
from deq_jax.storage.briefs import brief
from deq_jax.storage.trees import Json, to_tree

SCHEMA = 1  # of evaluation.json; files of before have no number


@dataclass(frozen=True)
class TrialRecord:
    """The result of a trial in numbers.

    Attributes:
      attacked, broken: numbers of images.
      seconds: time spent on it, compilation included.
      threat: config tree of the threat model that its attack declares; None if its images alone were checked.
      gradient_queries: per image, at most; None if its attack does not tell.

    Examples:
      >>> from deq_jax.evaluation import TrialRecord
      >>> record = TrialRecord(attacked=100, broken=60, seconds=12.5, gradient_queries=30)
      >>> record.attacked - record.broken
      40
    """

    attacked: int
    broken: int
    seconds: float
    threat: Json = None
    gradient_queries: int | None = None


@dataclass(frozen=True)
class PredictionCost:
    """The cost of a prediction for one image.

    Attributes:
      evaluations: applications of the cell; a vector-Jacobian product counts as one. None for an explicit network.
      seconds: median time on one device, compilation excluded.

    Examples:
      >>> from deq_jax.evaluation import PredictionCost
      >>> PredictionCost(evaluations=15.0, seconds=0.004).evaluations
      15.0
    """

    evaluations: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from: training run, checkpoint, images and versions.

    Attributes:
      workdir: workdir of the training run.
      checkpoint: best or latest, and its step, such as "best, step 17".
      split: train, validation or test.
      versions: distribution -> version.
      config: config tree of the training run.
      environment: settings, devices and versions, see `storage.environment`; None in older files.

    Examples:
      >>> from deq_jax.evaluation import Provenance
      >>> Provenance("runs/a", "best, step 17", "test", versions={"deq_jax": "0.1.0"}, config={}).split
      'test'
    """

    workdir: str
    checkpoint: str
    split: str
    versions: dict[str, str]
    config: Json
    environment: Json = None

    @cached_property
    def run(self) -> RecordedRun:
        """The training run, by its config."""
        return RecordedRun.of(self.config)


@dataclass(frozen=True)
class EvaluationRecord:
    """All numbers of an evaluation.

    Headline, tables and the report's page are functions of it. Robust accuracies are not to be trusted while a red flag
    is raised.

    Attributes:
      images: how many were evaluated.
      rows: means of the measurements in each state, on clean images and on the worst case of each image.
      accuracy: name of the images (clean, a trial or suite, or union) -> predictor -> accuracy.
      cumulative: whether a trial skips the images that earlier ones broke.
      trials: name of the trial -> its result.
      defence: name of the deployed predictor.
      cost: cost of a prediction.
      spectral_radius: spectral radius of the trained cell at the equilibria of the clean images.
      unsettled: number of images for which its estimate has not settled; None where it is not known.
      adjoint_residual: relative residual of the trained estimator's adjoint states.
      warnings: sentences on faults of the model.
      red_flags: checks of the attacks.
      early_state: accuracies of z_1 .. z_T on held-out images, if the deployed state was chosen by them; otherwise
        None.
      evaluation: config tree of the evaluation.
      provenance: where the classifier comes from; None for one that comes from no workdir.
      classes: accuracies of each class; empty in older files.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import EvalConfig, EvaluationRecord, PredictionCost, Spread
      >>> from deq_jax.storage import to_tree
      >>> record = EvaluationRecord(
      ...     images=100,
      ...     rows={},
      ...     accuracy={"clean": {"deployed": 0.9}, "union": {"deployed": 0.4}},
      ...     cumulative=True,
      ...     trials={},
      ...     defence="none",
      ...     cost=PredictionCost(),
      ...     spectral_radius=Spread(None, None),
      ...     unsettled=None,
      ...     adjoint_residual=Spread(None, None),
      ...     warnings=(),
      ...     red_flags=(),
      ...     early_state=None,
      ...     evaluation=to_tree(EvalConfig(Linf(0.1), trials=())),
      ... )
      >>> record.robust_accuracy
      0.4
      >>> EvaluationRecord.from_json(record.to_json()) == record
      True
    """

    images: int
    rows: dict[str, RowMeans]
    accuracy: dict[str, dict[str, float]]
    cumulative: bool
    trials: dict[str, TrialRecord]
    defence: str
    cost: PredictionCost
    spectral_radius: Spread
    unsettled: int | None
    adjoint_residual: Spread
    warnings: tuple[str, ...]
    red_flags: tuple[Flag, ...]
    early_state: tuple[float, ...] | None
    evaluation: Json
    provenance: Provenance | None = None
    classes: tuple[ClassAccuracy, ...] = ()

    @property
    def robust_accuracy(self) -> float | None:
        """Accuracy of the deployed predictor under all trials; None without attack."""
        return self.accuracy["union"]["deployed"] if "union" in self.accuracy else None

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals of the deployed predictor's accuracies on other images: clean, and under all trials."""
        known = [name for name in ("clean", "union") if name in self.accuracy]
        return {name: exact_interval(self.accuracy[name]["deployed"], self.images) for name in known}

    @cached_property
    def plan(self) -> RecordedPlan:
        """The parts of the evaluation, by its config."""
        return RecordedPlan.of(self.evaluation)

    @classmethod
    def of(
        cls, result: WorstCase, provenance: Provenance | None = None, class_names: Sequence[str] = ()
    ) -> EvaluationRecord:
        """The numbers of a result of `worst_case`; see `class_accuracies` for the names."""
        evaluations, settled = float(np.mean(result.cost.evaluations)), result.radius_settled
        radius = spread(result.spectral_radius)
        is_known = radius.mean is not None and settled is not None
        return cls(
            images=len(result.y),
            rows=summary(result.outcomes),
            accuracy=result.accuracies(),
            cumulative=result.config.skip_broken,
            trials={trial.name: _trial(result, trial) for trial in result.config.all_trials},
            defence=result.config.defence,
            cost=PredictionCost(None if np.isnan(evaluations) else evaluations, float(np.median(result.cost.seconds))),
            spectral_radius=radius,
            unsettled=int(np.sum(~np.asarray(settled))) if is_known else None,
            adjoint_residual=spread(result.adjoint_residual),
            warnings=tuple(warnings_of(result)),
            red_flags=tuple(red_flags(result)) if result.attempts else (),
            early_state=None if result.early_state is None else tuple(result.early_state),
            evaluation=to_tree(result.config),
            provenance=provenance,
            classes=class_accuracies(result.outcomes, class_names),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON data, with the number of its schema and the numbers that follow from others."""
        where = {} if self.provenance is None else dataclasses.asdict(self.provenance)
        radius = {**dataclasses.asdict(self.spectral_radius), "unsettled": self.unsettled}
        return {
            "schema": SCHEMA,
            "images": self.images,
            "rows": {name: _known(dataclasses.asdict(row), "attacked") for name, row in self.rows.items()},
            "accuracy": self.accuracy,
            "cumulative": self.cumulative,
            "trials": {name: dataclasses.asdict(trial) for name, trial in self.trials.items()},
            "defence": self.defence,
            "cost": dataclasses.asdict(self.cost),
            "spectral_radius": radius,
            "adjoint_residual": dataclasses.asdict(self.adjoint_residual),
            "robust_accuracy": self.robust_accuracy,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "classes": [dataclasses.asdict(one) for one in self.classes],
            "warnings": list(self.warnings),
            "red_flags": [dataclasses.asdict(flag) for flag in self.red_flags],
            "early_state": None if self.early_state is None else list(self.early_state),
            "evaluation": self.evaluation,
            **_known(where, "environment"),
        }

    @classmethod
    def from_json(cls, tree: Any) -> EvaluationRecord:
        """The record that `to_json` wrote, in this version or an older one; older files may lack some numbers.

        Raises:
          KeyError, TypeError, ValueError, AttributeError: it is not such a record, or is of a newer version.
        """
        schema = tree.get("schema", 0)
        if schema not in range(SCHEMA + 1):
            raise ValueError(f"schema {schema!r}, expected at most {SCHEMA}")
        radius, plan = tree.get("spectral_radius", {}), RecordedPlan.of(tree["evaluation"])
        early, images = tree.get("early_state"), int(tree["images"])
        if images < 1:
            raise ValueError(f"{images} images")
        return cls(
            images=images,
            rows={name: _row(row) for name, row in tree["rows"].items()},
            accuracy={name: {who: float(part) for who, part in row.items()} for name, row in tree["accuracy"].items()},
            cumulative=plan.skip_broken,
            trials={name: _trial_of(trial) for name, trial in tree.get("trials", {}).items()},
            defence=str(tree.get("defence", UNDEFENDED if plan.predictor is None else brief(plan.predictor))),
            cost=PredictionCost(**{name: _number(value) for name, value in tree.get("cost", {}).items()}),
            spectral_radius=_spread(radius),
            unsettled=None if radius.get("unsettled") is None else int(radius["unsettled"]),
            adjoint_residual=_spread(tree.get("adjoint_residual", {})),
            warnings=tuple(map(str, tree.get("warnings", ()))),
            red_flags=tuple(checked(Flag, flag) for flag in tree["red_flags"]),
            early_state=None if early is None else tuple(map(float, early)),
            evaluation=tree["evaluation"],
            provenance=_provenance(tree) if "workdir" in tree else None,
            classes=tuple(checked(ClassAccuracy, one) for one in tree.get("classes", ())),
        )


def read_record(path: Path) -> EvaluationRecord:
    """The record in an evaluation.json.

    Raises:
      InputError: there is no such file, it is damaged, or of a newer version.

    Examples:
      >>> from pathlib import Path
      >>> from deq_jax.evaluation import read_record
      >>> read_record(Path("runs/none/evaluation.json"))
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: runs/none/evaluation.json: no such file
    """
    return parsed(path, EvaluationRecord.from_json)


def _trial(result: WorstCase, trial: Trial) -> TrialRecord:
    attempt = result.attempts[trial.name]
    return TrialRecord(
        attacked=int(np.sum(attempt.attacked)),
        broken=int(np.sum(result.broken(trial.name))),
        seconds=round(attempt.seconds, 2),
        threat=to_tree(getattr(trial.attack, "threat", None)),
        gradient_queries=getattr(trial.attack, "gradient_queries", None),
    )


def _trial_of(tree: Any) -> TrialRecord:
    known = {field.name: tree[field.name] for field in dataclasses.fields(TrialRecord) if field.name in tree}
    return checked(TrialRecord, known | {"attacked": int(tree["attacked"])})


def _known(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Without the name if it is None."""
    return {key: value for key, value in tree.items() if key != name or value is not None}


def _row(tree: Any) -> RowMeans:
    return RowMeans(_means(tree["clean"]), _means(tree["attacked"]) if "attacked" in tree else None)


def _means(tree: Any) -> Means:
    return Means(float(tree["accuracy"]), float(tree["entropy"]), _number(tree["residual"]))


def _spread(tree: Any) -> Spread:
    found = Spread(_number(tree.get("mean")), _number(tree.get("largest")))
    if (found.mean is None) != (found.largest is None):
        raise ValueError(f"{found}")
    return found


def _provenance(tree: Any) -> Provenance:
    parts = {name: tree[name] for name in ("workdir", "checkpoint", "split", "config")}
    versions = {name: str(version) for name, version in tree["versions"].items()}
    found = checked(Provenance, parts | {"versions": versions, "environment": tree.get("environment")})
    _ = found.run  # raises where the config is of something else
    return found


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
