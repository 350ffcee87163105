"""The history of measurements: every version of their file, and its numbers by name."""

import json
import subprocess

import pytest

from benchmarks import history


def solved(ratio):
    rows = [{"what": "Broyden", "against": "9 small cells", "ratio": ratio}]
    return {"parts": {"solvers": {"rows": rows}}}


@pytest.fixture
def root(tmp_path):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init", "-q")
    file = tmp_path / history.NUMBERS
    file.parent.mkdir(parents=True)
    for ratio in (1.5, 1.25):
        file.write_text(json.dumps(solved(ratio)))
        git("add", ".")
        git("commit", "-q", "-m", "a")
    return tmp_path


def test_versions_are_those_of_git_and_the_file_if_it_has_changed(root):
    assert [parts for _, parts in history.versions(root)] == [solved(1.5)["parts"], solved(1.25)["parts"]]
    (root / history.NUMBERS).write_text(json.dumps(solved(1.125)))
    assert history.versions(root)[-1] == ("now", solved(1.125)["parts"])
    lines = history.series(history.versions(root), "solvers")
    assert [value for _, value in lines["Broyden, small cells"]] == [1.5, 1.25, 1.125]
    assert history.series(history.versions(root), "memory") == {}


def test_the_figure_has_a_line_for_each_name(root, tmp_path):
    history.draw(history.versions(root), tmp_path / "history.svg")
    assert (tmp_path / "history.svg").read_text().startswith("<?xml")


def test_names_of_memory_and_programs():
    assert history.memory([{"config": "cifar10_xl_pgd_at", "setting": "as configured", "step": 18.5}]) == {
        "XL, as configured": 18.5
    }
    assert history.programs([{"command": "evaluate", "cold": {"programs": 21}}]) == {"evaluate": 21}
