"""Training: one pure step, and the loop around it that logs, validates, saves and resumes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from deq_jax.checkpoints import Checkpoints
from deq_jax.config import TrainConfig, first_difference, from_tree, to_tree
from deq_jax.data import Splits, batch_indices, to_unit
from deq_jax.evaluation import evaluator, summary
from deq_jax.objectives import Outcome
from deq_jax.parallel import AXIS, check_batch_size, replicate, replicate_and_split
from deq_jax.processes import StopRequest, agreed, from_primary, gather_texts, is_primary
from deq_jax.records import MetricsLog, make_folder, read_json, write_json
from deq_jax.types import AnyArray, Array, InputError, Keys, PyTree, Variables, require

AUGMENTATION = 17  # purpose of a step's randomness, beside those of the objectives


class TrainState(NamedTuple):
    """All the state there is: every step depends on it and on the config alone."""

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> Variables:
        return {"params": self.params, "batch_stats": self.batch_stats}


class Batch(NamedTuple):
    """Images of one step.

    Attributes:
      x: [B, H, W, C], uint8 or float32 in [0, 1].
      y: [B] int32.
      position: [B] int32, each image's place in the whole batch.
    """

    x: AnyArray
    y: AnyArray
    position: AnyArray


class Interrupted(Exception):
    """The training was asked to stop (SIGINT, SIGTERM) and has saved its state; carries the signal."""


class NonFiniteLoss(Exception):
    """The loss is no longer a finite number; the message names the step and the last good checkpoint."""


def train_step(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of optimisation; pure.

    Args:
      config: objective, classifier, augmentation and seed are used.
      optimizer: whose state is in `state`.
      state: before the step.
      batch: this device's images.
      axis_name: mapped axis over which gradients, batch statistics and metrics are averaged.

    Returns:
      The state after the step, and scalar metrics of the whole batch.
    """

    def add(carry, part):
        total, batch_stats = carry
        gradient, outcome = _gradient(config, state._replace(batch_stats=batch_stats), part, axis_name)
        return (jax.tree.map(jnp.add, total, gradient), outcome.batch_stats), outcome.metrics

    parts = jax.tree.map(lambda leaf: leaf.reshape(config.accumulate, -1, *leaf.shape[1:]), batch)
    start = jax.tree.map(jnp.zeros_like, state.params), state.batch_stats
    (gradient, batch_stats), metrics = lax.scan(add, start, parts)
    gradient = jax.tree.map(lambda leaf: leaf / config.accumulate, gradient)
    metrics = {name: (jnp.max if name.endswith("_max") else jnp.mean)(metric) for name, metric in metrics.items()}
    if axis_name is not None:
        gradient = lax.pmean(gradient, axis_name)
        metrics = {
            name: (lax.pmax if name.endswith("_max") else lax.pmean)(metric, axis_name)
            for name, metric in metrics.items()
        }
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def _gradient(config: TrainConfig, state: TrainState, batch: Batch, axis_name: str | None) -> tuple[PyTree, Outcome]:
    """Gradient of the loss on these images, and what else their passes gave."""
    keys = Keys(jax.random.fold_in(jax.random.key(config.seed), state.step), batch.position)
    x = to_unit(batch.x)
    if config.augmentation is not None:
        x = config.augmentation(x, keys.fold(AUGMENTATION))
    classifier, objective = config.classifier, config.objective
    x_adv = lax.stop_gradient(objective.perturb(classifier, state.variables, x, batch.y, keys))

    def loss(params: PyTree):
        variables = {"params": params, "batch_stats": state.batch_stats}
        return objective.loss(classifier, variables, x, x_adv, batch.y, keys, axis_name)

    (value, outcome), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    return gradient, outcome._replace(metrics={"loss": value, **outcome.metrics})


