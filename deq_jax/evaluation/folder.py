"""The folder of an evaluation: the names of its files have this one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EVALUATIONS = "evaluation"  # folder of a run's evaluations, in its workdir


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of an evaluation's results.

    Attributes:
      path: the folder.

    Examples:
      >>> from pathlib import Path
      >>> from deq_jax.evaluation import EvaluationFolder
      >>> EvaluationFolder(Path("runs/a/evaluation/test-pgd")).batch("pgd-10", 3).name
      'batch-0003.npz'
    """

    path: Path

    @property
    def manifest(self) -> Path:
        """Config and data of the evaluation; written first."""
        return self.path / "manifest.json"

    @property
    def record(self) -> Path:
        """All its numbers, see `EvaluationRecord`; written last, so an evaluation that has it is finished."""
        return self.path / "evaluation.json"

    @property
    def arrays(self) -> Path:
        """Measurements of each image."""
        return self.path / "evaluation.npz"

    def trial(self, name: str) -> Path:
        """Folder of the batches of a trial, or of the "clean" images."""
        return self.path / "trials" / name

    def batch(self, trial: str, number: int) -> Path:
        """A batch of a trial."""
        return self.trial(trial) / f"batch-{number:04d}.npz"

    def answers(self, name: str) -> Path:
        """Answers of the deployed predictor that are asked for once: "probe", "cost", "early_state"."""
        return self.path / f"{name}.npz"

    def figure(self, name: str) -> Path:
        """A figure: "states", "trials", "images"."""
        return self.path / f"{name}.png"

    @staticmethod
    def batches_of(trial: Path) -> list[Path]:
        """All batches in a trial's folder, in their order."""
        return sorted(trial.glob("batch-*.npz"))

    @classmethod
    def of_trial(cls, trial: Path) -> EvaluationFolder:
        """The evaluation that a trial's folder belongs to."""
        return cls(trial.resolve().parents[1])


def finished_in(run: Path) -> list[EvaluationFolder]:
    """The finished evaluations of a run's workdir; or the folder itself, if it is one of a finished evaluation."""
    own = EvaluationFolder(run)
    return [own] if own.record.is_file() else [folder for folder in _all_in(run) if folder.record.is_file()]


def unfinished_in(run: Path) -> list[Path]:
    """The folders of evaluations in a workdir that were begun and are not finished."""
    if EvaluationFolder(run).record.is_file():
        return []
    return [one.path for one in _all_in(run) if one.manifest.exists() and not one.record.is_file()]


def _all_in(run: Path) -> list[EvaluationFolder]:
    return [EvaluationFolder(path) for path in sorted(run.glob(f"{EVALUATIONS}/*")) if path.is_dir()]
