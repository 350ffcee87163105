"""Finished evaluations on disk: what each one found, and under which conditions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from deq_jax.records import read_json
from deq_jax.red_flags import Flag
from deq_jax.trials import REFERENCE, UNDEFENDED
from deq_jax.types import InputError, require

SCHEDULE = ("epochs", "batch_size", "pretrain_steps", "optimizer", "augmentation")
QUANTITIES = ("accuracy", "entropy", "residual")
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
      rows: state -> "clean" or "attacked" -> accuracy, entropy or residual.
      accuracy: name of the images -> predictor -> accuracy.
      correct: name of the images -> [N] bool, which the deployed predictor classifies correctly.
      flags: of `red_flags`.
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
    rows: dict[str, dict[str, dict[str, float | None]]]
    accuracy: dict[str, dict[str, float]]
    correct: dict[str, np.ndarray] = field(compare=False)  # arrays have no single truth value
    flags: tuple[Flag, ...]
    defence: str
    early_state: list[float] | None
    cost: dict[str, float]
    checkpoint: str
    split: str
    versions: dict[str, str]

    @property
    def seed(self) -> int:
        """Of the training."""
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
        dataset = brief(self.config["dataset"])
        return Setting(dataset, self.split, self.images, kind, short_name(threat), threat["epsilon"])

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Of the evaluation, and then those of its diagnostics, as JSON data."""
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


def read_evaluations(runs: Iterable[Path]) -> list[Evaluation]:
    """All finished evaluations of trainings, and single ones.

    Args:
      runs: workdirs of trainings, or folders of evaluations.

    Raises:
      InputError: there are none, one is damaged, or two are the same.
    """
    files = {path.resolve(): path for run in runs for path in _files(run)}
    evaluations = [_read(path) for path in files.values()]
    _check_repetitions(evaluations)
    return evaluations


def _files(run: Path) -> list[Path]:
    own = run / "evaluation.json"
    found = [own] if own.is_file() else sorted(run.glob("evaluation/*/evaluation.json"))
    expected = "expected evaluation.json or evaluation/*/evaluation.json in it"
    require(bool(found), f"{run}: no finished evaluation: {expected}")
    return found


def _read(path: Path) -> Evaluation:
    report = read_json(path)
    try:
        evaluation = _parsed(path.parent, report)
        _ = evaluation.identity, evaluation.reference, protocol_text(evaluation)
        _check_accuracy(evaluation)
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not an evaluation as this version writes it ({reason})") from None
    return evaluation


def _parsed(folder: Path, report: dict[str, Any]) -> Evaluation:
    predictor = report["evaluation"]["predictor"]
    rows = {
        state: {
            condition: {name: None if values[name] is None else float(values[name]) for name in QUANTITIES}
            for condition, values in row.items()
        }
        for state, row in report["rows"].items()
    }
    return Evaluation(
        folder=folder,
        workdir=report["workdir"],
        config=report["config"],
        evaluation=report["evaluation"],
        images=int(report["images"]),
        rows=rows,
        accuracy={name: {key: float(value) for key, value in row.items()} for name, row in report["accuracy"].items()},
        correct=_correct(folder / "evaluation.npz"),
        flags=tuple(Flag(**flag) for flag in report["red_flags"]),
        defence=report.get("defence", UNDEFENDED if predictor is None else brief(predictor)),
        early_state=report.get("early_state"),
        cost={name: float(value) for name, value in report.get("cost", {}).items() if value is not None},
        checkpoint=report["checkpoint"],
        split=report["split"],
        versions=dict(report["versions"]),
    )


