"""Whether a finished evaluation is what its files give: its digests, its table, and a random part of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

from deq_jax.core.box import BOX_TOLERANCE
from deq_jax.core.errors import InputError
from deq_jax.data.datasets import Images
from deq_jax.evaluation.engine import folded
from deq_jax.evaluation.files import arrays_of
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.evaluation.plan import EvalConfig
from deq_jax.evaluation.record import EvaluationRecord, PredictionCost, read_record
from deq_jax.evaluation.results import WorstCase
from deq_jax.evaluation.rows import Row
from deq_jax.evaluation.stages import CLEAN, Stages
from deq_jax.evaluation.store import Store
from deq_jax.evaluation.transfers import read_manifest
from deq_jax.models.base import Classifier, Variables
from deq_jax.storage.files import digest, read_npz
from deq_jax.storage.trees import first_difference, from_tree, to_tree

SAMPLE = 200  # images that are classified again

ROUNDING = 1e-3  # a margin below it may change its sign on another device


YOUNGER = ("classes", "cost", "unsettled")  # numbers that older files lack


@dataclass(frozen=True)
class Check:
    """A check of a finished evaluation.

    Attributes:
      name: name of the check.
      holds: whether nothing has changed.
      text: the finding.

    Examples:
      >>> from deq_jax.evaluation import Check
      >>> print(Check("images", False, "digest was 01, now 02"))
      DIFFERS  images: digest was 01, now 02
    """

    name: str
    holds: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.holds else 'DIFFERS':8} {self.name}: {self.text}"


def verify(
    folder: EvaluationFolder,
    classifier: Classifier,
    variables: Variables,
    images: Images,
    *,
    validation: Images | None = None,
    about: dict[str, Any] | None = None,
    class_names: Sequence[str] = (),
    seed: int = 0,
    sample: int = SAMPLE,
) -> list[Check]:
    """Compares a finished evaluation with its files, and classifies a random part of its images again.

    Nothing is written, and nothing is attacked. The stored images of a trial are taken as given; no attack is
    repeated.

    Args:
      folder: the evaluation.
      classifier: as trained.
      variables: variables of the classifier.
      images: the split that was evaluated.
      validation, about: as `worst_case` had them.
      class_names: names of the classes in the order of their labels.
      seed: chooses the images that are classified again.
      sample: how many these are, over all trials.

    Returns:
      Checks of the digests of checkpoint and images, of the config, of the trials' files, of the table, of the numbers
      of each image, and of the images that were classified again; the ones after a failure that leaves nothing to
      compare are missing.

    Raises:
      InputError: it is not a finished evaluation that can be read.

    For example::

        checks = verify(workdir.evaluation("test-quick"), run.config.classifier, run.variables, run.data.test)
        print(all(check.holds for check in checks))

    Examples:
      >>> from pathlib import Path
      >>> from deq_jax.data import Digits
      >>> from deq_jax.evaluation import EvaluationFolder, verify
      >>> from deq_jax.models import pretrained
      >>> model = pretrained("digits_pgd_at")
      >>> verify(EvaluationFolder(Path("runs/none")), model.classifier, model.variables, Digits().load().test)
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: runs/none/evaluation.json: no such file
    """
    record, manifest = read_record(folder.record), read_manifest(folder.manifest)
    config = from_tree(manifest["config"])
    if not isinstance(config, EvalConfig):
        raise InputError(f"{folder.manifest}: expected the config of an evaluation, found {type(config).__name__}")
    chosen = Images(*(part[: config.max_images] for part in images))
    known = {name: value for name, value in (about or {}).items() if name in manifest}
    checks = [
        _compared("checkpoint", manifest, {**known, "variables": digest(variables)}),
        _compared("images", manifest, {"images": digest(chosen)}),
        _of("config", first_difference(record.evaluation, to_tree(config)), "the one of the manifest"),
    ]
    try:
        result, stages = folded(config, classifier, variables, chosen, Store(folder.path, is_whole=True), validation)
        found = EvaluationRecord.of(result, record.provenance, class_names)
        files = sum(len(folder.batches_of(folder.trial(name))) for name in (CLEAN, *result.attempts))
        checks.append(_trials(result, files))
        checks.append(_of("table", _table_difference(record, found), "all numbers follow from the files of the trials"))
        checks.append(_of("arrays", _arrays_difference(folder, result), "each image has the outcome of these files"))
        checks.append(_classified_again(result, stages, np.random.default_rng(seed), sample))
    except InputError as error:
        checks.append(Check("files", False, str(error)))
    return checks


def _compared(name: str, old: dict[str, Any], new: dict[str, Any]) -> Check:
    differences = [f"{key} was {old.get(key)}, now {value}" for key, value in new.items() if old.get(key) != value]
    return _of(name, "; ".join(differences), ", ".join(map(str, new.values())))


def _of(name: str, difference: str | None, text: str) -> Check:
    return Check(name, not difference, difference or text)


def _trials(result: WorstCase, files: int) -> Check:
    """Whether all images of all trials are images; reading them has checked that they lie within the ball."""
    for name, attempt in result.attempts.items():
        x = attempt.read()
        outside = np.flatnonzero(~((x >= -BOX_TOLERANCE) & (x <= 1 + BOX_TOLERANCE)).all(axis=(1, 2, 3)))
        if len(outside):
            return Check("trials", False, f"{name}: image {outside[0]} has pixels outside of [0, 1]")
    balls = f"all images lie in [0, 1], and those that count within {result.config.threat}"
    return Check("trials", True, f"{files} files of {len(result.attempts)} trials and the clean images; {balls}")


def _table_difference(stored: EvaluationRecord, found: EvaluationRecord) -> str | None:
    old, new = _numbers(stored), _numbers(found)
    known = [name for name, part in old.items() if name not in YOUNGER or part not in ((), None, PredictionCost())]
    return _difference({name: old[name] for name in known}, {name: new[name] for name in known})


def _numbers(record: EvaluationRecord) -> dict[str, Any]:
    """All numbers that the files give, by their places in evaluation.json; older ones lack some."""
    names = ("images", "rows", "accuracy", "spectral_radius", "adjoint_residual", "early_state", *YOUNGER)
    trials = {name: (trial.attacked, trial.broken, trial.seconds) for name, trial in record.trials.items()}
    flags = {flag.name: (flag.raised, flag.value) for flag in record.red_flags}
    return {name: getattr(record, name) for name in names} | {"trials": trials, "red_flags": flags}


def _difference(old: Any, new: Any, place: str = "") -> str | None:
    """The first place in which two values differ beyond rounding, with both."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        old, new = vars(old), vars(new)
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        places = {name: f"{place}.{name}" if place else str(name) for name in old | new}
        below = (_difference(old.get(name), new.get(name), where) for name, where in places.items())
        return next(filter(None, below), None)
    numbers = isinstance(old, float | int) and isinstance(new, float | int)
    same = np.isclose(cast(float, old), cast(float, new), rtol=1e-6, equal_nan=True) if numbers else old == new
    return None if same else f"{place} is {old}, and the files give {new}"


