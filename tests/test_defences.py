"""The study of the defences: what it evaluates, and what it leaves out."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.defences import CONTROLS, DEFENCES, lightened, plan
from configs import digits_pgd_at
from deq_jax.trials import EvalConfig

TRAIN = digits_pgd_at.get_config()


def planned(**changes):
    """Workdir, name and transferred suites of every evaluation of seed 1."""
    options = Namespace(**{"out": Path("o"), "trainings": ["digits_pgd_at_random"], "controls": 1} | changes)
    return [(workdir.name, name, list(suites)) for workdir, name, _, suites in plan(options, seed=1)]


def test_every_defence_meets_the_images_of_the_undefended_network_and_of_the_explicit_one():
    both = ["cnn", "reference"]
    assert planned() == [
        ("digits_cnn_pgd_at-1", "none", []),
        ("digits_pgd_at_random-1", "none", ["cnn"]),
        *(("digits_pgd_at_random-1", name, both) for name in DEFENCES),
    ]
    assert planned(trainings=["digits_standard"]) == [("digits_standard-1", "none", [])]
    assert planned(controls=2)[-len(CONTROLS) :] == [("digits_pgd_at_random-1", name, both) for name in CONTROLS]


@pytest.mark.parametrize("name", [*DEFENCES, *CONTROLS])
def test_what_is_left_out_to_save_time(name):
    whole = (DEFENCES | CONTROLS)[name](TRAIN)
    config = lightened(whole, images=30, queries=77)
    assert isinstance(config, EvalConfig) and config.predictor == whole.predictor
    assert (config.max_images, config.batch_size, config.skip_broken) == (30, 30, False)
    kept, names = {trial.name: trial for trial in config.trials}, {trial.name for trial in whole.trials}
    left_out = names - set(kept)
    assert all("fab" in name or "Intermediate" in name for name in left_out) and set(kept) <= names
    assert all(trial.attack.queries == 77 for name, trial in kept.items() if "square" in name)
    assert all(trial.attack.classes == 3 for name, trial in kept.items() if name.startswith("apgd-t"))
    if config.diagnostics:
        assert config.diagnostics.long.attack.steps == 200
