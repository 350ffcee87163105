"""Training: one compiled step, the same on any number of devices, resumed bit by bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deq_jax import Explicit, InputError, PGDAdversarialTraining, RandomIntermediateState, Standard, Trades
from deq_jax.attacks import gaussian_start
from deq_jax.core import cross_entropy, kl
from deq_jax.data import CropFlip
from deq_jax.models import SmallCell, SmallCNN
from deq_jax.parallel import AXIS, replicate, replicate_and_split
from deq_jax.storage import digest, environment
from deq_jax.storage.checkpoints import Checkpoints
from deq_jax.training import (
    AdamCosine,
    Batch,
    Interrupted,
    NonFiniteLoss,
    Sgd,
    TrainState,
    WeightAverage,
    Workdir,
    fit,
    initial_state,
    learning_rate,
    load_run,
    read_metrics,
    train_step,
)
from deq_jax.training.meters import TIMINGS, Meter
from deq_jax.training.optimizers import deployed_params, slowed
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
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
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_step_follows_the_gradient_of_the_loss_on_attacked_images():
    """With plain learning the first Adam step is the learning rate times the sign of the gradient."""
    config = tiny.get_config(classifier=tiny.classifier(dropout=0.0), optimizer=AdamCosine(1e-3))
    optimizer, state, batch = setup(config)
    after, metrics = jax.jit(lambda state, batch: train_step(config, optimizer, state, batch))(state, batch)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.params, state.params))
    assert int(after.step) == 1
    np.testing.assert_allclose(max(moved), 1e-3, rtol=1e-2)
    first_moment = optax.tree.norm(after.opt_state[0].mu)  # a tenth of the gradient
    np.testing.assert_allclose(metrics["gradient_norm"], 10 * first_moment, rtol=1e-5)
    clean = config.classifier(state.variables, batch.x, train=True).logits
    assert float(metrics["loss"]) > float(cross_entropy(clean, batch.y).mean())


@dataclass(frozen=True)
class Drifting:
    """Plain gradient descent with a counter that begins as an integer, or is there from the second step only."""

    is_float: bool

    def transformation(self, steps):
        def update(gradient, count, params=None):
            following = count["count"] + 0.5 if self.is_float else count["count"] + 1
            return jax.tree.map(jnp.negative, gradient), {"count": following} | ({} if self.is_float else {"new": 0})

        return optax.GradientTransformation(lambda params: {"count": jnp.zeros((), jnp.int32)}, update)


@pytest.mark.parametrize(
    ("is_float", "words"),
    [(True, "'opt_state/count': types: int32 != float32"), (False, "trees 0 and 1 do not match")],
    ids=["dtype", "structure"],
)
def test_an_optimiser_whose_state_changes_in_a_step_is_refused(is_float, words):
    """Its step would be compiled twice, and its checkpoints would not be restored."""
    config = tiny.get_config(objective=Standard(), optimizer=Drifting(is_float))
    optimizer, state, batch = setup(config)
    with pytest.raises(InputError) as raised:
        jax.eval_shape(partial(train_step, config, optimizer), state, batch)
    message = str(raised.value)
    assert message.startswith("optimizer Drifting: a step changes the shape of its state (0 is before, 1 after): ")
    assert words in message and "\n" not in message


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
    lines: list[dict[str, Any]] = []
    said: list[str] = []
    state = fit(tiny.get_config(), workdir, report=lines.append, say=said.append).state
    assert said == [
        "preparing: data and initial state ...",
        "compiling: shallow pre-training ...",
        "compiling: training ...",
        "compiling: validation ...",
    ]
    return workdir, state, lines


def test_what_a_training_leaves(uninterrupted):
    workdir, state, lines = uninterrupted
    logged = metrics_of(workdir)
    assert [line["step"] for line in logged if line["split"] == "train"] == list(range(1, 18))
    assert [line["step"] for line in logged if line["split"] == "validation"] == [17]
    assert len(lines) == len(logged)
    assert "residual" not in logged[0] and {"residual", "cell_evaluations"} <= set(logged[5])
    assert list((workdir / "tensorboard").glob("events.*"))
    rates = [line["learning_rate"] for line in logged if line["split"] == "train"]
    np.testing.assert_allclose(rates, [AdamCosine().schedule(17)(step) for step in range(17)], rtol=1e-6)
    timed = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in timed if "compile_seconds" in line] == [1, 3]  # both phases
    np.testing.assert_allclose([line["seconds_per_step"] * line["images_per_second"] for line in timed], 64)
    images = {"images": digest(tiny.get_config().dataset.load()._asdict())}
    assert json.loads((workdir / "environment.json").read_text()) == [{"step": 0, **environment(), "data": images}]
    loaded = load_run(workdir, best=False)
    config, variables, step = loaded.config, loaded.variables, loaded.step
    assert config == tiny.get_config() and step == 17
    assert_trees_equal(variables, state.variables)
    assert load_run(workdir).step == 17


def test_a_finished_training_is_not_repeated(uninterrupted):
    workdir, state, _ = uninterrupted
    before = metrics_of(workdir)
    assert_trees_equal(fit(tiny.get_config(), workdir).state, state)
    assert metrics_of(workdir) == before


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 9])
def test_stopped_and_resumed_equals_never_stopped_on_eight_devices(uninterrupted, tmp_path, stop_after):
    _, state, _ = uninterrupted

    def stop(line):
        if line["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit(tiny.get_config(), tmp_path, report=stop)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert_trees_equal(fit(tiny.get_config(), tmp_path).state, state)
    assert metrics_of(tmp_path) == metrics_of(uninterrupted[0])


@pytest.mark.slow
def test_a_line_has_the_means_of_its_interval_even_if_it_was_stopped(uninterrupted, tmp_path):
    """A signal at the line of step 5 stops the run after step 6, one step into the next interval."""

    def stop(line):
        if line["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    config = tiny.get_config(log_every=5)
    said: list[str] = []
    with pytest.raises(Interrupted) as stopped:
        fit(config, tmp_path, report=stop)
    assert stopped.value.args[1] == 6
    fit(config, tmp_path, say=said.append)
    assert said[1] == "resuming after step 6 of 17"
    steps = [line for line in metrics_of(uninterrupted[0]) if line["split"] == "train"]
    lines = [line for line in metrics_of(tmp_path) if line["split"] == "train"]
    assert [line["step"] for line in lines] == [5, 10, 15]
    for line in lines:
        interval = [one for one in steps if line["step"] - 5 < one["step"] <= line["step"]]
        for name in line.keys() - {"step", "epoch", "split", "learning_rate"}:
            values = [one[name] for one in interval if name in one]  # pre-training has no residual
            expected = max(values) if name == "residual_max" else sum(values) / len(values)
            assert line[name] == pytest.approx(expected, rel=1e-12), name
        assert line["learning_rate"] == interval[-1]["learning_rate"]


def test_a_meter_counts_each_metric_where_it_is_and_keeps_nan():
    meter = Meter(8, {"loss": [2, 5.0], "residual_max": [2, 0.5]})
    meter.add({"loss": jnp.float32(1.0), "residual_max": jnp.float32(jnp.nan)})
    meter.add({"loss": jnp.float32(3.0), "accuracy": jnp.float32(0.25)})
    assert meter.wait() == [1.0, 3.0]
    line = meter.line()
    assert line["loss"] == 9 / 4 and line["accuracy"] == 0.25 and np.isnan(line["residual_max"])
    assert meter.sums == {} and "compile_seconds" not in line


def test_a_meter_tells_the_speed_of_the_cell_and_the_share_of_the_input():
    meter = Meter(8, {})
    with meter.preparing():
        pass
    meter.add({"loss": jnp.float32(1.0), "cell_evaluations": jnp.float32(15.0)})
    meter.wait()
    line = meter.line()
    assert line["cell_evaluations_per_second"] == pytest.approx(15 * line["images_per_second"])
    assert 0 < line["input_share"] < 1


@pytest.mark.slow
def test_lines_after_the_last_checkpoint_are_dropped_on_resume(uninterrupted, tmp_path):
    """As if killed after logging step 10 and half of step 11, with the last checkpoint at step 8."""
    config = tiny.get_config(checkpoint_every=8)

    def crash(line):
        if line["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path, report=crash)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "los')
    state = fit(config, tmp_path).state
    assert_trees_equal(state, uninterrupted[1])
    assert metrics_of(tmp_path) == metrics_of(uninterrupted[0])


def test_another_config_is_refused_by_name_of_the_field(uninterrupted):
    with pytest.raises(InputError, match=r"objective.attack.steps was 2, now 3"):
        attack = replace(tiny.ATTACK, steps=3)
        fit(tiny.get_config(objective=PGDAdversarialTraining(attack)), uninterrupted[0])


@pytest.mark.slow
def test_settings_that_change_numbers_are_refused_on_resume(uninterrupted):
    words = "jax_default_matmul_precision was None, now highest; set JAX_DEFAULT_MATMUL_PRECISION as before"
    with jax.default_matmul_precision("highest"), pytest.raises(InputError, match=words):
        fit(tiny.get_config(), uninterrupted[0])


def test_a_workdir_without_environment_is_resumed(uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "old")
    (workdir / "environment.json").unlink()
    assert_trees_equal(fit(tiny.get_config(), workdir).state, uninterrupted[1])


@dataclass(frozen=True)
class Nesterov:
    """Someone's own optimiser: SGD with Nesterov momentum, weight decay, clipping and a warm-up."""

    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warmup: int = 3

    def schedule(self, steps):
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup, steps)

    def transformation(self, steps):
        sgd = optax.sgd(self.schedule(steps), momentum=0.9, nesterov=True)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(self.weight_decay), sgd)


