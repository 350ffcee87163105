"""One folder, one writer: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from deq_jax.core.errors import require
from deq_jax.storage.files import make_folder, parsed_json, writing

LOCK = "lock.json"  # host, process and start of the writer; deleted when it ends

BEAT = 60.0  # seconds between two signs of life of a writer: the time of its lock file

SILENCE = 600.0  # seconds without one, after which a writer on another host counts as dead


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Within it, no other process writes to the folder, which is created, and deleted if it stays empty.

    The lock of a process that has ended is free, however it ended. Some network file systems do not pass locks on. So
    the lock of a process on another host is respected even if it looks free, until it has shown no sign of life for
    ten minutes.

    Raises:
      InputError: another process writes there, or nothing can be written.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        with _locked(folder / LOCK) as file:
            mine = {"host": socket.gethostname(), "process": os.getpid(), "started": f"{datetime.now(UTC):%F %T} UTC"}
            try:
                with writing(folder / LOCK):
                    file.truncate(0)
                    file.write(json.dumps(mine) + "\n")
                    file.flush()
                with _alive(folder / LOCK):
                    yield
            finally:
                with suppress(OSError):  # the folder may have vanished
                    (folder / LOCK).unlink()
    finally:
        for path in created:
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def _alive(path: Path) -> Iterator[None]:
    """Renews the time of the file again and again."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """The file, open and locked; raises `InputError` if another process writes to its folder."""
    is_current = False
    while not is_current:
        require(not path.is_symlink(), f"{path} is a link, so its target would be written over; delete it")
        with writing(path):
            file = path.open("a+", errors="replace")
        with file:
            state = _try_to_lock(file)
            # Otherwise its former holder has deleted it meanwhile, and the lock is on a file without a name.
            is_current = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
            if is_current:
                _check_holder(file, path, state)
                yield file


def _try_to_lock(file: IO[str]) -> bool | None:
    """Whether it is locked now; None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _check_holder(file: IO[str], path: Path, is_locked: bool | None) -> None:
    file.seek(0)
    text = file.read()
    try:
        holder: dict[str, Any] = parsed_json(text, str(path))
        who = "process {process} on {host}, since {started}".format(**holder)
    except (ValueError, KeyError, TypeError):
        holder, who = {}, "another process"
    in_use = f"{path.parent} is in use: {who} writes there"
    require(is_locked is not False, f"{in_use}; wait for its end, or choose another folder")
    is_here = holder.get("host", socket.gethostname()) == socket.gethostname()
    if text and not (is_locked and is_here):
        silent = _silence(file, path.parent)
        last = f"its last sign of life is {silent:.0f} s old, after {SILENCE:.0f} s it counts as dead"
        require(silent > SILENCE, f"{in_use}; {last}; if it has ended, delete {path}")


def _silence(file: IO[str], folder: Path) -> float:
    """Age of a lock file by the clock of its file system, in seconds."""
    with tempfile.TemporaryFile(dir=folder) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
