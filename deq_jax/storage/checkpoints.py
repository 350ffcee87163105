"""Checkpoints by orbax: host arrays, so that any number of devices and processes can restore them."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from deq_jax.core.errors import InputError, require
from deq_jax.core.types import PyTree

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save

QUIET = 1.0  # seconds


class Checkpoints:
    """The checkpoints in one folder. A save is atomic: the remains of a killed process are never read.

    With several processes, each one reads and writes on its own, and only one of them may save.

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
        step: int | None = self._manager.latest_step()
        return step

    def shapes(self) -> PyTree:
        """The newest checkpoint's state with entries that have a shape, as nested dicts and lists; None if damaged."""
        try:
            with ocp.StandardCheckpointer() as reader:
                return reader.metadata(self.folder / str(self.latest_step()) / "state").item_metadata.tree
        except Exception:  # orbax, tensorstore and json each have their own; `restore` tells
            return None

    def restore(self, template: PyTree, *, only: Sequence[str] = ()) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint's state, shaped like `template`, and its meta data.

        Args:
          template: a pytree of arrays or their shapes.
          only: names of the checkpoint's topmost parts that are compared with the template; all if empty.

        Raises:
          InputError: if it cannot be read, or does not fit the template in structure, shapes and dtypes.
        """
        restored = self._read()
        found = {path: leaf for path, leaf in _leaves(restored.state) if not only or path.split("/")[0] in only}
        expected = dict(_leaves(template))
        where = f"checkpoint {self.folder / str(self.latest_step())} does not fit"
        for path in expected | found:  # in the template's order
            require(path in found, f"{where}: has no {path}")
            require(path in expected, f"{where}: {path} was not expected")
            for name in ("shape", "dtype"):
                old, new = getattr(found[path], name), getattr(expected[path], name)
                require(old == new, f"{where}: {path} has {name} {old}, expected {new}")
        return jax.tree.unflatten(jax.tree.structure(template), [found[path] for path in expected]), restored.meta

    def _read(self) -> ocp.args.Composite:
        step = self.latest_step()
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        try:
            with _without_late_reads():
                return self._manager.restore(step, args=items)
        except Exception as error:  # orbax, tensorstore and json each have their own
            reason = str(error).strip().splitlines()[0][:200]
            advice = "move it away to continue from an earlier one"
            message = f"checkpoint {self.folder / str(step)} cannot be read; {advice} ({reason})"
            raise InputError(message) from None


@contextmanager
def _without_late_reads() -> Iterator[None]:
    """Keeps quiet about reads that tensorstore answers when orbax no longer waits for them, because another one failed.

    Python reports these in its hook for exceptions that nobody can catch. After a failure they come for a fraction of a
    second; the hook is put back once there was none for `QUIET` seconds.
    """
    report, latest = sys.unraisablehook, time.monotonic()

    def hook(problem: Any) -> None:
        nonlocal latest
        if isinstance(problem.exc_value, RuntimeError) and str(problem.exc_value) == "Event loop is closed":
            latest = time.monotonic()
        else:
            report(problem)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        latest = time.monotonic()
        while time.monotonic() < latest + QUIET:
            time.sleep(QUIET / 10)
        raise
    finally:
        sys.unraisablehook = report


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves and their names, such as ``params/cell/kernel``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
