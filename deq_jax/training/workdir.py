"""What the workdir of a training says about it: its config, its surroundings, and where it started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax

from deq_jax.core.errors import InputError, require
from deq_jax.models.base import Variables
from deq_jax.parallel.processes import gather_texts
from deq_jax.storage.checkpoints import Checkpoints
from deq_jax.storage.environment import decisive_settings, resumed_environments
from deq_jax.storage.files import digest, read_json
from deq_jax.storage.trees import first_difference, from_tree, to_tree
from deq_jax.training.config import TrainConfig
from deq_jax.training.step import initial_variables


class Origin(NamedTuple):
    """The variables from which a run started, of another run.

    Attributes:
      workdir: of the other run, an absolute path.
      checkpoint: best or latest.
      step: of the checkpoint.
      digest: SHA-256 of its parameters and batch statistics, shortened.
    """

    workdir: str
    checkpoint: str
    step: int
    digest: str


def read_config(workdir: Path) -> TrainConfig:
    """The config of the training in `workdir`; raises `InputError` if there is none that can be read."""
    require((workdir / "config.json").is_file(), f"{workdir}: not a training's workdir (no config.json)")
    config = from_tree(read_json(workdir / "config.json"))
    if not isinstance(config, TrainConfig):
        raise InputError(f"{workdir / 'config.json'}: expected a TrainConfig")
    return config


def checkpoints_of(workdir: Path, name: str) -> Checkpoints:
    """The ``best`` or ``latest`` checkpoints of a training; raises `InputError` if there are none."""
    require(name in ("best", "latest"), f"checkpoint must be best or latest, got {name!r}")
    require((workdir / "config.json").is_file(), f"{workdir}: not a training's workdir (no config.json)")
    checkpoints = Checkpoints(workdir / "checkpoints" / name, keep=1 if name == "best" else 2)
    require(checkpoints.latest_step() is not None, f"{workdir}: has no {name} checkpoint yet")
    return checkpoints


def read_origin(workdir: Path, name: str, template: Variables) -> tuple[Variables, Origin]:
    """The variables of a run's best or latest checkpoint, to start another run from, and where they are from.

    Raises:
      InputError: there is no such checkpoint, or it does not fit the template; the first difference is named.
    """
    checkpoints = checkpoints_of(workdir, name)
    variables, _ = checkpoints.restore(template, only=list(template))
    return variables, Origin(str(workdir.absolute()), name, cast(int, checkpoints.latest_step()), digest(variables))


def check_origin(workdir: Path, origin: Origin | None, given: Path, name: str) -> None:
    """Raises `InputError` if the run in `workdir` did not start from the `name` checkpoint of the run in `given`."""
    advice = "leave --init-from out to go on, or choose another --workdir"
    require(origin is not None, f"--init-from {given}: {workdir} holds a run that started from no other one; {advice}")
    if origin is not None:
        started = f"{workdir} holds a run that started from the {origin.checkpoint} checkpoint of {origin.workdir}"
        same = (origin.workdir, origin.checkpoint) == (str(given.absolute()), name)
        require(same, f"--init-from {given}, {name} checkpoint: {started}; {advice}")


def check_same_everywhere(tree: Any) -> None:
    """Raises `InputError`, in all processes, naming what differs, unless they all train the same config alike."""
    if jax.process_count() == 1:
        return
    texts = [json.loads(text) for text in gather_texts(json.dumps({**tree, **decisive_settings()}))]
    for process, other in enumerate(texts):
        difference = first_difference(texts[0], other)
        require(difference is None, f"process {process} trains another config than process 0: {difference}")


def check_same_config(config: TrainConfig, workdir: Path) -> None:
    """Raises `InputError`, naming the field, if the workdir holds another training."""
    path = workdir / "config.json"
    if path.exists():
        difference = first_difference(read_json(path), to_tree(config))
        message = f"{workdir} holds a training of another config: {difference}; choose another --workdir"
        require(difference is None, message)


def environments_of(workdir: Path, step: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The environments of the run in `workdir` that goes on at `step`; see `resumed_environments`."""
    path = workdir / "environment.json"
    records = read_json(path) if path.exists() else []
    is_record = isinstance(records, list) and all(isinstance(record, dict) and "step" in record for record in records)
    require(is_record, f"{path}: expected a list of environments, each with its step")
    return resumed_environments(records, step)


def load_run(workdir: str | Path, *, best: bool = True) -> tuple[TrainConfig, Variables, int]:
    """Config, variables and step of a training's best (or latest) checkpoint.

    Raises:
      InputError: if the folder holds no readable training.
    """
    workdir = Path(workdir)
    config, checkpoints = read_config(workdir), checkpoints_of(workdir, "best" if best else "latest")
    template = initial_variables(config, config.dataset.load())
    variables, _ = checkpoints.restore(template, only=list(template))
    return config, variables, cast(int, checkpoints.latest_step())
