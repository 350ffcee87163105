"""The command lines: what a user may get wrong, help, and a training on someone's own images."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits_pgd_at
from deq_jax import InputError, evaluate, train
from deq_jax.attacks import APGD, L2, PGD, AutoAttack, Linf, Targeted
from deq_jax.evaluation import EvalConfig
from deq_jax.storage import from_tree, load_config, read_json, to_tree
from deq_jax.storage.checkpoints import Checkpoints
from deq_jax.storage.locks import sole_writer
from deq_jax.training import Interrupted, load_run
from tests.helpers.tiny import OVERRIDES, assignments


def save(path, shape=(8, 8, 1), classes=10, **changes):
    """An npz file of 36 + 20 images, with some arrays replaced or (None) left out."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in (("train", 36), ("test", 20)):
        arrays[f"y_{part}"] = np.arange(size) % classes
        arrays[f"x_{part}"] = rng.integers(0, 256, (size, *shape), np.uint8)
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return path


OWN_IMAGES = """
from dataclasses import replace

from configs import digits_pgd_at
from deq_jax.data import Npz
from deq_jax.models.small import SmallDecoder


def get_config():
    base = digits_pgd_at.get_config()
    classifier = replace(base.classifier, decoder=SmallDecoder({classes}))
    return replace(base, classifier=classifier, dataset=Npz({path!r}))
"""

EVALUATION = """
from deq_jax.attacks import PGD
from deq_jax.surrogates import Intermediate, MeanOverStates
from deq_jax.evaluation import EvalConfig, Trial, with_surrogates
from deq_jax.training import threat_of


def get_config(train):
    threat = threat_of(train)
    pgd = PGD(threat, steps=1, step_size=threat.epsilon)
    trials = (Trial("pgd", pgd), *with_surrogates("pgd", pgd, [Intermediate(1, 1), Intermediate(2, 0)]))
    return EvalConfig(threat, trials, batch_size=16)
"""

BAD_CONFIGS = {
    "syntax.py": "import os\ndef get_config(:\n",
    "empty.py": "",
    "dict.py": "def get_config():\n    return {'epochs': 3}\n",
    "field.py": (
        "from dataclasses import replace\nfrom configs import digits_standard\n"
        "def get_config():\n    return replace(digits_standard.get_config(), epoch=3)\n"
    ),
    "import.py": "from deq_jax import Newton\n",
    "name.py": "def get_config():\n    return TrainConfig()\n",
    "value.py": "from deq_jax import Broyden\ndef get_config():\n    return Broyden(0)\n",
    "tfds.py": (
        "from dataclasses import replace\nfrom configs import digits_standard\nfrom deq_jax.data import Tfds\n"
        "def get_config():\n    return replace(digits_standard.get_config(), dataset=Tfds('cifar10'))\n"
    ),
    "config.yaml": "epochs: 3\n",
}


@dataclass(frozen=True)
class Mistake:
    """What was typed, and what the line must tell; {} stands for the folder of the test."""

    name: str
    arguments: str
    words: tuple[str, ...]


def training(name, arguments, *words, config="configs/digits_standard.py", workdir="{}/new"):
    return Mistake(f"train-{name}", f"--config {config} --workdir {workdir} {arguments}", words)


def evaluation(name, arguments, *words, workdir="{}/run"):
    return Mistake(f"evaluate-{name}", f"--workdir {workdir} {arguments}", words)


def own(name, file, *words):
    return training(name, f"--set dataset.path={{}}/{file}", f"{{}}/{file}", *words, config="{}/own.py")


