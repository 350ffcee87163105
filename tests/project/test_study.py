"""The study of the defences: what it evaluates, and what it leaves out."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.defences import CONTROLS, DEFENCES, RADII, first, lightened, plan
from configs import digits_pgd_at
from deq_jax.evaluation import EvalConfig

TRAIN = digits_pgd_at.get_config()
DEQ, CNN = "digits_pgd_at-1", "digits_cnn_pgd_at-1"
SUFFIXES = [f"-radius-x{factor}" for factor in ("0.5", "2")]


def planned(**changes):
    """The evaluations of seed 1."""
    settings = {"out": Path("o"), "trainings": ["digits_pgd_at"], "images": 30, "queries": 77, "extras": 1}
    return list(plan(Namespace(**settings | changes), seed=1))


def shown(evaluations):
    """Of each its training, its name, and whose images it is shown by which suite."""
    return [
        (one.workdir.name, one.name, {suite: folder.relative_to("o") for suite, folder in one.suites.items()})
        for one in evaluations
    ]


def family(suffix, defences):
    """What is expected of a DEQ and its explicit twin."""
    cnn, base = Path(CNN, "evaluation", f"none{suffix}"), Path(DEQ, "evaluation", f"none{suffix}")
    both = {"cnn": cnn, "reference": base}
    undefended = [(CNN, f"none{suffix}", {}), (DEQ, f"none{suffix}", {"cnn": cnn})]
    return [*undefended, *((DEQ, f"{name}{suffix}", both) for name in defences)]


def test_every_defence_meets_the_images_of_the_undefended_network_and_of_the_explicit_one():
    assert shown(planned()) == family("", DEFENCES)
    assert shown(planned(trainings=["digits_standard"])) == [("digits_standard-1", "none", {})]
    extras = [one for suffix in ("-whole", *SUFFIXES) for one in family(suffix, ["entropy"])] + family("", CONTROLS)
    assert shown(planned(extras=2)) == family("", DEFENCES) + extras
    assert len(planned(extras=2, trainings=["digits_pgd_at_random"])) == len(family("", DEFENCES))


def test_radii_are_multiples_of_the_trainings_and_the_defence_follows():
    names = ["entropy", *(f"entropy{suffix}" for suffix in SUFFIXES)]
    configs = [one.choose(TRAIN) for one in planned(extras=2) if one.name in names]
    radii = [0.1, *(0.1 * factor for factor in RADII)]
    assert [config.threat.epsilon for config in configs] == pytest.approx(radii)
    assert [config.predictor.epsilon for config in configs] == pytest.approx(radii)
    assert len({tuple(trial.name for trial in config.trials) for config in configs}) == 1


def test_the_whole_configs_are_cut_to_the_images_only():
    whole = next(one for one in planned(extras=2) if one.name == "entropy-whole")
    assert whole.choose(TRAIN) == first(30, DEFENCES["entropy"](TRAIN))
    assert {trial.name: trial for trial in whole.choose(TRAIN).trials}["square"].attack.queries == 5000


@pytest.mark.parametrize("name", [*DEFENCES, *CONTROLS])
def test_what_is_left_out_to_save_time(name):
    whole = (DEFENCES | CONTROLS)[name](TRAIN)
    config = lightened(first(30, whole), queries=77)
    assert isinstance(config, EvalConfig) and config.predictor == whole.predictor
    assert (config.max_images, config.batch_size, config.skip_broken) == (30, 30, False)
    kept, names = {trial.name: trial for trial in config.trials}, {trial.name for trial in whole.trials}
    left_out = names - set(kept)
    assert all("fab" in name or "Intermediate" in name for name in left_out) and set(kept) <= names
    assert all(trial.attack.queries == 77 for name, trial in kept.items() if "square" in name)
    assert all(trial.attack.classes == 3 for name, trial in kept.items() if name.startswith("apgd-t"))
    if config.diagnostics:
        assert config.diagnostics.long.attack.steps == 200
