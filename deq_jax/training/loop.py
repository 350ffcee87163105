"""The training loop: it logs, validates, saves and resumes, in a workdir or in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deq_jax.core.errors import require
from deq_jax.core.types import Array
from deq_jax.data.batches import batch_indices
from deq_jax.data.datasets import Images, Splits, load_splits
from deq_jax.evaluation.measure import evaluator
from deq_jax.evaluation.predictor import Predictor
from deq_jax.parallel.devices import AXIS, check_batch_size, replicate, replicate_and_split
from deq_jax.parallel.processes import StopRequest, agreed, from_primary, is_primary
from deq_jax.storage.files import digest
from deq_jax.storage.trees import to_tree
from deq_jax.training.config import Phase, TrainConfig
from deq_jax.training.endings import Interrupted, NonFiniteLoss
from deq_jax.training.keeping import Disk, Memory
from deq_jax.training.meters import Meter
from deq_jax.training.optimizers import slowed
from deq_jax.training.step import Batch, TrainState, initial_state, learning_rate, optimizer_of, train_step
from deq_jax.training.validation import validation_line
from deq_jax.training.workdir import Origin, check_origin, check_same_everywhere, read_origin

SLOWING = 0.5  # factor of the learning rate each time that a run goes back

MOST_NUMBERS = 3  # of images, in a message

MOST_STEPS = 2**31 - 1  # that the state counts


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
      config: config of the run.
      data: the three splits of its dataset.
      predictor: the classifier with the variables of the best checkpoint, by accuracy under the config's validation
        attack on held-out training images.
      state: training state after the last step.
      metrics: the lines of metrics.jsonl; with several processes and a workdir, only on process 0.

    Examples:
      >>> from dataclasses import fields
      >>> from deq_jax.training import Run
      >>> [field.name for field in fields(Run)]
      ['config', 'data', 'predictor', 'state', 'metrics']
    """

    config: TrainConfig
    data: Splits
    predictor: Predictor
    state: TrainState
    metrics: list[dict[str, Any]]