MISTAKES = [
    # the config file
    training("no-config", "", "no/such.py: no such config file", config="no/such.py"),
    training("config-is-a-folder", "", "configs: no such config file", config="configs"),
    training("config-is-no-python", "", "config.yaml", ".py", config="{}/config.yaml"),
    training("syntax-error", "", "syntax.py: line 2", config="{}/syntax.py"),
    training("no-get_config", "", "empty.py", "get_config()", config="{}/empty.py"),
    training("config-of-another-type", "", "dict.py", "must return a TrainConfig, got dict", config="{}/dict.py"),
    training("unknown-field", "", "field.py", "unexpected keyword argument 'epoch'", config="{}/field.py"),
    training("unknown-import", "", "import.py", "cannot import name 'Newton'", config="{}/import.py"),
    training("unknown-name", "", "name.py", "'TrainConfig' is not defined", config="{}/name.py"),
    training("refused-value", "", "value.py", "Broyden", "steps", "got 0", config="{}/value.py"),
    # --set
    training("set-unknown", "--set epoch=3", "--set epoch=3: no field epoch", "valid names", "epochs"),
    training("set-without-value", "--set seed", "--set seed: expected NAME=VALUE"),
    training("set-wrong-type", "--set epochs=many", "--set epochs=many", "expected int", "now 20", "got 'many'"),
    training("set-object", "--set classifier.cell=3", "classifier.cell is an object"),
    training(
        "negative-epsilon", "--set validation_attack.threat.epsilon=-0.1", "epsilon must be >= 0 and finite, got -0.1"
    ),
    training("no-solver-steps", "--set classifier.dynamics.solver.steps=0", "Broyden", "steps", "got 0"),
    training("no-epochs", "--set epochs=0", "TrainConfig: epochs must be a positive integer, got 0"),
    # what does not fit together
    training("batch-not-divisible", "--set batch_size=60", "batch_size 60", "not divisible", "8 local devices"),
    training("batch-too-large", "--set batch_size=1152", "batch_size 1152 exceeds the 1149 training images"),
    training("groups-do-not-divide", "--set classifier.cell.groups=5", "GroupNorm: 24 channels", "5 groups"),
    training("parts-do-not-fit", "--set classifier.encoder.channels=8", "does not fit images of shape (8, 8, 1)"),
    # data
    training(
        "no-path", "", "Cifar: path is not set; name the files, as in --set", config="configs/cifar10_small_pgd_at.py"
    ),
    own("no-data", "no.npz", "no such npz file"),
    own("truncated-data", "truncated.npz", "cannot be read as an npz file"),
    own("data-is-text", "empty.py", "cannot be read as an npz file"),
    own("missing-array", "missing.npz", "expected arrays x_train, y_train, x_test, y_test", "missing y_test"),
    own("negative-label", "negative.npz", "train", "labels must count from 0", "-1"),
    own("fractional-labels", "fractional.npz", "train", "labels must be integers", "float64"),
    own("images-outside", "outside.npz", "train", "must lie in [0, 1], found ", "255"),
    own("images-nan", "nan.npz", "test", "[0, 1]", "nan"),
    own("images-of-two-sizes", "sizes.npz", "expected images of one shape, x_train has (8, 8, 1), x_test (9, 8, 1)"),
    own("labels-too-few", "few.npz", "test", "one label per image", "20 images", "(19,)"),
    training(
        "label-too-large",
        "--set dataset.path={}/classes.npz --set batch_size=16",
        "labels must be below the classifier's 10 classes",
        "found 10",
        config="{}/own.py",
    ),
    training(
        "more-classes-than-the-dataset",
        "--set classifier.decoder.num_classes=12",
        "the classifier has 12 classes, Digits() has 10",
    ),
    training(
        "no-such-dataset",
        "--set dataset.name=cifar11",
        "no usable dataset named 'cifar11'",
        config="{}/tfds.py",
    ),
    training(
        "dataset-not-prepared",
        "--set dataset.data_dir={}/nowhere",
        "Tfds: cifar10",
        "pip install tensorflow importlib_resources",
        "download_and_prepare()",
        config="{}/tfds.py",
    ),
    # the workdir
    training("workdir-below-a-file", "", "empty.py", "cannot write there", workdir="{}/empty.py/run"),
    training("workdir-is-a-file", "", "empty.py", "cannot write there", workdir="{}/empty.py"),
    training("workdir-of-another-config", "", "run holds a run of another config", "was", "now", workdir="{}/run"),
    training("workdir-damaged", "", "damaged", "config.json", "not valid JSON", workdir="{}/damaged"),
    # another run to start from
    training("init-from-nowhere", "--init-from {}/nowhere", "{}/nowhere: not the workdir of a run"),
    training("init-from-unsaved", "--init-from {}/unsaved", "{}/unsaved: has no best checkpoint yet"),
    training("init-from-damaged", "--init-from {}/truncated", "{}/truncated/checkpoints/best/2 is damaged"),
    training(
        "init-from-another", "--init-from {}/run", "run/checkpoints/best/2 does not fit: ", "has shape", "expected"
    ),
    # evaluation
    evaluation("empty-folder", "", "empty: not the workdir of a run", "config.json", workdir="{}/empty"),
    evaluation("no-folder", "", "nowhere: not the workdir of a run", workdir="{}/nowhere"),
    evaluation("config-damaged", "", "config.json", "not valid JSON", workdir="{}/damaged"),
    evaluation("config-unknown", "", "cannot import 'no.Config'", workdir="{}/unknown"),
    evaluation("no-checkpoint", "", "unsaved: has no best checkpoint yet", workdir="{}/unsaved"),
    evaluation(
        "truncated-checkpoint", "", "{}/truncated/checkpoints/best", "is damaged (state/d/", workdir="{}/truncated"
    ),
    evaluation("data-of-another-shape", "", "does not fit", "(128, 10), expected (256, 10)", workdir="{}/exchanged"),
    evaluation(
        "attack-unknown-field", "--attack pgd --set iterations=3", "no field iterations", "valid names: threat.epsilon"
    ),
    evaluation("attack-negative-epsilon", "--attack pgd --set threat.epsilon=-1", "epsilon must be >= 0"),
    evaluation("budget-set", "--set steps=3", "--set goes with a config or an attack, not with --budget"),
    evaluation("no-attack-to-set", "--attack none --set epsilon=0.1", "--set goes with a config or an attack"),
    evaluation("no-batch", "--batch-size 0", "batch_size must be a positive integer, got 0"),
    evaluation("batch-not-divisible", "--batch-size 9", "9", "8 local devices"),
    evaluation("negative-seed", "--seed -1", "seed must be an integer >= 0, got -1"),
    evaluation("no-image", "--images 0", "max_images must be a positive integer or None, got 0"),
    evaluation("negative-radius", "--epsilon -1", "epsilon must be >= 0"),
    evaluation("transfer-no-file", "--attack transfer:{}/no.npz", "{}/no.npz: cannot be read"),
    evaluation("transfer-other-arrays", "--attack transfer:{}/good.npz", "expected an array x_adv, found", "x_train"),
    evaluation("transfer-set", "--attack transfer:{}/a --set steps=3", "--set goes with a config or an attack"),
    evaluation("no-eval-config", "--config no/such.py", "no/such.py: no such config file"),
    evaluation("eval-config-of-a-training", "--config {}/own.py", "own.py: get_config() failed", "argument"),
    evaluation("eval-set-unknown", "--config {}/eval.py --set steps=3", "no field steps; valid names: threat.epsilon"),
    evaluation(
        "eval-radius", "--config {}/eval.py --set threat.epsilon=0.2", "trial pgd attacks within Linf(epsilon=0.1)"
    ),
    evaluation("eval-no-images", "--config {}/eval.py --set max_images=0", "max_images must be a positive integer or"),
    evaluation("out-below-a-file", "--out {}/empty.py/out", "empty.py/out: cannot write there"),
]


