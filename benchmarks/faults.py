"""How many one-token faults in the code the tests of its room catch.

    python benchmarks/faults.py --count 60 --out runs/bench/faults.json

Each fault is a sign, an operator, a comparison, a constant, an index or the order of two arguments, drawn at random
from the functions of `core`, `attacks`, `defences`, `surrogates` and `evaluation`. It is made in a copy of the project,
and the room's tests run there until one fails: the fast ones, then the slow ones. A fault that is not caught is shown
with its line: some change nothing that a test could see. Runs on the CPU, an hour or more; the same command resumes.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from rich.table import Table

from deq_jax._cli import command_line, console
from deq_jax.core import require
from deq_jax.storage import make_folder, read_json, write_json

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "attacks", "defences", "surrogates", "evaluation")
OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Lt: ("<", ">"),
    ast.Gt: (">", "<"),
    ast.LtE: ("<=", "<"),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}
KINDS = ("operator", "comparison", "constant", "arguments")
TIMEOUT = 1800  # seconds; a fault can make a loop endless
NO_TESTS = 5  # pytest's exit code where no test is marked so


@dataclass(frozen=True)
class Fault:
    """A change of one token: the characters `start` to `end` of a file become `new`."""

    room: str
    kind: str  # "operator", "comparison", "constant" or "arguments"
    file: str
    line: int
    start: int
    end: int
    old: str
    new: str


@dataclass(frozen=True)
class Outcome:
    """The tests' answer to a fault."""

    fault: Fault
    outcome: str  # "caught", "caught slowly" (by a slow test), "survived", "endless" or "crashed"
    by: str  # the first test that failed
    text: str  # the line before


def faults_in(path: Path) -> Iterator[Fault]:
    """All one-token faults in the functions of a file."""
    text = path.read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    source = text.encode()

    def place(node: ast.expr, end: bool = False) -> int:
        line, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        return starts[(line or 1) - 1] + (column or 0)

    def fault(kind: str, node: ast.expr, start: int, end: int, new: str) -> Fault:
        name = str(path.relative_to(ROOT))
        return Fault(path.parent.name, kind, name, node.lineno, start, end, source[start:end].decode(), new)

    def between(left: ast.expr, right: ast.expr, kind: type) -> Iterator[Fault]:
        if kind in OPERATORS:
            old, new = OPERATORS[kind]
            start = source.find(old.encode(), place(left, end=True), place(right))
            if start >= 0:
                name = "comparison" if issubclass(kind, ast.cmpop) else "operator"
                yield fault(name, left, start, start + len(old), new)

    for node in _expressions(ast.parse(text)):
        if isinstance(node, ast.BinOp):
            yield from between(node.left, node.right, type(node.op))
        elif isinstance(node, ast.Compare):
            for left, right, kind in zip([node.left, *node.comparators], node.comparators, node.ops, strict=False):
                yield from between(left, right, type(kind))
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], type(node.op))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            yield fault("operator", node, place(node), place(node.operand), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            changed = not node.value if isinstance(node.value, bool) else _other_number(node.value)
            yield fault("constant", node, place(node), place(node, end=True), repr(changed))
        elif (
            isinstance(node, ast.Call)
            and len(node.args) >= 2
            and not any(isinstance(a, ast.Starred) for a in node.args)
        ):
            first, second = node.args[:2]
            start, end = place(first), place(second, end=True)
            middle = source[place(first, end=True) : place(second)].decode()
            swapped = f"{ast.get_source_segment(text, second)}{middle}{ast.get_source_segment(text, first)}"
            yield fault("arguments", node, start, end, swapped)


def _other_number(value: float) -> float:
    return value + 1 if isinstance(value, int) else value * 2 or 1.0


def _expressions(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions inside functions that compute something: no messages, annotations or refusals."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Lambda)):
            waiting: list[ast.AST] = list(function.body) if isinstance(function, ast.FunctionDef) else [function.body]
            while waiting:
                node = waiting.pop()
                if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.JoinedStr, ast.Raise)):
                    continue
                if isinstance(node, ast.expr):
                    yield node
                waiting += (
                    [node.value] if isinstance(node, ast.AnnAssign) and node.value else ast.iter_child_nodes(node)
                )


def drawn(rooms: list[str], count: int, seed: int) -> list[Fault]:
    """`count` faults: rooms and kinds take turns, each fault of a room and kind is as likely as any other."""
    generator = random.Random(seed)
    of_room = {}
    for room in rooms:
        found = [fault for path in sorted((ROOT / "deq_jax" / room).glob("*.py")) for fault in faults_in(path)]
        generator.shuffle(found)
        of_room[room] = _in_turns([[fault for fault in found if fault.kind == kind] for kind in KINDS])
    return _in_turns(list(of_room.values()))[:count]


