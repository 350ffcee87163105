"""Several processes: they connect, agree on failures and stops, and let one of them write.

Every process runs the same program. The functions below are collective: if one process calls them, all must. With a
single process none of them communicates.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deq_jax.core.errors import InputError, WriteError, require
from deq_jax.core.types import PyTree
from deq_jax.parallel.reports import lost_line

CONNECT_SECONDS = 120  # within which all processes of a job must have started

LEAVE_SECONDS = 30  # for which a process that ends alone waits for the others

LOST = re.compile(
    "[Gg]loo|GetKeyValue|^UNAVAILABLE|coordination service"
)  # in errors of connections to other processes

_reporter: subprocess.Popen[bytes] | None = None  # shortens the reports on stderr; ends when this process has


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    seconds: float = CONNECT_SECONDS,
) -> None:
    """Joins the other processes of the job, if there are any; must precede any computation.

    Without arguments a SLURM step of several tasks and a TPU VM are recognised, and JAX finds the rest; anything
    else is one process. ``processes=1`` never looks for others. With several, stderr passes through a small process
    from then on. It puts one line in place of the many that JAX writes about a lost process.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached; None for the variable JAX_COORDINATOR_ADDRESS.
      processes: number of processes.
      process: index of this one, from 0.
      seconds: time within which all must have started. After that the process exits with one line and code 2,
        because JAX would abort it.

    Raises:
      InputError: for arguments that do not go together.

    Examples:
      >>> from deq_jax.parallel import connect
      >>> connect(processes=1)  # does not look for others
    """
    if processes == 1 and process in (None, 0):
        return
    if (coordinator, processes, process) == (None, None, None):
        if _in_slurm_step() or _on_tpu():
            _initialize(None, None, None, seconds)
        return
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None or processes is None or process is None:
        raise InputError("--coordinator HOST:PORT, --processes N and --process I go together")
    host, _, port = coordinator.rpartition(":")
    is_address = bool(host) and port.isdigit() and 0 < int(port) < 2**16
    require(is_address, f"--coordinator must be HOST:PORT, got {coordinator!r}")
    require(processes > 0, f"--processes must be positive, got {processes}")
    require(0 <= process < processes, f"--process must be in 0 .. {processes - 1}, got {process}")
    if process == 0:
        _check_port(int(port))
    _initialize(coordinator, processes, process, seconds)


def is_primary() -> bool:
    """Whether this process is the one that reads and writes the workdir.

    Examples:
      >>> from deq_jax.parallel import is_primary
      >>> is_primary()  # always so with a single process
      True
    """
    return jax.process_index() == 0


def end_without_others(error: Exception) -> None:
    """Ends this process with one line and code 134 if the error is of a connection to another one, which was lost.

    Nothing else is done at this end, because JAX would wait for the others first.
    """
    count, own = jax.process_count(), jax.process_index()
    if count > 1 and LOST.search(str(error)):
        _leave(lost_line(1 - own if count == 2 else None), 128 + signal.SIGABRT)


@contextmanager
def agreed() -> Iterator[None]:
    """The body succeeds in all processes, or fails in all of them.

    Nothing inside may wait for other processes.

    Raises:
      InputError, WriteError: wherever it was raised in any process.
      RuntimeError: in the processes that did not fail themselves, for any other exception.

    Examples:
      >>> from deq_jax.parallel import agreed
      >>> with agreed():
      ...     value = 1 + 1  # an exception here is raised in every process
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        _raise_of_others(failure)
    if failure is not None:
        raise failure


@contextmanager
def in_primary(context: AbstractContextManager[None]) -> Iterator[None]:
    """The primary process alone enters the context; if that fails, it fails in all of them."""
    with ExitStack() as stack:
        with agreed():
            if is_primary():
                stack.enter_context(context)
        yield


