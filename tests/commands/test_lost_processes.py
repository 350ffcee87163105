"""A process of a job that is lost ends the others with one line each."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from deq_jax._cli import command_line
from deq_jax.parallel import processes
from deq_jax.parallel.reports import readable
from deq_jax.training import read_metrics
from tests.helpers.compiling import FAST
from tests.helpers.tiny import OVERRIDES, assignments

ROOT = Path(__file__).parents[2]
TIMED = "1127 09:50:35.885190   12298"
END = (
    "Terminating process because the JAX distributed service detected fatal errors. This most likely indicates that "
    "another task died; see the other task logs for more details. absl::Status: "
)
STACK = "*** Check failure stack trace: ***\n    @     0x7fd5810f81b4  absl::LogMessage::SendToLog()\n"
UNHEALTHY = (
    f"E{TIMED} coordination_service.cc:1518] [1359] Use error polling to propagate the following error to all tasks: "
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed.\n"
    f"F{TIMED} client.h:86] {END}UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n\n"
    f"RPC: /xla.coordination.CoordinationService/PollForError\n{STACK}"
)
SILENT = (
    f"F{TIMED} client.h:80] {END}DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/Heartbeat\n{STACK}"
)
GONE = (
    f"W{TIMED} preemption_sync_manager.cc:147] Failed to retrieve preemption notice: UNAVAILABLE: Socket closed\n"
    f"F{TIMED} client.h:80] {END}UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was "
    f"preempted/died/restarted unexpectedly or this task is experiencing network issues.\n{STACK}"
)
LATE = (
    f"F{TIMED} client.h:86] {END}INTERNAL: Failed to disconnect: Shutdown barrier has failed.\n"
    "# of tasks that reached the barrier: 1/2.\nThe first task at the barrier: 0. Some timed out task names:\n1\n"
    f"{STACK}"
)
NOTICE = f"W{TIMED} preemption_notifier.cc:94] SIGTERM caught at 2026-11-27T09:47:48.008578678+00:00\n"
OTHER = f"E{TIMED} gpu_timer.cc:82] Delay kernel timed out\n  in its second line\n"
STOPPED = "error: stopped by SIGTERM after step 7, state saved; the same command resumes\n"


def lost(who):
    return f"error: {who} of the job was lost; the same command resumes\n"


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (UNHEALTHY, lost("process 1")),
        (SILENT, lost("process 0")),
        (GONE, lost("process 0")),
        (LATE, lost("process 1")),
        (f"F{TIMED} client.h:86] {END}INTERNAL\n", lost("another process")),
        (NOTICE + STOPPED, STOPPED),
        (STOPPED + LATE, STOPPED),  # the others waited for this one
        (f"{NOTICE}Traceback (most recent call last):\n  File\n", "Traceback (most recent call last):\n  File\n"),
        (NOTICE + OTHER, OTHER),
        (OTHER, OTHER),
        ("", ""),
    ],
)
def test_reports_on_processes_become_one_line_and_all_else_stays(printed, expected):
    assert "".join(readable(printed.splitlines(keepends=True))) == expected


@pytest.mark.parametrize(
    ("count", "who", "error"),
    [
        (2, "process 1", jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")),
        (2, "process 1", ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")),
        (4, "another process", jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out with key: a")),
        (2, "process 1", jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")),
    ],
)
def test_an_error_of_a_connection_to_another_process_is_one_line(count, who, error, monkeypatch, capfd):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match="134"), command_line():
        raise error
    assert capfd.readouterr().err == lost(who)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"), command_line():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_job_whose_process_was_killed_ends_and_resumes(victim, tmp_path):
    def start():
        with socket.create_server(("127.0.0.1", 0)) as server:
            job = ["--coordinator", f"127.0.0.1:{server.getsockname()[1]}", "--processes", "2", "--process"]
        command = [sys.executable, "-m", "deq_jax.train", "--config", "configs/digits_pgd_at.py", "--workdir", tmp_path]
        command += assignments(*OVERRIDES, "log_every=1", "epochs=4")
        environment = {**os.environ, "XLA_FLAGS": FAST, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        return [
            subprocess.Popen(
                [*command, *job, str(number)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
            )
            for number in range(2)
        ]

    started = start()
    while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path / "metrics.jsonl")) < 3:
        assert started[0].poll() is None
        time.sleep(0.01)
    started[victim].kill()
    said = [process.communicate(timeout=300)[1] for process in started]
    assert started[1 - victim].returncode in (134, -signal.SIGABRT)
    assert re.fullmatch(lost(f"process {victim}"), said[1 - victim]) and said[victim] == ""
    assert [process.communicate(timeout=300)[1] for process in start()] == ["", ""]
    assert max(line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")) == 4 * 71


@pytest.mark.slow
def test_stderr_goes_through_a_process_that_outlives_this_one():
    text = "import os, signal; from deq_jax.parallel import processes; processes._shorten_reports(); "
    text += f"os.write(2, {SILENT.encode()!r}); os.abort()"
    ended = subprocess.run([sys.executable, "-c", text], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == -signal.SIGABRT and ended.stderr == lost("process 0")
    assert processes._reporter is None  # of this process
