"""A finished evaluation against its files: as it was written, and with one of them changed."""

import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from deq_jax import Explicit, InputError, evaluate
from deq_jax.attacks import PGD, Linf
from deq_jax.data import Images
from deq_jax.evaluation import (
    EvalConfig,
    EvaluationFolder,
    EvaluationRecord,
    Trial,
    verify,
    worst_case,
    write_evaluation,
)
from tests.helpers.linear import DATA, Linear, trained

ARCHIVE = Path(__file__).parents[1] / "golden" / "workdir-0.1.tar.xz"  # a run and its evaluations
IMAGES = Images(*(part[:24] for part in DATA.test))
CLASSIFIER = Explicit(Linear())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an evaluation."""
    out = tmp_path_factory.mktemp("out")
    attacks = [PGD(Linf(0.1), steps=2), PGD(Linf(0.1), steps=1)]
    trials = tuple(Trial(f"pgd-{attack.steps}", attack) for attack in attacks)
    config = EvalConfig(Linf(0.1), trials, batch_size=8, skip_broken=False)
    result = worst_case(config, CLASSIFIER, trained(), IMAGES, out, about={"checkpoint": "best, step 3"})
    write_evaluation(out, EvaluationRecord.of(result), result, IMAGES.x)
    return out


@pytest.fixture
def folder(finished, tmp_path):
    """A copy that may be changed."""
    return EvaluationFolder(shutil.copytree(finished, tmp_path / "out"))


def failed(folder, variables=None, images=IMAGES, **options):
    checks = verify(folder, CLASSIFIER, variables or trained(), images, sample=1000, **options)
    assert all("\n" not in str(check) for check in checks)
    return {check.name: check.text for check in checks if not check.holds}


def test_a_good_evaluation_is_what_its_files_give(folder):
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    checks = verify(folder, CLASSIFIER, trained(), IMAGES, about={"checkpoint": "best, step 3"}, seed=3, sample=30)
    assert [check.name for check in checks] == [
        "checkpoint",
        "images",
        "config",
        "trials",
        "table",
        "arrays",
        "outcomes",
    ]
    assert all(check.holds for check in checks)
    assert checks[-1].text == "30 of 72 images, chosen at random, are classified as they were"
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def edit(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def exchange(path, name, change):
    with np.load(path) as file:
        arrays = dict(file)
    arrays[name] = change(arrays[name])
    np.savez(path, **arrays)


def record(change):
    return lambda folder: edit(folder.record, change)


def batch(name, change):
    return lambda folder: exchange(folder.batch("pgd-2", 1), name, change)


def first(value):
    """Sets the first image's part."""

    def change(array):
        array = array.copy()
        array[0] = value
        return array

    return change


CHANGES = {
    "accuracy": (record(lambda tree: tree["accuracy"]["union"].update(deployed=0.9)), {"table"}, "accuracy.union."),
    "count": (record(lambda tree: tree["trials"]["pgd-2"].update(broken=0)), {"table"}, "trials.pgd-2.1 is 0, and the"),
    "flag": (record(lambda tree: tree["red_flags"].pop()), {"table"}, "red_flags."),
    "class": (record(lambda tree: tree["classes"][0].update(attacked=1.0)), {"table"}, "classes.0.attacked is 1.0"),
    "radius": (record(lambda tree: tree["evaluation"]["threat"].update(epsilon=0.2)), {"config"}, "threat.epsilon was"),
    "arrays": (
        lambda folder: exchange(folder.arrays, "correct", np.logical_not),
        {"arrays"},
        "evaluation.npz: correct is not what the files give",
    ),
    "label": (batch("label", lambda label: (label + 1) % 10), {"table", "arrays", "outcomes"}, "pgd-2, image 8: class"),
    "image": (batch("x_adv", first(IMAGES.x[8])), {"arrays", "outcomes"}, ""),
    "far image": (batch("x_adv", first(1.0)), {"files"}, "more than Linf(epsilon=0.1)"),
    "no pixel": (
        batch("x_adv", lambda x: np.where(x == 0, -0.03, x)),
        {"trials", "arrays", "outcomes"},
        "pgd-2: image 8 has pixels outside of [0, 1]",
    ),
    "lost": (lambda folder: folder.batch("clean", 2).unlink(), {"files"}, "batch-0002.npz: missing"),
    "no digest": (
        lambda folder: edit(folder.manifest, lambda tree: tree.update(variables="0" * 16)),
        {"checkpoint"},
        "variables was 0000000000000000, now ",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_found(name, folder):
    change, expected, words = CHANGES[name]
    change(folder)
    found = failed(folder)
    assert set(found) <= expected and found and words in " ".join(found.values()), found


def test_another_network_or_other_images_are_found(folder):
    other = jax.tree.map(lambda leaf: -leaf, trained())
    assert set(failed(folder, other)) == {"checkpoint", "outcomes"}
    assert "images" in failed(folder, images=Images(IMAGES.x[::-1], IMAGES.y[::-1]))
    assert failed(folder, about={"checkpoint": "best, step 4"}) == {
        "checkpoint": "checkpoint was best, step 3, now best, step 4"
    }


def test_what_is_not_finished_is_refused(folder):
    folder.record.unlink()
    with pytest.raises(InputError, match=r"evaluation\.json: no such file"):
        failed(folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("run/evaluation/test-eval_config")


@pytest.mark.slow
def test_the_command_says_whether_it_is_good(run, capfd):
    """Of an evaluation of an older version."""
    evaluate.main(["--verify", str(run), "--seed", "5"])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 8 + ["verified:"]
    edit(run / "evaluation.json", lambda tree: tree["accuracy"]["union"].update(deployed=1.0))
    Path("run").rename("moved")
    folder = str(run).replace("run", "moved", 1)
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--verify", folder, "--workdir", "moved", "--seed", "5"])
    shown = capfd.readouterr()
    assert exit.value.code == 65
    assert shown.err == f"error: {folder}: not what its files give: table; --seed 5 repeats the choice\n"
    assert "DIFFERS  table: accuracy.union.deployed is 1.0, and the files give " in shown.out


def test_the_command_needs_a_folder_or_a_workdir(run, capfd):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([])
    assert exit.value.code == 2 and "the following arguments are required: --workdir" in capfd.readouterr().err
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--verify", "run"])
    assert exit.value.code == 2 and capfd.readouterr().err == "error: run/evaluation.json: no such file\n"
