"""Trains the classifier of a config file; the same command resumes after any interruption.

python -m deq_jax.train --config configs/digits_pgd_at.py --workdir runs/a --set seed=1
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from rich.progress import MofNCompleteColumn

from deq_jax._cli import add_process_options, add_set_option, command_line, console, fail, join
from deq_jax._progress import Display
from deq_jax.parallel.processes import agreed
from deq_jax.storage.briefs import duration
from deq_jax.storage.configs import load_config, set_fields
from deq_jax.training.config import TrainConfig
from deq_jax.training.endings import Interrupted, NonFiniteLoss
from deq_jax.training.fitting import fit

DESCRIPTION = """\
Train a deep equilibrium model, or an explicit baseline.

examples:
  python -m deq_jax.train --config configs/digits_pgd_at.py --workdir runs/a
  python -m deq_jax.train --config configs/digits_trades.py --workdir runs/b --set seed=1 --set epochs=20
  python -m deq_jax.train --config configs/digits_trades.py --workdir runs/c --init-from runs/a
To resume, run the same command again. Then:
  python -m deq_jax.evaluate --workdir runs/a
"""

EPILOG = """\
files in the workdir:
  config.json           the config
  environment.json      settings of JAX, versions
  metrics.jsonl         one line per log step and per epoch
  tensorboard/          the same as events
  checkpoints/latest    the newest state
  checkpoints/best      the best accuracy under the config's validation attack, on held-out training images
  origin.json           with --init-from: the run that gave the first parameters
  profile/              with --profile: for TensorBoard's profile plugin, or Perfetto

notes:
  Another config in the same workdir is refused, and so are settings of JAX that change numbers.
  --init-from starts at step 0 with a fresh optimiser. The architecture must be the same; epochs, objective and learning
  rate may differ. Use it also after deq_jax.convert.
  Exit codes: 0 trained to the end, 1 loss not finite, 2 mistake, 74 cannot write, 75 --minutes are over, 130 or 143
  stopped by a signal.
  All local devices are used. With several processes, start the same command in each of them, with its own --process:
    python -m deq_jax.train ... --coordinator 10.0.0.1:1234 --processes 2 --process 0
  The batch is split over the devices of all processes. Only process 0 reads and writes the workdir.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    with command_line():
        join(options)
        with agreed():
            config = set_fields(load_config(options.config, TrainConfig), options.assignments)
        processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        console.print(f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}{processes}")
        with Display(MofNCompleteColumn()) as display:
            try:
                run = fit(
                    config,
                    options.workdir,
                    init_from=options.init_from,
                    init_checkpoint=options.init_checkpoint,
                    minutes=options.minutes,
                    profile=options.profile,
                    retries=options.retries,
                    report=partial(show, display),
                    say=display.say,
                )
            except NonFiniteLoss as error:
                fail(str(error), 1)
            except Interrupted as stop:
                fail(*ending(*stop.args, minutes=options.minutes))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
        console.print(f"trained: {int(run.state.step)} steps, {parameters:,} parameters, in {options.workdir}")
        console.print(f"next: python -m deq_jax.evaluate --workdir {options.workdir}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deq_jax.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="Python file with a function get_config()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of this run; created if absent")
    add_set_option(
        parser,
        "replace a scalar field of the config, by dotted name, e.g. objective.attack.steps=7; repeatable",
    )
    parser.add_argument(
        "--init-from", metavar="DIR", help="start a new run from the parameters and batch statistics of this workdir"
    )
    parser.add_argument(
        "--init-checkpoint",
        choices=["best", "latest"],
        default="best",
        help="checkpoint that --init-from reads; default: best",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="stop after this time, with the state saved and exit code 75; the same command resumes",
    )
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="write a JAX profile of N steps, after the first one, into WORKDIR/profile",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        metavar="N",
        help="when the loss is not finite, go back to the latest checkpoint with half the learning rate, at most N "
        "times; default: 0",
    )
    add_process_options(parser)
    return parser.parse_args(arguments)


def ending(number: int, step: int, *, minutes: float | None) -> tuple[str, int]:
    """The line on a run that a signal stopped after this step, and the exit code."""
    rest = f"after step {step}, state saved; the same command resumes"
    if number == signal.SIGALRM:
        return f"{minutes:g} minutes are over, stopped {rest}", os.EX_TEMPFAIL
    return f"stopped by {signal.Signals(number).name} {rest}", 128 + number


def show(display: Display, line: dict[str, Any]) -> None:
    """Shows a line of metrics: beside the bar or, in a file, as a line of text; with its warnings."""
    step, total = line["step"], line["total_steps"]
    if line["split"] == "train":
        names = ("loss", "accuracy", "adversarial_accuracy", "residual")
        text = "  ".join(f"{name.replace('adversarial', 'adv')} {line[name]:.3f}" for name in names if name in line)
        display.show(step, total, text, f"step {step}/{total}  {text}  {_pace(line)}")
        return
    accuracy = f"accuracy {100 * line['accuracy']:.1f} %  under attack {100 * line['adversarial_accuracy']:.1f} %"
    residual = f"  residual {line['residual']:.3f}" if "residual" in line else ""
    warnings = line.get("warnings", ())
    signs = "".join(f"  ({warning.partition(':')[0]})" for warning in warnings)
    display.say(f"epoch {line['epoch']:g}  step {step}/{total}  validation: {accuracy}{residual}{signs}")
    for warning in warnings if step == total else ():
        display.say(f"warning: {warning}")


def _pace(line: dict[str, Any]) -> str:
    """Seconds per step, images per second, compilation time, and the remaining time at this pace."""
    seconds = line["seconds_per_step"]
    left = duration(seconds * (line["total_steps"] - line["step"]))
    compilation = f"  compilation {duration(line['compile_seconds'])}" if "compile_seconds" in line else ""
    return f"{seconds:.3g} s/step  {line['images_per_second']:.3g} images/s{compilation}  {left} left"


if __name__ == "__main__":
    main()
