"""Finished evaluations on disk: what each one found, and under which conditions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from deq_jax.core.errors import InputError, require
from deq_jax.evaluation.measure import Measured, Outcomes, correctness
from deq_jax.evaluation.plan import REFERENCE, UNDEFENDED
from deq_jax.evaluation.red_flags import Flag
from deq_jax.storage.briefs import brief, classifier_text, dynamics_lines, number, short_name, trial_text
from deq_jax.storage.files import read_json

SCHEDULE = ("epochs", "batch_size", "pretrain_steps", "optimizer", "augmentation")

CONDITIONS = ("clean", "attacked")

QUANTITIES = ("accuracy", "entropy", "residual")

Measurements = dict[tuple[str, str], np.ndarray]

DAMAGED = (KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Setting:
    """What two evaluations must share to be compared.

    Attributes:
      dataset, split, images: which images, the first ones of the split.
      checkpoint: which parameters: "best" or "latest".
      norm, epsilon: of the threat model.
    """

    dataset: str
    split: str
    images: int
    checkpoint: str
    norm: str
    epsilon: float

    def __str__(self) -> str:
        return f"{self.images_text}, {self.norm} ε = {number(self.epsilon)}"

    @property
    def images_text(self) -> str:
        """Without the radius."""
        return f"{self.images} images of {self.dataset}, {self.split} split, {self.checkpoint} checkpoint"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
      folder: that holds evaluation.json.
      workdir: of the training, as evaluation.json names it.
      config: of the training, as JSON data.
      evaluation: its own config, as JSON data.
      images: how many were evaluated.
      states: names of the R rows in which each image was measured: z_1 .. z_T, their mean, what is deployed.
      measured: "clean" or "attacked", and accuracy (True or False), entropy or residual -> [N, R].
      accuracy: name of the images -> predictor -> accuracy.
      correct: name of the images -> [N] bool, which the deployed predictor classifies correctly.
      attacked: trial -> how many images were left to attack; those that are known.
      flags: of `red_flags`.
      warnings: sentences on what is wrong with the model; those that are known.
      defence: what the deployed predictor is called.
      early_state: accuracies of z_1 .. z_T on held-out images, by which the deployed one was chosen; None if none was.
      cost: of a prediction for an image: "evaluations" of the cell, "seconds"; those that are known.
      checkpoint, split, versions: as evaluation.json has them.
    """

    folder: Path
    workdir: str
    config: dict[str, Any]
    evaluation: dict[str, Any]
    images: int
    states: tuple[str, ...]
    measured: Measurements = field(compare=False)  # arrays have no single truth value
    accuracy: dict[str, dict[str, float]]
    correct: dict[str, np.ndarray] = field(compare=False)
    attacked: dict[str, int]
    flags: tuple[Flag, ...]
    warnings: tuple[str, ...]
    defence: str
    early_state: list[float] | None
    cost: dict[str, float]
    checkpoint: str
    split: str
    versions: dict[str, str]

    @property
    def seed(self) -> int:
        """Random seed of the training run."""
        return int(self.config["seed"])

    @property
    def training(self) -> str:
        """The training's config without its seed, as text."""
        return _canonical({name: value for name, value in self.config.items() if name != "seed"})

    @property
    def predictor(self) -> str:
        """What was deployed, as text."""
        return self.defence + _canonical(self.evaluation["predictor"])

    @property
    def setting(self) -> Setting:
        """See `Setting`."""
        threat = self.evaluation["threat"]
        kind = self.checkpoint.partition(",")[0]
        dataset = brief({name: value for name, value in self.config["dataset"].items() if value is not None})
        return Setting(dataset, self.split, self.images, kind, short_name(threat), threat["epsilon"])

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Trials of the evaluation, then those of its diagnostics, as JSON data."""
        extra = self.evaluation["diagnostics"] or {}
        return [*self.evaluation["trials"], *(trial for name, trial in extra.items() if name != "class")]

    @property
    def attacks(self) -> tuple[str, ...]:
        """All trials and how they were run, as texts. Transferred images may come from any folder."""
        options = {name: self.evaluation.get(name) for name in ("skip_broken", "draws")}
        return (*(_canonical(_without_paths(trial)) for trial in self.trials), _canonical(options))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What it shares with the evaluations of other seeds of the same training, and with no others."""
        return self.training, self.predictor, self.setting, self.attacks

    @property
    def clean(self) -> np.ndarray:
        """[N] bool, which images are classified correctly as they are."""
        return self.correct["clean"]

    @property
    def reference(self) -> np.ndarray | None:
        """[N] bool, of the reference protocol: attacks on the undefended predictor; None if that was not run.

        Of the undefended predictor these are all attacks, as their images are what is shown to the defended ones.
        """
        return self.robust if self.defence == UNDEFENDED else self.correct.get(REFERENCE)

    @property
    def robust(self) -> np.ndarray | None:
        """[N] bool, which withstand all attacks; None without attack."""
        return self.correct.get("union")

    def in_state(self, state: str, condition: str, quantity: str) -> np.ndarray | None:
        """[N], what was measured of each image, or None; the arguments are as in `states` and `measured`."""
        table = self.measured.get((condition, quantity))
        if table is None or state not in self.states:
            return None
        values = table[:, self.states.index(state)]
        return None if np.isnan(values).any() else values


