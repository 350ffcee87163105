"""Evaluates a trained classifier: clean, and under the worst case of many attacks, at every state of its dynamics.

python -m deq_jax.evaluate --workdir runs/a --config configs/eval_auto_attack.py
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from rich.progress import TaskProgressColumn

from deq_jax._cli import add_process_options, add_set_option, command_line, console, join, note
from deq_jax._progress import Display
from deq_jax._verify import verify_folder
from deq_jax.attacks.pgd import PGD
from deq_jax.attacks.threats import Linf
from deq_jax.core.errors import InputError, require
from deq_jax.core.readouts import EnsembleState, LastState
from deq_jax.core.types import Readout
from deq_jax.data.batches import to_unit
from deq_jax.data.datasets import class_names
from deq_jax.defences.states import deployed
from deq_jax.evaluation.budgets import BUDGETS, default_trials
from deq_jax.evaluation.engine import worst_case
from deq_jax.evaluation.files import write_evaluation
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.evaluation.moments import Moment
from deq_jax.evaluation.plan import EarlyState, EvalConfig, Trial, with_transfers
from deq_jax.evaluation.record import EvaluationRecord, Provenance, read_record
from deq_jax.evaluation.terminal import accuracy_table, classes_table, states_table
from deq_jax.evaluation.transfers import Transfer
from deq_jax.evaluation.wording import headline
from deq_jax.models.base import Classifier
from deq_jax.parallel.processes import agreed, from_primary, is_primary
from deq_jax.storage.configs import load_config, set_fields
from deq_jax.storage.environment import environment
from deq_jax.storage.locks import make_or_wait
from deq_jax.storage.trees import Json, to_tree
from deq_jax.training.config import TrainConfig, threat_of
from deq_jax.training.workdir import Workdir, load_run

DESCRIPTION = """\
Evaluate a trained classifier: clean accuracy, and accuracy under the worst case of many attacks.

examples:
  python -m deq_jax.evaluate --workdir runs/a
  python -m deq_jax.evaluate --workdir runs/a --budget standard
  python -m deq_jax.evaluate --workdir runs/a --config configs/eval_auto_attack.py
  python -m deq_jax.evaluate --workdir runs/a --config configs/eval_white_box.py --readout early
  python -m deq_jax.evaluate --verify runs/a/evaluation/test-quick
To resume, run the same command again.
"""

EPILOG = """\
files in the output folder:
  evaluation.json       means, red flags, and the trials that were run
  evaluation.npz        per image: labels, outcomes, predictions, entropies and residuals of every state, and the
                        worst adversarial images
  trials/               all adversarial images
  *.png                 figures

notes:
  Success is measured on the deployed predictor. An image counts as correct under attack only if it is also correct
  without one. Row "union" is the worst case of all trials for each image. Every row is an upper bound of robustness.
  Red flags are signs that the attacks have failed.
  Row or column z_t is the raw state after t solver steps, "ensemble" the mean of these states.
  Every finished batch is kept. A different evaluation in the same folder is refused.
  With several processes, start the same command in each of them, with its own --process. The images are split over the
  devices of all processes, and all must see the workdir.
  With --share, processes that are started on their own, at any time, share the batches of one evaluation. If one ends
  early, the others compute its batch.

more examples:
  python -m deq_jax.evaluate --workdir runs/a --attack pgd --set steps=1000 --epsilon 0.05 --out runs/a/pgd1000
  python -m deq_jax.evaluate --workdir runs/a --config configs/eval_entropy_reduced.py \\
    --transfer reference=runs/a/evaluation/test-eval_white_box
  python -m deq_jax.evaluate --workdir runs/b --attack transfer:runs/a/evaluation/test-pgd/evaluation.npz
