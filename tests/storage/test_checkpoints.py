"""Checkpoints give back what was saved, or name the first part that does not fit."""

import errno
import shutil
import sys
import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from deq_jax import InputError
from deq_jax.core import WriteError
from deq_jax.storage import checkpoints as checkpoints_module
from deq_jax.storage.checkpoints import Checkpoints


class State(NamedTuple):
    step: object
    params: object
    batch_stats: object
    opt_state: object


def state_of(optimizer):
    params = {"cell": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}, "norm": [jnp.ones(2), jnp.ones(())]}
    return State(jnp.int32(3), params, {}, optimizer.init(params))


OPTIMIZERS = {
    "adam": optax.adam(optax.constant_schedule(0.1)),
    "masked": optax.chain(optax.masked(optax.sgd(0.1, 0.9), {"cell": True, "norm": False}), optax.trace(0.9)),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.cosine_decay_schedule(0.1, 10)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    Checkpoints(folder, keep=1).save(3, state_of(OPTIMIZERS["adam"]), {"note": [1, None]})
    return folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_state_is_restored_exactly(name, tmp_path):
    state = state_of(OPTIMIZERS[name])
    Checkpoints(tmp_path, keep=1).save(3, state, {"note": [1, None]})
    found = Checkpoints(tmp_path, keep=1).read()
    restored = found.shaped_like(jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert (found.step, found.meta) == (3, {"note": [1, None]})
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


def without(params, name):
    return {"cell": {other: leaf for other, leaf in params["cell"].items() if other != name}, "norm": params["norm"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p | {"cell": p["cell"] | {"w": np.ones((2, 4), np.float32)}}, "w has shape (2, 3), expected (2, 4)"),
        (lambda p: p | {"cell": p["cell"] | {"w": np.ones((2, 3))}}, "w has dtype float32, expected float64"),
        (lambda p: p | {"cell": p["cell"] | {"b": np.ones(3, np.float32)}}, "b has dtype bfloat16, expected float32"),
        (lambda p: p | {"cell": p["cell"] | {"v": np.ones(3)}}, "has no params/cell/v"),
        (lambda p: without(p, "w"), "params/cell/w was not expected"),
        (lambda p: p | {"norm": p["norm"][:1]}, "params/norm/1 was not expected"),
    ],
    ids=["shape", "x64", "half", "more", "less", "list"],
)
def test_the_first_part_that_does_not_fit_is_named(saved, change, words):
    state = state_of(OPTIMIZERS["adam"])
    with pytest.raises(InputError) as raised:
        Checkpoints(saved, keep=1).read().shaped_like(state._replace(params=change(state.params)))
    assert str(raised.value).startswith(f"checkpoint {saved / '3'} does not fit: ") and words in str(raised.value)


STATE = {f"w{number}": np.random.default_rng(number).normal(size=(100, 100)) for number in range(40)}


@pytest.fixture
def unseen():
    """Fails where something is reported that nobody can catch, or where the hook for it has changed.

    Tensorstore answers late for a moment after a failure; these answers are kept quiet, and nothing else is.
    """
    before, seen = sys.unraisablehook, list[Any]()
    sys.unraisablehook = mine = seen.append
    yield
    found, sys.unraisablehook = sys.unraisablehook, before
    assert found == mine and seen == []


@pytest.mark.slow
def test_a_failed_restore_leaves_no_hook_behind(tmp_path, unseen):
    Checkpoints(tmp_path, keep=1).save(3, STATE, {})
    (tmp_path / "3" / "digests.json").unlink()
    for path in tmp_path.rglob("ocdbt*/d/*"):
        path.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"3 is damaged \(.*\); there is no earlier one"):
        Checkpoints(tmp_path, keep=1).read()


@pytest.mark.slow
def test_a_failed_save_leaves_no_hook_behind(tmp_path, unseen, monkeypatch):
    def answer_late():
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))

    def fail(*_, **__):
        threading.Timer(0.1, answer_late).start()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(WriteError, match=r"3: cannot be written \(No space left on device\)"):
        Checkpoints(tmp_path, keep=1).save(3, {}, {})


def test_some_parts_alone_are_restored(saved):
    params = state_of(OPTIMIZERS["adam"]).params
    template = {"params": params, "batch_stats": {}}
    restored = Checkpoints(saved, keep=1).read().shaped_like(template, only=list(template))
    assert jax.tree.structure(restored) == jax.tree.structure(template)
    jax.tree.map(np.testing.assert_array_equal, restored, template)
    with pytest.raises(InputError, match="does not fit: params/cell/w was not expected"):
        other = template | {"params": without(params, "w")}
        Checkpoints(saved, keep=1).read().shaped_like(other, only=list(template))


