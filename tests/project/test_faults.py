"""The faults of benchmarks/faults.py are single tokens of code that still is Python."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from deq_jax import InputError

PATH = Path(__file__).parents[2] / "benchmarks" / "faults.py"
CODE = """
def shorten(x, limit, scale=2):
    '''Not a place for faults: 1 < 2.'''
    require(limit > 0, f"limit must be > {0}")
    return -x[0] + min(limit, scale) if x is not None and limit else x * 3
"""
TESTS = """
import pytest

@pytest.mark.parametrize("word", ["a b", "c"])
def test_word(word): assert word == "c"
def test_good(): pass
def test_broken(): assert 0
"""
EXPECTED = {
    ("comparison", ">", "<"),
    ("operator", "-", ""),
    ("constant", "0", "1"),
    ("operator", "+", "-"),
    ("arguments", "limit, scale", "scale, limit"),
    ("comparison", "is not", "is"),
    ("operator", "and", "or"),
    ("operator", "*", "/"),
    ("constant", "3", "4"),
}


@pytest.fixture
def faults(monkeypatch):
    spec = importlib.util.spec_from_file_location("faults", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "faults", module)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_every_fault_of_a_function_is_found(faults, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    found = {(fault.kind, fault.old, fault.new) for fault in faults.faults_in(tmp_path / "code.py")}
    whole = {one for one in found if not one[1].startswith("limit > 0")}  # the arguments of require, swapped
    assert whole == EXPECTED


@pytest.mark.slow
def test_a_fault_changes_its_place_and_nothing_else(faults):
    drawn = faults.drawn(["core", "defences"], 24, seed=0)
    assert len(set(drawn)) == 24 and {fault.kind for fault in drawn} == set(faults.KINDS)
    assert drawn == faults.drawn(["core", "defences"], 24, seed=0) != faults.drawn(["core", "defences"], 24, seed=1)
    for fault in drawn:
        source = (faults.ROOT / fault.file).read_bytes()
        assert source[fault.start : fault.end].decode() == fault.old != fault.new
        ast.parse(source[: fault.start] + fault.new.encode() + source[fault.end :])


def test_what_a_broken_test_catches_does_not_count(faults, tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_one.py").write_text(TESTS)
    (tests / "test_two.py").write_text("import nothing_of_this_name\n")
    names = {f"tests/test_one.py::test_{name}" for name in ("good", "broken", "word[a b]", "word[c]")}
    assert faults.failing(names, tests) == {"tests/test_one.py::test_broken", "tests/test_one.py::test_word[a b]"}
    with pytest.raises(InputError, match="pytest: exit code"):
        faults.failing({"tests/test_two.py"}, tests)
