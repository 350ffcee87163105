"""Storage of a training run: in memory, or in its workdir."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deq_jax.core.errors import require
from deq_jax.models.base import Variables
from deq_jax.storage.checkpoints import Checkpoint, DamagedError
from deq_jax.storage.files import write_json
from deq_jax.training.config import TrainConfig
from deq_jax.training.metrics import MetricsLog, digest_of, line_of, read_metrics
from deq_jax.training.profiles import Profile
from deq_jax.training.step import TrainState
from deq_jax.training.workdir import Workdir, check_meta, check_same_config, environments_of

Meta = dict[str, Any]  # JSON data beside the state: config, best_accuracy, interval, origin


class Memory:
    """Keeps the lines of metrics and the best variables, and writes nothing.

    All processes but the first also have this one; only the first reads and writes the workdir.
    """

    def __init__(self) -> None:
        self.changed: list[str] = []
        self._lines: list[dict[str, Any]] = []
        self._best: Variables | None = None

    def check(self, config: TrainConfig) -> None:
        """Raises `InputError` if another config's run is kept here."""

    def restore(self, state: TrainState, images: str) -> tuple[TrainState, Meta] | None:
        """The latest state, shaped like the given one, and its meta data; None for a new run.

        Raises `InputError` for a run on images of another digest.
        `changed` then tells how the environment differs from the one of earlier steps.
        """

    def open(self, state: TrainState, meta: Meta, *, is_new: bool, has_ended: bool) -> None:
        """Called once before the first step, with the state and meta data that it begins with."""

    def log(self, step: int, epoch: float, split: str, metrics: dict[str, Any]) -> dict[str, Any]:
        """Keeps a line of metrics and returns it."""
        self._lines.append(line_of(step, epoch, split, metrics))
        return self._lines[-1]

    def save(self, step: int, state: TrainState, meta: Meta) -> None:
        """Keeps the latest state."""

    def save_best(self, step: int, state: TrainState, meta: Meta) -> None:
        """Keeps the state of the highest validation accuracy so far."""
        self._best = jax.tree.map(np.asarray, jax.device_get(state.variables))

    def profile(self, steps: int) -> Profile:
        """Profiles so many steps, where there is a workdir."""
        return Profile(Path(), 0)

    def close(self) -> None:
        """Called once after the last step."""

    def last_good(self, step: int) -> str:
        """Where the latest state is, for a message; it is of this step, -1 for none."""
        return "nothing is saved without a workdir"

    def best(self, template: Variables) -> Variables:
        """The variables of the highest validation accuracy."""
        return template if self._best is None else self._best

    def lines(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        return self._lines


class Disk(Memory):
    """Keeps a run in its workdir: see `fit`.

    Args:
      path: the workdir, a folder that exists.
      say: called with a line about each damaged checkpoint.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        super().__init__()
        self._say = say
        self.workdir = Workdir(path)
        self.latest_checkpoints, self.best_checkpoints = self.workdir.latest, self.workdir.best

    def check(self, config: TrainConfig) -> None:
        check_same_config(config, self.workdir.path)

    def restore(self, state: TrainState, images: str) -> tuple[TrainState, Meta] | None:
        latest = self.latest_checkpoints
        found = None if latest.latest_step() is None else latest.read(self._say_damaged)
        lines = read_metrics(self.workdir.metrics)  # that they can be read is known before anything is written
        if found is not None:
            check_meta(found)
        step = 0 if found is None else found.step
        self.environments, self.changed = environments_of(self.workdir.path, step, images)
        if found is None:
            return None
        self._check_unchanged(self.workdir.metrics, [line for line in lines if line["step"] <= step], found)
        self._check_unchanged(self.workdir.environment, _before(self.environments, step), found)
        return found.shaped_like(state), {name: part for name, part in found.meta.items() if name != "records"}

    def open(self, state: TrainState, meta: Meta, *, is_new: bool, has_ended: bool) -> None:
        """Writes the files that a resumed run reads."""
        write_json(self.workdir.config_file, meta["config"])
        self.latest_checkpoints.set_aside(after=int(state.step))
        if not has_ended:
            self._check_best(meta)
            write_json(self.workdir.environment, self.environments)
        self._log = MetricsLog(self.workdir.metrics, self.workdir.events, int(state.step))
        if meta["origin"] is not None:
            if is_new:
                self.save(0, state, meta)
            write_json(self.workdir.origin, meta["origin"])

    def log(self, step: int, epoch: float, split: str, metrics: dict[str, Any]) -> dict[str, Any]:
        return self._log.append(line_of(step, epoch, split, metrics))

    def save(self, step: int, state: TrainState, meta: Meta) -> None:
        records = {"metrics": self._log.digest, "environment": digest_of(_before(self.environments, step)).hexdigest()}
        self.latest_checkpoints.save(step, state, meta | {"records": records})

    def save_best(self, step: int, state: TrainState, meta: Meta) -> None:
        self.best_checkpoints.save(step, state, meta)

    def profile(self, steps: int) -> Profile:
        return Profile(self.workdir.profile, steps)

    def close(self) -> None:
        self._log.close()

    def last_good(self, step: int) -> str:
        saved = self.latest_checkpoints.folder / str(step)
        return f"last good one: {saved}" if step >= 0 else "no checkpoint yet"

    def best(self, template: Variables) -> Variables:
        found = self.best_checkpoints
        if found.latest_step() is None:
            return template
        variables: Variables = found.read(self._say_damaged).shaped_like(template, only=list(template))
        return variables

    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.workdir.metrics)

    def _check_best(self, meta: Meta) -> None:
        """Sets a damaged best checkpoint aside; without another one, the next validation gives the best."""
        best, step = self.best_checkpoints, -1
        if best.latest_step() is not None:
            try:
                step = best.read(self._say_damaged).step
            except DamagedError as error:
                self._say_damaged(f"{error}: the next validation gives the best one")
                meta["best_accuracy"] = -1.0
            best.set_aside(after=step)

    def _check_unchanged(self, path: Path, records: list[dict[str, Any]], found: Checkpoint) -> None:
        """Refuses records other than those at the checkpoint; without a file, or in older runs, none are expected."""
        expected = found.meta.get("records", {}).get(path.stem)
        fits = expected is None or not path.exists() or digest_of(records).hexdigest() == expected
        ways = "restore it, or delete it to resume without what it tells of earlier steps"
        require(fits, f"{path} has changed since step {found.step}, whose checkpoint has its digest; {ways}")

    def _say_damaged(self, text: str) -> None:
        self._say(f"note: {text}; the damaged one is set aside")


def _before(environments: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The environments of the steps up to this one."""
    return [record for record in environments if record["step"] < step]