def _correct(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(zip(map(str, arrays["rows"]), arrays["correct"], strict=True))
    except (OSError, BadZipFile) as error:
        raise ValueError(f"{path.name}: {error}") from None


def _check_accuracy(evaluation: Evaluation) -> None:
    expected = ["clean", *(trial["name"] for trial in evaluation.trials)]
    rows = [evaluation.accuracy[name] for name in expected] + list(evaluation.accuracy.values())
    if any(row.keys() != rows[0].keys() for row in rows) or "deployed" not in rows[0]:
        raise ValueError("rows of accuracy are of different predictors")
    means = {name: float(np.mean(row)) for name, row in evaluation.correct.items()}
    counts = {len(row) for row in evaluation.correct.values()}
    if counts != {evaluation.images} or means != {name: row["deployed"] for name, row in evaluation.accuracy.items()}:
        raise ValueError("evaluation.npz is of another evaluation")


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
        "classifier": _classifier_text(classifier),
        **_dynamics_lines(classifier.get("dynamics") or {}),
        "deployed": _deployed_text(one),
        "threat": f"{short_name(evaluation['threat'])}, epsilon = {number(evaluation['threat']['epsilon'])}",
        "images": f"{one.images} of {brief(one.config['dataset'])}, {one.split} split",
        "evaluation": f"batch size {evaluation['batch_size']}, seed of the attacks {evaluation['seed']}",
        "draws": "the predictor is deterministic" if evaluation["draws"] is None else f"{evaluation['draws']} (EOT)",
        "broken images": "left alone by later trials" if evaluation["skip_broken"] else "attacked by every trial",
        "versions": ", ".join(f"{name} {version}" for name, version in one.versions.items()),
    }
    text = [f"{name}: {value}" for name, value in lines.items()]
    return "\n".join([*text, f"attacks ({len(one.trials)}):", *(f"  {_trial_text(trial)}" for trial in one.trials)])


def _deployed_text(one: Evaluation) -> str:
    predictor = one.evaluation["predictor"]
    chosen = "" if one.early_state is None else f" z_{1 + int(np.argmax(one.early_state))}"
    return f"{one.defence}{chosen}: {brief(predictor)}" if predictor else one.defence


def _classifier_text(classifier: dict) -> str:
    parts = [f"{name} {brief(part)}" for name, part in classifier.items() if name not in ("class", "dynamics")]
    return f"{short_name(classifier)}: {', '.join(parts)}"


def _dynamics_lines(dynamics: dict) -> dict[str, str]:
    solver, gradient = dynamics.get("solver"), dynamics.get("gradient")
    lines = {"readout": brief(dynamics["readout"])} if "readout" in dynamics else {}
    if solver:
        states = f"T = {solver['steps']}, tolerance {number(solver['tolerance'])}"
        lines["solver"] = f"{states}: {brief(solver)}"
    if gradient:
        steps = f"K = {gradient['steps']}: " if short_name(gradient) == "Phantom" else ""
        lines["gradient"] = steps + brief(gradient)
    return lines


def _trial_text(trial: dict) -> str:
    suite = f" [{trial['suite']}]" if trial["suite"] else ""
    start = ", from the worst image so far" if trial["from_worst"] else ""
    return f"{trial['name']}{suite}: {brief(trial['attack'])}{start}, gradients: {brief(trial['surrogate'])}"


def brief(tree: Any) -> str:
    """A config as `to_tree` writes it, as one line without module names: ``PGD(epsilon=0.1, steps=10)``."""
    if isinstance(tree, list):
        return f"[{', '.join(brief(item) for item in tree)}]"
    if not isinstance(tree, dict):
        return number(tree) if isinstance(tree, float) else str(tree)
    if "class" not in tree:
        return short_name(tree)
    fields = [f"{name}={brief(value)}" for name, value in tree.items() if name != "class"]
    return f"{short_name(tree)}({', '.join(fields)})" if fields else short_name(tree)


def short_name(tree: dict[str, Any]) -> str:
    """Of a class or function in a config, without its module."""
    return str(tree.get("class", tree.get("name", ""))).rpartition(".")[2]


def number(value: float) -> str:
    """With six digits, or as a small number of 255 grey levels where that is exact and shorter."""
    text, numerator = f"{value:g}", round(255 * value)
    is_fraction = len(text) > 6 and 0 < numerator <= 32 and abs(255 * value - numerator) < 1e-9
    return f"{numerator}/255" if is_fraction else text


def _canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True)


def _without_paths(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_without_paths(item) for item in tree]
    if isinstance(tree, dict):
        return {name: _without_paths(value) for name, value in tree.items() if name != "path"}
    return tree
