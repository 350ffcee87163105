"""One folder, one writer, or several that share: locks of the operating system, which end with their processes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from deq_jax.core.errors import InputError, require
from deq_jax.storage.files import make_folder, parsed_json, writing

LOCK = "lock.json"  # host, process and start of the writer; deleted when it ends

BEAT = 60.0  # seconds between two signs of life of a writer: the time of its lock file

SILENCE = 600.0  # seconds without one, after which a writer on another host counts as dead


POLL = 0.2  # seconds between two looks at a file that another process makes


class InUseError(InputError):
    """Another process holds the lock."""


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Within it, no other process writes to the folder, which is created, and deleted if it stays empty.

    The lock of a process that has ended is free, however it ended. Some network file systems do not pass locks on. So
    the lock of a process on another host is respected even if it looks free, until it has shown no sign of life for
    ten minutes.

    Raises:
      InputError: another process writes there, or nothing can be written.
    """
    with _writer(folder, is_shared=False):
        yield


@contextmanager
def fellow_writer(folder: Path) -> Iterator[None]:
    """As `sole_writer`, but other fellows are let in; they share the work by `try_to_make` and `make_or_wait`."""
    with _writer(folder, is_shared=True):
        yield


def try_to_make(file: Path, make: Callable[[], None]) -> bool:
    """Makes a file that is not there, unless another process is at it; returns whether it is there now.

    Args:
      file: the file, in a folder that exists.
      make: writes it whole.
    """
    if not file.exists():
        try:
            with _held(file.with_suffix(".lock"), is_shared=False):
                if not file.exists():
                    make()
        except InUseError:
            return False
    return True


def make_or_wait(file: Path, make: Callable[[], None]) -> None:
    """Makes a file that is not there, or waits until another process has made it."""
    while not try_to_make(file, make):
        time.sleep(POLL)


@contextmanager
def _writer(folder: Path, is_shared: bool) -> Iterator[None]:
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        with _held(folder / LOCK, is_shared):
            yield
    finally:
        for path in created:
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def _held(path: Path, is_shared: bool) -> Iterator[None]:
    """Within it, the lock file is this process's, or that of all who share it; the last of them deletes it."""
    with _locked(path, is_shared) as file:
        mine = {"host": socket.gethostname(), "process": os.getpid(), "started": f"{datetime.now(UTC):%F %T} UTC"}
        try:
            with writing(path):
                file.truncate(0)
                file.write(json.dumps(mine | ({"shared": True} if is_shared else {})) + "\n")
                file.flush()
            with _alive(path):
                yield
        finally:
            with suppress(OSError):  # the folder may have vanished
                if not is_shared or _try_to_lock(file, is_shared=False):
                    path.unlink()


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
def _locked(path: Path, is_shared: bool) -> Iterator[IO[str]]:
    """The file, open and locked; raises `InUseError` if another process holds it."""
    is_current = False
    while not is_current:
        require(not path.is_symlink(), f"{path} is a link, so its target would be written over; delete it")
        with writing(path):
            file = path.open("a+", errors="replace")
        with file:
            state = _try_to_lock(file, is_shared)
            # Otherwise its former holder has deleted it meanwhile, and the lock is on a file without a name.
            is_current = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
            holder = _holder(file, path)
            if is_shared and state is False and holder.get("shared"):
                is_current = False  # the last of its fellows is about to delete it
            if is_current:
                _check_holder(file, path, holder, state, is_shared)
                yield file


def _try_to_lock(file: IO[str], is_shared: bool) -> bool | None:
    """Whether it is locked now; None where the file system has no locks."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _holder(file: IO[str], path: Path) -> dict[str, Any]:
    """The text of a lock file as data, with `who` in words; empty without a text."""
    file.seek(0)
    text = file.read()
    if not text:
        return {}
    try:
        holder: dict[str, Any] = parsed_json(text, str(path))
        return {**holder, "who": "process {process} on {host}, since {started}".format(**holder)}
    except (ValueError, KeyError, TypeError):
        return {"who": "another process"}


def _check_holder(file: IO[str], path: Path, holder: dict[str, Any], is_locked: bool | None, is_shared: bool) -> None:
    is_fellow = is_shared and holder.get("shared") is True
    what = "shares it with others" if holder.get("shared") else "writes there"
    in_use = f"{path.parent} is in use: {holder.get('who', 'another process')} {what}"
    _require_free(is_locked is not False, f"{in_use}; wait for its end, or choose another folder")
    is_here = holder.get("host", socket.gethostname()) == socket.gethostname()
    if holder and not is_fellow and not (is_locked and is_here):
        silent = _silence(file, path.parent)
        age = f"is {silent:.0f} s old" if silent >= 0 else f"lies {-silent:.0f} s ahead of the clock here"
        last = f"its last sign of life {age}, after {SILENCE:.0f} s it counts as dead"
        _require_free(silent > SILENCE, f"{in_use}; {last}; if it has ended, delete {path}")


def _require_free(is_free: bool, message: str) -> None:
    if not is_free:
        raise InUseError(message)


def _silence(file: IO[str], folder: Path) -> float:
    """Age of a lock file by the clock of its file system, in seconds."""
    with tempfile.TemporaryFile(dir=folder) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
