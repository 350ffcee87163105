"""The workdir of a training run: its config, its environment, and its origin."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deq_jax.core.errors import InputError, described, require
from deq_jax.data.datasets import Splits, load_splits
from deq_jax.evaluation.folder import EVALUATIONS, EvaluationFolder
from deq_jax.models.base import Variables
from deq_jax.parallel.processes import gather_texts
from deq_jax.storage.checkpoints import Checkpoint, Checkpoints
from deq_jax.storage.environment import decisive_settings, resumed_environments
from deq_jax.storage.files import digest, read_json
from deq_jax.storage.trees import first_difference, from_tree, to_tree
from deq_jax.training.config import TrainConfig
from deq_jax.training.step import initial_variables

CHECKPOINTS = {"best": 1, "latest": 2}  # name -> how many are kept


@dataclass(frozen=True)
class Workdir:
    """The folder of a training run: the names of its files have this one place.

    Attributes:
      path: the folder.

    For example, the numbers of a finished run::

        workdir = Workdir(Path("runs/a"))
        print(workdir.config.objective, workdir.latest.latest_step(), read_metrics(workdir.metrics)[-1])
        print(read_record(workdir.evaluation("test-pgd").record).robust_accuracy)

    Examples:
      >>> from pathlib import Path
      >>> from deq_jax.training import Workdir
      >>> Workdir(Path("runs/a")).evaluation("test-pgd").record.as_posix()
      'runs/a/evaluation/test-pgd/evaluation.json'
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The config, as JSON data."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Settings and versions, see `environments_of`."""
        return self.path / "environment.json"

    @property
    def origin(self) -> Path:
        """Where the first parameters are from, if they are from another run; see `Origin`."""
        return self.path / "origin.json"

    @property
    def metrics(self) -> Path:
        """Lines of metrics, see `read_metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Folder of the same as TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Folder of JAX profiles."""
        return self.path / "profile"

    @property
    def config(self) -> TrainConfig:
        """The config of the run; raises `InputError` if there is none that can be read."""
        require(self.config_file.is_file(), f"{self.path}: not the workdir of a run (no {self.config_file.name})")
        tree = read_json(self.config_file)
        try:
            config = from_tree(tree)
        except InputError as error:
            raise InputError(f"{self.config_file}: {error}") from None
        if not isinstance(config, TrainConfig):
            raise InputError(f"{self.config_file}: expected a TrainConfig, found {described(config)}")
        return config

    @property
    def holds_a_run(self) -> bool:
        """Whether any of a run is there, whole or not."""
        return self.config_file.exists() or self._checkpoints.exists()

    @property
    def latest(self) -> Checkpoints:
        """Checkpoints of the last steps."""
        return self._named("latest")

    @property
    def best(self) -> Checkpoints:
        """The checkpoint of the highest validation accuracy."""
        return self._named("best")

    def trained(self, name: str) -> Checkpoints:
        """The ``best`` or ``latest`` checkpoints; raises `InputError` if there are none."""
        require(name in CHECKPOINTS, f"checkpoint must be best or latest, got {name!r}")
        require(self.config_file.is_file(), f"{self.path}: not the workdir of a run (no {self.config_file.name})")
        checkpoints = self._named(name)
        require(checkpoints.latest_step() is not None, f"{self.path}: has no {name} checkpoint yet")
        return checkpoints

    def evaluation(self, name: str) -> EvaluationFolder:
        """The evaluation of this name."""
        return EvaluationFolder(self.path / EVALUATIONS / name)

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _named(self, name: str) -> Checkpoints:
        return Checkpoints(self._checkpoints / name, keep=CHECKPOINTS[name])


class Origin(NamedTuple):
    """The variables from which a run started, of another run.

    Attributes:
      workdir: workdir of the other run, an absolute path.
      checkpoint: best or latest.
      step: step of the checkpoint.
      digest: SHA-256 of its parameters and batch statistics, shortened.

    Examples:
      >>> from deq_jax.training import Origin
      >>> Origin("/home/me/runs/a", "best", step=17, digest="0123456789abcdef").checkpoint
      'best'
    """

    workdir: str
    checkpoint: str
    step: int
    digest: str


def read_origin(workdir: Path, name: str, template: Variables, say: Callable[[str], None]) -> tuple[Variables, Origin]:
    """The variables of a run's best or latest checkpoint, to start another run from, and where they are from.

    Raises:
      InputError: there is no such checkpoint, or it does not fit the template; the first difference is named.
    """
    found = Workdir(workdir).trained(name).read(say)
    variables = found.shaped_like(template, only=list(template))
    return variables, Origin(str(workdir.absolute()), name, found.step, digest(variables))


