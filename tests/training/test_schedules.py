"""The radius of an attack that grows over a training run."""

import os
import signal
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError, Keys, PGDAdversarialTraining, Standard, Trades, fit
from deq_jax.attacks import L2, Linf, Targeted, gaussian_start
from deq_jax.core import kl
from deq_jax.models import small_cnn
from deq_jax.training import Batch, Interrupted, Phase, RadiusSchedule, initial_state, optimizer_of, train_step
from deq_jax.training.schedules import with_radius
from tests.helpers import tiny

LINEAR = small_cnn(10, 4, strides=4, expansion=1)
CONFIG = tiny.get_config(classifier=LINEAR, radius=RadiusSchedule(), pretrain_steps=0)
OBJECTIVE = CONFIG.objective


def test_the_radius_grows_to_the_whole_one_and_stays():
    share = RadiusSchedule(rise=0.4, start=0.2).over(steps=10)
    np.testing.assert_allclose([share(step) for step in range(10)], [0.4, 0.6, 0.8, *[1.0] * 7], rtol=1e-6)
    assert RadiusSchedule(rise=0.01).over(steps=10)(0) == 1


@pytest.mark.parametrize("norm", [Linf, L2])
def test_the_step_size_grows_with_the_radius(norm):
    attack = replace(tiny.TRADES_ATTACK, threat=norm(0.5), step_size=0.25)
    smaller = with_radius(Trades(attack, beta=3.0), 0.5)
    assert smaller == Trades(replace(attack, threat=norm(0.25), step_size=0.125), beta=3.0)
    by_default = replace(attack, step_size=None)
    assert with_radius(Trades(by_default), 0.5) == Trades(replace(by_default, threat=norm(0.25)))


@pytest.mark.slow
def test_a_traced_share_attacks_in_the_smaller_ball():
    x = jnp.full((2, 8, 8, 1), 0.5)
    variables, keys, y = LINEAR.init(0, x), Keys.of(0, 2), jnp.arange(2)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def lengths(share):
        return jnp.abs(with_radius(OBJECTIVE, share).perturb(LINEAR, variables, x, y, keys) - x).max((1, 2, 3))

    for share in (0.25, 1.0):
        np.testing.assert_allclose(lengths(share), share * 0.1, rtol=1e-5)


@pytest.fixture(scope="module")
def start():
    """The optimiser, a state and a batch."""
    optimizer, data = optimizer_of(CONFIG, 10), CONFIG.dataset.load()
    batch = Batch(data.train.x[:8], data.train.y[:8], np.arange(8, dtype=np.int32))
    return optimizer, initial_state(CONFIG, optimizer, data), batch


def test_a_step_must_know_how_long_the_run_is(start):
    optimizer, state, batch = start
    with pytest.raises(InputError, match="expected its number of steps, got steps=None"):
        train_step(CONFIG, optimizer, state, batch)


@pytest.mark.slow
def test_one_program_serves_all_radii_and_ends_with_the_whole_one(start):
    optimizer, state, batch = start
    growing = jax.jit(lambda state: train_step(CONFIG, optimizer, state, batch, steps=10))
    whole = jax.jit(lambda state: train_step(replace(CONFIG, radius=None), optimizer, state, batch))
    early, late = state, state._replace(step=jnp.int32(5))
    shares = [float(growing(state)[1]["radius_share"]) for state in (early, late)]
    np.testing.assert_allclose(shares, [0.2, 1.0], rtol=1e-6)
    found, expected = (float(step(late)[1]["loss"]) for step in (growing, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # rounding turns some signs, by which an attack moves
    assert growing(early)[1]["loss"] < whole(early)[1]["loss"]


def test_pre_training_has_no_attack():
    config = tiny.get_config(radius=RadiusSchedule())
    assert config.during(Phase.PRETRAINING).radius is None
    assert config.during(Phase.PLAIN).radius == RadiusSchedule()


@pytest.mark.parametrize(
    "objective",
    [Standard(), PGDAdversarialTraining(Targeted(replace(tiny.ATTACK, best_of=True)))],
    ids=["standard", "targeted"],
)
def test_an_objective_without_a_radius_is_refused(objective):
    with pytest.raises(InputError, match="radius: expected an objective with an attack of one radius"):
        replace(CONFIG, objective=objective)


@pytest.mark.parametrize(("field", "value"), [("rise", 0.0), ("rise", 1.5), ("start", -0.1), ("start", 1.1)])
def test_shares_are_checked(field, value):
    with pytest.raises(InputError, match=f"RadiusSchedule: {field} must be a share in"):
        RadiusSchedule(**{field: value})


@pytest.mark.slow
def test_a_stopped_run_goes_on_at_its_radius(tmp_path):
    objective = Trades(replace(tiny.ATTACK, loss=kl, start=gaussian_start))
    config = replace(CONFIG, objective=objective)
    whole = fit(config)
    shares = [line["radius_share"] for line in whole.metrics if line["split"] == "train"]
    np.testing.assert_allclose(shares, [RadiusSchedule().over(17)(step) for step in range(17)], rtol=1e-6)

    def stop(line):
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit(config, tmp_path, report=stop)
    jax.tree.map(np.testing.assert_array_equal, fit(config, tmp_path).state, whole.state)