TUNED = tiny.get_config(objective=Standard(), optimizer=Nesterov(), pretrain_steps=0)


@pytest.fixture(scope="module")
def tuned(uninterrupted, tmp_path_factory):
    """A run with another objective and optimiser, from the variables of the first."""
    workdir = tmp_path_factory.mktemp("runs") / "tuned"
    said: list[str] = []
    state = fit(TUNED, workdir, init_from=uninterrupted[0], init_checkpoint="latest", say=said.append).state
    assert f"starting from {uninterrupted[0]}, latest checkpoint, step 17" in said
    return workdir, state


@pytest.mark.slow
def test_an_optimizer_of_ones_own_trains_and_is_recorded(tuned):
    workdir, _ = tuned
    recorded = json.loads((workdir / "config.json").read_text())["optimizer"]
    assert recorded == {"class": f"{__name__}.Nesterov", "learning_rate": 0.1, "weight_decay": 5e-4, "warmup": 3}
    lines = [line for line in metrics_of(workdir) if line["split"] == "train"]
    np.testing.assert_allclose([line["learning_rate"] for line in lines[:4]], [0, 0.1 / 3, 0.2 / 3, 0.1], rtol=1e-6)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert load_run(workdir).config == TUNED


@pytest.mark.slow
def test_a_run_starts_from_the_variables_of_another(uninterrupted, tuned, tmp_path):
    workdir, state = tuned
    source = shutil.copytree(uninterrupted[0], tmp_path / "source")

    def stop(line):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit(TUNED, tmp_path / "new", init_from=source, init_checkpoint="latest", report=stop)
    template = setup(TUNED)[1]
    checkpoints = shutil.copytree(tmp_path / "new" / "checkpoints" / "latest", tmp_path / "checkpoints")
    shutil.rmtree(checkpoints / "2")
    start = Checkpoints(checkpoints, keep=2).read()
    assert_trees_equal(start.shaped_like(template), template._replace(**uninterrupted[1].variables))
    origin = json.loads((tmp_path / "new" / "origin.json").read_text())
    assert (
        origin
        == start.meta["origin"]
        == {
            "workdir": str(source),
            "checkpoint": "latest",
            "step": 17,
            "digest": digest(uninterrupted[1].variables),
        }
    )
    shutil.rmtree(source)  # it is not read again
    assert_trees_equal(fit(TUNED, tmp_path / "new", init_from=source, init_checkpoint="latest").state, state)
    assert metrics_of(tmp_path / "new") == metrics_of(workdir)
    assert_trees_equal(fit(TUNED, tmp_path / "new").state, state)  # nor needed to be named


