"""Settings of the process that change numbers: recorded, compared, and refused where a run would become another."""

import json
import subprocess
from importlib import import_module
from importlib.metadata import version
from typing import Any

import jax
import pytest

from deq_jax import InputError
from deq_jax.storage import decisive_settings, environment
from deq_jax.storage.environment import DECISIVE, resumed_environments

module = import_module("deq_jax.storage.environment")  # its name in the face is the function's


def changed(part, name, value):
    record: dict[str, Any] = {"step": 0, **environment()}
    return record | {part: {**record[part], name: value}}


def test_an_environment_is_json_and_tells_what_is_set(x64, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with jax.default_matmul_precision("highest"), jax.threefry_partitionable(False):
        found = json.loads(json.dumps(environment()))
    assert found["settings"] == {
        "jax_enable_x64": True,
        "jax_default_matmul_precision": "highest",
        "jax_threefry_partitionable": False,
        "jax_default_prng_impl": "threefry2x32",
        "default_float": "float64",
    }
    assert found["flags"]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert found["platform"]["platform"] == "cpu" and found["platform"]["devices"] == 8
    assert found["versions"]["jax"] == version("jax")
    assert found["versions"]["orbax-checkpoint"] == version("orbax-checkpoint")


def test_the_revision_of_a_checkout_and_whether_its_files_are_those(tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True, text=True).stdout

    def code():
        module._code.cache_clear()
        return environment()["code"]

    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert code() == {"revision": None, "unchanged": None}
    git("init", "-q")
    assert code() == {"revision": None, "unchanged": None}
    (tmp_path / "docs").mkdir()
    for name in ("file", "docs/page"):
        (tmp_path / name).write_text("a")
        git("add", name)
    git("-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "-m", "a")
    assert code() == {"revision": git("rev-parse", "HEAD").strip(), "unchanged": True}
    (tmp_path / "docs" / "page").write_text("b")
    assert code()["unchanged"] is True
    (tmp_path / "file").write_text("b")
    assert code()["unchanged"] is False
    monkeypatch.setattr(module, "ROOT", tmp_path / "site-packages")
    assert code() == {"revision": None, "unchanged": None}
    module._code.cache_clear()


def test_the_command_is_recorded_and_is_no_difference(monkeypatch):
    old = {"step": 0, **environment()}
    monkeypatch.setattr("sys.argv", ["train", "--workdir", "elsewhere"])
    assert environment()["command"] == {"arguments": ["train", "--workdir", "elsewhere"]}
    assert resumed_environments([old], 5) == ([old], [])


def test_a_new_run_records_where_it_is():
    assert resumed_environments([], 0) == ([{"step": 0, **environment()}], [])
    assert resumed_environments([], 7) == ([{"step": 7, **environment()}], [])  # of an older version


def test_nothing_is_said_of_the_same_environment():
    record = {"step": 0, **environment()}
    assert resumed_environments([record], 5) == ([record], [])


@pytest.mark.parametrize("name", DECISIVE)
def test_settings_that_change_numbers_are_refused(name):
    other = {"jax_enable_x64": True, "jax_default_matmul_precision": "bfloat16", "jax_threefry_partitionable": False}
    message = f"another setting of JAX: {name} was {other[name]}, now .*; set {name.upper()} as before"
    with pytest.raises(InputError, match=message):
        resumed_environments([changed("settings", name, other[name])], 5)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("versions", "jax", "0.1"), ("platform", "platform", "tpu"), ("settings", "jax_default_prng_impl", "rbg")],
)
def test_another_machine_or_version_is_told_and_recorded(part, name, value):
    old = changed(part, name, value)
    records, told = resumed_environments([old], 5)
    assert records == [old, {"step": 5, **environment()}]
    assert told == [f"{name} was {value}, now {environment()[part][name]}"]


def test_what_was_recorded_for_steps_that_were_lost_does_not_count():
    first, later = changed("versions", "jax", "0.1"), changed("settings", "jax_enable_x64", True) | {"step": 5}
    assert resumed_environments([first, later], 5)[0] == [first, {"step": 5, **environment()}]
    assert resumed_environments([later], 5) == ([{"step": 5, **environment()}], [])


def test_what_an_older_version_did_not_record_is_no_difference():
    record = {"step": 0, "versions": environment()["versions"]}
    assert resumed_environments([record], 5) == ([record], [])


def test_the_images_of_a_run_are_recorded_and_kept():
    records, _ = resumed_environments([], 0, images="abc")
    assert records[0]["data"] == {"images": "abc"}
    assert resumed_environments(records, 5, images="abc") == (records, [])
    with pytest.raises(InputError, match="a run on other images: images was abc, now def; take the images of before"):
        resumed_environments(records, 5, images="def")


def test_decisive_settings_are_those_of_the_process():
    with jax.default_matmul_precision("float32"):
        assert decisive_settings()["jax_default_matmul_precision"] == "float32"
    assert set(decisive_settings()) == set(DECISIVE)
