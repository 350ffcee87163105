"""Several processes on this machine compute what one does, resume each other, and end together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from deq_jax import InputError, train
from deq_jax.parallel import agreed, connect, from_primary, gather, is_primary
from deq_jax.parallel.processes import gather_texts
from deq_jax.training import load_run, read_metrics
from deq_jax.training.meters import TIMINGS
from tests.helpers.compiling import FAST

ROOT = Path(__file__).parents[2]
SECONDS = 300  # for a job to end
STARTED: list[subprocess.Popen[str]] = []
# Without an attack in the step: the sign of a gradient turns rounding into another image, so that with PGD already one
# process with two devices leaves one with four. Dropout and crops depend on each image's place in the batch.
CONFIG = """
from deq_jax.data import CropFlip
from deq_jax import Standard
from tests.helpers import tiny


def get_config():
    return tiny.get_config(epochs=2, objective=Standard(), augmentation=CropFlip(1))
"""


@pytest.fixture(autouse=True)
def nothing_left_running():
    """Kills what a failed test has left."""
    yield
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config, and the compiled code of all jobs."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "config.py").write_text(CONFIG)
    (folder / "other.py").write_text(CONFIG.replace("epochs=2", "epochs=3"))
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def python(folder, *arguments, devices=2, **environment):
    """Starts Python with simulated devices; its stdout and stderr are one stream."""
    settings = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        **environment,
    }
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    STARTED.append(process)
    return process


def launch(folder, *commands):
    """Starts a command in one process with four devices, or one each in two processes with two devices."""
    if len(commands) == 1:
        return [python(folder, "-m", *commands[0], devices=4)]
    job = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process"]
    return [python(folder, "-m", *command, *job, number) for number, command in enumerate(commands)]


def start(folder, workdir, *extra, processes=1, configs=("config.py", "config.py")):
    """The training command, in one process or two."""
    command = ["deq_jax.train", "--workdir", workdir, *extra, "--config"]
    return launch(folder, *([*command, folder / config] for config in configs[:processes]))


def end(job, *codes):
    """Waits for the processes, which must leave with these codes, and returns what each printed."""
    deadline = time.monotonic() + SECONDS
    try:
        printed = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0] for process in job]
    except subprocess.TimeoutExpired:
        for process in job:
            process.kill()
        printed = [process.communicate()[0] for process in job]
        raise AssertionError("\n--- next process\n".join([f"not ended after {SECONDS} s", *printed])) from None
    assert tuple(process.returncode for process in job) == codes, "\n--- next process\n".join(printed)
    return printed


def errors(printed):
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def metrics(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_training(workdir, expected):
    found = metrics(workdir)
    assert [(line["step"], line["split"]) for line in found] == [(line["step"], line["split"]) for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"split", "warnings"}:
            images = 2 / 288 if name == "adversarial_accuracy" else 0  # of validation, that rounding may change
            where = f"step {line['step']}: {name}"
            np.testing.assert_allclose(line[name], other[name], rtol=1e-5, atol=images, err_msg=where)


def wait_for_line(job, workdir, number):
    deadline = time.monotonic() + SECONDS
    while len(metrics(workdir)) < number:
        if time.monotonic() > deadline or any(process.poll() is not None for process in job):
            end(job, "still running")  # shows what they printed
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(folder):
    """The lines of one process with four devices, never stopped."""
    end(start(folder, folder / "whole"), 0)
    return metrics(folder / "whole")


@pytest.mark.slow
def test_two_processes_that_resume_end_together_where_patience_ends(folder):
    """The count of validations is in the checkpoint, which process 0 alone reads."""
    (folder / "patient.py").write_text(
        CONFIG.replace("epochs=2", "epochs=4, patience=2, optimizer=AdamCosine(1e-12, 0)")
        + "\n\nfrom deq_jax.training import AdamCosine\n"
    )
    both = ("patient.py", "patient.py")
    job = start(folder, folder / "patient", processes=2, configs=both)
    validations = 0
    while validations < 2:  # the best one, and one that is not better
        wait_for_line(job, folder / "patient", 1 + len(metrics(folder / "patient")))
        validations = sum(line["split"] == "validation" for line in metrics(folder / "patient"))
    job[0].send_signal(signal.SIGTERM)
    end(job, *[128 + signal.SIGTERM] * 2)
    end(start(folder, folder / "patient", processes=2, configs=both), 0, 0)
    assert [line["step"] for line in metrics(folder / "patient") if line["split"] == "validation"] == [17, 34, 51]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folder, whole):
    first, second = end(start(folder, folder / "two", processes=2), 0, 0)
    assert_same_training(folder / "two", whole)
    assert [line["split"] for line in whole].count("validation") == 2
    assert load_run(folder / "two", best=False).step == 34
    assert load_run(folder / "two").step == load_run(folder / "whole").step
    assert "devices: 4 x cpu, 2 processes" in first and "trained: 34 steps" in first
    # Gloo's threads report their connections, sometimes into each other's lines: "[Gloo] ... peer ranks ...".
    assert [line for line in second.splitlines() if line and "[Gloo]" not in line and "peer ranks" not in line] == []


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(folder, whole):
    command = ["deq_jax.evaluate", "--workdir", folder / "whole", "--attack", "pgd", "--set", "steps=2"]
    command += ["--set", "restarts=1", "--out"]
    outs = [folder / "one", folder / "both"]
    end(launch(folder, [*command, outs[0]]), 0)
    first, second = end(launch(folder, *[[*command, outs[1]]] * 2), 0, 0)
    assert "robust accuracy" in first and "robust accuracy" not in second
    one, both = (np.load(out / "evaluation.npz") for out in outs)
    for name in one.files:
        if name == "spectral_radius":  # on some processors its many products round otherwise for the last image
            np.testing.assert_allclose(one[name], both[name], rtol=1e-2, err_msg=name)
        else:
            np.testing.assert_array_equal(one[name], both[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "number"), [(2, 1, signal.SIGINT), (1, 2, signal.SIGTERM)])
def test_either_resumes_what_the_other_left_at_a_signal(before, after, number, folder, whole):
    workdir = folder / f"{before}-{after}"
    job = start(folder, workdir, processes=before)
    wait_for_line(job, workdir, 5)
    job[-1].send_signal(number)  # of two processes to the one that does not write, which passes it on as SIGTERM
    printed = end(job, *[128 + signal.SIGTERM] * before)
    told = re.compile(r"error: stopped by SIGTERM after step (\d+), state saved; .*")
    stops = {told.fullmatch(errors(text)[0])[1] for text in printed}
    assert len(stops) == 1
    assert 5 <= int(stops.pop()) < 34
    end(start(folder, workdir, processes=after), *[0] * after)
    assert_same_training(workdir, whole)


@pytest.mark.slow
def test_two_processes_stop_together_when_the_time_of_the_first_is_over(folder):
    printed = end(start(folder, folder / "late", "--minutes", 0.001, processes=2), 75, 75)
    stops = {re.search(r"0.001 minutes are over, stopped after step (\d+)", text)[1] for text in printed}
    assert len(stops) == 1 and load_run(folder / "late", best=False).step == int(stops.pop())


@pytest.mark.slow
def test_two_processes_start_from_another_run_that_one_of_them_reads(folder, whole):
    command = ["deq_jax.train", "--config", folder / "config.py", "--set", "epochs=1", "--init-from"]
    end(launch(folder, [*command, folder / "whole", "--workdir", folder / "from-1"]), 0)
    sources = folder / "whole", folder / "absent"
    end(launch(folder, *[[*command, source, "--workdir", folder / "from-2"] for source in sources]), 0, 0)
    assert_same_training(folder / "from-2", metrics(folder / "from-1"))
    first = metrics(folder / "from-2")[0]
    assert first["loss"] < whole[0]["loss"]


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_all(folder):
    workdir = folder / "mistakes"
    job = start(folder, workdir, processes=2, configs=("config.py", "other.py"))
    for printed in end(job, 2, 2):
        assert errors(printed) == ["error: process 1 trains another config than process 0: epochs was 2, now 3"]
    job = start(folder, workdir, processes=2, configs=("config.py", "absent.py"))
    for printed in end(job, 2, 2):
        assert len(errors(printed)) == 1 and "absent.py" in errors(printed)[0]
    assert not workdir.exists()
    workdir.write_text("a file")  # which only process 0 finds out
    for printed in end(start(folder, workdir, processes=2), 2, 2):
        assert len(errors(printed)) == 1 and "cannot write there" in errors(printed)[0]


@pytest.mark.slow
def test_a_slurm_step_is_recognised_and_the_batch_must_suit_all_devices(folder):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    step |= {"SLURM_JOB_ID": str(free_port())}
    command = ["-m", "deq_jax.train", "--config", folder / "config.py", "--workdir", folder / "slurm"]
    numbers = [{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2)]
    job = [python(folder, *command, "--set", "batch_size=6", **step, **number) for number in numbers]
    for printed in end(job, 2, 2):
        assert errors(printed) == ["error: batch_size 6 is not divisible by the 4 devices of 2 processes"]
    assert not (folder / "slurm").exists()


ALONE = """
import jax
from deq_jax.parallel import agreed, connect
connect("127.0.0.1:{port}", 2, {process}, seconds={seconds})
with agreed():
    if jax.process_index() == 1:
        {action}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "codes", "words"),
    [
        ("raise OSError('disk full')", (1, 1), "process 1 failed: OSError: disk full"),
        ("os._exit(3)", (-6, 3), "error: process 1 of the job was lost; the same command resumes"),
    ],
    ids=["an-exception", "gone"],
)
def test_a_process_that_fails_alone_does_not_leave_the_other_waiting(action, codes, words, folder):
    port = free_port()
    texts = ["import os" + ALONE.format(port=port, process=n, seconds=100, action=action) for n in range(2)]
    printed = end([python(folder, "-c", text) for text in texts], *codes)
    assert words in printed[0]


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_waiting_for_others_is_bounded(process, folder):
    text = ALONE.format(port=free_port(), process=process, seconds=2, action="pass")
    (printed,) = end([python(folder, "-c", text)], 2)
    assert len(errors(printed)) == 1
    assert f"process {process} of 2 at 127.0.0.1" in printed and "not all processes connected within 2 s" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--processes 2", "--coordinator HOST:PORT, --processes N and --process I go together"),
        ("--coordinator h:1 --process 0", "go together"),
        ("--coordinator h --processes 2 --process 0", "--coordinator must be HOST:PORT, got 'h'"),
        ("--coordinator h:99999 --processes 2 --process 0", "--coordinator must be HOST:PORT"),
        ("--coordinator h:1 --processes 0 --process 0", "--processes must be positive, got 0"),
        ("--coordinator h:1 --processes 2 --process 2", "--process must be in 0 .. 1, got 2"),
        ("--coordinator h:1 --processes 2 --process -1", "--process must be in 0 .. 1, got -1"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, words, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(SystemExit) as exit:
        train.main(["--config", "configs/digits_pgd_at.py", "--workdir", str(tmp_path / "new"), *flags.split()])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "new").exists()


def test_a_port_in_use_is_told():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"process 0 cannot listen at port {port}"):
            connect(f"127.0.0.1:{port}", 2, 0)


def test_the_address_may_come_from_the_variable_that_jax_reads(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere")
    with pytest.raises(InputError, match="got 'nowhere'"):
        connect(None, 2, 0)


def test_one_process_is_alone_and_passes_everything_on(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    connect(processes=1)
    assert is_primary() and not jax.distributed.is_initialized()
    assert gather_texts("équilibre") == ["équilibre"]
    np.testing.assert_array_equal(gather(np.arange(6).reshape(3, 2)), np.arange(6).reshape(3, 2))
    assert from_primary({"a": 1}) == {"a": 1}
    with pytest.raises(InputError, match="mine"), agreed():
        raise InputError("mine")
