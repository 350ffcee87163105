"""A workdir that an older version wrote, when files had other names, is still read: evaluated, resumed, reported.

tests/golden/workdir-0.1.tar.xz holds a run that was stopped after 9 of 12 steps (of a DEQ with four channels, on 144
digits), one whole evaluation of it and one that was stopped after two of its trials.
"""

import json
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from deq_jax import Broyden, IntermediateState, RandomIntermediateState, TrainConfig, evaluate, report, train
from deq_jax.attacks import PGD, Linf
from deq_jax.evaluation import EvalConfig
from deq_jax.models import JacobianRegularization
from deq_jax.reporting import read_evaluations
from deq_jax.storage import first_difference, from_tree, read_json, to_tree, write_json
from deq_jax.surrogates import SimultaneousAdjoint
from deq_jax.training import PenaltySchedule, load_run

ARCHIVE = Path(__file__).parents[1] / "golden" / "workdir-0.1.tar.xz"
CONFIG = """
from deq_jax import Broyden, Dynamics, Equilibrium, Phantom, RandomIntermediateState
from deq_jax.attacks import PGD, Linf
from deq_jax.data import Npz
from deq_jax.models import JacobianRegularization, SmallCell, SmallDecoder, SmallEncoder
from deq_jax.training import PenaltySchedule, PGDAdversarialTraining, TrainConfig


def get_config():
    attack = PGD(Linf(0.1), steps=2, step_size=0.05, best_of=False)
    dynamics = Dynamics(Broyden(4), RandomIntermediateState(), Phantom(2, 0.5))
    modules = SmallEncoder(4), SmallCell(4), SmallDecoder(10)
    classifier = Equilibrium(*modules, dynamics, JacobianRegularization())
    return TrainConfig(
        classifier, PGDAdversarialTraining(attack), Npz("digits200.npz"), validation_attack=attack,
        batch_size=40, epochs=4, pretrain_steps=2, log_every=1, checkpoint_every=4,
        penalty_schedule=PenaltySchedule(probability=0.1),
    )
"""
EVALUATION = """
from pathlib import Path

from deq_jax.storage import from_tree, read_json


def get_config(train):
    return from_tree(read_json(Path("run/evaluation/half/manifest.json"))["config"])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_its_config_is_the_present_one(folder):
    old = read_json(folder / "run" / "config.json")
    loaded = load_run(folder / "run")
    config, variables, step = loaded.config, loaded.variables, loaded.step
    assert isinstance(config, TrainConfig) and step == 3
    assert config.validation_attack == PGD(Linf(0.1), steps=2, step_size=0.05, best_of=False)
    dynamics = config.classifier.dynamics
    assert (dynamics.solver, dynamics.readout) == (Broyden(4), RandomIntermediateState())
    assert config.classifier.jacobian == JacobianRegularization() and config.penalty_schedule == PenaltySchedule(
        0.1, 90
    )
    assert first_difference(old, to_tree(config)) is None
    assert "deq_jax.solvers" in json.dumps(old) and "deq_jax.core.Broyden" in json.dumps(to_tree(config))
    assert {*variables} == {"params", "batch_stats"} and {*variables["params"]} == {"encoder", "cell", "decoder"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"class": "deq_jax.readouts.IntermediateState", "t": 3}, IntermediateState(3)),
        ({"class": "deq_jax.core.IntermediateState", "t": 3}, IntermediateState(3)),
        ({"class": "deq_jax.surrogates.SimultaneousAdjoint", "step": 2}, SimultaneousAdjoint(2)),
    ],
)
def test_renamed_fields(old, new):
    assert from_tree(old) == new and first_difference(old, to_tree(new)) is None


def test_the_schedule_of_the_penalty_belonged_to_the_classifier(folder):
    old = read_json(folder / "run" / "config.json")
    new = to_tree(from_tree(old))
    other = old | {"classifier": old["classifier"] | {"jacobian": None}}
    assert from_tree(other).classifier.jacobian is None and from_tree(other).penalty_schedule == PenaltySchedule()
    assert first_difference(other, to_tree(from_tree(other))) is None
    changed = new | {"penalty_schedule": new["penalty_schedule"] | {"epochs": 3}}
    assert first_difference(old, changed) == "penalty_schedule.epochs was 90, now 3"


def test_its_evaluation_is_read(folder):
    manifest = read_json(folder / "run" / "evaluation" / "test-eval_config" / "manifest.json")
    config = from_tree(manifest["config"])
    assert isinstance(config, EvalConfig) and len(config.trials) == 6
    (found,) = read_evaluations([folder / "run" / "evaluation" / "test-eval_config"])
    assert len(found.record.plan.trials) == 6 and found.record.images == 24


@pytest.mark.slow
def test_it_is_resumed_and_evaluated_and_reported(folder):
    train.main(["--config", "config.py", "--workdir", "run"])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 13))
    assert load_run("run", best=False).step == 12
    report.main(["run", "--out", "report"])
    assert "24 images" in (folder / "report" / "index.html").read_text()


@pytest.mark.slow
def test_its_half_evaluation_is_finished(folder):
    """The manifest names the versions of JAX and of the package, which resuming compares: present ones here."""
    path = folder / "run" / "evaluation" / "half" / "manifest.json"
    manifest = read_json(path)
    write_json(path, manifest | {name: version(name) for name in ("deq_jax", "jax")})
    (folder / "evaluation.py").write_text(EVALUATION)
    before = {file: file.read_bytes() for file in path.parent.glob("trials/*/*.npz")}
    evaluate.main(["--workdir", "run", "--config", "evaluation.py", "--out", str(path.parent)])
    assert len(before) == 10 and all(file.read_bytes() == text for file, text in before.items())
    assert len(read_json(path.parent / "evaluation.json")["trials"]) == 12
