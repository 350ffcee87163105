"""What random states, entropy reduction, and the early, last and ensemble state are worth on digits, honestly attacked.

    python -m benchmarks.defences --seeds 3 --out runs/defences

Trains what is missing, evaluates each training with each defence under the attacks of configs/eval_*.py, and makes
the report OUT/report/index.html. Interrupt it at any time: the same command goes on where it stopped. Processes may
share the work: one with `--trainings digits_standard digits_pgd_at digits_pgd_at_random`, one with the others; the
whole command then makes the report of all.

To save time FAB is left out, targeted attacks aim at three classes, intermediate states are unrolled with K = 5 and
damping 0.5 only, the longest PGD has 200 steps, and Square has --queries; `python -m deq_jax.evaluate` runs the
configs as they are.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from configs import (
    eval_auto_attack,
    eval_entropy_half_radius,
    eval_entropy_raised,
    eval_entropy_random,
    eval_entropy_reduced,
    eval_more_steps,
    eval_white_box,
)
from deq_jax import report, train
from deq_jax.attacks import FAB, Linf, Square, Targeted
from deq_jax.cli import command_line, console
from deq_jax.config import TrainConfig
from deq_jax.evaluate import evaluate, with_deployed
from deq_jax.surrogates import Intermediate
from deq_jax.trials import EvalConfig, Trial, diagnostics, with_transfers

DEQS = ("digits_pgd_at", "digits_pgd_at_random", "digits_trades", "digits_trades_random")
CNNS = {"digits_pgd_at": "digits_cnn_pgd_at", "digits_trades": "digits_cnn_trades"}
OBSERVED = ("digits_standard",)  # as trained only
TRAININGS = (*OBSERVED, *DEQS)
Choose = Callable[[TrainConfig], EvalConfig]


def white_box(readout: str) -> Choose:
    """The attacks made for DEQs on a predictor as `evaluate --readout` deploys it."""
    return lambda config: with_deployed(eval_white_box.get_config(config), config, readout)


DEFENCES: dict[str, Choose] = {
    "entropy": eval_entropy_reduced.get_config,
    "early": white_box("early"),
    "last": white_box("last"),
    "ensemble": white_box("ensemble"),
}
CONTROLS: dict[str, Choose] = {
    "raised": eval_entropy_raised.get_config,
    "random": eval_entropy_random.get_config,
    "half": eval_entropy_half_radius.get_config,
    "steps": eval_more_steps.get_config,
}


def main() -> None:
    """Runs what is missing, then makes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1; default: 3")
    parser.add_argument("--images", type=int, default=120, metavar="N", help="the first N test images; default: 120")
    parser.add_argument("--queries", type=int, default=1000, metavar="N", help="of Square; default: 1000")
    parser.add_argument("--controls", type=int, default=1, metavar="N", help="seeds with controls; default: 1")
    parser.add_argument(
        "--trainings",
        nargs="+",
        default=TRAININGS,
        choices=TRAININGS,
        metavar="NAME",
        help=f"of {', '.join(TRAININGS)}",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/defences"), metavar="DIR", help="default: runs/defences")
    options = parser.parse_args()
    with command_line():
        lighter = partial(lightened, images=options.images, queries=options.queries)
        evaluated: list[Path] = []
        for seed in range(options.seeds):
            cnns = {CNNS[name.removesuffix("_random")] for name in options.trainings if name in DEQS}
            for name in (*sorted(cnns), *options.trainings):
                where = ["--config", f"configs/{name}.py", "--workdir", str(options.out / f"{name}-{seed}")]
                train.main([*where, "--set", f"seed={seed}"])
            for workdir, name, choose, suites in plan(options, seed):
                run(workdir, name, lambda config, choose=choose: lighter(choose(config)), suites)  # type: ignore[misc]
                evaluated.append(workdir)
        report.main([*map(str, sorted(set(evaluated))), "--out", str(options.out / "report")])


def plan(options: argparse.Namespace, seed: int) -> Iterator[tuple[Path, str, Choose, dict[str, Path]]]:
    """The evaluations of one seed: workdir, name, what it is, and whose images are transferred, by suite."""
    out, controls = options.out, seed < options.controls
    for name in options.trainings:
        workdir = out / f"{name}-{seed}"
        if name in OBSERVED:
            yield workdir, "none", eval_white_box.get_config, {}
            continue
        cnn = out / f"{CNNS[name.removesuffix('_random')]}-{seed}"
        yield cnn, "none", eval_auto_attack.get_config, {}
        baseline = {"cnn": cnn / "evaluation" / "none"}
        yield workdir, "none", eval_white_box.get_config, baseline
        for defence, choose in (DEFENCES | (CONTROLS if controls else {})).items():
            yield workdir, defence, choose, baseline | {"reference": workdir / "evaluation" / "none"}


def run(workdir: Path, name: str, choose: Choose, suites: dict[str, Path]) -> None:
    """One evaluation; what is on disk of it is not computed again."""
    console.print(f"{workdir.name}: {name}")
    out = workdir / "evaluation" / name
    found = evaluate(workdir, lambda config: with_transfers(choose(config), suites.items()), out)
    console.print(f"  robust accuracy {100 * found['robust_accuracy']:.1f} %")
    jax.clear_caches()
    gc.collect()


def lightened(config: EvalConfig, images: int, queries: int) -> EvalConfig:
    """The evaluation on the first images, in one batch, with its costliest attacks cut short or left out."""
    trials = tuple(lighter for trial in config.trials for lighter in _lighter(trial, queries))
    extra = config.diagnostics and diagnostics(Linf(config.threat.epsilon), steps=200)
    return replace(config, trials=trials, diagnostics=extra, max_images=images, batch_size=images, skip_broken=False)


def _lighter(trial: Trial, queries: int) -> Iterator[Trial]:
    """The trial with less to do, or nothing."""
    match trial:
        case Trial(surrogate=Intermediate() as surrogate) if (surrogate.steps, surrogate.damping) != (5, 0.5):
            return
        case Trial(attack=Targeted(attack=FAB())):
            return
        case Trial(attack=Targeted() as attack):
            yield replace(trial, attack=replace(attack, classes=3))
        case Trial(attack=Square() as attack):
            yield replace(trial, attack=replace(attack, queries=queries))
        case _:
            yield trial


if __name__ == "__main__":
    main()