def initial_state(config: TrainConfig, optimizer: optax.GradientTransformation, data: Splits) -> TrainState:
    """The state before the first step.

    Raises:
      InputError: if the classifier does not accept the dataset's images or has too few classes.
    """
    x = jnp.zeros((2, *data.train.x.shape[1:]))
    try:
        variables = config.classifier.init(jax.random.key(config.seed), x)
        logits = jax.eval_shape(lambda v, x: config.classifier(v, x).logits, variables, x)
    except InputError:
        raise
    except (TypeError, ValueError, ZeroDivisionError, flax.errors.FlaxError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"classifier does not fit images of shape {x.shape[1:]}: {reason}") from None
    classes = logits.shape[-1]
    for split, part in data._asdict().items():
        highest = int(part.y.max())
        expected = f"labels must be below the classifier's {classes} classes"
        require(highest < classes, f"{expected}, found {highest} in the {split} split of {config.dataset}")
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> TrainState:
    """Trains to the end, resuming whatever `workdir` holds of the same training.

    The workdir gets ``config.json``, ``metrics.jsonl``, TensorBoard events under ``tensorboard/``, and
    checkpoints under ``checkpoints/latest`` and ``checkpoints/best`` (by accuracy under the config's
    validation attack on held-out training images).

    Args:
      config: what to train.
      workdir: folder of this training.
      report: called with every line of metrics as it is written.

    With several processes (`deq_jax.processes.connect`) all call this alike. Process 0 alone reads and writes
    the workdir, which the others need not see, and calls `report`; it hands the state to the others.

    Raises:
      InputError: for data, a device count or a workdir that do not fit.
      NonFiniteLoss: when the loss is not finite.
      Interrupted: after SIGINT or SIGTERM to any process, with the state saved.
    """
    return _Training(config, Path(workdir), report).run()


