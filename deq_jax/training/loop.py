"""The training loop: it logs, validates, saves and resumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deq_jax.core.errors import require
from deq_jax.data.batches import batch_indices
from deq_jax.evaluation.measure import evaluator, spread, summary
from deq_jax.evaluation.sanity import plain_warnings
from deq_jax.parallel.devices import AXIS, check_batch_size, replicate, replicate_and_split
from deq_jax.parallel.processes import StopRequest, agreed, from_primary, is_primary
from deq_jax.storage.checkpoints import Checkpoints
from deq_jax.storage.files import make_folder, write_json
from deq_jax.storage.trees import to_tree
from deq_jax.training.config import TrainConfig
from deq_jax.training.meters import Meter
from deq_jax.training.metrics import MetricsLog
from deq_jax.training.step import Batch, TrainState, initial_state, learning_rate, optimizer_of, train_step
from deq_jax.training.workdir import (
    Origin,
    check_origin,
    check_same_config,
    check_same_everywhere,
    environments_of,
    read_origin,
)


class Interrupted(Exception):
    """The training was asked to stop (SIGINT, SIGTERM) and has saved its state; carries the signal."""


class NonFiniteLoss(Exception):
    """The loss is no longer a finite number; the message names the step and the last good checkpoint."""


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    init_from: str | Path | None = None,
    init_checkpoint: str = "best",
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    say: Callable[[str], None] = lambda text: None,
) -> TrainState:
    """Trains to the end, resuming whatever `workdir` holds of the same training.

    The workdir gets ``config.json``, ``environment.json`` (settings and versions), ``metrics.jsonl``, TensorBoard
    events under ``tensorboard/``, and checkpoints under ``checkpoints/latest`` and ``checkpoints/best`` (by accuracy
    under the config's validation attack on held-out training images).

    A line of training metrics has means over the steps since the last one, and the largest value of `residual_max`;
    an interval in which a run was stopped and resumed is whole. `learning_rate` is that of the last step, where the
    optimiser tells it (see `Optimizer`). `seconds_per_step` and `images_per_second` are without compilation, which is
    `compile_seconds` in the line after it, and without validation. A line of validation has `warnings` if there are any
    (see `plain_warnings`).

    Args:
      config: what to train.
      workdir: folder of this training.
      init_from: workdir of another run, whose parameters and batch statistics a new run starts from; its config may
        differ in all but the shapes of these. Recorded in ``origin.json`` and not read again.
      init_checkpoint: of `init_from`: best or latest.
      report: called with every line of metrics as it is written.
      say: called with a sentence about what happens beside the steps: compilation, where the run starts, another
        environment than before.

    With several processes (`parallel.connect`) all call this alike. Process 0 alone reads and writes
    the workdirs, which the others need not see, and calls `report` and `say`; it hands the state to the others.

    Raises:
      InputError: for data, a device count, a workdir or an `init_from` that do not fit, and for a run that was begun
        under settings of JAX that make other numbers.
      NonFiniteLoss: when the loss is not finite.
      Interrupted: after SIGINT or SIGTERM to any process, with the state saved.
    """
    start = None if init_from is None else Path(init_from)
    return _Training(config, Path(workdir), start, init_checkpoint, report, say).run()


class _Training:
    """The parts of a running training; `train` is its public face."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: Path,
        init_from: Path | None,
        init_checkpoint: str,
        report: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ):
        self.config, self.workdir, self.report = config, workdir, report
        self.say = say if is_primary() else lambda text: None
        self.config_tree = to_tree(config)
        self.state: TrainState
        self.meta: dict[str, Any] = {"config": self.config_tree, "best_accuracy": -1.0, "interval": {}, "origin": None}
        self.saved = -1  # step of the latest checkpoint
        check_same_everywhere(self.config_tree)
        check_batch_size(config.batch_size)
        self.say("preparing: data and initial state ...")
        with agreed():
            self._prepare()
            if is_primary():
                self._restore(init_from, init_checkpoint)
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
        self.optimizer = optimizer_of(config, self.total_steps)
        self.state = initial_state(config, self.optimizer, self.data)

    def _restore(self, init_from: Path | None, init_checkpoint: str) -> None:
        """The state that the workdir holds, or the variables that a new run starts from; nothing is written."""
        self.latest = Checkpoints(self.workdir / "checkpoints" / "latest", keep=2)
        self.best = Checkpoints(self.workdir / "checkpoints" / "best", keep=1)
        latest = self.latest.latest_step()
        self.environments, changed = environments_of(self.workdir, latest or 0)
        if latest is not None:
            self.saved = latest
            self.state, meta = self.latest.restore(self.state)
            self.meta |= meta | {"config": self.config_tree}
            if init_from is not None:
                check_origin(self.workdir, self._origin(), init_from, init_checkpoint)
            if latest < self.total_steps:
                self.say(f"going on after step {latest} of {self.total_steps}")
        elif init_from is not None:
            variables, origin = read_origin(init_from, init_checkpoint, self.state.variables)
            self.state = self.state._replace(**variables)
            self.meta["origin"] = origin._asdict()
            self.say(f"starting from {init_from}, {init_checkpoint} checkpoint, step {origin.step}")
            if self.config.pretrain_steps:
                phase = f"{self.config.pretrain_steps} pre-training steps"
                self.say(f"note: training begins with the {phase} of its config; pretrain_steps=0 leaves them out")
        if changed:
            self.say(f"note: numbers may differ from here on: {'; '.join(changed)}")

    def _origin(self) -> Origin | None:
        return self.meta["origin"] and Origin(**self.meta["origin"])

    def _open_workdir(self) -> None:
        """What only the process does that writes: it makes the workdir, and what a resumed run reads."""
        make_folder(self.workdir)
        write_json(self.workdir / "config.json", self.config_tree)
        if int(self.state.step) < self.total_steps:
            write_json(self.workdir / "environment.json", self.environments)
        if self.meta["origin"] is not None:
            if self.saved < 0:
                self.saved = 0
                self.latest.save(self.saved, self.state, self.meta)
            write_json(self.workdir / "origin.json", self.meta["origin"])
        self.log = MetricsLog(self.workdir, int(self.state.step))

    def run(self) -> TrainState:
        self.steps: dict[TrainConfig, Callable] = {}
        self.meter = Meter(self.config.batch_size, self.meta["interval"])
        self.is_validated = False
        try:
            with StopRequest() as self.stop:
                while self.done < self.total_steps:
                    self._step()
                    self._after()
        finally:
            if is_primary():
                self.log.close()
        return self.state

    def _step(self) -> None:
        """Starts the next step, compiled for its config: of pre-training, with or without the penalty."""
        config, batch = self.config.at(self.done, self.steps_per_epoch), self._batch(self.done)
        if config in self.steps:
            self.state, metrics = self.steps[config](self.state, batch)
        else:
            self.say(f"compiling: {self._phase(config)} ...")
            step = partial(train_step, config, self.optimizer, axis_name=AXIS)
            self.steps[config] = replicate_and_split(step, joint=True)
            with self.meter.compiling():
                self.state, metrics = self.steps[config](self.state, batch)
        self.done += 1
        self.meter.add(metrics)

    def _phase(self, config: TrainConfig) -> str:
        if self.done < self.config.pretrain_steps:
            return "shallow pre-training"
        return "training" if getattr(config.classifier, "jacobian", None) is None else "training with Jacobian penalty"

    def _after(self) -> None:
        config = self.config
        stop = self.stop.after(self.done)
        epoch_ends = self._is_due(self.steps_per_epoch)
        saves = self._is_due(config.checkpoint_every or self.steps_per_epoch) or self.done == self.total_steps
        logs = self._is_due(config.log_every)
        if not (epoch_ends or saves or logs or stop):
            return
        self._check_finite()
        if logs:
            rate = learning_rate(config.optimizer, self.total_steps, self.state)
            self._write("train", self.meter.line() | ({} if rate is None else {"learning_rate": rate}))
        if epoch_ends:
            self._validate()
        if saves or stop:
            with agreed():
                if is_primary():
                    self._save(self.latest)
            self.saved = self.done
        if stop:
            raise Interrupted(stop, self.done)
        self.meter.start()

    def _batch(self, step: int) -> Batch:
        size, batch_size = len(self.data.train.y), self.config.batch_size
        chosen = batch_indices(size, batch_size, self.config.seed, step)
        return Batch(self.data.train.x[chosen], self.data.train.y[chosen], np.arange(batch_size, dtype=np.int32))

    def _is_due(self, every: int) -> bool:
        return self.done % every == 0

    def _check_finite(self) -> None:
        """Waits for the pending steps; raises `NonFiniteLoss` at the first that went wrong."""
        losses = self.meter.wait()
        for step, loss in enumerate(losses, self.done - len(losses) + 1):
            if not math.isfinite(loss):
                saved = self.workdir.absolute() / "checkpoints" / "latest" / str(self.saved)
                good = f"last good one: {saved}" if self.saved >= 0 else "no checkpoint yet"
                raise NonFiniteLoss(f"the loss is {loss} at step {step} of {self.total_steps}; {good}")

    def _validate(self) -> None:
        if not self.is_validated:
            self.say("compiling: validation ...")
            self.is_validated = True
        outcomes = self.evaluate(self.state.variables, self.data.validation)
        row = summary(outcomes)["deployed"]
        assert row.attacked is not None  # there is a validation attack
        accuracy, residual = row.attacked.accuracy, row.clean.residual
        line = {"accuracy": row.clean.accuracy, "adversarial_accuracy": accuracy}
        if residual is not None:
            line["residual"] = residual
        adjoint = spread(outcomes.adjoint_residual).mean
        if adjoint is not None:
            line["adjoint_residual"] = adjoint
        classes = 1 + int(self.data.train.y.max())
        warnings = plain_warnings(line["accuracy"], len(self.data.validation.y), classes, residual)
        self._write("validation", line | ({"warnings": warnings} if warnings else {}))
        with agreed():
            if is_primary() and accuracy > self.meta["best_accuracy"]:
                self.meta["best_accuracy"] = accuracy
                self._save(self.best)

    def _save(self, checkpoints: Checkpoints) -> None:
        checkpoints.save(self.done, self.state, self.meta | {"interval": self.meter.sums})

    def _write(self, split: str, metrics: dict[str, Any]) -> None:
        if not is_primary():
            return
        line = self.log.append(self.done, self.done / self.steps_per_epoch, split, metrics)
        self.report({**line, "total_steps": self.total_steps})