def read_evaluations(runs: Sequence[Path]) -> list[Evaluation]:
    """All finished evaluations of trainings, and single ones.

    Args:
      runs: workdirs of trainings, or folders of evaluations; see `unfinished`.

    Raises:
      InputError: there are none, one is damaged, or two are the same.
    """
    for run in runs:
        require(run.is_dir(), f"{run}: no such folder")
    files = {path.resolve(): path for run in runs for path in _files(run)}
    where = ", ".join(map(str, runs))
    expected = "expected evaluation.json or evaluation/*/evaluation.json in it"
    require(bool(files), f"{where}: no finished evaluation: {expected}")
    evaluations = [_read(path) for path in files.values()]
    _check_repetitions(evaluations)
    return evaluations


def unfinished(runs: Sequence[Path]) -> list[Path]:
    """Folders of evaluations that were begun and not finished, and those of `runs` that have none at all."""
    found: list[Path] = []
    for run in runs:
        finished = {path.parent for path in _files(run)}
        begun = {path.parent for path in run.glob("evaluation/*/manifest.json")} if run not in finished else set()
        found += sorted(begun - finished) or ([] if finished else [run])
    return list(dict.fromkeys(found))


def _files(run: Path) -> list[Path]:
    own = run / "evaluation.json"
    return [own] if own.is_file() else sorted(run.glob("evaluation/*/evaluation.json"))


def _read(path: Path) -> Evaluation:
    report = read_json(path)
    try:
        evaluation = _parsed(path.parent, report)
        _ = evaluation.identity, evaluation.reference, protocol_text(evaluation)
        _check_accuracy(evaluation)
        _check_states(evaluation, report["rows"])
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not an evaluation as this version writes it ({reason})") from None
    return evaluation


def _parsed(folder: Path, report: dict[str, Any]) -> Evaluation:
    predictor = report["evaluation"]["predictor"]
    arrays = _arrays(folder / "evaluation.npz")
    return Evaluation(
        folder=folder,
        workdir=report["workdir"],
        config=report["config"],
        evaluation=report["evaluation"],
        images=int(report["images"]),
        states=tuple(report["rows"]),
        measured=_measured(arrays),
        accuracy={name: {key: float(value) for key, value in row.items()} for name, row in report["accuracy"].items()},
        correct=dict(zip(map(str, arrays["rows"]), arrays["correct"], strict=True)),
        attacked={name: int(trial["attacked"]) for name, trial in report.get("trials", {}).items()},
        flags=tuple(Flag(**flag) for flag in report["red_flags"]),
        warnings=tuple(map(str, report.get("warnings", ()))),
        defence=report.get("defence", UNDEFENDED if predictor is None else brief(predictor)),
        early_state=report.get("early_state"),
        cost={name: float(value) for name, value in report.get("cost", {}).items() if value is not None},
        checkpoint=report["checkpoint"],
        split=report["split"],
        versions=dict(report["versions"]),
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files if name != "x_adv"}
    except (OSError, BadZipFile) as error:
        raise ValueError(f"{path.name}: {error}") from None


