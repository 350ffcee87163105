"""Training: one compiled step, the same on any number of devices, resumed bit by bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.attacks import gaussian_start
from deq_jax.config import AdamCosine
from deq_jax.data import CropFlip
from deq_jax.losses import cross_entropy, kl
from deq_jax.objectives import PGDAdversarialTraining, Standard, Trades
from deq_jax.parallel import AXIS, replicate, replicate_and_split
from deq_jax.readouts import RandomIntermediateState
from deq_jax.training import Batch, Interrupted, NonFiniteLoss, initial_state, load_run, train, train_step
from deq_jax.types import InputError
from tests import tiny

ROOT = Path(__file__).parents[1]
TRADES = Trades(replace(tiny.ATTACK, loss=kl, start=gaussian_start))
CONFIGS = {
    "pgd_at": tiny.get_config(),
    "trades": tiny.get_config(objective=TRADES, augmentation=CropFlip(1)),
    "random": tiny.get_config(classifier=tiny.classifier(RandomIntermediateState(per_sample=True))),
}


def setup(config):
    optimizer = config.optimizer.transformation(100)
    data = config.dataset.load()
    batch = Batch(data.train.x[:16], data.train.y[:16], np.arange(16, dtype=np.int32))
    return optimizer, initial_state(config, optimizer, data), batch


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def metrics_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_devices_equal_one_and_each_step_is_traced_once(name):
    config = CONFIGS[name]
    optimizer, state, batch = setup(config)
    assert jax.local_device_count() == 8
    chex.clear_trace_counter()

    @chex.assert_max_traces(1)
    def step(state, batch):
        return train_step(config, optimizer, state, batch, AXIS)

    parallel = replicate_and_split(step, joint=True)
    one, metrics_one = jax.jit(lambda state, batch: train_step(config, optimizer, state, batch))(state, batch)
    many, metrics_many = parallel(replicate(state), batch)
    for key in metrics_one:
        np.testing.assert_allclose(metrics_many[key], metrics_one[key], rtol=1e-3, atol=1e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), many.batch_stats, one.batch_stats)
    # Adam's first moment is a tenth of the gradient; its step would magnify the rounding of zero gradients.
    moments = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(s.opt_state[0].mu)]) for s in (many, one))
    many_moment, one_moment = moments
    assert jnp.linalg.norm(many_moment - one_moment) < 1e-3 * jnp.linalg.norm(one_moment)
    assert int(parallel(many, batch)[0].step) == 2


def test_a_step_follows_the_gradient_of_the_loss_on_attacked_images():
    """With plain learning the first Adam step is the learning rate times the sign of the gradient."""
    config = tiny.get_config(classifier=tiny.classifier(dropout=0.0), optimizer=AdamCosine(1e-3))
    optimizer, state, batch = setup(config)
    after, metrics = jax.jit(lambda state, batch: train_step(config, optimizer, state, batch))(state, batch)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.params, state.params))
    assert int(after.step) == 1
    np.testing.assert_allclose(max(moved), 1e-3, rtol=1e-2)
    clean = config.classifier(state.variables, batch.x, train=True).logits
    assert float(metrics["loss"]) > float(cross_entropy(clean, batch.y).mean())


@pytest.mark.parametrize("phase", ["pretraining", "equilibrium"])
def test_learns(phase):
    config = tiny.get_config(objective=Standard(), optimizer=AdamCosine(1e-2))
    optimizer, state, batch = setup(config)
    config = config.pretraining() if phase == "pretraining" else config
    step = jax.jit(lambda state, batch: train_step(config, optimizer, state, batch))
    history = []
    for _ in range(25):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.5 * history[0]
    assert ("residual" in metrics) == (phase == "equilibrium")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    lines = []
    state = train(tiny.get_config(), workdir, report=lines.append)
    return workdir, state, lines


def test_what_a_training_leaves(uninterrupted):
    workdir, state, lines = uninterrupted
    logged = metrics_of(workdir)
    assert [line["step"] for line in logged if line["split"] == "train"] == list(range(1, 18))
    assert [line["step"] for line in logged if line["split"] == "validation"] == [17]
    assert len(lines) == len(logged)
    assert "residual" not in logged[0] and {"residual", "cell_evaluations"} <= set(logged[5])
    assert list((workdir / "tensorboard").glob("events.*"))
    config, variables, step = load_run(workdir, best=False)
    assert config == tiny.get_config() and step == 17
    assert_trees_equal(variables, state.variables)
    assert load_run(workdir)[2] == 17


def test_a_finished_training_is_not_repeated(uninterrupted):
    workdir, state, _ = uninterrupted
    before = metrics_of(workdir)
    assert_trees_equal(train(tiny.get_config(), workdir), state)
    assert metrics_of(workdir) == before


@pytest.mark.parametrize("stop_after", [1, 9])
def test_stopped_and_resumed_equals_never_stopped_on_eight_devices(uninterrupted, tmp_path, stop_after):
    _, state, _ = uninterrupted

    def stop(line):
        if line["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(tiny.get_config(), tmp_path, report=stop)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert_trees_equal(train(tiny.get_config(), tmp_path), state)
    assert metrics_of(tmp_path) == metrics_of(uninterrupted[0])


def test_lines_after_the_last_checkpoint_are_dropped_on_resume(uninterrupted, tmp_path):
    """As if killed after logging step 10 and half of step 11, with the last checkpoint at step 8."""
    config = tiny.get_config(checkpoint_every=8)

    def crash(line):
        if line["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, report=crash)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "los')
    state = train(config, tmp_path)
    assert_trees_equal(state, uninterrupted[1])
    assert metrics_of(tmp_path) == metrics_of(uninterrupted[0])


def test_another_config_is_refused_by_name_of_the_field(uninterrupted):
    with pytest.raises(InputError, match=r"objective.attack.steps was 2, now 3"):
        attack = replace(tiny.ATTACK, steps=3)
        train(tiny.get_config(objective=PGDAdversarialTraining(attack)), uninterrupted[0])


def test_the_parts_of_a_step_must_divide_the_images_of_a_device(tmp_path):
    with pytest.raises(InputError, match="the 8 images of a device do not divide into accumulate = 16 parts"):
        train(tiny.get_config(accumulate=16), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny.get_config(objective=Standard(), optimizer=AdamCosine(1e38), pretrain_steps=0, checkpoint_every=1)
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step \d+ of 17; last good one: .*latest/\d+"):
        train(config, tmp_path)


@pytest.mark.slow
def test_killed_at_five_moments_and_resumed_equals_never_killed(tmp_path):
    arguments = ["--config", "configs/digits_pgd_at.py", "--set", "epochs=2", "--set", "checkpoint_every=4"]
    arguments += ["--set", "pretrain_steps=5", "--set", "log_every=2", "--set", "validation_attack.steps=2"]
    environment = {**os.environ, "XLA_FLAGS": ""}

    def start(workdir):
        command = [sys.executable, "-m", "deq_jax.train", *arguments, "--workdir", str(workdir)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    killed = tmp_path / "killed"
    for lines in (1, 3, 7, 12, 16):  # killed when this many lines are logged
        process = start(killed)
        while not (killed / "metrics.jsonl").exists() or len(metrics_text(killed)) < lines:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert start(killed).wait() == 0
    whole, resumed = (load_run(path, best=False) for path in (tmp_path / "whole", killed))
    assert_trees_equal(whole[1], resumed[1])
    assert metrics_of(tmp_path / "whole") == metrics_of(killed)


def metrics_text(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()