STATE = {"w": np.arange(1000, dtype=np.float32)}


def two_checkpoints(folder):
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"w": STATE["w"] * step}, {"step": step})
    return checkpoints


def largest_file(checkpoint):
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    for place in (len(data) // 2, len(data) // 3, len(data) // 4):
        data[place] ^= 0xFF
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "has changed"), (cut, "has changed"), (lambda file: file.unlink(), "is missing")],
    ids=["flipped", "cut", "removed"],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_read(damage, words, tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    said: list[str] = []
    damage(largest_file(tmp_path / "2"))
    found = checkpoints.read(said.append)
    np.testing.assert_array_equal(found.state["w"], STATE["w"])
    assert (found.step, found.meta) == (1, {"step": 1})
    assert len(said) == 1 and words in said[0]
    assert said[0].startswith(f"checkpoint {tmp_path / '2'} is damaged (") and said[0].endswith("); step 1 is used")
    assert checkpoints.latest_step() == 2  # reading writes nothing
    checkpoints.set_aside(after=1)
    assert checkpoints.latest_step() == 1 and (tmp_path / "2.damaged-1").is_dir()
    checkpoints.save(2, STATE, {})
    assert checkpoints.read(said.append).step == 2 and len(said) == 1


def test_a_checkpoint_set_aside_does_not_take_the_place_of_another(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    for _ in range(2):
        checkpoints.set_aside(after=1)
        checkpoints.save(2, STATE, {})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged-1", "2.damaged-2"}


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_digests_that_are_damaged_themselves_are_noticed(text, tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    said: list[str] = []
    (tmp_path / "2" / "digests.json").write_text(text)
    assert checkpoints.read(said.append).step == 1 and "2 is damaged (" in said[0]


def out_of_memory(*_, **__):
    raise MemoryError


def not_permitted(*_):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("place", "failure", "words"),
    [
        ("ocp.Checkpointer.restore", out_of_memory, r"2 cannot be read \(MemoryError\)"),
        ("_sha256", not_permitted, r"2 cannot be read \(\[Errno 13\] Permission denied\)"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_here_does_not_count_as_damaged(place, failure, words, tmp_path, monkeypatch):
    """The one before it is not used: the newest may be sound."""
    checkpoints = two_checkpoints(tmp_path)
    monkeypatch.setattr(f"deq_jax.storage.checkpoints.{place}", failure)
    said: list[str] = []
    with pytest.raises(InputError, match=words):
        checkpoints.read(said.append)
    assert said == []


@pytest.mark.slow
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_passed_over(tmp_path, monkeypatch):
    """As by the process that trains, which keeps the newest."""
    checkpoints, check = two_checkpoints(tmp_path), checkpoints_module._check_digests

    def deleted(folder):
        check(folder)
        if folder.name == "2":
            shutil.rmtree(folder)

    monkeypatch.setattr(checkpoints_module, "_check_digests", deleted)
    said: list[str] = []
    assert checkpoints.read(said.append).step == 1 and said == []


def test_where_all_are_damaged_the_newest_is_named(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    said: list[str] = []
    for step in "12":
        flip(largest_file(tmp_path / step))
    with pytest.raises(InputError, match=r"2 is damaged \(.* has changed\); there is no earlier one"):
        checkpoints.read(said.append)
    assert said == []


@pytest.mark.slow
def test_checkpoints_of_older_versions_have_no_digests(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    said: list[str] = []
    for file in tmp_path.glob("*/digests.json"):
        file.unlink()
    assert checkpoints.read(said.append).step == 2 and said == []
    for file in (tmp_path / "2" / "state" / "d").iterdir():
        cut(file)
    assert checkpoints.read(said.append).step == 1 and "2 is damaged (" in said[0]


def test_the_newest_are_kept_and_what_a_killed_process_began_goes(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    for name in (".unfinished", ".unfinished.orbax-checkpoint-tmp", ".unfinished-0"):
        (tmp_path / name).mkdir()
    checkpoints.save(3, STATE, {})
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}
    checkpoints.save(2, STATE, {})  # of a run that went on from an earlier step
    assert {path.name for path in tmp_path.iterdir()} == {"2"}