def test_another_origin_is_refused_on_resume(uninterrupted, tuned, tmp_path):
    words = f"holds a run that started from the latest checkpoint of {uninterrupted[0]}; drop --init-from"
    for given in ({"init_from": tmp_path, "init_checkpoint": "latest"}, {"init_from": uninterrupted[0]}):
        with pytest.raises(InputError, match=words):
            fit(TUNED, tuned[0], **given)
    with pytest.raises(InputError, match="holds a run that started from no other one; drop --init-from"):
        fit(tiny.get_config(), uninterrupted[0], init_from=tuned[0])


@pytest.mark.parametrize(
    ("classifier", "words"),
    [
        (replace(tiny.classifier(), cell=SmallCell(4, expansion=4)), "params/cell/.* has shape .*, expected "),
        (Explicit(SmallCNN(10, 4)), ""),
    ],
    ids=["width", "kind"],
)
def test_an_origin_of_another_architecture_is_refused(uninterrupted, tmp_path, classifier, words):
    with pytest.raises(InputError, match=f"best/17 does not fit: {words}"):
        fit(replace(TUNED, classifier=classifier), tmp_path / "new", init_from=uninterrupted[0])
    assert not (tmp_path / "new").exists()


def test_a_schedule_that_does_not_suit_the_steps_is_told_in_one_line(tmp_path):
    words = "optimizer Nesterov does not suit a run of 17 steps: .*positive decay_steps"
    with pytest.raises(InputError, match=words):
        fit(replace(TUNED, optimizer=Nesterov(warmup=20)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("tell", "expected"),
    [
        (lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(1.0, 0.0, 10)), 0.8),
        (lambda: optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=0.5)), 0.5),
        (lambda: optax.sgd(0.1), None),
    ],
    ids=["scheduled", "constant", "untold"],
)
def test_the_learning_rate_is_found_in_the_state_of_an_optimizer_without_schedule(tell, expected):
    optimizer, params = tell(), {"w": jnp.ones(2)}
    state = TrainState(jnp.int32(0), params, {}, optimizer.init(params))
    for step in range(3):
        state = state._replace(step=jnp.int32(step + 1), opt_state=optimizer.update(params, state.opt_state, params)[1])
    rate = learning_rate(object(), 10, state)
    assert rate == (None if expected is None else pytest.approx(expected))