"""

MOST_CLASSES = 20  # that are shown on the terminal

SILENCE = 30  # seconds after which a file or a pipe gets a line

READOUTS = ("trained", "early", "last", "ensemble")

RAW: dict[str, Readout] = {"last": LastState(), "ensemble": EnsembleState()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    with command_line():
        join(options)
        alone = jax.process_count() == 1
        require(alone or not options.share, "--share: the processes of one job share each batch without it")
        if options.verify:
            verify_folder(Path(options.verify), options.workdir and Path(options.workdir), options.seed)
            return
        workdir, choose = Path(options.workdir), partial(choose_config, options)
        out = folder_of(options)
        record = evaluate(workdir, choose, out, split=options.split, checkpoint=options.checkpoint, share=options.share)
        console.print(states_table(record))
        console.print(accuracy_table(record))
        if len(record.classes) <= MOST_CLASSES:
            console.print(classes_table(record))
        console.print(headline(record), style="bold")
        console.print(f"results: {out}")


def evaluate(
    workdir: Path,
    choose: Callable[[TrainConfig], EvalConfig],
    out: Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    share: bool = False,
) -> EvaluationRecord:
    """Evaluates a trained classifier, or continues in `out`; see `worst_case`.

    Args:
      workdir: folder of the training run.
      choose: makes the evaluation from the run's config.
      out: folder of the results.
      split: train, validation or test.
      checkpoint: best or latest.
      share: other processes may do the same at the same time; the first that has all results writes the files.
    """
    with agreed():
        run = load_run(workdir, best=checkpoint == "best", say=note)
        train, config = run.config, choose(run.config)
        names = class_names(train.dataset)
        earlier = environment_of(out)
    variables, step = from_primary((run.variables, np.int32(run.step)))
    images = getattr(run.data, split)
    about = {"checkpoint": f"{checkpoint}, step {step}", "split": split}
    with Display(TaskProgressColumn(), transient=True) as display:
        tell = teller(display)
        result = worst_case(
            config,
            train.classifier,
            variables,
            images,
            out,
            validation=run.data.validation,
            about=about,
            share=share,
            report=tell,
        )
    versions = {name: version(name) for name in ("deq_jax", "jax", "flax")}
    made = earlier or environment()
    provenance = Provenance(str(workdir), **about, versions=versions, config=to_tree(train), environment=made)
    record = EvaluationRecord.of(result, provenance, names)
    write = partial(write_evaluation, out, record, result, np.asarray(to_unit(images.x[: config.max_images])))
    with agreed():
        if share:
            make_or_wait(EvaluationFolder(out).record, write)
        elif is_primary():
            write()
    return record


def environment_of(out: Path) -> Json:
    """The environment in which a finished evaluation was made; None for one that is not finished, or older."""
    with suppress(InputError):
        provenance = read_record(EvaluationFolder(out).record).provenance
        return None if provenance is None else provenance.environment
    return None


def teller(display: Display) -> Callable[[Moment], None]:
    """Shows every moment on a terminal; elsewhere only beginnings, ends, and a line after some silence."""
    last = time.monotonic()

    def tell(moment: Moment) -> None:
        nonlocal last
        if console.is_terminal or moment.milestone or time.monotonic() - last >= SILENCE:
            display.show(moment.share, 1.0, moment.name, moment.line)
            last = time.monotonic()

    return tell


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deq_jax.evaluate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", metavar="DIR", help="folder of a training run")
    parser.add_argument(
        "--verify",
        metavar="FOLDER",
        help="recompute a finished evaluation from its files, and classify a random part of its images again; exit "
        "code 0 if it agrees with them, 65 if not. With --workdir if the run has moved, --seed to repeat a choice",
    )
    attacks = parser.add_mutually_exclusive_group()
    attacks.add_argument("--config", metavar="FILE", help="Python file with get_config(train_config) -> EvalConfig")
    attacks.add_argument(
        "--attack",
        type=_attack,
        metavar="none|pgd|transfer:FILE",
        help="one attack; pgd: 50 steps, 5 restarts, and the best of all iterates; transfer: precomputed images",
    )
    attacks.add_argument(
        "--budget",
        choices=BUDGETS,
        help="without --config and --attack: the strongest attacks on the deployed predictor, by their cost per image; "
        "default: quick",
    )
    parser.add_argument(
        "--transfer",
        action="append",
        default=[],
        type=_suite,
        metavar="SUITE=DIR",
        help="also test the final images of another evaluation's trials, as a suite; repeatable. Call it `reference` "
        "if they attacked the undefended predictor of the same run",
    )
    add_set_option(
        parser,
        "replace a scalar field of the config, or of the attack: threat.epsilon, steps, restarts, ...; repeatable",
    )
    parser.add_argument(
        "--epsilon",
        type=float,
        metavar="R",
        help="radius of all attacks; default: the radius of the run's validation attack",
    )
    parser.add_argument(
        "--readout", choices=READOUTS, default="trained", help="state to classify; default: the one trained with"
    )
    parser.add_argument(
        "--split", choices=["test", "validation", "train"], default="test", help="images to evaluate; default: test"
    )
    parser.add_argument(
        "--checkpoint", choices=["best", "latest"], default="best", help="checkpoint to evaluate; default: best"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="evaluate the first N images of the split; default: from the config"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time; default: from the config")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed of the attacks; default: from the config")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="output folder; default: WORKDIR/evaluation/SPLIT-NAME, where NAME is the config's or attack's, "
        "followed by --readout, --epsilon and --images if they are given",
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="share the batches with other processes that run the same command with --share",
    )
    add_process_options(parser)
    options = parser.parse_args(arguments)
    if options.workdir is None and options.verify is None:
        parser.error("the following arguments are required: --workdir")
    return options


def _attack(text: str) -> str:
    if text in ("none", "pgd") or text.startswith("transfer:"):
        return text
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from none, pgd, transfer:FILE)")


def _suite(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"expected SUITE=DIR, got {text!r}")
    return name, Path(folder)


def folder_of(options: argparse.Namespace) -> Path:
    """The output folder: --out, or the one of this name in the workdir."""
    default = Workdir(Path(options.workdir)).evaluation(f"{options.split}-{name_of(options)}").path
    return Path(options.out or default)


def name_of(options: argparse.Namespace) -> str:
    """Name of the evaluation: config file, attack or budget, then readout, radius and number of images if given."""
    name = Path(options.config).stem if options.config else (options.attack or "").partition(":")[0]
    name = name or options.budget or BUDGETS[0]
    readout = [] if options.readout == "trained" else [options.readout]
    radius = [] if options.epsilon is None else [f"epsilon-{options.epsilon:g}"]
    images = [] if options.images is None else [f"images-{options.images}"]
    return "-".join([name, *readout, *radius, *images])


def choose_config(options: argparse.Namespace, train: TrainConfig) -> EvalConfig:
    """The evaluation that the command line asks for, at the radius of the run's validation attack."""
    if options.epsilon is not None:
        train = at_radius(train, options.epsilon)
    if options.config:
        config = set_fields(load_config(options.config, EvalConfig, train), options.assignments)
    else:
        config = attack_config(options, train) if options.attack else budget_config(options, train)
        config = dataclasses.replace(config, batch_size=train.batch_size)
    given = {"batch_size": options.batch_size, "seed": options.seed, "max_images": options.images}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    return with_transfers(with_deployed(config, train, options.readout), options.transfer)


