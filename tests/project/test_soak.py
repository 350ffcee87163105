"""The fault campaign: what it draws, what it counts, how it damages files; and some of its injections."""

import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.pages import stamp, with_parts
from benchmarks.soak import results
from benchmarks.soak.campaign import drawn, problems_of
from benchmarks.soak.jobs import Ended
from benchmarks.soak.kinds import KINDS, Clock, DamagedConfig
from benchmarks.soak.results import first_difference, is_lost, numbers_of, tables
from deq_jax.storage import read_json

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "failures.md"
LINE = "error: a line"


def test_each_kind_is_drawn_in_each_place_and_the_seed_decides():
    places = sum(len(kind.commands) * len(kind.processes) for kind in KINDS.values())
    first = list(islice(drawn(0, KINDS), places))
    assert {one.kind for one in first} == KINDS.keys()
    assert len({(one.kind, one.command, one.processes) for one in first}) == places
    assert first == list(islice(drawn(0, KINDS), places)) != list(islice(drawn(1, KINDS), places))
    assert {one.kind for one in islice(drawn(0, {"SIGKILL"}), 8)} == {"SIGKILL"}


@pytest.mark.parametrize(
    ("code", "lines", "problems"),
    [
        (0, [], set()),
        (2, [LINE], set()),
        (137, [], set()),
        (0, [LINE], {"lines"}),
        (2, [], {"lines"}),
        (74, [LINE, LINE], {"lines"}),
        (1, ["Traceback (most recent call last):", LINE], {"traceback", "lines", "exit code"}),
        (139, [], {"exit code"}),
    ],
)
def test_what_a_process_may_say_at_its_end(code, lines, problems):
    assert problems_of(Ended([0, code], [[], lines], hung=False, seconds=1.0)) == problems
    assert problems_of(Ended([0, code], [[], lines], hung=True, seconds=1.0)) == problems | {"hang"}


def test_a_row_counts_each_outcome_and_each_problem_once():
    row = {"kind": "SIGKILL", "command": "train", "processes": 1, "came": True, "outcome": "resumed", "problems": []}
    bad = row | {"processes": 2, "problems": ["differs", "lines"]}
    numbers = numbers_of([row, row, bad, row | {"came": False}])
    assert numbers["late"] == 1
    text = tables(numbers)
    assert "| SIGKILL | 3 | 0 | 2 | 0 | 0 | 0 | 1 | 0 | 0 | 1 | 0 |" in text
    assert "| train, 2 processes | 1 | 0 | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 1 | 0 |" in text
    assert "| **all** | 3 |" in text


def test_what_is_finished_may_grow_and_not_shrink(tmp_path):
    (tmp_path / "checkpoints" / "latest" / "4").mkdir(parents=True)
    before = results.finished("train", tmp_path)
    assert before == {"latest": 4, "best": -1} and not is_lost(before, before | {"latest": 6})
    (tmp_path / "checkpoints" / "latest" / "4").rename(tmp_path / "checkpoints" / "latest" / "4.damaged-1")
    assert not is_lost(before, results.finished("train", tmp_path))
    assert is_lost(before, {"latest": 2, "best": -1})
    assert is_lost({"batch": "a"}, {"batch": "b"}) and is_lost({"batch": "a"}, {})
    assert first_difference({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == "b"
    assert first_difference({"a": "1"}, {"a": "1"}) is None


def case(tmp_path, number):
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text('{"seed": 0}')
    return SimpleNamespace(rng=random.Random(number), place=tmp_path, run=run, folder=run, damaged=set())


def test_damage_is_not_undone_where_the_file_was_written_anew(tmp_path):
    fault = DamagedConfig(case(tmp_path, 0))
    fault.before()
    fault.file.write_bytes(b"anew")
    fault.undo()
    assert fault.file.read_bytes() == b"anew"


@pytest.mark.parametrize("number", range(6))
def test_damage_changes_one_file_and_is_undone(number, tmp_path):
    fault = DamagedConfig(case(tmp_path, number))
    fault.before()
    file = tmp_path / "run" / "config.json"
    assert file.read_bytes() != b'{"seed": 0}' and fault.case.damaged == {str(file)}
    assert fault.about.startswith("run/config.json: ")
    fault.undo()
    assert file.read_bytes() == b'{"seed": 0}'


def test_files_of_the_future(tmp_path):
    Clock(case(tmp_path, 0)).before()
    assert (tmp_path / "run" / "config.json").stat().st_mtime > time.time() + 60


@pytest.mark.slow
def test_injections_have_an_outcome_that_is_allowed_and_are_not_repeated(tmp_path):
    kinds = ["SIGKILL while a checkpoint is written", "damaged metrics"]
    command = [sys.executable, "-m", "benchmarks.soak", "--out", tmp_path, "--only", *kinds, "--injections", "3"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX"))}
    for _ in range(2):
        said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
    assert "a checkpoint is written, train" not in said.stdout  # the second time
    found = read_json(tmp_path / "failures.json")["injections"]
    assert len(found) == 3 and {row["kind"] for row in found} == set(kinds)
    assert all(row["problems"] == [] and row["codes"][-1] == [0] * row["processes"] for row in found)
    killed = [row for row in found if row["kind"] == kinds[0]]
    assert all(row["codes"][0] == [128 + signal.SIGKILL] * row["processes"] for row in killed)


def test_the_page_shows_its_numbers():
    numbers = read_json(PAGE.with_suffix(".json"))
    text = PAGE.read_text()
    assert with_parts(PAGE, {"stamp": stamp(numbers["made"]), "tables": tables(numbers)}) == text
    assert all(f"| {kind} |" in text for kind in {row["kind"] for row in numbers["injections"]})
