"""Finished evaluations on disk: their results and conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deq_jax.core.errors import InputError, require
from deq_jax.evaluation.folder import EvaluationFolder, finished_in, unfinished_in
from deq_jax.evaluation.plan import REFERENCE, UNDEFENDED
from deq_jax.evaluation.record import EvaluationRecord, Provenance, read_record
from deq_jax.evaluation.recorded import DAMAGED, RecordedRun, canonical
from deq_jax.evaluation.rows import Outcomes, correctness, from_columns, named
from deq_jax.storage.briefs import brief, number
from deq_jax.storage.files import read_npz

CONDITIONS = ("clean", "attacked")

QUANTITIES = ("accuracy", "entropy", "residual")

Measurements = dict[tuple[str, str, str], np.ndarray]


@dataclass(frozen=True)
class Setting:
    """Conditions that two evaluations must share to be compared.

    Attributes:
      dataset, split, images: dataset, split and number of images, the first ones of the split.
      checkpoint: source of the parameters: "best" or "latest".
      norm, epsilon: the threat model.

    Examples:
      >>> from deq_jax.reporting import Setting
      >>> print(Setting("Digits", "test", 360, "best", "Linf", 8 / 255))
      360 images of Digits, test split, best checkpoint, Linf ε = 8/255
    """

    dataset: str
    split: str
    images: int
    checkpoint: str
    norm: str
    epsilon: float

    def __str__(self) -> str:
        return f"{self.images_text}, {self.radius_text}"

    @property
    def radius_text(self) -> str:
        """The threat model."""
        return f"{self.norm} ε = {number(self.epsilon)}"

    @property
    def images_text(self) -> str:
        """Without the radius."""
        return f"{self.images} images of {self.dataset}, {self.split} split, {self.checkpoint} checkpoint"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of a training run's classifier.

    Attributes:
      folder: the folder with evaluation.json.
      record: its numbers.
      provenance: where its classifier comes from.
      measured: state, "clean" or "attacked", and accuracy (True or False), entropy or residual -> [N].
      correct: name of the images -> [N] bool, which the deployed predictor classifies correctly.

    Examples:
      >>> from dataclasses import fields
      >>> from deq_jax.reporting import Evaluation
      >>> [field.name for field in fields(Evaluation)]
      ['folder', 'record', 'provenance', 'measured', 'correct']
    """

    folder: Path
    record: EvaluationRecord
    provenance: Provenance
    measured: Measurements = field(compare=False)  # arrays have no single truth value
    correct: dict[str, np.ndarray] = field(compare=False)

    @property
    def run(self) -> RecordedRun:
        """The training run."""
        return self.provenance.run

    @property
    def seed(self) -> int:
        """Random seed of the training run."""
        return self.run.seed

    @property
    def training(self) -> str:
        """The config of the training run without its seed, as text."""
        return self.run.text

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the R rows in which each image was measured: z_1 .. z_T, their mean, the deployed one."""
        return tuple(self.record.rows)

    @property
    def predictor(self) -> str:
        """The deployed predictor, as text."""
        return self.record.defence + canonical(self.record.plan.predictor)

    @property
    def setting(self) -> Setting:
        """The conditions of the evaluation."""
        where, plan = self.provenance, self.record.plan
        kind, dataset = where.checkpoint.partition(",")[0], self.run.dataset
        known = {name: value for name, value in dataset.items() if value is not None}
        return Setting(brief(known), where.split, self.record.images, kind, plan.norm, plan.epsilon)

    @property
    def attacks(self) -> tuple[str, ...]:
        """All trials and how they were run, as texts. Transferred images may come from any folder."""
        plan = self.record.plan
        options = canonical({"skip_broken": plan.skip_broken, "draws": plan.draws})
        return (*(trial.text for trial in plan.all_trials), options)

    @property
    def identity(self) -> tuple[str, str, Setting, tuple[str, ...]]:
        """Its properties that only evaluations of the same training config under other seeds share."""
        return self.training, self.predictor, self.setting, self.attacks

    @property
    def clean(self) -> np.ndarray:
        """[N] bool, which clean images are classified correctly."""
        return self.correct["clean"]

    @property
    def reference(self) -> np.ndarray | None:
        """[N] bool, of the reference protocol: attacks on the undefended predictor; None if that was not run.

        For the undefended predictor these are all attacks, because defended ones are shown their images.
        """
        return self.robust if self.record.defence == UNDEFENDED else self.correct.get(REFERENCE)

    @property
    def robust(self) -> np.ndarray | None:
        """[N] bool, which withstand all attacks; None without attack."""
        return self.correct.get("union")

    @property
    def panel(self) -> bytes | None:
        """The PNG file with some images, clean and attacked; None without attack, or where it is gone."""
        path = EvaluationFolder(self.folder).figure("images")
        return path.read_bytes() if path.is_file() else None

    def in_state(self, state: str, condition: str, quantity: str) -> np.ndarray | None:
        """[N], the measurement of each image, or None; the arguments are as in `measured`."""
        values = self.measured.get((state, condition, quantity))
        return None if values is None or np.isnan(values).any() else values


def read_evaluations(runs: Sequence[Path]) -> list[Evaluation]:
    """All finished evaluations of training runs, and single ones.

    Args:
      runs: workdirs of training runs, or folders of evaluations; see `unfinished`.

    Raises:
      InputError: there are none, one is damaged, or two are the same.

    Examples:
      >>> from pathlib import Path
      >>> from deq_jax.reporting import read_evaluations
      >>> read_evaluations([Path("runs/none")])
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: runs/none: no such folder
    """
    for run in runs:
        require(run.is_dir(), f"{run}: no such folder")
    folders = {one.path.resolve(): one for run in runs for one in finished_in(run)}
    where = ", ".join(map(str, runs))
    expected = "expected evaluation.json or evaluation/*/evaluation.json in it"
    require(bool(folders), f"{where}: no finished evaluation: {expected}")
    evaluations = [_read(folder) for folder in folders.values()]
    _check_repetitions(evaluations)
    return evaluations


def unfinished(runs: Sequence[Path]) -> list[Path]:
    """Folders of evaluations that were begun and not finished, and folders of `runs` without any.

    Args:
      runs: workdirs of training runs, or folders of evaluations.

    Examples:
      >>> from pathlib import Path
      >>> from deq_jax.reporting import unfinished
      >>> [folder.name for folder in unfinished([Path("runs/none")])]
      ['none']
    """
    found = [unfinished_in(run) or ([] if finished_in(run) else [run]) for run in runs]
    return list(dict.fromkeys(folder for part in found for folder in part))


def _read(folder: EvaluationFolder) -> Evaluation:
    record = read_record(folder.record)
    try:
        if record.provenance is None:
            raise ValueError("no workdir is named")
        arrays = read_npz(folder.arrays, skip=["x_adv"])
        correct = dict(zip(map(str, arrays["rows"]), arrays["correct"], strict=True))
        evaluation = Evaluation(folder.path, record, record.provenance, _measured(arrays), correct)
        _check_accuracy(evaluation)
        _check_states(evaluation)
    except (InputError, *DAMAGED) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder.record}: not an evaluation as this version writes it ({reason})") from None
    return evaluation


def _measured(arrays: dict[str, np.ndarray]) -> Measurements:
    parts = {name: from_columns(arrays, f"{name}_") for name in CONDITIONS if f"{name}_label" in arrays}
    outcomes = Outcomes(arrays["y"], parts["clean"], parts.get("attacked"), None)
    correct = dict(zip(CONDITIONS, correctness(outcomes), strict=True))
    found: Measurements = {}
    for condition, part in parts.items():
        right = correct[condition]
        assert right is not None  # it is of the conditions that were measured
        for (state, row), is_right in zip(named(part).items(), named(right).values(), strict=True):
            measured = (is_right, row.entropy, row.residual)
            found |= {(state, condition, name): values for name, values in zip(QUANTITIES, measured, strict=True)}
    return found


def _check_accuracy(evaluation: Evaluation) -> None:
    accuracy, correct = evaluation.record.accuracy, evaluation.correct
    expected = ["clean", *(trial.name for trial in evaluation.record.plan.all_trials)]
    rows = [accuracy[name] for name in expected] + list(accuracy.values())
    if any(row.keys() != rows[0].keys() for row in rows) or "deployed" not in rows[0]:
        raise ValueError("rows of accuracy are of different predictors")
    means = {name: float(np.mean(row)) for name, row in correct.items()}
    counts = {len(row) for row in correct.values()}
    if counts != {evaluation.record.images} or means != {name: row["deployed"] for name, row in accuracy.items()}:
        raise ValueError("evaluation.npz is of another evaluation")


def _check_states(evaluation: Evaluation) -> None:
    """Checks that the means of the arrays equal the record's, for the same rows and conditions."""
    stored = {
        (state, condition, quantity): getattr(means, quantity)
        for state, row in evaluation.record.rows.items()
        for condition, means in (("clean", row.clean), ("attacked", row.attacked))
        if means is not None
        for quantity in QUANTITIES
    }
    found = {name: values.mean() for name, values in evaluation.measured.items()}
    same = found.keys() == stored.keys() and all(
        np.isnan(mean) if stored[name] is None else np.isclose(mean, stored[name]) for name, mean in found.items()
    )
    shapes = {values.shape for values in evaluation.measured.values()}
    if not same or shapes != {(evaluation.record.images,)}:
        raise ValueError("evaluation.npz has other states")


def _check_repetitions(evaluations: list[Evaluation]) -> None:
    first: dict[Any, Evaluation] = {}
    for new in evaluations:
        old = first.setdefault((new.identity, new.seed), new)
        same = f"the same training config, defence, seed {new.seed}, images, radius and attacks"
        require(old is new, f"{new.folder} has {same} as {old.folder}: expected one of the two")
