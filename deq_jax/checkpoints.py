"""Checkpoints by orbax: host arrays, so that any number of devices and processes can restore them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from deq_jax.types import InputError, PyTree, require

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save


class Checkpoints:
    """The checkpoints in one folder. A save is atomic: what a killed process leaves is never read.

    With several processes, each that has one reads and writes on its own: only one of them may save.

    Args:
      folder: created when first saved to.
      keep: number of checkpoints kept, the newest.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = Path(folder).absolute()
        own = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Saves a pytree of arrays and JSON data; a checkpoint of the same step is replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if step in self._manager.all_steps():
            self._manager.delete(step)
        arrays = jax.tree.map(np.asarray, jax.device_get(state))
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint's state, shaped like `template`, and its meta data.

        Raises:
          InputError: if it cannot be read or does not fit the template.
        """
        step = self.latest_step()
        template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore())
        # After a failed restore tensorstore still answers reads that orbax no longer waits for.
        report = sys.unraisablehook
        sys.unraisablehook = lambda problem: None if _is_late_read(problem) else report(problem)
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # orbax, tensorstore and json each have their own
            reason = str(error).strip().splitlines()[0][:200]
            advice = "move it away to go on from an earlier one"
            message = f"checkpoint {self.folder / str(step)} cannot be read; {advice} ({reason})"
            raise InputError(message) from None
        sys.unraisablehook = report
        expected = jax.tree_util.tree_leaves_with_path(template)
        for (path, leaf), found in zip(expected, jax.tree.leaves(restored.state), strict=True):
            where = f"checkpoint {self.folder / str(step)} does not fit: {jax.tree_util.keystr(path)}"
            require(leaf.shape == found.shape, f"{where} has shape {found.shape}, expected {leaf.shape}")
        return restored.state, restored.meta


def _is_late_read(problem: Any) -> bool:
    """Whether tensorstore answers a read for which orbax has stopped waiting, because another one failed."""
    return isinstance(problem.exc_value, RuntimeError) and str(problem.exc_value) == "Event loop is closed"
