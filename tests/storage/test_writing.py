"""A disk that is full, read-only or gone: one line, and what was there before is as it was."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deq_jax import InputError
from deq_jax.core import WriteError
from deq_jax.evaluation.store import Store
from deq_jax.parallel import agreed, processes
from deq_jax.storage import make_folder, read_json, read_npz, write_json, write_npz
from deq_jax.storage.checkpoints import Checkpoints
from deq_jax.storage.files import write_whole
from deq_jax.storage.locks import InUseError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_OF_TENSORSTORE = ValueError(
    "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 3: No space left on device [os_error_code='28']"
)
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(("write", "read"), [(write_json, read_json), (write_npz, read_npz)], ids=["json", "npz"])
def test_a_file_is_there_as_it_was(write, read, tmp_path, monkeypatch):
    file = tmp_path / "a"
    write(file, {"x": 1})
    monkeypatch.setattr(os, "fsync", failing(FULL))
    with pytest.raises(WriteError) as raised:
        write(file, {"x": 2})
    assert str(raised.value) == f"{file}: cannot be written (No space left on device)"
    assert read(file)["x"] == 1 and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (ocp.Checkpointer, "save", FULL),
        (ocp.Checkpointer, "save", FULL_OF_TENSORSTORE),
        (ocp.Checkpointer, "save", READ_ONLY),
        (os, "fsync", FULL),  # of the digests: all files of orbax are there
    ],
    ids=["orbax", "tensorstore", "read-only", "digests"],
)
def test_the_last_checkpoint_is_there_as_it_was(place, name, error, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "latest", keep=1)
    checkpoints.save(1, {"w": np.ones(3)}, {})
    with monkeypatch.context() as changed:
        changed.setattr(place, name, failing(error))
        for step in (1, 2):
            with pytest.raises(WriteError) as raised:
                checkpoints.save(step, {"w": np.zeros(3)}, {})
            reason = "Read-only file system" if error is READ_ONLY else "No space left on device"
            file = ".unfinished/digests.json" if place is os else str(step)
            assert str(raised.value) == f"{tmp_path / 'latest' / file}: cannot be written ({reason})"
    assert [path.name for path in (tmp_path / "latest").iterdir()] == ["1"]
    assert checkpoints.read().state["w"].tolist() == [1, 1, 1]
    checkpoints.save(2, {"w": np.zeros(3)}, {})
    assert checkpoints.read().step == 2


def test_a_batch_of_an_evaluation_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    store = Store(tmp_path)
    with monkeypatch.context() as changed:
        changed.setattr(os, "fsync", failing(FULL))
        with pytest.raises(WriteError, match=r"pgd/batch-0000.npz: cannot be written \(No space left on device\)"):
            store.batch("pgd", 0, lambda: {"x": np.zeros(3)})
    assert not store.has("pgd", 0) and [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert store.batch("pgd", 0, lambda: {"x": np.ones(3)})["x"].tolist() == [1, 1, 1]
    with pytest.raises(WriteError, match="No such file or directory"):
        Store(tmp_path / "gone").batch("pgd", 0, lambda: {"x": np.zeros(3)})
    assert not (tmp_path / "gone").exists()


def test_a_folder_that_has_vanished_does_not_come_back_in_part(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints" / "latest", keep=1)
    with pytest.raises(WriteError, match=r"latest/1: cannot be written \(No such file or directory\)"):
        checkpoints.save(1, {"w": np.ones(3)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_error_that_is_none_of_the_operating_system_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ocp.Checkpointer, "save", failing(ValueError("a fault")))
    with pytest.raises(ValueError, match="a fault"):
        Checkpoints(tmp_path, keep=1).save(1, {"w": np.ones(3)}, {})


@pytest.mark.parametrize(
    ("failure", "kind"), [(InputError, InputError), (InUseError, InputError), (WriteError, WriteError)]
)
def test_both_kinds_of_errors_are_those_of_all_processes(failure, kind, monkeypatch):
    """Also those of a special kind."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sent: list[str] = []

    def gathered(own):
        sent.append(own)
        return sent

    monkeypatch.setattr(processes, "gather_texts", gathered)
    with pytest.raises(failure, match=r"^a line$"), agreed():
        raise failure("a line")
    with pytest.raises(kind, match=r"^a line$"), agreed():  # in a process that did not fail
        pass


def test_two_writers_of_one_file_each_write_it_whole(tmp_path):
    """Processes on two hosts can have the same number."""

    def outer(file):
        file.write(b"one ")
        write_whole(tmp_path / "a", lambda other: other.write(b"two"))
        assert (tmp_path / "a").read_bytes() == b"two"
        file.write(b"whole")

    write_whole(tmp_path / "a", outer)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"one whole"


def test_two_may_try_a_folder_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(make_folder, [tmp_path] * 2000)) == {tmp_path}
    assert not list(tmp_path.iterdir())