class Training:
    """The parts of a running training; `fit` is its public face and has its arguments."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: Path | None,
        init_from: Path | None,
        init_checkpoint: str,
        report: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
        retreats: int,
    ):
        self.config, self.workdir, self.report = config, workdir, report
        self.kept = Memory() if workdir is None or not is_primary() else Disk(workdir, say)
        self.say = say if is_primary() else lambda text: None
        self.config_tree = to_tree(config)
        self.state: TrainState
        self.meta: dict[str, Any] = {"config": self.config_tree, "interval": {}, "origin": None}
        self.meta |= {"best_accuracy": -1.0, "not_better": 0, "retreats": 0}
        self.saved = -1  # step of the latest checkpoint
        check_same_everywhere(self.config_tree)
        check_batch_size(config.batch_size)
        self.say("preparing: data and initial state ...")
        with agreed():
            self._prepare()
            if is_primary():
                self._restore(init_from, init_checkpoint)
        with agreed():
            self.kept.open(self.state, self.meta, is_new=self.saved < 0, has_ended=self._is_over(int(self.state.step)))
        if self.meta["origin"] is not None:
            self.saved = max(self.saved, 0)
        self.meta["retreats"] = max(self.meta["retreats"], retreats)
        counts = np.array([self.saved, self.meta["not_better"], self.meta["retreats"]], np.int32)
        state, counts = from_primary((self.state, counts))
        self.state = replicate(state)
        self.saved, self.meta["not_better"], self.meta["retreats"] = map(int, counts)
        self.slowing = SLOWING ** self.meta["retreats"]
        if self.slowing != 1:
            slower = replace(config, optimizer=slowed(config.optimizer, self.slowing))
            self.optimizer = optimizer_of(slower, self.total_steps)
        self.done = int(self.state.step)
        self.evaluate = evaluator(
            config.classifier, config.validation_attack, batch_size=config.batch_size, seed=config.seed
        )

    def _prepare(self) -> None:
        """Data and the state before the first step."""
        config = self.config
        self.kept.check(config)
        self.data = load_splits(config.dataset)
        self.steps_per_epoch = len(self.data.train.y) // config.batch_size
        size = len(self.data.train.y)
        require(self.steps_per_epoch > 0, f"batch_size {config.batch_size} exceeds the {size} training images")
        per_device = config.batch_size // jax.device_count()
        parts = f"accumulate = {config.accumulate} parts"
        require(per_device % config.accumulate == 0, f"the {per_device} images of a device do not divide into {parts}")
        self.total_steps = config.epochs * self.steps_per_epoch
        require(
            self.total_steps <= MOST_STEPS, f"epochs {config.epochs} are {self.total_steps} steps, too many to count"
        )
        self.optimizer = optimizer_of(config, self.total_steps)
        self.state = initial_state(config, self.optimizer, self.data)

    def _restore(self, init_from: Path | None, init_checkpoint: str) -> None:
        """The state that the workdir holds, or the variables that a new run starts from; nothing is written."""
        restored = self.kept.restore(self.state, digest(self.data._asdict()))
        if restored is not None:
            self.state, meta = restored
            self.saved = int(self.state.step)
            self.meta |= meta | {"config": self.config_tree}
            if init_from is not None and self.workdir is not None:
                check_origin(self.workdir, self._origin(), init_from, init_checkpoint)
            if not self._is_over(self.saved):
                self.say(f"resuming after step {self.saved} of {self.total_steps}")
        elif init_from is not None:
            variables, origin = read_origin(init_from, init_checkpoint, self.state.variables, self.say)
            optimizer_state = self.optimizer.init(variables["params"])
            self.state = self.state._replace(**variables, opt_state=optimizer_state)
            self.meta["origin"] = origin._asdict()
            self.say(f"starting from {init_from}, {init_checkpoint} checkpoint, step {origin.step}")
            if self.config.pretrain_steps:
                phase = f"{self.config.pretrain_steps} pre-training steps"
                self.say(f"note: training begins with the {phase} of its config; pretrain_steps=0 skips them")
        if self.kept.changed:
            self.say(f"note: numbers may differ from here on: {'; '.join(self.kept.changed)}")

    def _origin(self) -> Origin | None:
        return self.meta["origin"] and Origin(**self.meta["origin"])

    def run(self, deadline: float | None, profile: int) -> Run:
        """Trains to the end, or to a time of `time.monotonic`, with a profile of so many steps."""
        self.steps: dict[Phase, Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]] = {}
        self.meter = Meter(self.config.batch_size, self.meta["interval"])
        self.is_validated = False
        try:
            seconds = None if deadline is None else deadline - time.monotonic()
            with StopRequest(seconds) as self.stop, self.kept.profile(profile) as steps:
                while not self._is_over(self.done):
                    self._step()
                    steps.after(self.state)
                    self._after()
        finally:
            self.kept.close()
        if self.done < self.total_steps:
            where = f"step {self.done} of {self.total_steps}"
            rest = f"{self.meta['not_better']} validations in a row were not better than the best one"
            self.say(f"ending after {where}: {rest}")
        with agreed():
            best, lines = self.kept.best(self.state.to_deploy().variables), self.kept.lines()
        best = from_primary(best)
        return Run(self.config, self.data, Predictor(self.config.classifier, best), self.state, lines)

    def _step(self) -> None:
        """Starts the next step, compiled for its phase."""
        phase = self.config.phase(self.done, self.steps_per_epoch)
        with self.meter.preparing():
            batch = self._batch(self.done)
        if phase in self.steps:
            self.state, metrics = self.steps[phase](self.state, batch)
        else:
            self.say(f"compiling: {phase.value} ...")
            config = self.config.during(phase)
            step = partial(train_step, config, self.optimizer, axis_name=AXIS, steps=self.total_steps)
            self.steps[phase] = replicate_and_split(step, joint=True, donate=True)
            with self.meter.compiling():
                self.state, metrics = self.steps[phase](self.state, batch)
        self.done += 1
        self.meter.add(metrics)

    def _after(self) -> None:
        config = self.config
        stop = self.stop.after(self.done)
        validates = self._is_due(self.steps_per_epoch * (config.validate_every or 1)) or self.done == self.total_steps
        saves = self._is_due(config.checkpoint_every or self.steps_per_epoch) or self.done == self.total_steps
        logs = self._is_due(config.log_every)
        if not (validates or saves or logs or stop):
            return
        self._check_finite()
        if logs:
            rate = learning_rate(config.optimizer, self.total_steps, self.state)
            self._write("train", self.meter.line() | ({} if rate is None else {"learning_rate": self.slowing * rate}))
        if validates:
            self._validate()
        if saves or stop or self._is_over(self.done):
            with agreed():
                self.kept.save(self.done, self.state, self._meta())
            self.saved = self.done
        if stop and not self._is_over(self.done):
            raise Interrupted(stop, self.done)
        self.meter.start()

    def _batch(self, step: int) -> Batch:
        size, batch_size = len(self.data.train.y), self.config.batch_size
        chosen = batch_indices(size, batch_size, self.config.seed, step)
        return Batch(self.data.train.x[chosen], self.data.train.y[chosen], np.arange(batch_size, dtype=np.int32))

    def _is_over(self, step: int) -> bool:
        """Whether no step follows: the last one is done, or validations have not become better for too long."""
        patience = self.config.patience
        return step >= self.total_steps or (patience is not None and self.meta["not_better"] >= patience)

    def _is_due(self, every: int) -> bool:
        return self.done % every == 0

    def _check_finite(self) -> None:
        """Waits for the pending steps; raises `NonFiniteLoss` at the first that went wrong."""
        losses = self.meter.wait()
        for step, loss in enumerate(losses, self.done - len(losses) + 1):
            if not math.isfinite(loss):
                numbers = batch_indices(len(self.data.train.y), self.config.batch_size, self.config.seed, step - 1)
                first, others = numbers[:MOST_NUMBERS].tolist(), len(numbers[MOST_NUMBERS:])
                images = f"its batch is training images {first}" + (f" and {others} others" if others else "")
                where = self.kept.last_good(self.saved)
                raise NonFiniteLoss(f"the loss is {loss} at step {step} of {self.total_steps}; {images}; {where}")

    def _validate(self) -> None:
        if not self.is_validated:
            self.say("compiling: validation ...")
            self.is_validated = True
        state = self.state.to_deploy()
        images = Images(*(part[: self.config.validation_images] for part in self.data.validation))
        outcomes = self.evaluate(state.variables, images)
        classes = 1 + int(self.data.train.y.max())
        line = validation_line(outcomes, classes, self.meta["best_accuracy"])
        accuracy = line["adversarial_accuracy"]
        self._write("validation", line)
        with agreed():
            self.meta["not_better"] += 1
            if accuracy > self.meta["best_accuracy"]:
                self.meta |= {"best_accuracy": accuracy, "not_better": 0}
                self.kept.save_best(self.done, state, self._meta())
        # Process 0 alone has read which one was best; the others end when it does.
        self.meta["not_better"] = int(from_primary(np.int32(self.meta["not_better"])))

    def _meta(self) -> dict[str, Any]:
        return self.meta | {"interval": self.meter.sums}

    def _write(self, split: str, metrics: dict[str, Any]) -> None:
        with agreed():
            line = self.kept.log(self.done, self.done / self.steps_per_epoch, split, metrics)
        if is_primary():
            self.report({**line, "total_steps": self.total_steps})
