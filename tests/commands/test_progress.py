"""Where a command is, in a file and on a terminal; plain signs that something is wrong."""

import io
import os
import signal
import subprocess
import sys
from math import comb
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import MofNCompleteColumn

from deq_jax import _progress as progress
from deq_jax._cli import PlainConsole, command_line, fail
from deq_jax._progress import Display
from deq_jax.evaluation import plain_warnings
from deq_jax.parallel import processes
from deq_jax.storage import duration

ROOT = Path(__file__).parents[2]


def shown(monkeypatch, **kind):
    file = io.StringIO()
    console = PlainConsole(file=file, width=120, markup=False, highlight=False, color_system=None, **kind)
    monkeypatch.setattr(progress, "console", console)
    with Display(MofNCompleteColumn()) as display:
        display.say("compiling [this]")
        display.show(3, 17, "loss 1.5", "step 3/17  loss 1.5")
        display.show(4, 17, "loss 1.4", "step 4/17  loss 1.4")
    return file.getvalue()


def test_a_file_gets_one_line_at_a_time(monkeypatch):
    assert shown(monkeypatch).splitlines() == ["compiling [this]", "step 3/17  loss 1.5", "step 4/17  loss 1.4"]


def test_a_terminal_gets_a_bar(monkeypatch):
    text = shown(monkeypatch, force_terminal=True)
    assert "compiling [this]" in text and "loss 1.4" in text and "4/17" in text
    assert "step 4/17" not in text


def test_an_interruption_from_the_keyboard_is_one_line(capfd):
    with pytest.raises(SystemExit) as left, command_line():
        raise KeyboardInterrupt
    assert left.value.code == 130 and capfd.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (7199.9, "2 h"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_are_told_in_two_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("images", [1, 20, 64, 1000])
def test_chance_is_told_by_the_exact_binomial_test(images, classes):
    chances = [comb(images, k) * (classes - 1) ** (images - k) for k in range(images + 1)]
    for correct in range(0, images + 1, max(images // 20, 1)):
        at_chance = 20 * sum(chances[correct:]) > classes**images  # in whole numbers: P(X >= correct) > 1 / 20
        assert len(plain_warnings(correct / images, images, classes)) == at_chance


def test_warnings_tell_the_numbers():
    chance, solver = plain_warnings(7 / 64, 64, 10, 0.058)
    assert chance.startswith("clean accuracy is at chance: 10.9 % of 64 images, guessing gives 10.0 %; ")
    assert solver.startswith("the solver has not converged: mean residual 0.058, expected at most 0.05; ")
    assert plain_warnings(0.9, 64, 10, 0.05) == []
    assert len(plain_warnings(0.9, 64, 10, float("inf"))) == 1


@pytest.mark.parametrize(("images", "classes", "residual"), [(0, 10, None), (64, 1, None), (0, 10, float("nan"))])
def test_nothing_to_judge_is_no_warning(images, classes, residual):
    assert plain_warnings(1.0, images, classes, residual) == []


def python(folder, *arguments):
    """Runs Python with the modules of a folder. It heeds SIGINT, which tests in the background ignore."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_that_cannot_be_raised_is_raised_soon_after(tmp_path):
    (tmp_path / "script.py").write_text("""
import gc
import time
from deq_jax._cli import command_line

def interrupt(phase, info):
    gc.callbacks.remove(interrupt)
    raise KeyboardInterrupt

with command_line():
    gc.callbacks.append(interrupt)
    gc.collect()
    time.sleep(60)
""")
    said = python(tmp_path, "script.py")
    assert (said.returncode, said.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("end", [lambda: fail("one", 2), lambda: processes._leave("one", 134)], ids=["fail", "leave"])
def test_an_error_is_written_whole(end, monkeypatch):
    """Compiled code writes to the same place, from other threads."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        end()
    assert written == ["error: one\n"]


@pytest.mark.parametrize("command", ["train", "evaluate", "convert", "report"])
def test_an_interruption_while_a_command_imports_is_no_traceback(command, tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    said = python(tmp_path, "-m", f"deq_jax.{command}")
    assert said.returncode == -signal.SIGINT and said.stderr == ""


def test_an_import_elsewhere_changes_no_signal(tmp_path):
    (tmp_path / "jax.py").write_text("raise KeyboardInterrupt\n")
    text = "import signal\ntry:\n    import deq_jax\nexcept KeyboardInterrupt:\n    pass\n"
    text += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    said = python(tmp_path, "-c", text)
    assert said.returncode == 0, said.stderr