class _Training:
    """The parts of a running training; `train` is its public face."""

    def __init__(self, config: TrainConfig, workdir: Path, report: Callable[[dict[str, Any]], None]):
        self.config, self.workdir, self.report = config, workdir, report
        self.config_tree = to_tree(config)
        self.state: TrainState
        self.saved = -1  # step of the latest checkpoint
        check_same_everywhere(self.config_tree)
        check_batch_size(config.batch_size)
        with agreed():
            self._prepare()
        with agreed():
            if is_primary():
                self._open_workdir()
        state, saved = from_primary((self.state, np.int32(self.saved)))
        self.state, self.saved = replicate(state), int(saved)
        self.done = int(self.state.step)
        self.evaluate = evaluator(
            config.classifier, config.validation_attack, batch_size=config.batch_size, seed=config.seed
        )

    def _prepare(self) -> None:
        """Data and the state before the first step."""
        config = self.config
        if is_primary():
            check_same_config(config, self.workdir)
        self.data = config.dataset.load()
        self.steps_per_epoch = len(self.data.train.y) // config.batch_size
        size = len(self.data.train.y)
        require(self.steps_per_epoch > 0, f"batch_size {config.batch_size} exceeds the {size} training images")
        per_device = config.batch_size // jax.device_count()
        parts = f"accumulate = {config.accumulate} parts"
        require(per_device % config.accumulate == 0, f"the {per_device} images of a device do not divide into {parts}")
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = config.optimizer.transformation(self.total_steps)
        self.state = initial_state(config, self.optimizer, self.data)

    def _open_workdir(self) -> None:
        """What only the process does that writes: it makes the workdir, or restores the state that is in it."""
        make_folder(self.workdir)
        write_json(self.workdir / "config.json", self.config_tree)
        self.latest = Checkpoints(self.workdir / "checkpoints" / "latest", keep=2)
        self.best = Checkpoints(self.workdir / "checkpoints" / "best", keep=1)
        self.best_accuracy = -1.0
        latest = self.latest.latest_step()
        if latest is not None:
            self.saved = latest
            self.state, meta = self.latest.restore(self.state)
            self.best_accuracy = meta["best_accuracy"]
        self.log = MetricsLog(self.workdir, int(self.state.step))

    def run(self) -> TrainState:
        self.steps: dict[TrainConfig, Callable] = {}
        self.pending: list[dict[str, Array]] = []
        self.started = time.perf_counter()
        try:
            with StopRequest() as self.stop:
                while self.done < self.total_steps:
                    step = self._step(self.config.at(self.done, self.steps_per_epoch))
                    self.state, metrics = step(self.state, self._batch(self.done))
                    self.done += 1
                    self.pending.append(metrics)
                    self._after()
        finally:
            if is_primary():
                self.log.close()
        return self.state

    def _step(self, config: TrainConfig) -> Callable:
        """The compiled step of a config; a training has up to three: pre-training, with and without penalty."""

        def on_device(state: TrainState, batch: Batch):
            return train_step(config, self.optimizer, state, batch, AXIS)

        if config not in self.steps:
            self.steps[config] = replicate_and_split(on_device, joint=True)
        return self.steps[config]

    def _after(self) -> None:
        config = self.config
        stop = self.stop.after(self.done)
        epoch_ends = self._is_due(self.steps_per_epoch)
        saves = self._is_due(config.checkpoint_every or self.steps_per_epoch) or self.done == self.total_steps
        logs = self._is_due(config.log_every)
        if not (epoch_ends or saves or logs or stop):
            return
        metrics, seconds = self._check_finite()
        if logs:
            self._write("train", {**metrics, "seconds_per_step": seconds})
        if epoch_ends:
            self._validate()
        if saves or stop:
            self._save()
        if stop:
            raise Interrupted(stop, self.done)
        self.started = time.perf_counter()

    def _batch(self, step: int) -> Batch:
        size, batch_size = len(self.data.train.y), self.config.batch_size
        chosen = batch_indices(size, batch_size, self.config.seed, step)
        return Batch(self.data.train.x[chosen], self.data.train.y[chosen], np.arange(batch_size, dtype=np.int32))

    def _is_due(self, every: int) -> bool:
        return self.done % every == 0

    def _check_finite(self) -> tuple[dict[str, float], float]:
        """Waits for the pending steps; returns the last one's metrics and the seconds per step."""
        metrics: dict[str, float] = {}
        first = self.done - len(self.pending) + 1
        for step, arrays in enumerate(self.pending, first):
            metrics = {name: float(value) for name, value in arrays.items()}
            if not math.isfinite(metrics["loss"]):
                saved = self.workdir.absolute() / "checkpoints" / "latest" / str(self.saved)
                good = f"last good one: {saved}" if self.saved >= 0 else "no checkpoint yet"
                raise NonFiniteLoss(f"the loss is {metrics['loss']} at step {step} of {self.total_steps}; {good}")
        seconds = (time.perf_counter() - self.started) / max(len(self.pending), 1)
        self.pending = []
        return metrics, seconds

    def _validate(self) -> None:
        outcomes = self.evaluate(self.state.variables, self.data.validation)
        row = summary(outcomes)["rows"]["deployed"]
        accuracy = row["attacked"]["accuracy"]
        line = {"accuracy": row["clean"]["accuracy"], "adversarial_accuracy": accuracy}
        if row["clean"]["residual"] is not None:
            line["residual"] = row["clean"]["residual"]
        self._write("validation", line)
        with agreed():
            if is_primary() and accuracy > self.best_accuracy:
                self.best_accuracy = accuracy
                self.best.save(self.done, self.state, self._meta())

    def _save(self) -> None:
        with agreed():
            if is_primary():
                self.latest.save(self.done, self.state, self._meta())
        self.saved = self.done

    def _meta(self) -> dict[str, Any]:
        return {"config": self.config_tree, "best_accuracy": self.best_accuracy}

    def _write(self, split: str, metrics: dict[str, float]) -> None:
        if not is_primary():
            return
        line = self.log.append(self.done, self.done / self.steps_per_epoch, split, metrics)
        self.report({**line, "total_steps": self.total_steps})


def check_same_everywhere(tree: Any) -> None:
    """Raises `InputError`, in all processes, naming the field, if they do not all train the same config."""
    if jax.process_count() == 1:
        return
    texts = [json.loads(text) for text in gather_texts(json.dumps(tree))]
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


def load_run(workdir: str | Path, *, best: bool = True) -> tuple[TrainConfig, Variables, int]:
    """Config, variables and step of a training's best (or latest) checkpoint.

    Raises:
      InputError: if the folder holds no readable training.
    """
    workdir = Path(workdir)
    require((workdir / "config.json").is_file(), f"{workdir}: not a training's workdir (no config.json)")
    config = from_tree(read_json(workdir / "config.json"))
    require(isinstance(config, TrainConfig), f"{workdir / 'config.json'}: expected a TrainConfig")
    name = "best" if best else "latest"
    checkpoints = Checkpoints(workdir / "checkpoints" / name, keep=1 if best else 2)
    require(checkpoints.latest_step() is not None, f"{workdir}: has no {name} checkpoint yet")
    data = config.dataset.load()
    template = initial_state(config, config.optimizer.transformation(1), data)
    state, _ = checkpoints.restore(template)
    return config, state.variables, int(state.step)