def _in_turns(groups: list[list[Fault]]) -> list[Fault]:
    return [fault for each in zip_longest(*groups) for fault in each if fault is not None]


def tried(fault: Fault, tests: Path, cache: Path) -> Outcome:
    """Makes the fault in a copy of the project and runs the room's tests: fast before slow, the file's own first."""
    line = (ROOT / fault.file).read_text().splitlines()[fault.line - 1].strip()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "__pycache__", ".mypy_cache", ".ruff_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        shutil.rmtree(copy / "tests")
        shutil.copytree(tests, copy / "tests", ignore=ignored)
        source = (copy / fault.file).read_bytes()
        (copy / fault.file).write_bytes(source[: fault.start] + fault.new.encode() + source[fault.end :])
        own, room = f"tests/{fault.room}/test_{Path(fault.file).stem}.py", f"tests/{fault.room}"
        first = [own] if (copy / own).exists() else []
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", *first, room]
        environment = {**os.environ, "PYTHONPATH": str(copy), "TESTS_COMPILATION_CACHE": str(cache)}
        for marked, caught in (("not slow", "caught"), ("slow", "caught slowly")):
            try:
                run = subprocess.run(
                    [*command, "-m", marked], cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT
                )
            except subprocess.TimeoutExpired:
                return Outcome(fault, "endless", "", line)
            if run.returncode not in (0, NO_TESTS):
                said = caught if run.returncode in (1, 2) else "crashed"
                return Outcome(fault, said, (failed(run.stdout) or [""])[0], line)
    return Outcome(fault, "survived", "", line)


def failing(names: set[str], tests: Path) -> set[str]:
    """The tests among these that fail in the project as it is: what they catch says nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", *sorted(names)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    require(run.returncode in (0, 1), f"pytest: exit code {run.returncode}: {run.stdout[-500:]}")
    return {name for name in names for found in failed(run.stdout) if found == name or found.startswith(f"{name}::")}


def failed(output: str) -> list[str]:
    """The names of the tests that failed, from pytest's summary."""
    lines = [line.partition(" ") for line in output.splitlines()]
    return [name.split(" - ")[0] for word, _, name in lines if word in ("FAILED", "ERROR")]


def main(argv: list[str] | None = None) -> None:
    """Tries the faults that have not been tried, and tabulates all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="number of faults (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    parser.add_argument("--rooms", nargs="+", default=list(ROOMS), choices=ROOMS, help="where (default: all five)")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="folder of tests (default: the project's)")
    parser.add_argument("--workers", type=int, default=1, help="faults tried at a time (default 1)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of outcomes")
    arguments = parser.parse_args(argv)
    make_folder(arguments.out.parent)
    known = read_json(arguments.out) if arguments.out.exists() else []
    outcomes = [Outcome(Fault(**{**entry["fault"]}), entry["outcome"], entry["by"], entry["text"]) for entry in known]
    faults = drawn(arguments.rooms, arguments.count, arguments.seed)
    waiting = [fault for fault in faults if fault not in [outcome.fault for outcome in outcomes]]
    cache = arguments.out.parent.absolute() / "compilations"
    with ThreadPoolExecutor(arguments.workers) as pool:
        for outcome in pool.map(lambda fault: tried(fault, arguments.tests.absolute(), cache), waiting):
            outcomes.append(outcome)
            write_json(arguments.out, [asdict(each) for each in outcomes])
            where = f"{outcome.fault.file}:{outcome.fault.line}"
            console.print(f"{outcome.outcome:9} {where} {outcome.fault.old!r} -> {outcome.fault.new!r}", markup=False)
    broken = failing({outcome.by for outcome in outcomes if outcome.outcome.startswith("caught")}, arguments.tests)
    kept = [outcome for outcome in outcomes if outcome.by not in broken]
    write_json(arguments.out, [asdict(each) for each in kept])
    _show([outcome for outcome in kept if outcome.fault in faults])
    again = "mend them; the same command tries their faults again"
    require(not broken, f"tests that fail without a fault: {', '.join(sorted(broken))}; {again}")


def _show(outcomes: list[Outcome]) -> None:
    table = Table("room", "faults", "caught by fast tests", "by slow tests", "survived", title="one-token faults")
    for room in ROOMS:
        said = [outcome.outcome for outcome in outcomes if outcome.fault.room == room]
        slow, survived = said.count("caught slowly"), said.count("survived")
        table.add_row(room, *map(str, (len(said), len(said) - slow - survived, slow, survived)))
    console.print(table)
    for outcome in outcomes:
        if outcome.outcome == "survived":
            fault = outcome.fault
            console.print(f"{fault.file}:{fault.line} {fault.old} -> {fault.new}: {outcome.text}", markup=False)


if __name__ == "__main__":
    with command_line():
        main()
