"""One call that trains a config to its end, in a workdir or in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from deq_jax.core.errors import described, require, require_count
from deq_jax.parallel.processes import in_primary
from deq_jax.storage.locks import sole_writer
from deq_jax.training.config import TrainConfig
from deq_jax.training.endings import NonFiniteLoss
from deq_jax.training.loop import SLOWING, Run, Training

MOST_MINUTES = 10_000_000  # that a timer takes: nineteen years


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
    counts the passes that have the `residual`, not those of the attack. `device_memory_gb` is the most that was in use
    on the first device, in GiB, where the device tells it. A line of validation has `warnings` if there are any (see
    `plain_warnings`).

    Args:
      config: config of the run.
      workdir: folder of this run; None for memory.
      init_from: workdir of another run. A new run starts from its parameters and batch statistics; its config may
        differ in all but their shapes. Recorded in ``origin.json`` and not read again.
      init_checkpoint: checkpoint of `init_from`: best or latest.
      minutes: time after which the run stops, as at SIGTERM, after the step that it is in; None for no end.
      profile: number of steps that a JAX profile covers, from the second step on. It is written into ``profile/`` of
        the workdir.
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
            training = Training(config, folder, start, init_checkpoint, report, say, retreats)
            try:
                return training.run(deadline, profile)
            except NonFiniteLoss as error:
                retreats = training.meta["retreats"] + 1
                if retreats > retries:
                    raise
                training.say(f"{error}; going back, with {SLOWING**retreats:g} x the learning rate")
