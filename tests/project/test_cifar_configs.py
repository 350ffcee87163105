"""The CIFAR configs: complete, loadable, documented, and of the sizes in the literature."""

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.cifar import cell_evaluations
from deq_jax import (
    Broyden,
    Equilibrium,
    FinalState,
    Implicit,
    PGDAdversarialTraining,
    Phantom,
    RandomIntermediateState,
    Standard,
    Trades,
    TrainConfig,
)
from deq_jax.data import Cifar, ImageFolder
from deq_jax.parallel import AXIS, replicate, replicate_and_split
from deq_jax.storage import from_tree, load_config, to_tree
from deq_jax.surrogates import ThroughSolver
from deq_jax.training import Batch, Phase, RadiusSchedule, TrainState, train_step
from tests.helpers import tiny
from tests.helpers.cases import mostly_slow

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = sorted([*CONFIGS.glob("cifar10_small_*.py"), CONFIGS / "photos_small_pgd_at.py"])
PATHS = sorted({*CONFIGS.glob("cifar1*.py")} - {*SMALL})
PARAMETERS = {"large": 11_097_438, "xl": 48_792_098, "resnet18": 11_173_962, "wrn34_10": 46_160_474}


def test_every_combination_is_there():
    mdeqs = product(("cifar10", "cifar100"), ("large", "xl"), ("pgd_at", "trades"), ("", "_random", "_exact"))
    baselines = product(("cifar10", "cifar100"), ("resnet18", "wrn34_10"), ("pgd_at", "trades"), ("",))
    expected = {f"{data}_{size}_{objective}{variant}" for data, size, objective, variant in (*mdeqs, *baselines)}
    extra = {
        f"cifar10_large_{objective}_{name}" for objective in ("pgd_at", "trades") for name in ("stable", "through")
    }
    assert {path.stem for path in PATHS} == expected | extra


@pytest.mark.parametrize("path", mostly_slow(PATHS, 0, 9, 19, 29), ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    config = load_config(path, TrainConfig)
    assert from_tree(json.loads(json.dumps(to_tree(config)))) == config
    text = path.read_text()
    assert f"python -m deq_jax.train --config configs/{path.name} --workdir runs/{path.stem}\n" in text
    assert "Hardware: " in text and "has not been measured here" in text
    data, rest = path.stem.split("_", 1)
    size = next(size for size in PARAMETERS if rest.startswith(size))
    classes = int(data.removeprefix("cifar"))
    assert config.dataset.name == data
    assert isinstance(config.objective, Trades if "trades" in rest else PGDAdversarialTraining)
    assert config.objective.surrogate == (ThroughSolver() if rest.endswith("through") else None)
    attack = config.objective.attack
    assert (attack.threat.epsilon, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 10)
    assert (config.batch_size, config.epochs, config.optimizer.learning_rate) == (96, 220, 1e-3)
    variables = jax.eval_shape(config.classifier.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    head = {"large": 1680, "xl": 1800, "resnet18": 512, "wrn34_10": 640}[size] + 1
    assert count == PARAMETERS[size] + (classes - 10) * head
    assert isinstance(config.classifier, Equilibrium) == (size in ("large", "xl"))
    if isinstance(config.classifier, Equilibrium):
        dynamics = config.classifier.dynamics
        assert config.pretrain_steps == 16_000
        assert config.classifier.jacobian.weight == (2.0 if rest.endswith("stable") else 0.4)
        assert dynamics.readout == (RandomIntermediateState() if rest.endswith("random") else FinalState())
        assert isinstance(dynamics.gradient, Implicit if rest.endswith("exact") else Phantom)


@pytest.mark.parametrize("path", mostly_slow(SMALL, 0, 6), ids=lambda path: path.stem)
def test_a_config_for_small_machines_is_what_its_name_says(path):
    config, name = load_config(path, TrainConfig), path.stem
    measured = {f"cifar10_small_{name}" for name in ("pgd_at", "pgd_at_random", "twin_pgd_at", "tied_pgd_at")}
    said = "Measured with one seed" if name in measured else "has not been measured here"
    assert said in path.read_text()
    assert config.dataset == (Cifar("") if name.startswith("cifar10") else ImageFolder("", size=32, colours="rgb"))
    kinds = {"standard": Standard, "trades": Trades, "pgd_at": PGDAdversarialTraining}
    assert isinstance(config.objective, next(kind for word, kind in kinds.items() if word in name))
    assert config.radius == (None if "standard" in name else RadiusSchedule(0.4))
    if "standard" not in name:
        attack = config.objective.attack
        assert (attack.threat.epsilon, attack.step_size, attack.steps) == (8 / 255, 6 / 255, 2)
    assert (config.batch_size, config.validation_attack.threat.epsilon) == (256, 8 / 255)
    depth = {"twin": 1, "tied": 11}.get(name.split("_")[2])
    assert getattr(getattr(config.classifier, "module", None), "depth", None) == depth
    variables = jax.eval_shape(config.classifier.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 402_170


def test_a_tied_network_evaluates_the_cell_as_often_as_its_deq():
    classifier = tiny.classifier().with_dynamics(solver=Broyden(4, tolerance=0.0))
    x = jnp.linspace(0, 1, 128).reshape(2, 8, 8, 1)
    evaluations = classifier(classifier.init(0, x), x).solution.evaluations
    assert evaluations.tolist() == [cell_evaluations(classifier)] * 2


@pytest.mark.slow
def test_large_trains_on_eight_devices():
    """A pre-training step of MDEQ-LARGE, and a PGD-AT step with a single attack step: finite, on 8 devices."""
    config = load_config(CONFIGS / "cifar10_large_pgd_at.py", TrainConfig)
    objective = replace(config.objective, attack=replace(config.objective.attack, steps=1))
    config = replace(config, objective=objective, batch_size=8)
    optimizer = config.optimizer.transformation(1000)
    x = np.random.default_rng(0).integers(256, size=(8, 32, 32, 3), dtype=np.uint8)
    batch = Batch(x, np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32))
    variables = jax.jit(config.classifier.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params = variables["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))
    state = replicate(state)
    for phase in (Phase.PRETRAINING, Phase.PLAIN):
        step = replicate_and_split(partial(train_step, config.during(phase), optimizer, axis_name=AXIS), joint=True)
        state, metrics = step(state, batch)
        assert np.isfinite(float(metrics["loss"]))
    assert int(state.step) == 2
