"""Checkpoints by orbax: host arrays, so that any number of devices and processes can restore them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from deq_jax.core.errors import InputError, first_line, require
from deq_jax.core.types import PyTree
from deq_jax.storage.files import parsed_json, write_json, writing

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports every save, and also raises every failure

QUIET = 1.0  # seconds

DIGESTS = "digests.json"  # SHA-256 of all other files of a checkpoint, by their path in it

UNFINISHED = ".unfinished"  # a checkpoint that is being written or deleted; orbax appends endings of its own


class DamagedError(InputError):
    """A checkpoint has changed since it was written."""


class Checkpoints:
    """The checkpoints in one folder, each in a folder named by its step.

    A save is atomic: the remains of a killed process are never read. A file that has changed since it was written is
    noticed when the checkpoint is read. With several processes, each one reads and writes on its own, and only one of
    them may save.

    Args:
      folder: created when first saved to, with the folder that it is in.
      keep: number of checkpoints kept, the newest.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = Path(folder).absolute()
        self.keep = keep

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Saves a pytree of arrays and JSON data; a checkpoint of the same step or a later one is replaced.

        Raises:
          WriteError: it cannot be written; all that was there still is.
        """
        arrays = jax.tree.map(np.asarray, jax.device_get(state))
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        with writing(self.folder / str(step)):
            self.folder.parent.mkdir(exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._clear()
            try:
                self._place(step, items)
            finally:
                self._clear()

    def _place(self, step: int, items: ocp.args.Composite) -> None:
        unfinished = self.folder / UNFINISHED
        with _os_errors(), _without_late_answers(), _checkpointer() as checkpointer:
            checkpointer.save(unfinished, args=items)
        write_json(unfinished / DIGESTS, _digests(unfinished))
        if step in self._steps():
            self._remove(step)
        unfinished.rename(self.folder / str(step))
        for later in (other for other in self._steps() if other > step):
            self._remove(later)
        for old in self._steps()[: -self.keep]:
            self._remove(old)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, sound or not; None if there is none."""
        return max(self._steps(), default=None)

    def read(self, say: Callable[[str], None] = warnings.warn) -> Checkpoint:
        """The newest sound checkpoint; nothing is written.

        Args:
          say: called with a line for each newer one that is damaged.

        Raises:
          DamagedError: all are damaged.
          InputError: there is none, or the newest that is not known to be damaged cannot be read.
        """
        damaged: dict[int, str] = {}
        while steps := [step for step in self._steps() if step not in damaged]:
            step = steps[-1]
            try:
                found = Checkpoint.of(self.folder / str(step))
            except InputError as error:
                if step not in self._steps():  # deleted meanwhile by the process that trains
                    continue
                if not isinstance(error, DamagedError):
                    raise
                damaged[step] = str(error)
            else:
                for problem in damaged.values():
                    say(f"{problem}; step {step} is used")
                return found
        require(bool(damaged), f"{self.folder}: has no checkpoint")
        raise DamagedError(f"{next(iter(damaged.values()))}; there is no earlier one")

    def set_aside(self, after: int) -> None:
        """Renames the checkpoints after this step, which are damaged, to STEP.damaged-NUMBER; nothing is deleted."""
        for step in (step for step in self._steps() if step > after):
            names = (self.folder / f"{step}.damaged-{number}" for number in count(1))
            with writing(self.folder):
                (self.folder / str(step)).rename(next(path for path in names if not path.exists()))

    def _steps(self) -> list[int]:
        """Steps of all checkpoints, the newest last."""
        names = (path.name for path in self.folder.glob("[0-9]*"))
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{,8}", name))

    def _remove(self, step: int) -> None:
        """Takes a checkpoint away; at no moment half of it is there under its name."""
        (self.folder / str(step)).rename(self.folder / f"{UNFINISHED}-{step}")

    def _clear(self) -> None:
        """Deletes checkpoints that were taken away or not finished, also by a process that was killed."""
        for path in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
      path: its folder.
      state: its arrays, in nested dicts and lists.
      meta: its JSON data.
    """

    path: Path
    state: PyTree
    meta: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Checkpoint:
        """Reads a checkpoint. Its digests tell whether it is damaged; of an older one, without digests, orbax tells.

        Raises:
          DamagedError: it is damaged.
          InputError: it cannot be read for another reason, such as a want of memory or of permission.
        """
        try:
            is_checked = _check_digests(path)
        except OSError as error:
            raise InputError(f"checkpoint {path} cannot be read ({first_line(error)})") from None
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        try:
            with _without_late_answers(), _checkpointer() as checkpointer:
                found = checkpointer.restore(path, args=items)
        except Exception as error:  # orbax, tensorstore and json each have their own
            reason = first_line(error)[:200]
            if is_checked:
                raise InputError(f"checkpoint {path} cannot be read ({reason})") from None
            raise DamagedError(f"checkpoint {path} is damaged ({reason})") from None
        return cls(path, found.state, found.meta)

    @property
    def step(self) -> int:
        """Number of steps that were done."""
        return int(self.path.name)

    def shaped_like(self, template: PyTree, *, only: Sequence[str] = ()) -> PyTree:
        """The state, in the structure of the template.

        Args:
          template: a pytree of arrays or their shapes.
          only: names of the checkpoint's topmost parts that are compared with the template; all if empty.

        Raises:
          InputError: it does not fit the template in structure, shapes and dtypes; the first difference is named.
        """
        found = {path: leaf for path, leaf in _leaves(self.state) if not only or path.split("/")[0] in only}
        expected = dict(_leaves(template))
        where = f"checkpoint {self.path} does not fit"
        for path in expected | found:  # in the template's order
            require(path in found, f"{where}: has no {path}")
            require(path in expected, f"{where}: {path} was not expected")
            for name in ("shape", "dtype"):
                old, new = getattr(found[path], name, None), getattr(expected[path], name)
                require(old == new, f"{where}: {path} has {name} {old}, expected {new}")
        return jax.tree.unflatten(jax.tree.structure(template), [found[path] for path in expected])


def _checkpointer() -> ocp.Checkpointer:
    """Writes and reads in this process alone."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Errors of the operating system, which tensorstore raises as `ValueError`, as `OSError`."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _check_digests(folder: Path) -> bool:
    """Whether the checkpoint has digests; raises `DamagedError` where they do not fit its files."""
    if not (folder / DIGESTS).exists():
        return False
    try:
        for name, expected in parsed_json((folder / DIGESTS).read_text(), DIGESTS).items():
            require((folder / name).is_file(), f"{name} is missing")
            require(_sha256(folder / name) == expected, f"{name} has changed")
    except (AttributeError, ValueError) as error:  # the file of digests itself, or its content (InputError)
        raise DamagedError(f"checkpoint {folder} is damaged ({error})") from None
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _without_late_answers() -> Iterator[None]:
    """Keeps quiet about what tensorstore has read or written when orbax no longer waits, because another part failed.

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
