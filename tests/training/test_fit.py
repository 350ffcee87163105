"""Training in one call: in memory and in a workdir, with the same result."""

import dataclasses
import os
import re
import signal
from functools import partial

import jax
import numpy as np
import pytest

import deq_jax as dj
from deq_jax import InputError
from deq_jax.parallel import StopRequest
from deq_jax.training import AdamCosine, Interrupted, OneCycle, Sgd, WeightAverage, Workdir, load_run, read_metrics
from deq_jax.training.meters import TIMINGS
from deq_jax.training.profiles import Profile
from deq_jax.training.validation import collapse
from tests.helpers import tiny

CONFIG = tiny.get_config(epochs=2, log_every=5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "a"
    return dj.fit(CONFIG), dj.fit(CONFIG, workdir, profile=2), workdir


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for mine, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.slow
def test_memory_and_a_workdir_give_the_same_bits(runs):
    memory, disk, workdir = runs
    same(memory.state, disk.state)
    same(memory.predictor, disk.predictor)
    loaded = load_run(workdir)
    config, best = loaded.config, loaded.variables
    same(disk.predictor.variables, best)
    assert memory.config == disk.config == config == CONFIG


@pytest.mark.slow
def test_the_lines_of_metrics_are_the_same_but_for_times(runs):
    memory, disk, workdir = runs
    assert disk.metrics == read_metrics(workdir / "metrics.jsonl")
    mine, other = (
        [{name: value for name, value in line.items() if name not in TIMINGS} for line in run.metrics]
        for run in (memory, disk)
    )
    assert mine == other and {line["split"] for line in mine} == {"train", "validation"}


def test_in_memory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    linear = dj.models.small_cnn(10, 4, strides=4, expansion=1)
    run = dj.fit(tiny.get_config(classifier=linear, objective=dj.Standard(), pretrain_steps=0))
    assert not list(tmp_path.iterdir()) and int(run.state.step) == 17
    assert len(run.data.test.y) == 360
    accuracy = run.predictor.accuracy(*run.data.validation)
    assert accuracy == pytest.approx(run.metrics[-1]["accuracy"])


@pytest.mark.slow
def test_a_finished_workdir_is_read_again(runs):
    _, disk, workdir = runs
    again = dj.fit(CONFIG, workdir)
    same(again.predictor, disk.predictor)
    assert again.metrics == disk.metrics
    with pytest.raises(InputError, match="holds a run of another config: seed was 0, now 1"):
        dj.fit(tiny.get_config(epochs=2, log_every=5, seed=1), workdir)


@pytest.mark.slow
def test_the_average_of_the_parameters_is_deployed_and_survives_a_stop(tmp_path):
    linear = dj.models.small_cnn(10, 4, strides=4, expansion=1)
    descent = Sgd(0.05, clip=1.0, rates=OneCycle())
    plain, averaged = (
        tiny.get_config(classifier=linear, objective=dj.Standard(), pretrain_steps=0, optimizer=optimizer)
        for optimizer in (descent, WeightAverage(descent, decay=0.9))
    )
    whole = dj.fit(averaged)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)  # two programs round each in its way
    jax.tree.map(close, whole.state.params, dj.fit(plain).state.params)
    same(whole.predictor.variables["params"], whole.state.opt_state.average)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), whole.state.params, whole.state.opt_state.average)
    assert all(jax.tree.leaves(moved))
    with pytest.raises(Interrupted):
        dj.fit(averaged, tmp_path / "run", report=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    resumed = dj.fit(averaged, tmp_path / "run")
    same(resumed.state, whole.state)
    same(load_run(tmp_path / "run").variables, whole.predictor.variables)


LINEAR = tiny.get_config(
    classifier=dj.models.small_cnn(10, 4, strides=4, expansion=1), objective=dj.Standard(), pretrain_steps=0
)


def test_a_profile_has_the_steps_after_the_first(tmp_path):
    with Profile(tmp_path / "profile", 2) as steps:
        for step in range(3):
            assert not (tmp_path / "profile").exists()
            steps.after(jax.numpy.float32(step))
        assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(InputError, match="profile: expected a workdir"):
        dj.fit(LINEAR, profile=2)


@pytest.mark.slow
def test_a_run_from_given_variables_begins_its_average_there(tmp_path):
    """As every state of an optimiser that depends on the parameters."""
    source = dj.fit(dataclasses.replace(LINEAR, epochs=1), tmp_path / "source")
    still = WeightAverage(Sgd(1e-30, weight_decay=0.0), decay=0.9)
    run = dj.fit(dataclasses.replace(LINEAR, epochs=1, optimizer=still), init_from=tmp_path / "source")
    average, given = (
        jax.tree.leaves(tree) for tree in (run.state.opt_state.average, source.predictor.variables["params"])
    )
    for mine, other in zip(average, given, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5)


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(tmp_path):
    config = dataclasses.replace(LINEAR, checkpoint_every=8)
    whole = dj.fit(config, tmp_path / "run")
    latest = Workdir(tmp_path / "run").latest.folder
    file = max(latest.glob("17/state/ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    said: list[str] = []
    again = dj.fit(config, tmp_path / "run", say=said.append)
    assert [text for text in said if "damaged" in text or "resuming" in text] == [
        f"note: checkpoint {latest / '17'} is damaged (state/ocdbt.process_0/d/{file.name} has changed); "
        "step 16 is used; the damaged one is set aside",
        "resuming after step 16 of 17",
    ]
    same(again.state, whole.state)
    same(again.predictor, whole.predictor)
    assert sorted(path.name for path in latest.iterdir()) == ["16", "17", "17.damaged-1"]


@pytest.mark.slow
def test_a_run_whose_time_is_over_saves_and_goes_on(tmp_path):
    with pytest.raises(Interrupted) as stopped:
        dj.fit(LINEAR, tmp_path / "run", minutes=1e-6)
    assert stopped.value.args == (signal.SIGALRM, 1)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    said: list[str] = []
    run = dj.fit(LINEAR, tmp_path / "run", minutes=60, say=said.append)
    assert "resuming after step 1 of 17" in said and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    same(run.state, dj.fit(LINEAR).state)


def test_a_time_that_is_none_is_refused(tmp_path):
    for minutes in (0, -1, float("nan"), float("inf"), 1e12):
        words = re.escape(f"minutes must be positive and at most 10000000, got {minutes}")
        with pytest.raises(InputError, match=words):
            dj.fit(LINEAR, tmp_path / "run", minutes=minutes)


def test_a_stop_is_asked_for_when_the_time_is_over():
    with StopRequest(seconds=60) as stop:
        assert stop.after(1) is None
        signal.setitimer(signal.ITIMER_REAL, 1e-6)
        signal.sigtimedwait([], 0.01)
        assert stop.after(2) == signal.SIGALRM


@pytest.mark.slow
def test_a_run_without_progress_ends_after_its_patience_and_stays_ended(tmp_path):
    config = dataclasses.replace(LINEAR, optimizer=AdamCosine(1e-12, 0), epochs=5, patience=2)
    said: list[str] = []
    run = dj.fit(config, tmp_path / "run", say=said.append)
    assert int(run.state.step) == 3 * 17  # the first validation is the best, the next two are not better
    assert said[-1] == "ending after step 51 of 85: 2 validations in a row were not better than the best one"
    again = dj.fit(config, tmp_path / "run", say=said.append)
    assert not any("resuming" in text for text in said)
    same(again.state, run.state)
    assert len([line for line in again.metrics if line["split"] == "validation"]) == 3


@pytest.mark.slow
def test_validation_takes_the_epochs_and_images_that_are_asked_for():
    config = dataclasses.replace(LINEAR, epochs=3, validate_every=2, validation_images=40)
    lines = [line for line in dj.fit(config).metrics if line["split"] == "validation"]
    assert [line["step"] for line in lines] == [34, 51]
    assert all((40 * line["accuracy"]) == pytest.approx(round(40 * line["accuracy"])) for line in lines)


@pytest.mark.parametrize(("best", "accuracy", "said"), [(-1.0, 0.1, 0), (0.4, 0.25, 0), (0.4, 0.2, 0), (0.4, 0.1, 1)])
def test_a_sudden_fall_under_attack_is_said(best, accuracy, said):
    warnings = collapse(best, accuracy)
    assert len(warnings) == said
    assert all("fell from 40.0 % to 10.0 %: catastrophic overfitting" in text for text in warnings)
