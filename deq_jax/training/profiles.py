"""A JAX profile of some steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from deq_jax.storage.files import writing


class Profile:
    """Writes a JAX profile of steps into a folder, for TensorBoard's profile plugin or Perfetto.

    The first step is left out, because it is compiled. Steps that are pending when the profile begins or ends are
    waited for, so it has whole steps.

    Args:
      folder: gets the profile.
      steps: number of steps; 0 for no profile.
    """

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps = folder, steps
        self._seen, self._runs = 0, False

    def __enter__(self) -> Profile:
        return self

    def after(self, state: Any) -> None:
        """To be called after each step, with its state."""
        self._seen += 1
        if self._steps and self._seen == 1:
            jax.block_until_ready(state)
            with writing(self._folder):
                jax.profiler.start_trace(self._folder)
            self._runs = True
        elif self._runs and self._seen == 1 + self._steps:
            jax.block_until_ready(state)
            self._end()

    def __exit__(self, *_: object) -> None:
        if self._runs:
            self._end()

    def _end(self) -> None:
        self._runs = False
        with writing(self._folder):
            jax.profiler.stop_trace()