def _arrays_difference(folder: EvaluationFolder, result: WorstCase) -> str | None:
    stored, expected = read_npz(folder.arrays), arrays_of(result)
    for name, values in stored.items():
        known = name in expected and values.dtype.kind == expected[name].dtype.kind
        if not (known and np.array_equal(values, expected[name], equal_nan=values.dtype.kind == "f")):
            return f"{folder.arrays.name}: {name} is not what the files give"
    missing = {"y", "rows", "correct"} - stored.keys()
    return f"{folder.arrays.name}: lacks {', '.join(sorted(missing))}" if missing else None


def _classified_again(result: WorstCase, stages: Stages, rng: np.random.Generator, sample: int) -> Check:
    """Whether the deployed predictor gives the stored outcome of some images, chosen over all trials."""
    parts: dict[str, tuple[np.ndarray, Row, Callable[[], np.ndarray]]] = {
        CLEAN: (np.arange(len(result.y)), result.clean.deployed, lambda: stages.x)
    }
    for name, attempt in result.attempts.items():
        parts[name] = np.flatnonzero(attempt.attacked), attempt.measured.deployed, attempt.read
    total = sum(len(rows) for rows, *_ in parts.values())
    places = np.sort(rng.choice(total, min(sample, total), replace=False))
    x, number, label, margin, trial, start = [], [], [], [], [], 0
    for name, (rows, row, read) in parts.items():
        own = rows[places[(places >= start) & (places < start + len(rows))] - start]
        start += len(rows)
        if len(own):
            x.append(read()[own])
            number.append(own)
            label.append(row.label[own])
            margin.append(row.margin[own])
            trial += [name] * len(own)
    numbers, labels, margins = (np.concatenate(part) for part in (number, label, margin))
    devices, at_once = jax.device_count(), min(result.config.batch_size, len(numbers))
    given = stages.classified(np.concatenate(x), numbers, -(-at_once // devices) * devices)
    wrong = np.flatnonzero((given != labels) & ~(np.abs(margins) < ROUNDING))
    what = f"{len(places)} of {total} images, chosen at random, are classified as they were"
    if len(wrong) == 0:
        return Check("outcomes", True, what)
    i = wrong[0]
    first = f"{trial[i]}, image {numbers[i]}: class {labels[i]} is stored, and the predictor gives {given[i]}"
    return Check("outcomes", False, f"{len(wrong)} of {len(places)} images are classified otherwise (first: {first})")
