"""Checkpoints of PyTorch: into a run's workdir and back, exactly; what is unsafe or does not fit is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError, TrainConfig, convert, evaluate, train
from deq_jax.core import WriteError
from deq_jax.interop import (
    export_checkpoint,
    import_checkpoint,
    mdeq_shapes,
    read_state_dict,
    to_torch,
    write_state_dict,
)
from deq_jax.interop.state_dicts import check_writable
from deq_jax.storage import load_config, read_json, to_tree
from deq_jax.storage.checkpoints import Checkpoints
from deq_jax.training import initial_state, load_run

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = """
from deq_jax.attacks import PGD, Linf
from deq_jax import Dynamics, Equilibrium
from deq_jax import TrainConfig
from deq_jax.data import Npz
from deq_jax import Phantom
from deq_jax.models.mdeq import mdeq
from deq_jax import Standard
from deq_jax import Broyden


def get_config():
    classifier = Equilibrium(*mdeq({modules}), {dynamics})
    attack = PGD(Linf(8 / 255), steps=1, step_size=2 / 255)
    return TrainConfig(classifier, Standard(), Npz({data!r}), attack, batch_size=8, epochs=1)
"""
SMALL = {
    "modules": "10, (8, 8), (2, 2), final_channels=8, expansion=1",
    "dynamics": "Dynamics(Broyden(2), gradient=Phantom(1, 0.5))",
}
REFERENCE = {  # of the golden numbers
    "modules": "10, (8, 16, 32, 64), (4, 8, 16, 32), final_channels=64, expansion=2, dropout=0.0",
    "dynamics": "Dynamics(Broyden(8, batch_joint=True), gradient=Phantom(5, 0.5))",
}


def write_config(folder, settings=SMALL):
    """A config whose dataset is `folder`/images.npz, which need not exist."""
    path = folder / "mdeq.py"
    path.write_text(CONFIG.format(data=str(folder / "images.npz"), **settings))
    return path


def write_images(folder, x, y):
    np.savez(folder / "images.npz", x_train=x, y_train=y, x_test=x, y_test=y)


def random_images(size):
    return np.random.default_rng(1).integers(0, 256, (size, 32, 32, 3), np.uint8), np.arange(size) % 10


def random_arrays(config, dtype=np.float32, channels=None):
    """Random variables of the config's MDEQ under their torch names; variances positive."""
    random = np.random.default_rng(0)
    arrays = to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), mdeq_shapes(config, channels)))
    values = {name: (0.1 * random.normal(size=array.shape)).astype(dtype) for name, array in arrays.items()}
    return {name: np.abs(value) + 1 if "running_var" in name else value for name, value in values.items()}


def read(path):
    """All arrays in an npz file."""
    with np.load(path) as file:
        return dict(file)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True, err_msg=name)


@dataclass(frozen=True)
class Place:
    """A folder with the small config, a checkpoint of it, and what is wrong."""

    folder: Path
    config_file: Path
    arrays: dict[str, np.ndarray]

    @property
    def config(self):
        return load_config(self.config_file, TrainConfig)

    def run(self, arguments):
        convert.main(shlex.split(arguments.replace("{}", str(self.folder))))


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    file = write_config(folder)
    arrays = random_arrays(load_config(file, TrainConfig))
    np.savez(folder / "good.npz", **arrays)
    write_mistakes(folder, arrays)
    import_checkpoint(folder / "good.npz", load_config(file, TrainConfig), folder / "run")
    return Place(folder, file, arrays)