def train_tiny(folder):
    train.main(["--config", f"{folder}/own.py", "--workdir", f"{folder}/run", *assignments(*OVERRIDES)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished training in run/, and all that is wrong."""
    folder = tmp_path_factory.mktemp("cli")
    for name, text in BAD_CONFIGS.items():
        (folder / name).write_text(text)
    good = save(folder / "good.npz", (28, 28, 1))
    (folder / "truncated.npz").write_bytes(good.read_bytes()[:3000])
    save(folder / "missing.npz", y_test=None)
    save(folder / "negative.npz", y_train=np.arange(36) % 5 - 1)
    save(folder / "fractional.npz", y_train=np.zeros(36))
    save(folder / "classes.npz", classes=11)
    save(folder / "outside.npz", x_train=np.linspace(0, 255, 36 * 64).reshape(36, 8, 8, 1))
    save(folder / "nan.npz", x_test=np.full((20, 8, 8, 1), np.nan))
    save(folder / "sizes.npz", x_test=np.zeros((20, 9, 8, 1)))
    save(folder / "few.npz", y_test=np.zeros(19, int))
    (folder / "own.py").write_text(OWN_IMAGES.format(classes=10, path=str(good)))
    (folder / "eval.py").write_text(EVALUATION)
    save(folder / "large.npz", (64, 28, 1))
    train_tiny(folder)
    for name, text in (("damaged", '{"class": '), ("unknown", '{"class": "no.Config"}')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    (folder / "empty").mkdir()
    (folder / "unsaved").mkdir()
    shutil.copy(folder / "run" / "config.json", folder / "unsaved")
    shutil.copytree(folder / "run", folder / "truncated")
    for name in ("latest", "best"):
        files = (folder / "truncated" / "checkpoints" / name).glob("*/state/d/*")
        largest = max(files, key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    shutil.copytree(folder / "run", folder / "exchanged")
    config = folder / "exchanged" / "config.json"
    config.write_text(config.read_text().replace("good.npz", "large.npz"))
    return folder


def contents(folder):
    """All there is below a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(main, arguments, folder, capfd, code=2):
    """The one line that a command leaves with; checks that it writes nothing."""
    before = contents(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    lines = capfd.readouterr().err.splitlines()
    assert exit.value.code == code
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert contents(folder) == before
    return lines[0]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_clear_line(mistake, folder, capfd):
    main = train.main if mistake.name.startswith("train") else evaluate.main
    line = refusal(main, mistake.arguments.replace("{}", str(folder)).split(), folder, capfd)
    assert [word for word in mistake.words if word.replace("{}", str(folder)) not in line] == []


@pytest.mark.parametrize(
    ("workdir", "changes", "words"),
    [
        (
            "run",
            ["objective.attack.threat.epsilon=0.2"],
            ["objective.attack.threat.epsilon was 0.1, now 0.2", "another --workdir"],
        ),
        ("truncated", [], ["truncated/checkpoints/latest/2", "is damaged (state/d/", "there is no earlier one"]),
    ],
    ids=["another-config", "truncated-checkpoint"],
)
def test_resuming_is_refused(workdir, changes, words, folder, capfd):
    run = ["--config", f"{folder}/own.py", "--workdir", f"{folder}/{workdir}"]
    line = refusal(train.main, [*run, *assignments(*OVERRIDES, *changes)], folder, capfd)
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_a_folder_to_which_another_process_writes_is_refused(main, folder, capfd):
    out = folder / "run" if main is train.main else folder / "run" / "evaluation" / "locked"
    arguments = ["--workdir", f"{folder}/run"]
    arguments += ["--config", f"{folder}/own.py", *assignments(*OVERRIDES)] if main is train.main else []
    arguments += [] if main is train.main else ["--attack", "none", "--out", str(out)]
    with sole_writer(out):
        line = refusal(main, arguments, folder, capfd)
    assert f"{out} is in use: process {os.getpid()} on " in line


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGALRM, 75, "90 minutes are over, stopped after step 7, state saved; the same command resumes"),
        (signal.SIGTERM, 143, "stopped by SIGTERM after step 7, state saved; the same command resumes"),
    ],
)
def test_a_run_that_was_stopped_has_its_own_exit_code(number, code, words, folder, capfd, monkeypatch):
    def stopped(*_, minutes, **__):
        assert minutes == 90
        raise Interrupted(number, 7)

    monkeypatch.setattr(train, "fit", stopped)
    run = ["--config", f"{folder}/own.py", "--workdir", f"{folder}/new", "--minutes", "90"]
    assert refusal(train.main, run, folder, capfd, code=code) == f"error: {words}"


