"""One process at a time writes to a folder, and a lock does not outlive its process."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deq_jax import InputError
from deq_jax.core import WriteError
from deq_jax.storage import locks
from deq_jax.storage.locks import fellow_writer, make_or_wait, sole_writer, try_to_make

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from deq_jax.storage.locks import sole_writer
with sole_writer(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def enter(folder):
    with sole_writer(folder):
        pass


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    with sole_writer(tmp_path / "run"):
        who = rf"process {os.getpid()} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        with pytest.raises(InputError, match=f"run is in use: {who} writes there; wait for its end"):
            enter(tmp_path / "run")
        enter(tmp_path / "run" / "evaluation")
    enter(tmp_path / "run")


def test_nothing_stays_behind_but_what_was_written(tmp_path):
    enter(tmp_path / "runs" / "a")
    assert list(tmp_path.iterdir()) == []
    with sole_writer(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "config.json").touch()
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["config.json"]


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "lock.json").read_text())["process"] != os.getpid()
    enter(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", '{"host', "[]", "{}"])
def test_what_a_process_left_that_was_killed_while_it_wrote_is_taken_over(text, tmp_path):
    (tmp_path / "lock.json").write_text(text)
    enter(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_host_is_respected(tmp_path):
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps({"host": "node7", "process": 12, "started": "2026-01-02 03:04:05 UTC"}))
    age = r"its last sign of life is \d+ s old, after 600 s it counts as dead"
    words = f"process 12 on node7, since 2026-01-02 03:04:05 UTC writes there; {age}; if it has ended, delete {lock}"
    with pytest.raises(InputError, match=words):
        enter(tmp_path)
    lock.unlink()
    enter(tmp_path)


def test_the_lock_of_another_host_whose_clock_is_ahead_is_respected(tmp_path):
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps({"host": "node7", "process": 12, "started": "2026-01-02 03:04:05 UTC"}))
    os.utime(lock, (time.time() + 100,) * 2)
    with pytest.raises(InputError, match=r"its last sign of life lies \d+ s ahead of the clock here, after 600 s"):
        enter(tmp_path)


def test_the_lock_of_another_host_that_is_silent_is_taken_over(tmp_path):
    """A job that was killed and is started again elsewhere."""
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps({"host": "node7", "process": 12, "started": "2026-01-02 03:04:05 UTC"}))
    os.utime(lock, (time.time() - 601,) * 2)
    enter(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with sole_writer(tmp_path):
        os.utime(tmp_path / "lock.json", (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / "lock.json").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_on_a_file_system_without_locks_the_file_alone_counts(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_writer(tmp_path), pytest.raises(InputError, match=r"if it has ended, delete .*lock.json"):
        enter(tmp_path)
    enter(tmp_path)


def test_a_lock_file_that_is_deleted_while_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    """As when the first writer ends between the opening and the locking of the second."""
    take = fcntl.flock

    def end_of_the_first(file, how):
        take(file, how)
        monkeypatch.setattr(fcntl, "flock", take)
        (tmp_path / "lock.json").unlink()

    monkeypatch.setattr(fcntl, "flock", end_of_the_first)
    with sole_writer(tmp_path), pytest.raises(InputError, match="is in use"):
        enter(tmp_path)


def test_a_lock_file_that_cannot_be_opened_is_one_line(tmp_path):
    """As that of another user, who has ended."""
    (tmp_path / "lock.json").mkdir()
    with pytest.raises(WriteError, match=r"lock.json: cannot be written \(Is a directory\)"):
        enter(tmp_path)


def test_fellows_let_each_other_in_and_nobody_else(tmp_path):
    with fellow_writer(tmp_path / "run"):
        with fellow_writer(tmp_path / "run"):
            pass
        with pytest.raises(InputError, match=rf"process {os.getpid()} on .* shares it with others; wait for its end"):
            enter(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with sole_writer(tmp_path), pytest.raises(InputError, match="writes there"), fellow_writer(tmp_path):
        pass


def test_a_fellow_on_another_host_is_let_in_and_that_of_one_who_was_killed_is_taken_over(tmp_path):
    lock = {"host": "node7", "process": 12, "started": "2026-01-02 03:04:05 UTC", "shared": True}
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    with fellow_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_made_by_one_and_by_another_if_that_one_ends(tmp_path):
    file, made = tmp_path / "batch-0000.npz", []

    def make():
        made.append(1)
        assert not try_to_make(file, make)  # as another process would ask meanwhile
        if len(made) == 1:
            raise KeyboardInterrupt
        file.touch()

    with pytest.raises(KeyboardInterrupt):
        try_to_make(file, make)
    (tmp_path / "batch-0000.lock").write_text('{"host": "' + socket.gethostname() + '", "process": 1, "started": ""}')
    make_or_wait(file, make)
    assert try_to_make(file, make) and len(made) == 2
    assert list(tmp_path.iterdir()) == [file]