def write_mistakes(folder, arrays):
    name = "classifier.bias"
    malicious = pickle.dumps(Malicious(folder))
    for file in ("pickle.npz", "pickle.safetensors", "pickle.pt"):
        (folder / file).write_bytes(malicious)
    objects = np.empty(1, object)
    objects[0] = Malicious(folder)
    np.savez(folder / "objects.npz", **arrays | {name: objects})
    (folder / "truncated.npz").write_bytes((folder / "good.npz").read_bytes()[:5000])
    (folder / "empty.npz").write_bytes(b"")
    with (folder / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    np.savez(folder / "integers.npz", **arrays | {name: np.zeros(10, int)})
    np.savez(folder / "nan.npz", **arrays | {name: np.full(10, np.nan, np.float32)})
    np.savez(folder / "large.npz", **arrays | {name: np.full(10, 1e300)})
    others = {entry: array for entry, array in arrays.items() if entry != "downsample.0.weight"}
    np.savez(folder / "other.npz", **others | {name: np.zeros(7), "stray": np.zeros(2)})
    (folder / "notes.txt").write_text("no checkpoint")
    (folder / "empty").mkdir()


MISTAKES = {
    "no-source": ("{}/no.npz --config {}/mdeq.py", "{}/no.npz: no such checkpoint or workdir"),
    "no-config": ("{}/good.npz", "--config FILE is needed"),
    "no-such-config": ("{}/good.npz --config {}/no.py", "{}/no.py: no such config file"),
    "set-unknown": ("{}/good.npz --config {}/mdeq.py --set epoch=3", "no field epoch"),
    "no-mdeq": ("{}/good.npz --config configs/digits_standard.py", "is not an MDEQ", "Equilibrium(*mdeq("),
    "explicit": ("{}/good.npz --config configs/digits_cnn_standard.py", "is not an MDEQ"),
    "parts-do-not-fit": ("{}/good.npz --config {}/mdeq.py --set classifier.cell.groups=5", "8 channels", "5 groups"),
    "checkpoint-of-a-file": ("{}/good.npz --config {}/mdeq.py --checkpoint best", "--checkpoint goes with"),
    "ending": ("{}/notes.txt --config {}/mdeq.py", "expected a file ending in .npz, .safetensors, .pth.tar"),
    "pickle-as-npz": ("{}/pickle.npz --config {}/mdeq.py", "{}/pickle.npz: not read", "no code in it was run"),
    "objects": ("{}/objects.npz --config {}/mdeq.py", "{}/objects.npz: not read", "no code in it was run"),
    "truncated": ("{}/truncated.npz --config {}/mdeq.py", "{}/truncated.npz: not read: damaged"),
    "empty-file": ("{}/empty.npz --config {}/mdeq.py", "{}/empty.npz: not read: damaged"),
    "single": ("{}/single.npz --config {}/mdeq.py", "expected an npz file, found a single array"),
    "integers": ("{}/integers.npz --config {}/mdeq.py", "classifier/bias: expected floating numbers, found int64"),
    "nan": ("{}/nan.npz --config {}/mdeq.py", "{}/nan.npz: params/decoder/classifier/bias", "not finite"),
    "too-large-for-float32": ("{}/large.npz --config {}/mdeq.py", "classifier/bias", "not finite in float32"),
    "other-architecture": (
        "{}/other.npz --config {}/mdeq.py",
        "{}/other.npz: the PyTorch entries do not fit this MDEQ",
        "1 missing: downsample.0.weight; 1 unexpected: stray; 1 mis-shaped: classifier.bias (7,) instead of (10,)",
    ),
    "another-training": ("{}/good.npz --config {}/mdeq.py --out {}/run", "{}/run holds a run already"),
    "out-is-a-file": ("{}/good.npz --config {}/mdeq.py --out {}/mdeq.py", "{}/mdeq.py: cannot write there"),
    "config-of-a-workdir": ("{}/run --config {}/mdeq.py --out {}/new.npz", "--config and --set go with a checkpoint"),
    "no-workdir": ("{}/empty --out {}/new.npz", "{}/empty: not the workdir of a run (no config.json)"),
    "export-ending": ("{}/run --out {}/new.pt", "new.pt: expected a file ending in .npz, .safetensors"),
    "export-over-a-file": ("{}/run --out {}/good.npz", "{}/good.npz exists already"),
}


def refusal(place, arguments, capfd):
    """The one line that the command leaves with; checks that nothing is written, and nothing executed."""
    arguments += "" if "--out" in arguments else " --out {}/new"
    before = sorted(place.folder.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        place.run(arguments)
    lines = capfd.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert sorted(place.folder.rglob("*")) == before
    assert not (place.folder / "executed").exists()
    return lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name, place, capfd):
    arguments, *words = MISTAKES[name]
    line = refusal(place, arguments, capfd)
    assert [word for word in words if word.replace("{}", str(place.folder)) not in line] == []


def test_the_malicious_pickle_would_do_something(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path)))
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize(
    ("module", "file", "words"),
    [
        (None, "pickle.pt", "pip install torch; or save its state_dict as .npz or .safetensors"),
        (SimpleNamespace(__version__=(2, 9)), "pickle.pt", "needs torch >= 2.10, found (2, 9)"),
        (None, "pickle.safetensors", "pip install safetensors; or use an npz file"),
    ],
    ids=["no-torch", "unsafe-torch", "no-safetensors"],
)
def test_a_missing_or_unsafe_reader_is_named(module, file, words, place, monkeypatch, capfd):
    for name in ("torch", "safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, module)
    assert words in refusal(place, f"{{}}/{file} --config {{}}/mdeq.py", capfd)


@pytest.mark.slow
def test_what_is_written_is_the_start_of_a_training(place, tmp_path):
    """Config, optimiser and meta data as a training writes them; without reading the dataset, which is absent here."""
    config = place.config
    import_checkpoint(place.folder / "good.npz", config, tmp_path / "run")
    write_images(place.folder, *random_images(16))
    optimizer, data = config.optimizer.transformation(7), config.dataset.load()
    template = jax.eval_shape(lambda: initial_state(config, optimizer, data))
    (place.folder / "images.npz").unlink()
    assert read_json(tmp_path / "run" / "config.json") == to_tree(config)
    for name in ("best", "latest"):
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints" / name, keep=1)
        found = checkpoints.read()
        state = found.shaped_like(template)
        assert (found.step, int(state.step)) == (0, 0)
        assert found.meta == {"config": to_tree(config), "best_accuracy": -1.0}
        equal(to_torch(state.variables), place.arrays)
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, optimizer.init(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["", "--checkpoint latest"])
def test_round_trip_is_exact(checkpoint, place, tmp_path):
    place.run(f"{{}}/run --out {tmp_path}/new/back.npz {checkpoint}")
    with np.load(tmp_path / "new" / "back.npz") as file:
        equal(dict(file), place.arrays)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["back.npz"]


@pytest.mark.slow
def test_export_chooses_the_checkpoint(place, tmp_path):
    config = place.config
    state = import_checkpoint(place.folder / "good.npz", config, tmp_path / "run")
    later = state._replace(step=jnp.int32(3), params=jax.tree.map(lambda leaf: leaf + 1, state.params))
    Checkpoints(tmp_path / "run" / "checkpoints" / "latest", keep=2).save(3, later, {})
    assert export_checkpoint(tmp_path / "run", tmp_path / "best.npz") == 0
    assert export_checkpoint(tmp_path / "run", tmp_path / "latest.npz", best=False) == 3
    equal(read(tmp_path / "best.npz"), place.arrays)
    equal(read(tmp_path / "latest.npz"), to_torch(later.variables))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_become_float32(dtype, place, tmp_path):
    arrays = random_arrays(place.config, dtype)
    np.savez(tmp_path / "arrays.npz", **arrays)
    state = import_checkpoint(tmp_path / "arrays.npz", place.config, tmp_path / "run")
    equal(to_torch(state.variables), {name: array.astype(np.float32) for name, array in arrays.items()})


def test_data_parallel_and_counters(place, tmp_path):
    counters = {"downsample.1.num_batches_tracked": np.array(7)}
    named = {f"module.{name}": array for name, array in (place.arrays | counters).items()}
    np.savez(tmp_path / "parallel.npz", **named)
    state = import_checkpoint(tmp_path / "parallel.npz", place.config, tmp_path / "run")
    equal(to_torch(state.variables), place.arrays)


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.backbone."]


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_any_prefix_of_all_names_is_left_out(prefix, place, tmp_path):
    counters = {"downsample.1.num_batches_tracked": np.array(7)}
    np.savez(tmp_path / "a.npz", **{prefix + name: array for name, array in (place.arrays | counters).items()})
    found, left_out = read_state_dict(tmp_path / "a.npz", place.arrays)
    assert left_out == []
    equal(found, place.arrays | counters)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weight_normalisation_of_pytorch_2_has_other_names(prefix, place, tmp_path):
    """``torch.nn.utils.parametrizations.weight_norm``, as a network that is trained today has it."""
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    named = {}
    for name, array in place.arrays.items():
        module, _, last = name.rpartition(".")
        named[f"{prefix}{module}.{new.get(last, last)}"] = array
    assert sum("parametrizations" in name for name in named) > 4
    np.savez(tmp_path / "a.npz", **named)
    found, left_out = read_state_dict(tmp_path / "a.npz", place.arrays)
    assert left_out == []
    equal(found, place.arrays)
    place.run(f"{tmp_path}/a.npz --config {{}}/mdeq.py --out {tmp_path}/run")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_lies_beside_a_prefix_is_left_out_and_named(prefix, place, tmp_path, capfd):
    """The counter of averaged modules; a normalisation before the network."""
    beside = {"n_averaged": np.array(3), "normalize.mean": np.zeros(3)}
    np.savez(tmp_path / "a.npz", **{prefix + name: array for name, array in place.arrays.items()}, **beside)
    found, left_out = read_state_dict(tmp_path / "a.npz", place.arrays)
    assert left_out == ["n_averaged", "normalize.mean"]
    equal(found, place.arrays)
    place.run(f"{tmp_path}/a.npz --config {{}}/mdeq.py --out {tmp_path}/run")
    assert "left out: n_averaged, normalize.mean (beside the network)" in capfd.readouterr().out


def test_without_a_prefix_nothing_is_left_out(place, tmp_path, capfd):
    np.savez(place.folder / "beside.npz", **place.arrays, n_averaged=np.array(3))
    assert "1 unexpected: n_averaged" in refusal(place, "{}/beside.npz --config {}/mdeq.py", capfd)


def test_the_prefix_of_most_names_counts_where_none_has_all(place, tmp_path, capfd):
    some = dict(list(place.arrays.items())[1:])
    np.savez(place.folder / "most.npz", **{f"model.{name}": array for name, array in some.items()})
    missing = next(iter(place.arrays))
    line = refusal(place, "{}/most.npz --config {}/mdeq.py", capfd)
    assert line.endswith(f"the PyTorch entries do not fit this MDEQ: 1 missing: {missing}")


def test_two_networks_in_a_file_are_refused(place, capfd):
    both = {f"{prefix}.{name}": array for prefix in ("model", "ema_model") for name, array in place.arrays.items()}
    np.savez(place.folder / "both.npz", **both)
    words = "holds 2 networks with the expected names: 'model', 'ema_model'; save one of them alone"
    assert words in refusal(place, "{}/both.npz --config {}/mdeq.py", capfd)


class Tensor:
    """Of torch, as far as it is read."""

    dtype = "torch.float32"

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    def numpy(self):
        return self.array


@pytest.fixture
def torch_that_loads(monkeypatch):
    """A torch whose files hold what is given, or raise it."""

    def install(content):
        def load(path, map_location, weights_only):
            assert weights_only
            if isinstance(content, Exception):
                raise content
            return content

        module = SimpleNamespace(__version__=(2, 10), Tensor=Tensor, load=load)
        monkeypatch.setitem(sys.modules, "torch", module)

    return install


def tensors(place, prefix=""):
    return {prefix + name: Tensor(array) for name, array in place.arrays.items()}


class TestEntries:
    """The network in a file of PyTorch is found by its names, wherever it lies."""

    @pytest.mark.parametrize("entry", ["net", "model", "state_dict", "ema", "weights.best", "model.state_dict"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_the_one_that_fits_is_taken(self, entry, prefix, place, torch_that_loads):
        content = tensors(place, prefix)
        for name in reversed(entry.split(".")):
            content = {name: content}
        optimizer = {"state": {0: {"exp_avg": Tensor(np.zeros(3))}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        torch_that_loads({"epoch": 3, "optimizer": optimizer, "name": "mdeq", **content, "other": {"a": Tensor(0)}})
        (place.folder / "entry.pt").touch()
        equal(read_state_dict(place.folder / "entry.pt", place.arrays).arrays, place.arrays)

    def test_two_that_fit_are_refused(self, place, torch_that_loads, capfd):
        torch_that_loads({"epoch": 3, "net": tensors(place), "ema": tensors(place, "module.")})
        (place.folder / "entry.pt").touch()
        words = "entry.pt: holds 2 networks with the expected names: 'net', 'ema.module'; save one of them alone"
        assert words in refusal(place, "{}/entry.pt --config {}/mdeq.py", capfd)

    def test_the_whole_file_may_be_one_of_them(self, place, torch_that_loads, capfd):
        torch_that_loads({**tensors(place), "ema": tensors(place)})
        (place.folder / "entry.pt").touch()
        assert "names: the whole file, 'ema'; save" in refusal(place, "{}/entry.pt --config {}/mdeq.py", capfd)

    @pytest.mark.parametrize("content", [{"epoch": 3, "model": "mdeq"}, {}, {"model": {}}, {1: Tensor(np.zeros(1))}])
    def test_no_tensors(self, content, place, torch_that_loads, capfd):
        torch_that_loads(content)
        (place.folder / "entry.pt").touch()
        line = refusal(place, "{}/entry.pt --config {}/mdeq.py", capfd)
        assert "expected tensors by name, themselves or in an entry; found " in line

    def test_a_refusal_of_torch_names_the_way_out(self, place, torch_that_loads, capfd):
        """For a numpy scalar beside the state_dict; without torch's advice, which would load the whole file."""
        torch_that_loads(ValueError("Weights only load failed. GLOBAL numpy._core.multiarray.scalar was not allowed"))
        (place.folder / "entry.pt").touch()
        line = refusal(place, "{}/entry.pt --config {}/mdeq.py", capfd)
        assert "no code in it was run (it names numpy._core.multiarray.scalar); where the file is trusted, " in line
        assert line.endswith('torch.save(torch.load(path, weights_only=False)["state_dict"], out)')


class TestChannels:
    """MDEQs of images that are not of three channels, in and out."""

    @pytest.mark.slow
    @pytest.mark.parametrize("channels", [1, 2, 4])
    def test_round_trip_is_exact(self, channels, place, tmp_path):
        arrays = random_arrays(place.config, channels=channels)
        assert arrays["downsample.0.weight"].shape == (8, channels, 3, 3)
        np.savez(tmp_path / "a.npz", **{f"module.{name}": array for name, array in arrays.items()})
        place.run(f"{tmp_path}/a.npz --config {{}}/mdeq.py --out {tmp_path}/run")
        for checkpoint in ("best", "latest"):
            place.run(f"{tmp_path}/run --checkpoint {checkpoint} --out {tmp_path}/{checkpoint}.npz")
            equal(read(tmp_path / f"{checkpoint}.npz"), arrays)

    @pytest.mark.slow
    def test_of_a_normalised_network(self, place, tmp_path, capfd):
        """The entries are those of the network; their channels must be those of the normalisation."""
        file = tmp_path / "normal.py"
        text = CONFIG.format(data="none.npz", **SMALL).replace("Equilibrium(*", "normalized(Equilibrium(*")
        text = text.replace("1, 0.5)))\n", "1, 0.5))), (0.5,) * 3, (0.2,) * 3)\n")
        file.write_text("from deq_jax.models import normalized\n" + text)
        place.run(f"{{}}/good.npz --config {file} --out {tmp_path}/run")
        place.run(f"{tmp_path}/run --out {tmp_path}/back.npz")
        equal(read(tmp_path / "back.npz"), place.arrays)
        np.savez(place.folder / "grey.npz", **random_arrays(place.config, channels=1))
        line = refusal(place, f"{{}}/grey.npz --config {file}", capfd)
        assert "Normalized: expected images of 3 channels, got 1" in line

    def test_a_stem_that_is_no_convolution_is_refused(self, place, capfd):
        np.savez(place.folder / "stem.npz", **place.arrays | {"downsample.0.weight": np.zeros(3, np.float32)})
        line = refusal(place, "{}/stem.npz --config {}/mdeq.py", capfd)
        assert "1 mis-shaped: downsample.0.weight (3,) instead of (8, 3, 3, 3)" in line


def test_names_and_shapes_of_a_config(place, tmp_path, capfd):
    place.run("--config {}/mdeq.py --names")
    lines = capfd.readouterr().out.splitlines()
    assert lines == [f"{name} {array.shape}" for name, array in place.arrays.items()]


@pytest.mark.parametrize("arguments", ["--names", "{}/good.npz --config {}/mdeq.py --names", "{}/good.npz", ""])
def test_half_a_command_is_refused(arguments, place, capfd):
    with pytest.raises(SystemExit) as exit:
        place.run(arguments)
    assert exit.value.code == 2
    assert capfd.readouterr().err.startswith("error: ")


def test_only_new_files_are_written(tmp_path):
    check_writable(tmp_path / "new.npz")
    write_state_dict(tmp_path / "new.npz", {"a": np.zeros(1)})
    with pytest.raises(InputError, match=r"new\.npz exists already"):
        write_state_dict(tmp_path / "new.npz", {"a": np.ones(1)})
    equal(read(tmp_path / "new.npz"), {"a": np.zeros(1)})


def test_what_is_printed_goes_on(place, tmp_path, capfd):
    """The commands printed name the same config, with what was set; pre-training is pointed out."""
    place.run(f"{{}}/good.npz --config {{}}/mdeq.py --set seed=5 --set pretrain_steps=3 --out {tmp_path}/run")
    printed = capfd.readouterr().out
    assert f"converted: {parameters(place):,} parameters, in {tmp_path}/run" in printed
    assert f"deq_jax.evaluate --workdir {tmp_path}/run" in printed
    assignments = "--set seed=5 --set pretrain_steps=3"
    assert f"train --config {place.config_file} {assignments} --workdir {tmp_path}/run" in printed
    assert "begin with the 3 pre-training steps" in printed and "--set pretrain_steps=0" in printed
    assert read_json(tmp_path / "run" / "config.json")["seed"] == 5
    place.run(f"{tmp_path}/run --out {tmp_path}/back.npz")
    assert "converted: best checkpoint, step 0" in capfd.readouterr().out


def parameters(place):
    return sum(array.size for name, array in place.arrays.items() if "running" not in name)


def test_help_shows_how_to_start(capfd):
    with pytest.raises(SystemExit) as exit:
        convert.main(["--help"])
    text = capfd.readouterr().out
    assert exit.value.code == 0
    assert all(word in text for word in ("--config", "--out", ".pth.tar", "examples:", "no code in the file is run"))


@pytest.mark.slow
def test_logits_of_the_golden_checkpoint(tmp_path):
    """The logits of the authors' code, from their weights in a file; within a few float32 roundings."""
    inputs = np.load(GOLDEN / "tiny_inputs.npz")
    arrays = {f"module.{name[7:]}": inputs[name] for name in inputs if name.startswith("params/")}
    np.savez(tmp_path / "golden.npz", **arrays)
    file = write_config(tmp_path, REFERENCE)
    convert.main([str(tmp_path / "golden.npz"), "--config", str(file), "--out", str(tmp_path / "run")])
    images = inputs["x_uint8"].transpose(0, 2, 3, 1)
    write_images(tmp_path, images, inputs["y"])
    config = load_config(file, TrainConfig)
    template = jax.eval_shape(lambda: initial_state(config, config.optimizer.transformation(1), config.dataset.load()))
    state = Checkpoints(tmp_path / "run" / "checkpoints" / "best", keep=1).read().shaped_like(template)
    x = images.astype(np.float32) / np.float32(255)
    options = {"xla_llvm_disable_expensive_passes": True}  # a third less time to compile
    predict = jax.jit(lambda variables: config.classifier(variables, x).logits, compiler_options=options)
    logits = predict(state.variables)
    expected = np.load(GOLDEN / "tiny_expected.npz")["phantom/ris/logits"]
    noise = json.loads((GOLDEN / "tiny_noise.json").read_text())["phantom/ris/logits"]
    assert np.linalg.norm(logits - expected) <= (2e-6 + 5 * noise) * np.linalg.norm(expected)


@pytest.mark.slow
def test_converted_networks_are_evaluated_and_trained_on(place, tmp_path, capfd):
    file, run = write_config(tmp_path), tmp_path / "run"
    convert.main([str(place.folder / "good.npz"), "--config", str(file), "--out", str(run)])
    write_images(tmp_path, *random_images(20))
    evaluate.main(["--workdir", str(run), "--attack", "pgd", "--set", "steps=1", "--set", "restarts=1"])
    result = read_json(run / "evaluation" / "test-pgd" / "evaluation.json")
    assert result["images"] == 20
    assert result["checkpoint"] == "best, step 0"
    before = load_run(run, best=False).variables
    train.main(["--config", str(file), "--workdir", str(run)])
    loaded = load_run(run, best=False)
    after, step = loaded.variables, loaded.step
    assert step == 2
    # Adam's first two steps move no entry by more than the learning rate each: it started from these weights.
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), before["params"], after["params"]))
    assert 0 < max(moved) <= 2.1e-3


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_file_that_cannot_be_written_is_not_there_in_part(ending, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    pytest.importorskip("safetensors.numpy")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match=rf"a\.{ending}: cannot be written \(No space left on device\)"):
        write_state_dict(tmp_path / f"a.{ending}", {"weight": np.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_safetensors(place, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(place.arrays, tmp_path / "good.safetensors")
    state = import_checkpoint(tmp_path / "good.safetensors", place.config, tmp_path / "run")
    equal(to_torch(state.variables), place.arrays)
    export_checkpoint(tmp_path / "run", tmp_path / "back.safetensors")
    equal(safetensors.load_file(tmp_path / "back.safetensors"), place.arrays)
    assert not list(tmp_path.glob(".*.tmp"))


def test_damaged_safetensors(place, tmp_path, capfd):
    safetensors = pytest.importorskip("safetensors.numpy")
    whole = safetensors.save(place.arrays)
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    for file in (f"{tmp_path}/truncated.safetensors", "{}/pickle.safetensors"):
        assert "not read: damaged" in refusal(place, f"{file} --config {{}}/mdeq.py", capfd)


def test_half_precision_of_safetensors(place, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    half = {name: array.astype(jnp.bfloat16) for name, array in place.arrays.items()}
    safetensors.save_file(half, tmp_path / "half.safetensors")
    state = import_checkpoint(tmp_path / "half.safetensors", place.config, tmp_path / "run")
    equal(to_torch(state.variables), {name: array.astype(np.float32) for name, array in half.items()})


@pytest.mark.parametrize("ending", [".pth.tar", ".pth", ".pt"])
@pytest.mark.parametrize("entry", [None, "state_dict", "model_state_dict", "model"])
def test_files_of_torch(ending, entry, place, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in place.arrays.items()}
    tensors |= {"module.downsample.1.num_batches_tracked": torch.tensor(7)}
    saved = {"model": "mdeq", "epoch": 3, "perf": 0.9} | {entry: tensors} if entry else tensors
    torch.save(saved, tmp_path / f"file{ending}", _use_new_zipfile_serialization=ending != ".pth.tar")
    found = read_state_dict(tmp_path / f"file{ending}", place.arrays).arrays
    assert found.pop("downsample.1.num_batches_tracked") == 7
    equal(found, place.arrays)


def test_parameters_and_half_precision_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    saved = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.full((3,), 0.5, dtype=torch.bfloat16)}
    torch.save(saved, tmp_path / "file.pt")
    expected = {"a": np.ones(2, np.float32), "b": np.full(3, 0.5, np.float32)}
    equal(read_state_dict(tmp_path / "file.pt", expected).arrays, expected)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
def test_code_in_files_of_torch_is_refused(zipped, hidden, place, capfd):
    """The code is the whole file, or one entry beside a good state_dict."""
    torch = pytest.importorskip("torch")
    malicious = Malicious(place.folder)
    saved = {"state_dict": {"a": torch.ones(2)}, "more": malicious} if hidden else malicious
    torch.save(saved, place.folder / "code.pt", _use_new_zipfile_serialization=zipped)
    line = refusal(place, "{}/code.pt --config {}/mdeq.py", capfd)
    assert "no code in it was run" in line and "it names posix.mkdir" in line
    assert "where the file is trusted" in line


def test_a_pickle_is_no_file_of_torch(place, capfd):
    pytest.importorskip("torch")
    assert "no code in it was run" in refusal(place, "{}/pickle.pt --config {}/mdeq.py", capfd)


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_truncated_files_of_torch(size, place, capfd):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(array) for name, array in place.arrays.items()}, place.folder / "cut.pt")
    whole = (place.folder / "cut.pt").read_bytes()
    (place.folder / "cut.pt").write_bytes(whole[:size])
    assert "cut.pt: not read: damaged" in refusal(place, "{}/cut.pt --config {}/mdeq.py", capfd)


def test_files_of_torch_without_a_state_dict(place, capfd):
    torch = pytest.importorskip("torch")
    for saved, words in (
        ([1, 2], "expected a state_dict, found list"),
        ({"epoch": 3, "model": "mdeq"}, "expected tensors by name, themselves or in an entry"),
        (torch.nn.Linear(2, 2), "it names torch.nn.modules.linear.Linear"),
    ):
        torch.save(saved, place.folder / "other.pt")
        assert words in refusal(place, "{}/other.pt --config {}/mdeq.py", capfd)


def test_torch_loads_what_is_written(place, tmp_path):
    torch = pytest.importorskip("torch")
    place.run(f"{{}}/run --out {tmp_path}/back.npz")
    with np.load(tmp_path / "back.npz") as file:
        norm = {entry: torch.from_numpy(file[f"downsample.1.{entry}"]) for entry in ("weight", "bias")}
        norm |= {entry: torch.from_numpy(file[f"downsample.1.{entry}"]) for entry in ("running_mean", "running_var")}
    layer = torch.nn.BatchNorm2d(8)
    layer.load_state_dict(norm)  # strict: the counter may be absent
    np.testing.assert_array_equal(layer.running_var.numpy(), place.arrays["downsample.1.running_var"])
