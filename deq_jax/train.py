"""Trains what a config file describes; the same command resumes after any interruption.

python -m deq_jax.train --config configs/digits_pgd_at.py --workdir runs/a --set seed=1
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deq_jax.cli import add_process_options, add_set_option, command_line, console, fail, join
from deq_jax.config import load_config, set_fields
from deq_jax.processes import agreed
from deq_jax.training import Interrupted, NonFiniteLoss, train

EPILOG = """\
The workdir gets: config.json (what is trained), metrics.jsonl (one line per log step and per epoch),
tensorboard/ (the same as events), checkpoints/latest and checkpoints/best (best accuracy under the
config's validation attack, on held-out training images). Run the same command again to resume;
another config in the same workdir is refused. All local devices are used. With several processes the same
command starts each of them, with its own --process; the batch is split over the devices of all, and process 0
alone reads and writes the workdir.

examples:
  python -m deq_jax.train --config configs/digits_pgd_at.py --workdir runs/a
  python -m deq_jax.train --config configs/digits_trades.py --workdir runs/b --set seed=1 --set epochs=20
  python -m deq_jax.train ... --coordinator 10.0.0.1:1234 --processes 2 --process 0   (and --process 1 elsewhere)
then:
  python -m deq_jax.evaluate --workdir runs/a
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deq_jax.train",
        description="Train a deep equilibrium model, or an explicit baseline.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="Python file with a function get_config()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of this training; created if absent")
    add_set_option(
        parser,
        "replace a scalar field of the config, by dotted name, e.g. objective.attack.steps=7; repeatable",
    )
    add_process_options(parser)
    options = parser.parse_args(arguments)
    with command_line():
        join(options)
        with agreed():
            config = set_fields(load_config(options.config), options.assignments)
        with _Display() as display:
            try:
                state = train(config, options.workdir, report=display.show)
            except NonFiniteLoss as error:
                fail(str(error), 1)
            except Interrupted as stop:
                number, step = stop.args
                message = f"stopped by {signal.Signals(number).name} after step {step}, state saved"
                fail(f"{message}; the same command resumes", 128 + number)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        console.print(f"trained: {int(state.step)} steps, {parameters:,} parameters, in {options.workdir}")
        console.print(f"next: python -m deq_jax.evaluate --workdir {options.workdir}")


class _Display:
    """A progress bar on a terminal, a line per validation elsewhere."""

    def __init__(self):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = None

    def __enter__(self):
        processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        console.print(f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}{processes}")
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def show(self, line: dict[str, Any]) -> None:
        """Shows a line of metrics."""
        if self.task is None:
            self.task = self.progress.add_task("", total=line["total_steps"])
        if line["split"] == "train":
            shown = {
                name: line[name] for name in ("loss", "accuracy", "adversarial_accuracy", "residual") if name in line
            }
            text = "  ".join(f"{name.replace('adversarial', 'adv')} {value:.3f}" for name, value in shown.items())
            self.progress.update(self.task, description=text, completed=line["step"])
            return
        accuracy = f"accuracy {100 * line['accuracy']:.1f} %  under attack {100 * line['adversarial_accuracy']:.1f} %"
        residual = f"  residual {line['residual']:.3f}" if "residual" in line else ""
        step = f"step {line['step']}/{line['total_steps']}"
        console.print(f"epoch {line['epoch']:g}  {step}  validation: {accuracy}{residual}")


if __name__ == "__main__":
    main()
