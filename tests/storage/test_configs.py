"""Configs: files, --set, JSON and back, and what is refused."""

import ast
import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from deq_jax import Explicit, InputError, RandomIntermediateState, Standard, TrainConfig
from deq_jax.attacks import PGD, Linf
from deq_jax.core import kl
from deq_jax.data import CropFlip, Digits, Npz
from deq_jax.models import SmallCNN
from deq_jax.storage import first_difference, from_tree, load_config, set_fields, to_tree
from deq_jax.storage.configs import scalar_paths
from deq_jax.training import AdamCosine, with_readout

CONFIGS = [p for p in sorted(Path("configs").glob("*.py")) if p.stem != "cifar" and not p.stem.startswith("eval_")]


@pytest.fixture
def config():
    return load_config("configs/digits_pgd_at.py", TrainConfig)


def test_there_are_configs():
    assert len(CONFIGS) >= 9


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestEveryConfig:
    def test_survives_json(self, path):
        config = load_config(path, TrainConfig)
        assert from_tree(json.loads(json.dumps(to_tree(config)))) == config

    def test_tells_its_command(self, path):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        command = f"python -m deq_jax.train --config {path.as_posix()} --workdir runs/{path.stem}"
        assert re.search(rf"{re.escape(command)}(\n| --set dataset\.path=)", re.sub(r" \\\n +", " ", docstring + "\n"))

    def test_has_scalars_to_set(self, path):
        config = load_config(path, TrainConfig)
        assert {"seed", "optimizer.learning_rate"} <= set(scalar_paths(config))
        assert set_fields(config, ["seed=7"]) == dataclasses.replace(config, seed=7)


def test_random_states_are_a_one_field_variant():
    for path in CONFIGS:
        if path.stem.endswith("_random"):
            base = load_config(path.with_name(path.name.replace("_random", "")), TrainConfig)
            assert load_config(path, TrainConfig) == with_readout(base, RandomIntermediateState())


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("seed=1", lambda c: c.seed, 1),
        (" seed = 1 ", lambda c: c.seed, 1),
        ("objective.attack.threat.epsilon=0.2", lambda c: c.objective.attack.threat.epsilon, 0.2),
        ("objective.attack.threat.epsilon=1", lambda c: c.objective.attack.threat.epsilon, 1.0),
        ("objective.attack.best_of=True", lambda c: c.objective.attack.best_of, True),
        ("classifier.dynamics.solver.steps=3", lambda c: c.classifier.dynamics.solver.steps, 3),
        ("classifier.encoder.channels=4", lambda c: c.classifier.encoder.channels, 4),  # a flax module
        ("checkpoint_every=5", lambda c: c.checkpoint_every, 5),
        ("checkpoint_every=None", lambda c: c.checkpoint_every, None),
    ],
)
def test_set_changes_one_field(config, assignment, read, value):
    changed = set_fields(config, [assignment])
    assert read(changed) == value
    assert type(read(changed)) is type(value)
    unset = {name for name in to_tree(config) if to_tree(config)[name] != to_tree(changed)[name]}
    assert unset <= {assignment.split("=")[0].split(".")[0].strip()}


def test_set_takes_strings_as_they_are():
    assert set_fields(Npz("a.npz"), ["path=some folder/b=c.npz"]) == Npz("some folder/b=c.npz")