def _raise_of_others(failure: Exception | None) -> None:
    kinds = {kind.__name__: kind for kind in (InputError, WriteError)}
    name = next((name for name, kind in kinds.items() if isinstance(failure, kind)), type(failure).__name__)
    mine = "" if failure is None else f"{name}: {failure}"
    for number, text in enumerate(gather_texts(mine)):
        if text and failure is None:
            name, _, message = text.partition(": ")
            if name in kinds:
                raise kinds[name](message)
            raise RuntimeError(f"process {number} failed: {text}")


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([own.size], np.int32), tiled=True)
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded[None], tiled=True)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows [b, ...] of all processes, one below the other in their order, [B, ...].

    Examples:
      >>> import numpy as np
      >>> from deq_jax.parallel import gather
      >>> gather(np.array([3, 4]))[:2].tolist()  # the rows of process 0 come first
      [3, 4]
    """
    every: np.ndarray = multihost_utils.process_allgather(rows, tiled=True)
    return every


def from_primary(tree: PyTree) -> PyTree:
    """The primary's arrays, in all processes.

    Args:
      tree: pytree of arrays, of the same structure, shapes and dtypes in every process.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.parallel import from_primary
      >>> from_primary({"step": np.int32(7)})["step"].item()
      7
    """
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


class StopRequest:
    """SIGINT, SIGTERM and the end of a time, while it is entered, as a question with the same answer in all processes.

    With several processes a signal to any of them stops all of them, after the same step: the preemption service
    of JAX, which has been listening to SIGTERM since `connect`, agrees on it. The clock of the primary counts.

    Args:
      seconds: time after which it asks to stop, by SIGALRM; None for no end.

    Examples:
      >>> from deq_jax.parallel import StopRequest
      >>> with StopRequest() as stop:
      ...     print(stop.after(step=1))
      None
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds if is_primary() else None
        self._number: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        several = jax.process_count() > 1
        numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
        numbers += () if self._seconds is None else (signal.SIGALRM,)
        self._handlers = {number: signal.signal(number, self._pass_on if several else self._note) for number in numbers}
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, max(self._seconds, 1e-6))
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def after(self, step: int) -> int | None:
        """The signal that asks to stop after this step, or None to continue; call it after every step."""
        if jax.process_count() == 1:
            return self._number
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        return int(from_primary(np.int32(self._number or signal.SIGTERM)))

    def _note(self, number: int, frame: Any) -> None:
        self._number = number

    def _pass_on(self, number: int, frame: Any) -> None:
        self._number = signal.SIGALRM if number == signal.SIGALRM else signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)


def _in_slurm_step() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _on_tpu() -> bool:
    """Whether this is a TPU VM; its meta data name the other hosts of its slice, if there are any."""
    has_library = importlib.util.find_spec("libtpu") is not None
    return has_library and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _check_port(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(f"--coordinator: process 0 cannot listen at port {port} ({error.strerror})") from None


def _initialize(coordinator: str | None, processes: int | None, process: int | None, seconds: float) -> None:
    where = "the job's processes" if coordinator is None else f"process {process} of {processes} at {coordinator}"
    advice = "start each of them once, and make the port of process 0 reachable"
    late = f"{where}: not all processes connected within {seconds:g} s; {advice}"
    alarm = threading.Timer(seconds, _leave, [late, 2])
    alarm.daemon = True
    alarm.start()
    _shorten_reports()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=int(seconds) + 60,  # JAX aborts the process then: the alarm comes first
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    finally:
        alarm.cancel()


def _shorten_reports() -> None:
    """From here on, stderr has one line about a lost process; see `reports`."""
    global _reporter
    sys.stderr.flush()
    read, write = os.pipe()
    script = [sys.executable, "-I", "-S", str(Path(__file__).with_name("reports.py"))]
    _reporter = subprocess.Popen(script, stdin=read, stdout=2, start_new_session=True)
    os.dup2(write, 2)
    os.close(read)
    os.close(write)


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"error: {message}\n")  # whole, as compiled code writes, too
    sys.stderr.flush()
    os._exit(code)