def test_a_file_that_cannot_be_written_is_one_line_and_exit_code_74(folder, capfd, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    line = refusal(evaluate.main, ["--workdir", f"{folder}/run", "--attack", "none"], folder, capfd, code=74)
    assert (
        line == f"error: {folder}/run/evaluation/test-none/manifest.json: cannot be written (No space left on device)"
    )


def test_whatever_a_command_compiles_is_kept_for_the_next(tmp_path):
    run = "from deq_jax._cli import command_line; import jax\nwith command_line(): jax.jit(lambda x: x + 1)(1.0)"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", run], env=environment, check=True)
    assert list(tmp_path.glob("jit__lambda*-cache"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that sets its size in bytes; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        return shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0

    if not mount("size=1m"):
        pytest.skip("cannot mount a file system")
    yield disk, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_run_goes_on_after_its_disk_was_full(folder, small_disk, capfd):
    disk, resize = small_disk
    fields = assignments(*OVERRIDES, "epochs=3", "checkpoint_every=1")
    run = ["--config", f"{folder}/own.py", *fields, "--workdir"]
    files = [file for file in (folder / "run").rglob("*") if file.is_file()]
    one_epoch = sum(-(-file.stat().st_size // 4096) * 4096 for file in files)  # a file takes whole pages
    assert resize(one_epoch * 5 // 4)  # room for two checkpoints and not for the third
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        train.main([*run, str(disk / "run")])
    assert exit.value.code == 74
    assert re.fullmatch(r"error: .* cannot be written \(No space left on device\)\n", capfd.readouterr().err)
    assert resize(64 * one_epoch)
    train.main([*run, str(disk / "run")])
    assert "resuming after step" in capfd.readouterr().out
    train.main([*run, str(folder / "whole")])
    stopped, whole = (load_run(workdir, best=False) for workdir in (disk / "run", folder / "whole"))
    jax.tree.map(np.testing.assert_array_equal, stopped.variables, whole.variables)


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "removed": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_a_checkpoint_is_restored_exactly_or_refused(damage, tmp_path):
    state = {"w": np.arange(1000, dtype=np.float32), "step": np.int32(3)}
    Checkpoints(tmp_path / "good", keep=1).save(3, state, {"best_accuracy": 0.5})
    files = sorted(path for path in (tmp_path / "good").rglob("*") if path.is_file())
    refused = 0
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", copy)
        DAMAGES[damage](copy / file.relative_to(tmp_path / "good"))
        try:
            found = Checkpoints(copy, keep=1).read()
        except InputError as error:
            assert f"checkpoint {copy}/3 is damaged" in str(error)
            refused += 1
        else:
            assert found.meta == {"best_accuracy": 0.5}
            assert set(found.state) == set(state)
            assert all(np.array_equal(found.state[name], state[name]) for name in state)
    assert refused >= 2


def test_argparse_reports_its_own_errors(capfd):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--workdir", "runs/a", "--attack", "fgsm"])
    error = capfd.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("usage: python -m deq_jax.evaluate")
    assert "invalid choice: 'fgsm' (choose from" in error


@pytest.mark.parametrize("command", [train, evaluate], ids=["train", "evaluate"])
def test_help_shows_how_to_start(command, capfd):
    with pytest.raises(SystemExit) as exit:
        command.main(["--help"])
    shown = capfd.readouterr().out
    assert exit.value.code == 0
    assert "examples:\n  python -m deq_jax." in shown
    assert "--workdir DIR" in shown
    assert "--set NAME=VALUE" in shown


@pytest.mark.slow
def test_an_evaluation_keeps_the_environment_in_which_it_was_made(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["--workdir", str(folder / "run"), "--out", str(out), "--batch-size", "16", "--attack", "pgd"]
    made = []
    for name in ("first", "again", "anew"):
        if name == "anew":
            (out / "evaluation.json").unlink()
        monkeypatch.setattr(sys, "argv", [name])
        evaluate.main([*command, *assignments("steps=1", "restarts=1")])
        made.append(read_json(out / "evaluation.json")["environment"]["command"]["arguments"])
    assert made == [["first"], ["first"], ["anew"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "classes"), [((28, 28, 1), 10), pytest.param((32, 32, 3), 5, marks=pytest.mark.slow)], ids=str
)
def test_own_images_are_trained_on_and_evaluated(shape, classes, request, tmp_path, capfd):
    if classes == 10:  # trained already
        tmp_path = request.getfixturevalue("folder")
    else:
        save(tmp_path / "good.npz", shape, classes)
        (tmp_path / "own.py").write_text(OWN_IMAGES.format(classes=classes, path=str(tmp_path / "good.npz")))
        train_tiny(tmp_path)
    run, out = tmp_path / "run", tmp_path / "out"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(2, "validation")]

    capfd.readouterr()
    few = ["--batch-size", "16", "--attack", "pgd", *assignments("steps=2", "restarts=1")]
    evaluate.main(["--workdir", str(run), "--out", str(out), *few])
    assert "robust accuracy: " in capfd.readouterr().out
    figures = {"images.png", "states.png", "trials.png"}
    records = {"manifest.json", "probe.npz", "cost.npz", "trials", "evaluation.json", "evaluation.npz"}
    assert {path.name for path in out.iterdir()} == figures | records
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in figures)
    with np.load(tmp_path / "good.npz") as given, np.load(out / "evaluation.npz") as arrays:
        x, y = given["x_test"] / 255, given["y_test"]
        found = dict(arrays)
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["images"], list(result["rows"])) == (20, ["z_1", "z_2", "ensemble", "deployed"])
    np.testing.assert_array_equal(found["y"], y)
    assert found["x_adv"].shape == (20, *shape)
    assert np.abs(found["x_adv"] - x).max() <= 0.1 + 1e-6
    assert found["clean_label"].shape == found["attacked_residual"].shape == (20, 4)
    assert found["clean_entropy"].max() <= np.log(classes) + 1e-5
    correct = found["clean_label"] == y[:, None]
    robust = correct & (found["attacked_label"] == y[:, None])
    rows = result["rows"].values()
    np.testing.assert_allclose([row["clean"]["accuracy"] for row in rows], correct.mean(axis=0))
    np.testing.assert_allclose([row["attacked"]["accuracy"] for row in rows], robust.mean(axis=0))
    assert result["robust_accuracy"] == pytest.approx(robust[:, -1].mean())
    radii = found["spectral_radius"]
    unsettled = np.sum(~found["radius_settled"])
    expected = {"mean": pytest.approx(radii.mean()), "largest": radii.max(), "unsettled": unsettled}
    assert result["spectral_radius"] == expected
    assert result["adjoint_residual"] == {"mean": None, "largest": None}
    assert radii.shape == (20,) and radii.min() > 0
    assert list(found["rows"]) == list(result["accuracy"]) == ["clean", "pgd", "union"]
    np.testing.assert_array_equal(found["correct"][[0, 2]], [correct[:, -1], robust[:, -1]])


@pytest.mark.slow
def test_a_training_tells_its_life_into_a_file(folder, tmp_path, capfd):
    """Here it starts from another run, with other objective and optimiser settings; then it is resumed."""
    (tmp_path / "tuned.py").write_text(
        "from dataclasses import replace\nfrom deq_jax import TrainConfig\nfrom deq_jax.storage import load_config\n"
        "from deq_jax import Standard\n"
        f"def get_config():\n    base = load_config({f'{folder}/own.py'!r}, TrainConfig)\n"
        "    return replace(base, objective=Standard())\n"
    )
    tiny = assignments(
        *(item for item in OVERRIDES if not item.startswith("objective")), "log_every=1", "pretrain_steps=1"
    )
    arguments = ["--config", f"{tmp_path}/tuned.py", "--workdir", f"{tmp_path}/run", *tiny]
    train.main([*arguments, "--init-from", f"{folder}/run"])
    lines = capfd.readouterr().out.splitlines()
    pace = r"\S+ s/step  \S+ images/s  compilation \d+ (s|min.*)  \d+ s left"
    patterns = [
        r"devices: 8 x cpu",
        r"preparing: data and initial state \.\.\.",
        rf"starting from {folder}/run, best checkpoint, step 2",
        r"note: training begins with the 1 pre-training steps of its config; pretrain_steps=0 skips them",
        r"compiling: shallow pre-training \.\.\.",
        rf"step 1/2  loss \d\.\d+  accuracy \d\.\d+  {pace}",
        r"compiling: training \.\.\.",
        rf"step 2/2  loss \d\.\d+  accuracy \d\.\d+  residual \d\.\d+  {pace}",
        r"compiling: validation \.\.\.",
        r"epoch 1  step 2/2  validation: accuracy \d+\.\d %  under attack \d+\.\d %  residual \d\.\d+"
        r"  \(clean accuracy is at chance\)  \(the solver has not converged\)",
        r"warning: clean accuracy is at chance: .* of \d+ images, guessing gives 10\.0 %; .*",
        r"warning: the solver has not converged: mean residual .*",
        r"trained: 2 steps, [\d,]+ parameters, in .*",
        r"next: python -m deq_jax\.evaluate --workdir .*",
    ]
    assert [bool(re.fullmatch(*pair)) for pair in zip(patterns, lines, strict=True)] == [True] * len(lines), lines
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [len(line.get("warnings", ())) for line in metrics] == [0, 0, 2]
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["workdir"] == f"{folder}/run"
    line = refusal(train.main, [*arguments, "--init-from", f"{tmp_path}"], tmp_path, capfd)
    assert f"holds a run that started from the best checkpoint of {folder}/run" in line


def evaluate_tiny(folder, out, *arguments):
    """The report of an evaluation of the tiny training, and its files."""
    evaluate.main(["--workdir", f"{folder}/run", "--out", str(out), *arguments])
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.slow
def test_an_evaluation_config_is_run_resumed_and_never_mixed(folder, tmp_path, capfd):
    out = tmp_path / "out"
    arguments = ["--config", f"{folder}/eval.py", "--readout", "ensemble", "--epsilon", "0.2"]
    report = evaluate_tiny(folder, out, *arguments)
    names = ["clean", "pgd", "pgd.Intermediate-1-1-0.5", "pgd.Intermediate-2-0-0.5", "union"]
    assert list(report["accuracy"]) == names
    assert [trial["gradient_queries"] for trial in report["trials"].values()] == [1, 1, 1]
    assert report["evaluation"]["threat"]["epsilon"] == 0.2
    assert [row["deployed"] == row["ensemble"] for row in report["accuracy"].values()] == [True] * 5
    accuracies = [row["deployed"] for row in report["accuracy"].values()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert report["checkpoint"] == "best, step 2"
    assert evaluate_tiny(folder, out, *arguments)["trials"] == report["trials"]  # seconds, too: nothing ran again
    line = refusal(evaluate.main, ["--workdir", f"{folder}/run", "--out", str(out)], tmp_path, capfd)
    assert "holds another evaluation: config." in line

    both = evaluate_tiny(folder, tmp_path / "both", *arguments, "--transfer", f"other={out}")
    attacked = [f"other.{name}" for name, trial in report["trials"].items() if trial["attacked"]]
    assert list(both["accuracy"]) == [*names[:-1], *attacked, "other", "union"]
    assert both["accuracy"]["other"] == report["accuracy"]["union"] and not both["cumulative"]

    images = evaluate_tiny(folder, tmp_path / "again", "--attack", f"transfer:{out}/evaluation.npz", "--epsilon", "0.2")
    assert images["accuracy"]["transfer"].keys() == images["accuracy"]["clean"].keys()
    line = f"--workdir {folder}/run --out {tmp_path}/near --attack transfer:{out}/evaluation.npz".split()
    assert "more than Linf(epsilon=0.1)" in refusal(evaluate.main, line, tmp_path, capfd)


@pytest.mark.slow
def test_the_last_state_is_deployed(folder, tmp_path):
    report = evaluate_tiny(folder, tmp_path / "out", "--readout", "last", "--attack", "none")
    assert report["defence"] == "last state"
    assert report["evaluation"]["predictor"]["dynamics"]["readout"]["class"] == "deq_jax.core.LastState"
    assert report["rows"]["deployed"]["clean"]["entropy"] == report["rows"]["z_2"]["clean"]["entropy"]


@pytest.mark.slow
def test_a_state_of_a_defended_predictor_is_deployed(folder, tmp_path):
    config = """
from dataclasses import replace
from configs import eval_entropy_reduced
from deq_jax.attacks import APGD, L2, PGD, AutoAttack, Linf, Targeted
from deq_jax.evaluation import EvalConfig
def get_config(train):
    defence = replace(eval_entropy_reduced.defence(train), every=1, steps=1)
    return EvalConfig(Linf(0.1), (), predictor=defence, defence="entropy reduction", batch_size=16)
"""
    (tmp_path / "eval.py").write_text(config)
    undefended = evaluate_tiny(folder, tmp_path / "undefended", "--attack", "none")
    for readout in ("ensemble", "early"):
        arguments = ["--config", f"{tmp_path}/eval.py", "--readout", readout]
        report = evaluate_tiny(folder, tmp_path / readout, *arguments)
        assert report["defence"] == f"entropy reduction, {readout} state"
        early = report["early_state"]
        state = "ensemble" if early is None else f"z_{1 + early.index(max(early))}"
        assert report["rows"]["deployed"]["clean"]["entropy"] == report["rows"][state]["clean"]["entropy"]
        regulated, shown = (one["rows"]["z_2"]["clean"]["entropy"] for one in (report, undefended))
        assert regulated < shown


def test_a_config_that_chooses_a_state_takes_no_other_one(folder, tmp_path, capfd):
    (tmp_path / "eval.py").write_text(
        "from deq_jax.attacks import PGD, Linf\nfrom deq_jax.evaluation import EarlyState, EvalConfig\n"
        "def get_config(train):\n    early = EarlyState(PGD(Linf(0.1), steps=1, step_size=0.1))\n"
        "    return EvalConfig(Linf(0.1), (), predictor=early, defence='early')\n"
    )
    arguments = ["--workdir", f"{folder}/run", "--config", f"{tmp_path}/eval.py", "--readout", "last"]
    line = refusal(evaluate.main, arguments, tmp_path, capfd)
    assert "--readout last: the config chooses a state itself" in line


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "test-quick"),
        (["--budget", "standard"], "test-standard"),
        (["--attack", "pgd"], "test-pgd"),
        (["--readout", "early", "--attack", "none"], "test-none-early"),
        (["--epsilon", "0.05"], "test-quick-epsilon-0.05"),
        (["--config", "x/some.py", "--readout", "last", "--epsilon", "0.2"], "test-some-last-epsilon-0.2"),
        (["--images", "100"], "test-quick-images-100"),
    ],
)
def test_evaluations_that_differ_have_folders_of_their_own(arguments, name):
    options = evaluate.parse(["--workdir", "x", *arguments])
    assert f"{options.split}-{evaluate.name_of(options)}" == name


@pytest.mark.slow
def test_an_early_state_is_chosen_on_held_out_images(folder, tmp_path):
    report = evaluate_tiny(
        folder, tmp_path / "out", "--readout", "early", "--batch-size", "16", "--config", f"{folder}/eval.py"
    )
    assert len(report["early_state"]) == 2
    chosen = f"z_{1 + report['early_state'].index(max(report['early_state']))}"
    assert report["rows"]["deployed"]["clean"]["accuracy"] == report["rows"][chosen]["clean"]["accuracy"]


@pytest.mark.slow
def test_the_first_images_of_a_split(folder, tmp_path):
    few = ["--config", f"{folder}/eval.py", "--set", "max_images=5", "--batch-size", "8"]
    assert evaluate_tiny(folder, tmp_path / "out", *few)["images"] == 5
    with np.load(tmp_path / "out" / "evaluation.npz") as arrays:
        assert len(arrays["x_adv"]) == 5


def test_clean_images_alone(folder, tmp_path, capfd):
    report = evaluate_tiny(folder, tmp_path / "out", "--attack", "none", "--share")
    assert (list(report["accuracy"]), report["robust_accuracy"], report["red_flags"]) == (["clean"], None, [])
    assert "nothing has attacked them" in capfd.readouterr().out
    assert not (tmp_path / "out" / "images.png").exists()


L2_ATTACKS = [PGD(L2(0.5)), APGD(L2(0.5), 3), Targeted(APGD(L2(0.5))), AutoAttack.standard(L2(0.5))]


@pytest.mark.parametrize("attack", L2_ATTACKS, ids=lambda attack: type(attack).__name__)
@pytest.mark.parametrize("name", sorted(path.stem for path in Path("configs").glob("eval_*.py")))
def test_configs_of_the_project_are_in_the_norm_of_the_training_or_refused(name, attack):
    train_config = replace(digits_pgd_at.get_config(), validation_attack=attack)
    options = evaluate.parse(["--workdir", "x", "--config", f"configs/{name}.py", "--epsilon", "0.25"])
    if "entropy" in name or name == "eval_more_steps":
        with pytest.raises(InputError, match="within an ℓ∞ ball, expected Linf, got L2"):
            evaluate.choose_config(options, train_config)
        return
    config = evaluate.choose_config(options, train_config)
    trials = (*config.trials, *config.extra_trials)
    assert config.threat == L2(0.25)
    assert {trial.attack.threat for trial in trials} == {L2(0.25), L2(2.0)}


@pytest.mark.parametrize("attack", L2_ATTACKS, ids=lambda attack: type(attack).__name__)
@pytest.mark.parametrize(
    "arguments", [[], ["--attack", "pgd"], ["--readout", "early"], ["--attack", "transfer:a.npz"]], ids=str
)
def test_the_norm_is_that_of_the_training(arguments, attack):
    train_config = replace(digits_pgd_at.get_config(), validation_attack=attack)
    options = evaluate.parse(["--workdir", "x", "--epsilon", "0.25", *arguments])
    config = evaluate.choose_config(options, train_config)
    assert config.threat == L2(0.25)
    expected = {None} if "transfer:a.npz" in arguments else {L2(0.25)}
    assert {getattr(trial.attack, "threat", None) for trial in config.trials} == expected
    if "early" in arguments:
        assert config.predictor.attack.threat == L2(0.25)


@pytest.mark.slow
def test_a_run_in_l2_is_evaluated_in_l2(folder, tmp_path, capfd):
    """By the same weights, validated by another attack: every image is within the ball, and some are beyond Linf's."""
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    tree = json.loads(path.read_text())
    tree["validation_attack"] = to_tree(APGD(L2(0.5), 2))
    path.write_text(json.dumps(tree))
    capfd.readouterr()
    arguments = ["--attack", "pgd", *assignments("steps=2", "restarts=1"), "--batch-size", "16"]
    report = evaluate_tiny(tmp_path, tmp_path / "out", *arguments)
    assert report["evaluation"]["threat"] == to_tree(L2(0.5))
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "[1/2] clean: 0 of 20 images; compiling, and the first batch"
    assert re.fullmatch(r"\[1/2\] clean: 20 of 20 images; [0-9.]+ % correct, .*", lines[1])
    assert lines[2] == "[2/2] pgd: 0 of 20 images; compiling, and the first batch"
    assert re.fullmatch(r"\[2/2\] pgd: 20 of 20 images; .* correct, .*, at most 2 gradients per image", lines[3])
    with np.load(tmp_path / "out" / "evaluation.npz") as arrays, np.load(folder / "good.npz") as given:
        delta = (arrays["x_adv"] - given["x_test"] / 255).reshape(20, -1)
    assert np.linalg.norm(delta, axis=1).max() <= 0.5 + 1e-5
    evaluate_tiny(tmp_path, tmp_path / "out", *arguments)
    again = capfd.readouterr().out.splitlines()
    assert again[0].startswith("[1/2] clean: 20 of 20 images; ")  # nothing is computed, and nothing is compiled


@pytest.mark.parametrize("name", ["eval_auto_attack", "eval_white_box"])
def test_evaluation_configs_of_the_project(name):
    train_config = digits_pgd_at.get_config()
    config = load_config(f"configs/{name}.py", EvalConfig, train_config)
    assert from_tree(to_tree(config)) == config
    assert config.threat == Linf(0.1)
    names = [trial.name for trial in config.trials]
    assert len(names) == (4 if name == "eval_auto_attack" else 8 * 3 * 2 + 1 + 8 + 1 + 2 + 4 + 1)
    assert {"apgd-ce", "apgd-t", "fab-t", "square"} <= set(names)
    assert [trial.from_worst for trial in config.trials[:-1]] == [False] * (len(names) - 1)