def test_the_last_assignment_counts(config):
    assert set_fields(config, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("sed=1", ["--set sed=1", "no field sed", "valid names: ", " seed", "objective.attack.threat.epsilon"]),
        (
            "objective.attack.threat.eps=1",
            ["no field objective.attack.threat.eps", "valid names: objective.attack.threat.epsilon"],
        ),
        ("classifier.encoder.parent=1", ["no field classifier.encoder.parent", "classifier.encoder.channels"]),
        ("seed.x=1", ["no field seed.x", "valid names: none"]),
        ("objective.attack.loss.x=1", ["no field objective.attack.loss.x"]),
        ("=1", ["no field", "seed"]),
        ("seed", ["--set seed", "NAME=VALUE"]),
        ("seed=x", ["expected int", "now 0", "'x'"]),
        ("seed=1.5", ["expected int", "'1.5'"]),
        ("seed=True", ["expected int", "'True'"]),
        ("seed=", ["expected int", "''"]),
        ("seed={[]: 1}", ["expected int"]),
        ("checkpoint_every=a", ["expected int or None", "'a'"]),
        ("objective.attack.best_of=1", ["expected bool"]),
        ("objective.attack.threat.epsilon=None", ["expected float", "'None'"]),
        (
            "objective.attack.threat.epsilon=-1",
            ["--set objective.attack.threat.epsilon=-1", "Linf", "epsilon", ">= 0", "-1"],
        ),
        ("epochs=0", ["TrainConfig", "epochs", "positive", "0"]),
        ("objective=1", ["objective is an object", "not a scalar"]),
        ("objective.attack.loss=kl", ["objective.attack.loss is an object", "replace it in a config file"]),
        ("optimizer=sgd", ["optimizer is an object", "such as --set optimizer.learning_rate=VALUE", "config file"]),
    ],
)
def test_set_refuses(config, assignment, words):
    with pytest.raises(InputError) as raised:
        set_fields(config, [assignment])
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"seed": 3}, "seed was 0, now 3"),
        ({"optimizer": AdamCosine(2e-3)}, "optimizer.learning_rate was 0.003, now 0.002"),
        ({"objective": Standard()}, "objective was deq_jax.training.PGDAdversarialTraining, now deq_jax.training"),
        ({"augmentation": CropFlip()}, "augmentation was None, now deq_jax.data.CropFlip"),
        (
            {"validation_attack": PGD(Linf(0.1), steps=10, step_size=0.025, loss=kl)},
            "validation_attack.loss was deq_jax.core.cross_",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_first_difference_names_the_field(config, change, expected):
    difference = first_difference(to_tree(config), to_tree(dataclasses.replace(config, **change)))
    assert difference is None if expected is None else difference.startswith(expected)


class Eager:
    """Not a dataclass: it must never be made."""

    def __init__(self, *args, **kwargs):
        raise AssertionError("called")


def eager(*args, **kwargs):
    """No class at all."""
    raise AssertionError("called")


@dataclass(frozen=True)
class Holder:
    """Something that holds anything."""

    content: object = None


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"class": "deq_jax.attacks.pgd.FGD", "epsilon": 1}, ["cannot import 'deq_jax.attacks.FGD'"]),
        ({"class": "no_such_package.Thing"}, ["cannot import 'no_such_package.Thing'"]),
        ({"class": "deq_jax.data.Npz", "file": "a"}, ["deq_jax.data.Npz", "other fields", "file"]),
        ({"class": "deq_jax.data.Npz", "path": "a", "validation": 2.0}, ["validation", "(0, 1)", "2.0"]),
        ({"class": f"{__name__}.Eager"}, ["not a config class"]),
        ({"class": f"{__name__}.eager", "x": 1}, ["not a config class"]),
        ({"class": "os.system", "command": "false"}, ["not a config class"]),
        ({"class": 5}, ["cannot import 5"]),
        ({"class": ""}, ["cannot import"]),
        ({"epsilon": 1}, ["cannot import"]),
        ({"name": 5}, ["cannot import 5"]),
        ({"class": f"{__name__}.Holder", "content": [{"class": "builtins.print"}]}, ["builtins.print", "not a config"]),
    ],
    ids=lambda value: str(value.get("class", value)) if isinstance(value, dict) else "",
)
def test_from_tree_refuses(tree, words):
    with pytest.raises(InputError) as raised:
        from_tree(tree)
    assert [word for word in words if word not in str(raised.value)] == []


def test_from_tree_imports_functions_without_calling_them():
    assert from_tree({"name": f"{__name__}.eager"}) is eager


def test_lists_become_tuples():
    assert from_tree(to_tree(Holder((1, (2.5, "a"), None)))) == Holder((1, (2.5, "a"), None))


@pytest.mark.parametrize("content", [object(), {1: 2}, b"a", lambda: 0], ids=["object", "dict", "bytes", "lambda"])
def test_to_tree_refuses_what_it_cannot_build_again(content):
    with pytest.raises(InputError, match=r"a config cannot hold .* in content\[1\]: expected") as error:
        to_tree(Holder((1, content)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, ["batch_size", "positive", "0"]),
        ({"epochs": -1}, ["epochs", "positive", "-1"]),
        ({"log_every": 0}, ["log_every", "positive", "0"]),
        ({"checkpoint_every": 0}, ["checkpoint_every", "None", "0"]),
        ({"pretrain_steps": -1}, ["pretrain_steps", ">= 0", "-1"]),
        ({"seed": -1}, ["seed", ">= 0", "-1"]),
        ({"classifier": Explicit(SmallCNN(10, 4))}, ["pretrain_steps", "Equilibrium"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_train_config_refuses(config, change, words):
    with pytest.raises(InputError) as raised:
        dataclasses.replace(config, **change)
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize("rates", [(0.0, 0.0), (1e-3, 2e-3), (1e-3, -1e-6)], ids=str)
def test_adam_cosine_refuses(rates):
    with pytest.raises(InputError, match="AdamCosine: expected"):
        AdamCosine(*rates)


@pytest.mark.parametrize("text", ["from configs import digits_pgd_at", "import configs.digits_pgd_at"])
def test_a_config_that_needs_the_clone_tells_where_to_run(text, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "configs").is_dir()])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "on_its_own.py").write_text(text)
    with pytest.raises(InputError) as raised:
        load_config("on_its_own.py", TrainConfig)
    advice = "configs/ is not installed with deq_jax: run in the folder of its clone, or add that to PYTHONPATH"
    assert str(raised.value) == f"on_its_own.py: line 1: No module named 'configs'; {advice}"


