"""Storage of an evaluation's results: in a folder, or in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deq_jax.core.errors import require
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.evaluation.transfers import read_trial, with_batches
from deq_jax.parallel.processes import agreed, from_primary, is_primary
from deq_jax.storage.files import read_npz, write_npz, writing
from deq_jax.storage.locks import make_or_wait, try_to_make

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Store:
    """Groups of named arrays, each computed once: ``store.batch("pgd", 0, compute)``.

    Attributes:
      path: folder that holds each group as a file, written whole by the primary process. All processes see the same
        folder. None keeps the groups in memory, each process its own.
      is_whole: nothing is computed: a group that is not kept is an `InputError`.
      is_shared: other processes compute groups of the same folder, each on its own; each group is computed by one.
    """

    path: Path | None
    is_whole: bool = False
    is_shared: bool = False
    _kept: dict[Path, Arrays] = field(default_factory=dict, repr=False)

    def has(self, trial: str, number: int) -> bool:
        """Whether a batch is kept."""
        file = self._folder.batch(trial, number)
        return file in self._kept if self.path is None else file.exists()

    def batch(self, trial: str, number: int, compute: Callable[[], Arrays]) -> Arrays | None:
        """Results of a batch of a trial; computed where nothing is kept. None while another process computes them."""
        file = self._folder.batch(trial, number)
        if self.is_shared and not try_to_make(*self._shared(file, compute)):
            return None
        return self._get(file, compute)

    def answers(self, name: str, parts: Collection[str], compute: Callable[[], Arrays]) -> Arrays:
        """Answers of the deployed predictor that are asked for once, in these parts; computed where nothing is kept."""
        file = self._folder.answers(name)
        if self.is_shared:
            make_or_wait(*self._shared(file, compute))
        found = self._get(file, compute)
        require(found.keys() == set(parts), f"{file}: expected {', '.join(parts)}, found {', '.join(found)}; delete it")
        return found

    def x_adv(self, trial: str, x: np.ndarray) -> np.ndarray:
        """The images [N, H, W, C] that a trial has made, and x where it attacked none."""
        folder = self._folder.trial(trial)
        if self.path is not None:
            return read_trial(folder, x)
        return with_batches(x, [(file, arrays) for file, arrays in self._kept.items() if file.parent == folder])

    @property
    def _folder(self) -> EvaluationFolder:
        return EvaluationFolder(Path() if self.path is None else self.path)

    def _get(self, file: Path, compute: Callable[[], Arrays]) -> Arrays:
        if self.path is None:
            if file not in self._kept:
                self._kept[file] = compute()
            return self._kept[file]
        if from_primary(np.array(file.exists())):
            return read_npz(file)
        require(not self.is_whole, f"{file}: missing")
        arrays = compute()
        with agreed():
            if is_primary():
                self._make_folders(file)
                write_npz(file, arrays)
        return arrays

    def _shared(self, file: Path, compute: Callable[[], Arrays]) -> tuple[Path, Callable[[], None]]:
        """The file of a group, in its folder, and how it is made."""
        self._make_folders(file)
        return file, lambda: write_npz(file, compute())

    def _make_folders(self, file: Path) -> None:
        """Makes the folders in which a group is, but not the evaluation's own, which may have vanished."""
        with writing(file):
            for folder in reversed(file.relative_to(self._folder.path).parents[:-1]):
                (self._folder.path / folder).mkdir(exist_ok=True)
