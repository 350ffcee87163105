"""Networks that come with the package."""

import hashlib
import json
import runpy
import shutil
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

import deq_jax as dj
from deq_jax import InputError
from deq_jax.evaluation import read_record
from deq_jax.models import pretrained
from deq_jax.models.pretrained import BUILDERS, FOLDER
from deq_jax.storage import from_tree, load_config
from deq_jax.training import TrainConfig, load_run


@pytest.mark.parametrize("name", BUILDERS)
def test_a_network_is_that_of_its_config(name):
    model = pretrained(name)
    config = load_config(f"configs/{name}.py", TrainConfig)
    assert model.classifier == config.classifier
    assert from_tree(model.about["config"]) == config


def test_its_accuracy_on_clean_images_is_the_one_it_tells():
    model, test = pretrained("digits_pgd_at"), dj.data.Digits().load().test
    accuracy = dj.Predictor(model.classifier, model.variables).accuracy(test.x, test.y)
    assert accuracy == pytest.approx(model.about["robustness"]["clean_accuracy"], abs=1.1 / 360)  # one image


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match="no network is called 'cifar'; there is digits_pgd_at"):
        pretrained("cifar")


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "trained")
    monkeypatch.setattr(sys.modules["deq_jax.models.pretrained"], "FOLDER", tmp_path / "trained")
    content = bytearray((FOLDER / "digits_pgd_at.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "trained" / "digits_pgd_at.npz").write_bytes(content)
    with pytest.raises(InputError, match="damaged, its SHA-256 is"):
        pretrained("digits_pgd_at")


@pytest.mark.slow
def test_the_script_ships_the_weights_and_numbers_of_a_run(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    with tarfile.open(root / "tests" / "golden" / "workdir-0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    command = ["ship_run.py", "run", "--evaluation", "test-eval_config", "--out", "shipped"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(root / "scripts" / "ship_run.py"), run_name="__main__")
    about = json.loads(Path("shipped/run.json").read_text())
    content = Path("shipped/run.npz").read_bytes()
    assert about["sha256"] == hashlib.sha256(content).hexdigest()
    record = read_record(Path("run/evaluation/test-eval_config/evaluation.json"))
    assert about["robustness"]["robust_accuracy"] == record.robust_accuracy
    expected = traverse_util.flatten_dict(dict(load_run("run").variables), sep="/")
    with np.load("shipped/run.npz") as arrays:
        shipped = dict(arrays)
    jax.tree.map(np.testing.assert_array_equal, shipped, expected)


@pytest.mark.parametrize("name", BUILDERS)
def test_variables_are_like_those_of_an_untrained_network(name):
    model = pretrained(name)
    fresh = jax.eval_shape(lambda: model.classifier.init(0, jax.numpy.zeros((1, 8, 8, 1))))
    assert jax.tree.structure(dict(model.variables)) == jax.tree.structure(dict(fresh))
    assert jax.tree.map(jax.numpy.shape, dict(model.variables)) == jax.tree.map(lambda leaf: leaf.shape, dict(fresh))


def test_weights_are_in_single_precision():
    leaves = [leaf for part in pretrained("digits_pgd_at").variables.values() for leaf in _leaves(part)]
    assert leaves and all(leaf.dtype == np.float32 for leaf in leaves)


def _leaves(tree):
    return [leaf for part in tree.values() for leaf in _leaves(part)] if isinstance(tree, dict) else [tree]