def at_radius(train: TrainConfig, epsilon: float) -> TrainConfig:
    """The run's config with another radius of its validation attack, in the same norm.

    Raises:
      InputError: see `threat_of`; the threat refuses the radius; the attack does not hold its threat as a field.
    """
    old = threat_of(train)
    new = dataclasses.replace(cast(Any, old), epsilon=epsilon)
    changed = dataclasses.replace(train, validation_attack=_exchanged(train.validation_attack, old, new))
    expected = f"expected a validation_attack that holds its threat as a field, got {train.validation_attack!r}"
    require(threat_of(changed) == new, f"no other radius than {old}: {expected}")
    return changed


def _exchanged(node: Any, old: Any, new: Any) -> Any:
    """The object with `old` replaced by `new`, also in the objects that it holds."""
    if type(node) is type(old) and node == old:
        return new
    if isinstance(node, tuple):
        items = tuple(_exchanged(item, old, new) for item in node)
        return items if any(a is not b for a, b in zip(items, node, strict=True)) else node
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    parts = {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}
    found = {name: _exchanged(part, old, new) for name, part in parts.items()}
    changes = {name: part for name, part in found.items() if part is not parts[name]}
    return dataclasses.replace(node, **changes) if changes else node


def with_deployed(config: EvalConfig, train: TrainConfig, readout: str) -> EvalConfig:
    """The evaluation with another deployed state: one of `READOUTS`.

    Raises:
      InputError: the config deploys an early state already.
    """
    if readout == "trained":
        return config
    chosen = isinstance(config.predictor, EarlyState)
    require(not chosen, f"--readout {readout}: the config chooses a state itself, {config.defence}")
    defence = f"{readout} state" if config.predictor is None else f"{config.defence}, {readout} state"
    if readout == "early":
        early = EarlyState(PGD(threat_of(train), steps=10), cast(Classifier | None, config.predictor))
        return dataclasses.replace(config, predictor=early, defence=defence)
    predictor = deployed(cast(Classifier, config.predictor or train.classifier), RAW[readout])
    return dataclasses.replace(config, predictor=predictor, defence=defence)


def budget_config(options: argparse.Namespace, train: TrainConfig) -> EvalConfig:
    """The evaluation within the budget that --budget names."""
    require(not options.assignments, "--set goes with a config or an attack, not with --budget")
    threat, budget = threat_of(train), options.budget or BUDGETS[0]
    return EvalConfig(threat, default_trials(train.classifier, threat, budget), budget=budget)


def attack_config(options: argparse.Namespace, train: TrainConfig) -> EvalConfig:
    """The evaluation with the one attack that --attack names."""
    if options.attack == "pgd":
        threat, validation = threat_of(train), train.validation_attack
        first = validation if isinstance(validation, PGD) else PGD(threat)  # with its loss and its start
        step_size = max(threat.epsilon / 10, 1e-6)
        attack = dataclasses.replace(first, step_size=step_size, steps=50, restarts=5, best_of=True)
        attack = set_fields(attack, options.assignments)
        return EvalConfig(attack.threat, (Trial("pgd", attack),), skip_broken=False)
    require(not options.assignments, f"--set goes with a config or an attack, not with --attack {options.attack}")
    if options.attack == "none":
        return EvalConfig(Linf(0.0), ())
    path = options.attack.partition(":")[2]
    return EvalConfig(threat_of(train), (Trial("transfer", Transfer(path)),), skip_broken=False)


if __name__ == "__main__":
    main()
