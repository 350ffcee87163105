"""Random states, entropy reduction, and the early, last and ensemble state on digits, honestly attacked.

    python -m benchmarks.defences --seeds 3 --out runs/defences

Trains the missing runs, evaluates each with each defence under the attacks of configs/eval_*.py, and makes
the report OUT/report/index.html. Interrupt it at any time: the same command resumes. Processes may
share the work: one with `--trainings digits_standard digits_pgd_at digits_pgd_at_random`, one with the others; the
whole command then makes the report of all.

To save time, FAB is dropped, and targeted attacks aim at three classes. Intermediate states are unrolled with K = 5 and
damping 0.5 only. The longest PGD has 200 steps, and Square has --queries. For the first --extras seeds, the plain
adversarially trained models have further evaluations, undefended and with entropy reduction: by the full configs
(Square with 5,000 queries), at other radii, and with the controls of entropy reduction.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

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
from deq_jax import TrainConfig, report, train
from deq_jax._cli import command_line, console
from deq_jax.attacks import FAB, Linf, Square, Targeted
from deq_jax.evaluate import evaluate, with_deployed
from deq_jax.evaluation import EvalConfig, Trial, diagnostics, with_transfers
from deq_jax.storage import set_fields
from deq_jax.surrogates import Intermediate
from deq_jax.training import Workdir, threat_of

DEQS = ("digits_pgd_at", "digits_pgd_at_random", "digits_trades", "digits_trades_random")
CNNS = {"digits_pgd_at": "digits_cnn_pgd_at", "digits_trades": "digits_cnn_trades"}
OBSERVED = ("digits_standard",)  # as trained only
TRAININGS = (*OBSERVED, *DEQS)
RADII = (0.5, 2.0)  # times the radius of the training run
Choose = Callable[[TrainConfig], EvalConfig]
Adapt = Callable[[Choose], Choose]


class Planned(NamedTuple):
    """An evaluation: its run's folder, its name, its config, and the evaluations that give images, by suite."""

    workdir: Path
    name: str
    choose: Choose
    suites: Mapping[str, Path] = MappingProxyType({})

    @property
    def folder(self) -> Path:
        """Folder of its results."""
        return Workdir(self.workdir).evaluation(self.name).path


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
    """Runs the missing parts, then makes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1; default: 3")
    parser.add_argument("--images", type=int, default=120, metavar="N", help="the first N test images; default: 120")
    parser.add_argument("--queries", type=int, default=1000, metavar="N", help="queries of Square; default: 1000")
    extras = "seeds with whole attacks, other radii and controls; default: 1"
    parser.add_argument("--extras", type=int, default=1, metavar="N", help=extras)
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
        evaluated: list[Path] = []
        for seed in range(options.seeds):
            cnns = {CNNS[name.removesuffix("_random")] for name in options.trainings if name in DEQS}
            for name in (*sorted(cnns), *options.trainings):
                where = ["--config", f"configs/{name}.py", "--workdir", str(options.out / f"{name}-{seed}")]
                train.main([*where, "--set", f"seed={seed}"])
            for planned in plan(options, seed):
                run(planned)
                evaluated.append(planned.workdir)
        report.main([*map(str, sorted(set(evaluated))), "--out", str(options.out / "report")])


def plan(options: argparse.Namespace, seed: int) -> Iterator[Planned]:
    """The evaluations of one seed, in an order in which transferred images exist."""

    def whole(choose: Choose) -> Choose:
        return lambda train: first(options.images, choose(train))

    def light(choose: Choose) -> Choose:
        return lambda train: lightened(whole(choose)(train), options.queries)

    def light_at(factor: float) -> Adapt:
        return lambda choose: at(factor, light(choose))

    for name in options.trainings:
        workdir = options.out / f"{name}-{seed}"
        if name in OBSERVED:
            yield Planned(workdir, "none", light(eval_white_box.get_config))
            continue
        family = partial(with_defences, options.out / f"{CNNS[name.removesuffix('_random')]}-{seed}", workdir)
        yield from family(DEFENCES, light)
        if seed < options.extras and name in CNNS:
            entropy = {"entropy": DEFENCES["entropy"]}
            yield from family(entropy, whole, "-whole")
            for factor in RADII:
                yield from family(entropy, light_at(factor), f"-radius-x{factor:g}")
            yield from family(CONTROLS, light)


def with_defences(
    cnn: Path, workdir: Path, defences: dict[str, Choose], adapt: Adapt, suffix: str = ""
) -> Iterator[Planned]:
    """The explicit network, then the DEQ as trained and with each defence, under the images of those before."""
    yield Planned(cnn, f"none{suffix}", adapt(eval_auto_attack.get_config))
    suites = {"cnn": Workdir(cnn).evaluation(f"none{suffix}").path}
    yield Planned(workdir, f"none{suffix}", adapt(eval_white_box.get_config), suites)
    suites = suites | {"reference": Workdir(workdir).evaluation(f"none{suffix}").path}
    for name, choose in defences.items():
        yield Planned(workdir, f"{name}{suffix}", adapt(choose), suites)


def run(planned: Planned) -> None:
    """One evaluation; finished parts are not computed again."""
    workdir, name, choose, suites = planned
    console.print(f"{workdir.name}: {name}")
    found = evaluate(workdir, lambda config: with_transfers(choose(config), suites.items()), planned.folder)
    console.print(f"  robust accuracy {100 * (found.robust_accuracy or 0.0):.1f} %")
    jax.clear_caches()
    gc.collect()


def at(factor: float, choose: Choose) -> Choose:
    """The evaluation at a multiple of the radius."""

    def chosen(train: TrainConfig) -> EvalConfig:
        epsilon = factor * threat_of(train).epsilon
        return choose(set_fields(train, [f"validation_attack.threat.epsilon={epsilon}"]))

    return chosen


def first(images: int, config: EvalConfig) -> EvalConfig:
    """The evaluation on the first images, in one batch; every trial attacks all of them."""
    return replace(config, max_images=images, batch_size=images, skip_broken=False)


def lightened(config: EvalConfig, queries: int) -> EvalConfig:
    """The evaluation with its costliest attacks shortened or dropped."""
    trials = tuple(lighter for trial in config.trials for lighter in _lighter(trial, queries))
    extra = config.diagnostics and diagnostics(Linf(config.threat.epsilon), steps=200)
    return replace(config, trials=trials, diagnostics=extra)


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