def _measured(arrays: dict[str, np.ndarray]) -> Measurements:
    parts = {name: _part(arrays, name) for name in CONDITIONS if f"{name}_label" in arrays}
    outcomes = Outcomes(arrays["y"], parts["clean"], parts.get("attacked"), None)
    correct = dict(zip(CONDITIONS, correctness(outcomes), strict=True))
    return {
        (condition, quantity): table
        for condition, part in parts.items()
        for quantity, table in zip(QUANTITIES, (correct[condition], part.entropy, part.residual), strict=True)
    }


def _part(arrays: dict[str, np.ndarray], condition: str) -> Measured:
    return Measured(*(arrays[f"{condition}_{name}"] for name in Measured._fields))


def _check_accuracy(evaluation: Evaluation) -> None:
    expected = ["clean", *(trial["name"] for trial in evaluation.trials)]
    rows = [evaluation.accuracy[name] for name in expected] + list(evaluation.accuracy.values())
    if any(row.keys() != rows[0].keys() for row in rows) or "deployed" not in rows[0]:
        raise ValueError("rows of accuracy are of different predictors")
    means = {name: float(np.mean(row)) for name, row in evaluation.correct.items()}
    counts = {len(row) for row in evaluation.correct.values()}
    if counts != {evaluation.images} or means != {name: row["deployed"] for name, row in evaluation.accuracy.items()}:
        raise ValueError("evaluation.npz is of another evaluation")


def _check_states(evaluation: Evaluation, rows: dict[str, Any]) -> None:
    found = {(state, condition) for state, row in rows.items() for condition in row}
    shapes = {table.shape for table in evaluation.measured.values()}
    same = shapes == {(evaluation.images, len(rows))}
    for (condition, quantity), table in evaluation.measured.items():
        for state, mean in zip(rows, table.mean(axis=0), strict=True):
            stored = rows[state][condition][quantity]
            same &= bool(np.isnan(mean) if stored is None else np.isclose(mean, float(stored)))
            found.discard((state, condition))
    if found or not same:
        raise ValueError("evaluation.npz has other states")


def _check_repetitions(evaluations: list[Evaluation]) -> None:
    first: dict[Any, Evaluation] = {}
    for new in evaluations:
        old = first.setdefault((new.identity, new.seed), new)
        same = f"the same training, defence, seed {new.seed}, images, radius and attacks"
        require(old is new, f"{new.folder} has {same} as {old.folder}: expected one of the two")


def protocol_text(one: Evaluation) -> str:
    """Everything that determines an evaluation, line by line, to be copied."""
    classifier, evaluation = one.config["classifier"], one.evaluation
    lines = {
        "training": f"{one.workdir}, seed {one.seed}, checkpoint {one.checkpoint}",
        "objective": brief(one.config["objective"]),
        "schedule": ", ".join(f"{name} {brief(one.config[name])}" for name in SCHEDULE),
        "classifier": classifier_text(classifier),
        **dynamics_lines(classifier.get("dynamics") or {}),
        "deployed": _deployed_text(one),
        "threat": f"{short_name(evaluation['threat'])}, epsilon = {number(evaluation['threat']['epsilon'])}",
        "images": f"{one.images} of {brief(one.config['dataset'])}, {one.split} split",
        "evaluation": f"batch size {evaluation['batch_size']}, seed of the attacks {evaluation['seed']}",
        "draws": "the predictor is deterministic" if evaluation["draws"] is None else f"{evaluation['draws']} (EOT)",
        "broken images": "left alone by later trials" if evaluation["skip_broken"] else "attacked by every trial",
        "versions": ", ".join(f"{name} {version}" for name, version in one.versions.items()),
    }
    text = [f"{name}: {value}" for name, value in lines.items()]
    return "\n".join([*text, f"attacks ({len(one.trials)}):", *(f"  {trial_text(trial)}" for trial in one.trials)])


def _deployed_text(one: Evaluation) -> str:
    predictor = one.evaluation["predictor"]
    chosen = "" if one.early_state is None else f" z_{1 + int(np.argmax(one.early_state))}"
    return f"{one.defence}{chosen}: {brief(predictor)}" if predictor else one.defence


def _canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True)


def _without_paths(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_without_paths(item) for item in tree]
    if isinstance(tree, dict):
        return {name: _without_paths(value) for name, value in tree.items() if name != "path"}
    return tree