def check_origin(workdir: Path, origin: Origin | None, given: Path, name: str) -> None:
    """Raises `InputError` if the run in `workdir` did not start from the `name` checkpoint of the run in `given`."""
    advice = "drop --init-from to resume, or choose another --workdir"
    require(origin is not None, f"--init-from {given}: {workdir} holds a run that started from no other one; {advice}")
    if origin is not None:
        started = f"{workdir} holds a run that started from the {origin.checkpoint} checkpoint of {origin.workdir}"
        same = (origin.workdir, origin.checkpoint) == (str(given.absolute()), name)
        require(same, f"--init-from {given}, {name} checkpoint: {started}; {advice}")


def check_same_everywhere(tree: Any) -> None:
    """Raises `InputError`, in all processes, naming the difference, unless they all train the same config alike."""
    if jax.process_count() == 1:
        return
    texts = [json.loads(text) for text in gather_texts(json.dumps({**tree, **decisive_settings()}))]
    for process, other in enumerate(texts):
        difference = first_difference(texts[0], other)
        require(difference is None, f"process {process} trains another config than process 0: {difference}")


def check_same_config(config: TrainConfig, workdir: Path) -> None:
    """Raises `InputError`, naming the field, if the workdir holds another run."""
    path = Workdir(workdir).config_file
    if path.exists():
        difference = first_difference(read_json(path), to_tree(config))
        message = f"{workdir} holds a run of another config: {difference}; choose another --workdir"
        require(difference is None, message)


def environments_of(workdir: Path, step: int, images: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """The environments of the run in `workdir` that continues at `step`; see `resumed_environments`."""
    path = Workdir(workdir).environment
    records = read_json(path) if path.exists() else []
    fits = isinstance(records, list) and all(_is_environment(record) for record in records)
    require(fits, f"{path}: expected a list of environments, each with its step")
    return resumed_environments(records, step, images)


def _is_environment(record: Any) -> bool:
    """Whether it is a step and parts of an `environment`."""
    kinds = {name: type(part) for name, part in record.items()} if isinstance(record, dict) else {}
    return kinds.pop("step", None) is int and set(kinds.values()) <= {dict}


def check_meta(found: Checkpoint) -> None:
    """Raises `InputError` if a checkpoint's data beside the state do not come from a training run."""
    meta: Any = found.meta
    try:
        sums = meta.get("interval", {}).values()
        counts = [meta.get(name, 0) for name in ("best_accuracy", "not_better", "retreats")]
        numbers = [*counts, *(one for pair in sums for one in pair)]
        origin = meta.get("origin")
        fits = {type(one) for one in numbers} <= {int, float} and {len(pair) for pair in sums} <= {2}
        fits = fits and (origin is None or origin.keys() == set(Origin._fields))
        fits = fits and {type(one) for one in meta.get("records", {}).values()} <= {str}
    except (AttributeError, TypeError):  # something else than names and values
        fits = False
    require(fits, f"checkpoint {found.path}: not of a training run, by its data beside the state")


@dataclass(frozen=True)
class LoadedRun:
    """A training run, as its checkpoint has it.

    Attributes:
      config: config of the run.
      data: the three splits of its dataset.
      variables: parameters and batch statistics.
      step: step of the checkpoint.

    Examples:
      >>> from deq_jax import Standard, TrainConfig
      >>> from deq_jax.data import Digits
      >>> from deq_jax.models import small_cnn
      >>> from deq_jax.training import LoadedRun
      >>> config = TrainConfig(small_cnn(10, 12), Standard(), Digits())
      >>> LoadedRun(config, Digits().load(), {"params": {}, "batch_stats": {}}, step=17).data.test.y.shape
      (360,)
    """

    config: TrainConfig
    data: Splits
    variables: Variables
    step: int


def load_run(workdir: str | Path, *, best: bool = True, say: Callable[[str], None] = warnings.warn) -> LoadedRun:
    """A run's best (or latest) checkpoint, with its config and its dataset.

    Args:
      workdir: folder of the run.
      best: the best checkpoint, or else the latest.
      say: called with a line for each checkpoint that is damaged; the one before it is loaded then.

    Raises:
      InputError: if the folder holds no readable run.

    Examples:
      >>> from deq_jax.training import load_run
      >>> load_run("runs/none")
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: runs/none: not the workdir of a run (no config.json)
    """
    folder = Workdir(Path(workdir))
    config, checkpoints = folder.config, folder.trained("best" if best else "latest")
    data = load_splits(config.dataset)
    template = jax.eval_shape(partial(initial_variables, config, data))
    found = checkpoints.read(say)
    return LoadedRun(config, data, found.shaped_like(template, only=list(template)), found.step)