def test_a_config_of_the_clone_named_elsewhere_tells_where_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    advice = "configs/ is not installed with deq_jax: run in the folder of its clone"
    with pytest.raises(InputError, match=f"^configs/digits_trades.py: no such config file; {advice}$"):
        load_config("configs/digits_trades.py", TrainConfig)


def test_a_folder_named_configs_of_ones_own_hides_the_clones(tmp_path, monkeypatch):
    (tmp_path / "on_its_own.py").write_text("from configs import digits_pgd_at_of_mine")
    with pytest.raises(InputError, match=r"cannot import name 'digits_pgd_at_of_mine'.*; configs/ is not installed"):
        load_config(tmp_path / "on_its_own.py", TrainConfig)


def test_learning_rate_falls_from_first_to_last_step():
    steps, gradient = 10, {"w": 1.0}
    optimizer, schedule = AdamCosine(1e-2, 1e-4).transformation(steps), AdamCosine(1e-2, 1e-4).schedule(steps)
    state, sizes = optimizer.init(gradient), []
    for _ in range(steps + 1):  # Adam's step on a constant gradient is the learning rate
        update, state = optimizer.update(gradient, state)
        sizes.append(-float(update["w"]))
    assert sizes[0] == pytest.approx(1e-2, rel=1e-3)
    assert sizes[-1] == pytest.approx(1e-4, rel=1e-3)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == pytest.approx([float(schedule(step)) for step in range(steps + 1)], rel=1e-3)


def test_pretraining_is_clean_and_unrolled(config):
    shallow = config.pretraining()
    assert shallow.objective == Standard()
    assert shallow.classifier.dynamics.solver is None
    assert shallow.classifier.dynamics.gradient.steps == config.classifier.dynamics.solver.steps
    assert (shallow.seed, shallow.batch_size, shallow.dataset) == (config.seed, config.batch_size, Digits())


def test_configs_are_hashable_values(config):
    assert config == load_config("configs/digits_pgd_at.py", TrainConfig)
    assert len({config, load_config("configs/digits_pgd_at.py", TrainConfig)}) == 1
    assert jax.jit(lambda c: c.seed, static_argnums=0)(config) == 0


def test_functions_of_a_config_file_are_found_again(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = [
        "from dataclasses import replace",
        "from configs import digits_pgd_at",
        "def loss(logits, target):",
        "    return -logits[:, 0]",
        "def get_config():",
        "    base = digits_pgd_at.get_config()",
        "    return replace(base, validation_attack=replace(base.validation_attack, loss=loss))",
    ]
    (folder / "own_loss.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    tree = to_tree(load_config("mine/own_loss.py", TrainConfig))
    assert tree["validation_attack"]["loss"] == {"name": "mine.own_loss.loss"}
    monkeypatch.delitem(sys.modules, "mine.own_loss", raising=False)  # as in another process, started in this folder
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "mine" not in path)])
    assert from_tree(tree).validation_attack.loss.__name__ == "loss"


def test_an_attack_of_an_older_version_is_read():
    """PGD once had a radius, in ℓ∞, where it now has a threat model."""
    attack = PGD(Linf(0.1), steps=3, step_size=0.03)
    tree = to_tree(attack)
    older = {"class": tree["class"], "epsilon": 0.1} | {k: v for k, v in tree.items() if k not in ("class", "threat")}
    assert from_tree(older) == attack
    assert first_difference({"a": older}, {"a": tree}) is None
    assert first_difference(older | {"epsilon": 0.2}, tree) == "threat.epsilon was 0.2, now 0.1"
