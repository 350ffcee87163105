"""Commands as processes: started, disturbed, and waited for.

A process is forked from one that has imported the package, because the imports take longer than a tiny run. The process
that forks computes nothing by JAX.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
FAST = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
IMPORTED = ("deq_jax.train", "deq_jax.evaluate", "orbax.checkpoint", "matplotlib.figure", "tensorboardX")
POLL = 0.002  # seconds
LEAVE = 10.0  # seconds that processes have after SIGKILL


class Command(NamedTuple):
    """A command line of the package, in one process or several.

    Attributes:
      name: train or evaluate.
      arguments: its arguments.
      processes: number of processes, which meet on this machine.
    """

    name: str
    arguments: tuple[str, ...]
    processes: int = 1


class Ended(NamedTuple):
    """How the processes of a job ended.

    Attributes:
      codes: exit codes, as a shell reports them.
      errors: lines of stderr of each process.
      hung: whether one had to be killed in the end.
      seconds: how long it took.
    """

    codes: list[int]
    errors: list[list[str]]
    hung: bool
    seconds: float


class Job:
    """The processes of a command that was started.

    Args:
      command: the command.
      logs: folder for what they print.
      as_command: they are started as from a shell, imports included.
    """

    def __init__(self, command: Command, logs: Path, *, as_command: bool = False):
        logs.mkdir(parents=True)
        self.logs, self.began = logs, time.monotonic()
        self._codes: dict[int, int] = {}
        arguments = [*command.arguments]
        if command.processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            arguments += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(command.processes), "--process"]
        several = [[*arguments, str(number)] for number in range(command.processes)]
        module = f"deq_jax.{command.name}"
        every = [arguments] if command.processes == 1 else several
        run = as_shell if as_command else main_of
        started = [forked(run(module, each), logs / f"{number}.out") for number, each in enumerate(every)]
        self.pids, self._errors = [pid for pid, _ in started], [file for _, file in started]

    def running(self) -> list[int]:
        """Numbers of the processes that have not ended."""
        for number, pid in enumerate(self.pids):
            if number not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    self._codes[number] = code if code >= 0 else 128 - code
        return [number for number in range(len(self.pids)) if number not in self._codes]

    def send(self, number: int, *processes: int) -> None:
        """Sends a signal to some of the processes, where they run."""
        for process in set(processes) & set(self.running()):
            os.kill(self.pids[process], number)

    def wait(self, seconds: float) -> Ended:
        """Waits for the end of all; kills them after this time."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(POLL)
        left = self.running()
        self.kill()
        codes = [self._codes[number] for number in range(len(self.pids))]
        errors = [read_to_end(file) for file in self._errors]
        for number, lines in enumerate(errors):
            (self.logs / f"{number}.err").write_text("\n".join(lines))
        return Ended(codes, errors, bool(left), time.monotonic() - self.began)

    def kill(self) -> None:
        """Ends all that still run."""
        self.send(signal.SIGKILL, *range(len(self.pids)))
        end = time.monotonic() + LEAVE
        while self.running() and time.monotonic() < end:
            time.sleep(POLL)


def read_to_end(file: int) -> list[str]:
    """The lines of a pipe that are not empty, until all who can write to it have ended, or for some seconds."""
    text, end = b"", time.monotonic() + LEAVE
    while select.select([file], [], [], max(end - time.monotonic(), 0))[0]:
        part = os.read(file, 1 << 16)
        if not part:
            break
        text += part
    os.close(file)
    return [line for line in text.decode(errors="replace").splitlines() if line.strip()]


def main_of(module: str, arguments: list[str]) -> Callable[[], Any]:
    """What a forked process does as the command."""

    def run() -> None:
        sys.argv = [module, *arguments]
        import_module(module).main(arguments)

    return run


def as_shell(module: str, arguments: list[str]) -> Callable[[], Any]:
    """What a forked process does to become the command, imports included."""
    return lambda: os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def forked(run: Callable[[], Any], out: Path) -> tuple[int, int]:
    """The id of a new process that does this and ends as Python does, and a pipe of its stderr; stdout is a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _be(run, out, write)
    os.close(write)
    return pid, read


def _be(run: Callable[[], Any], out: Path, errors: int) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(errors, 2)
        os.close(errors)
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    try:
        # As at the end of an interpreter, which a forked process does not reach.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 1
    os._exit(code)
