"""Where an evaluation keeps what it has computed: in a folder, or in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deq_jax.evaluation.transfers import read_trial, with_batches
from deq_jax.parallel.processes import from_primary, is_primary
from deq_jax.storage.files import read_npz, write_npz

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Store:
    """Groups of named arrays, each computed once: ``store.get("cost", compute)``.

    Attributes:
      folder: holds each group as a file NAME.npz, written whole by the primary process. All processes see the same
        folder. None keeps the groups in memory, each process its own.
    """

    folder: Path | None
    _kept: dict[str, Arrays] = field(default_factory=dict, repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self._kept if self.folder is None else (self.folder / f"{name}.npz").exists()

    def get(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """What is kept under this name, such as ``trials/pgd/batch-0000``; computed where nothing is."""
        if self.folder is None:
            if name not in self._kept:
                self._kept[name] = compute()
            return self._kept[name]
        path = self.folder / f"{name}.npz"
        if from_primary(np.array(path.exists())):
            return read_npz(path)
        arrays = compute()
        if is_primary():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, arrays)
        return arrays

    def x_adv(self, trial: str, x: np.ndarray) -> np.ndarray:
        """The images [N, H, W, C] that a trial has made; those of x that it left alone stand for themselves."""
        if self.folder is not None:
            return read_trial(self.folder / "trials" / trial, x)
        begin = f"trials/{trial}/"
        return with_batches(x, [(name, arrays) for name, arrays in self._kept.items() if name.startswith(begin)])