def test_the_parts_of_a_step_must_divide_the_images_of_a_device(tmp_path):
    with pytest.raises(InputError, match="the 8 images of a device do not divide into accumulate = 16 parts"):
        fit(tiny.get_config(accumulate=16), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny.get_config(objective=Standard(), optimizer=AdamCosine(1e38), pretrain_steps=0, checkpoint_every=1)
    images = r"training images \[\d+, \d+, \d+\] and 61 others"
    message = rf"loss is nan at step \d+ of 17; its batch is {images}; last good one: .*latest/\d+"
    with pytest.raises(NonFiniteLoss, match=message):
        fit(config, tmp_path)


BUILT: list[Any] = []  # optimisers of the test below


@dataclass(frozen=True)
class Explosive:
    """SGD; the ones that are built first make steps that are not finite, from step 10 on."""

    explosive: int

    def transformation(self, steps):
        BUILT.append(self)
        sgd, explodes = optax.sgd(0.1), len(BUILT) <= self.explosive

        def update(gradient, count, params):
            factor = jnp.where(explodes & (count >= 9), jnp.nan, 1.0)
            return optax.tree.scale(factor, sgd.update(gradient, sgd.init(params))[0]), count + 1

        return optax.GradientTransformation(lambda params: jnp.int32(0), update)


@pytest.mark.slow
@pytest.mark.parametrize(("explosive", "ends"), [(1, True), (99, False)], ids=["once", "always"])
def test_a_run_goes_back_with_half_the_learning_rate_as_often_as_it_may(explosive, ends, tmp_path):
    BUILT.clear()
    said: list[str] = []
    optimizer = Explosive(explosive)
    config = tiny.get_config(objective=Standard(), optimizer=optimizer, pretrain_steps=0, checkpoint_every=4)
    with nullcontext() if ends else pytest.raises(NonFiniteLoss, match="latest/8"):
        fit(config, tmp_path, retries=2, say=said.append)
    factors = [text.rpartition("; ")[2] for text in said if "going back" in text]
    expected = [f"going back, with {factor} x the learning rate" for factor in (0.5, 0.25)]
    assert factors == expected[: 1 if ends else 2]
    assert said.count("resuming after step 8 of 17") == len(factors)
    workdir = Workdir(tmp_path)
    steps = [line["step"] for line in read_metrics(workdir.metrics) if line["split"] == "train"]
    assert steps == list(range(1, 1 + (17 if ends else 10)))
    assert workdir.latest.read(print).meta["retreats"] == (1 if ends else 0)


@pytest.mark.parametrize("average", [lambda optimizer: optimizer, WeightAverage], ids=["plain", "averaged"])
def test_a_slower_optimizer_is_one_with_a_smaller_learning_rate(average):
    params, gradient = {"w": jnp.arange(3.0)}, {"w": jnp.array([1.0, -2.0, 0.5])}
    found = []
    for optimizer in (slowed(average(Sgd(0.4)), 0.25), average(Sgd(0.1))):
        transformation, now = optimizer.transformation(20), params
        state = transformation.init(params)
        for _ in range(3):
            updates, state = transformation.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        found.append((now, deployed_params(now, state)))
    chex.assert_trees_all_close(*found, rtol=1e-6)


@pytest.mark.slow
def test_killed_at_five_moments_and_resumed_equals_never_killed(tmp_path):
    arguments = ["--config", "configs/digits_pgd_at.py", "--set", "epochs=2", "--set", "checkpoint_every=3"]
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
    assert_trees_equal(whole.variables, resumed.variables)
    assert metrics_of(tmp_path / "whole") == metrics_of(killed)


def metrics_text(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()
