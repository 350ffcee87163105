"""The training loop: it logs, validates, saves and resumes, in a workdir or in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deq_jax.core.errors import described, require, require_count
from deq_jax.core.types import Array
from deq_jax.data.batches import batch_indices
from deq_jax.data.datasets import Images, Splits, load_splits
from deq_jax.evaluation.measure import evaluator
from deq_jax.evaluation.predictor import Predictor
from deq_jax.parallel.devices import AXIS, check_batch_size, replicate, replicate_and_split
from deq_jax.parallel.processes import StopRequest, agreed, from_primary, in_primary, is_primary
from deq_jax.storage.files import digest
from deq_jax.storage.locks import sole_writer
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

MOST_STEPS = 2**31 - 1  # that the state counts

MOST_MINUTES = 10_000_000  # that a timer takes: nineteen years


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


def fit(
    config: TrainConfig,
    workdir: str | Path | None = None,
    *,
    init_from: str | Path | None = None,
    init_checkpoint: str = "best",
    minutes: float | None = None,
    profile: int = 0,
    retries: int = 0,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    say: Callable[[str], None] = lambda text: None,
) -> Run:
    """Trains to the end: in a workdir, resuming the run that it holds, or in memory.

    Both give the same numbers as ``python -m deq_jax.train``. In memory no file is written, and an interrupted
    run is lost.

    The workdir gets ``config.json``, ``environment.json`` (settings, versions, and a digest of the images),
    ``metrics.jsonl``, TensorBoard events under ``tensorboard/``, and checkpoints under ``checkpoints/latest`` and
    ``checkpoints/best`` (by accuracy under the config's validation attack on held-out training images). With a
    `WeightAverage` the best one has the averaged parameters, and the latest one both.

    A line of training metrics has means over the steps since the last one, and the largest value of `residual_max`;
    an interval in which a run was stopped and resumed is whole. `learning_rate` is the rate of the last step, where the
    optimiser tells it (see `Optimizer`). `seconds_per_step` and `images_per_second` are without compilation, which is
    `compile_seconds` in the line after it, and without validation. `input_share` is the share of this time in which
    images were prepared; the device computes meanwhile, so it waits for them no longer. `cell_evaluations_per_second`
    counts the passes that have the `residual`, not those of the attack. `device_memory_gb` is the most that was in use on
    the first device, in GiB, where the device tells it. A line of validation has `warnings` if there are any (see
    `plain_warnings`).

    Args:
      config: config of the run.
      workdir: folder of this run; None for memory.
      init_from: workdir of another run. A new run starts from its parameters and batch statistics; its config may
        differ in all but their shapes. Recorded in ``origin.json`` and not read again.
      init_checkpoint: checkpoint of `init_from`: best or latest.
      minutes: time after which the run stops, as at SIGTERM, after the step that it is in; None for no end.
      profile: number of steps, after the first one, of which a JAX profile is written into ``profile/`` of the workdir.
      retries: number of times that the run goes back to its latest checkpoint when the loss is not finite, each time
        with half the learning rate from there on; in memory it goes back to the beginning. Checkpoints record how often
        it has gone back.
      report: called with every line of metrics, once it is written.
      say: called with a sentence about events beside the steps: compilation, where the run starts, another
        environment than before.

    With several processes (`parallel.connect`) all call this alike. Process 0 alone reads and writes
    the workdirs, which the others need not see, and calls `report` and `say`; it hands the state to the others.

    For example::

        run = dj.fit(dj.TrainConfig(dj.models.small_cnn(10, 12), dj.Standard(), dj.data.Digits(), epochs=6))
        print(run.predictor.accuracy(*run.data.test))

    Raises:
      InputError: data, the device count, the workdir or `init_from` do not fit; the run was begun under settings of
        JAX that make other numbers; or another process writes to the workdir.
      WriteError: the workdir can no longer be written to; the checkpoints in it are whole.
      NonFiniteLoss: when the loss is not finite, and no retry is left.
      Interrupted: after SIGINT or SIGTERM to any process, or after `minutes`, with the state saved.

    Examples:
      >>> import deq_jax as dj
      >>> model = dj.models.small_cnn(num_classes=10, channels=4)
      >>> dj.fit(dj.TrainConfig(model, dj.Standard(), dj.data.Digits(), batch_size=4800))
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: batch_size 4800 exceeds the 1149 training images
    """
    require(isinstance(config, TrainConfig), f"fit: config: expected a TrainConfig, got {described(config)}")
    in_time = minutes is None or 0 < minutes <= MOST_MINUTES
    require(in_time, f"minutes must be positive and at most {MOST_MINUTES}, got {minutes}")
    require_count("profile", profile, 0)
    require_count("retries", retries, 0)
    require(not profile or workdir is not None, "profile: expected a workdir, into which the profile is written")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    start = None if init_from is None else Path(init_from)
    folder = None if workdir is None else Path(workdir)
    with in_primary(nullcontext() if folder is None else sole_writer(folder)):
        retreats = 0
        while True:
            training = _Training(config, folder, start, init_checkpoint, report, say, retreats)
            try:
                return training.run(deadline, profile)
            except NonFiniteLoss as error:
                retreats = training.meta["retreats"] + 1
                if retreats > retries:
                    raise
                training.say(f"{error}; going back, with {SLOWING**retreats:g} x the learning rate")


class _Training:
    """The parts of a running training; `fit` is its public face."""

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
                images = (
                    f"its batch is training images {', '.join(map(str, numbers[:3]))} and {len(numbers) - 3} others"
                )
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
