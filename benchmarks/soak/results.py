"""What a command has made, for comparison; and the table of what the faults have done."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deq_jax.evaluation import EvaluationFolder
from deq_jax.storage import digest, read_json, read_npz, write_json
from deq_jax.training import Workdir, read_metrics

TIMES = {"seconds_per_step", "images_per_second", "cell_evaluations_per_second", "input_share", "compile_seconds"}
TIMES |= {"device_memory_gb", "seconds"}
ELSEWHERE = {"workdir", "environment", "cost"}  # of evaluation.json: folders and times
PROBLEMS = ("hang", "traceback", "lines", "lost", "not resumed", "differs", "exit code")
OUTCOMES = ("no harm", "resumed", "refused, then resumed")
Row = dict[str, Any]


def contents(command: str, folder: Path) -> dict[str, str]:
    """Digests of all that a finished command has computed, by their places; no times."""
    return trained(Workdir(folder)) if command == "train" else evaluated(EvaluationFolder(folder))


def trained(workdir: Workdir) -> dict[str, str]:
    """Digests of a training run: both kinds of checkpoints, the lines of metrics, the config and the environment."""
    found = {"config": _of(read_json(workdir.config_file))}
    for name, checkpoints in (("latest", workdir.latest), ("best", workdir.best)):
        checkpoint = checkpoints.read()
        meta = {key: value for key, value in checkpoint.meta.items() if key not in ("interval", "records")}
        found |= {f"{name} step": str(checkpoint.step), f"{name} meta": _of(meta)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.state):
            found[f"{name} {jax.tree_util.keystr(path)}"] = digest(np.asarray(leaf))
    for number, line in enumerate(read_metrics(workdir.metrics)):
        found[f"line {number} of metrics"] = _of(_without(line, TIMES))
    records = [_without(record, {"command", "code"}) for record in read_json(workdir.environment)]
    return found | {"environment": _of(records)}


def evaluated(folder: EvaluationFolder) -> dict[str, str]:
    """Digests of an evaluation: its record, its manifest, and the arrays of all files but the timed ones."""
    record = _without(read_json(folder.record), ELSEWHERE)
    found = {"record": _of(_without_times(record)), "manifest": _of(read_json(folder.manifest))}
    for file in sorted(folder.path.rglob("*.npz")):
        if file != folder.answers("cost"):
            place = file.relative_to(folder.path).as_posix()
            arrays = _without(read_npz(file), TIMES)
            found |= {f"{place} {name}": digest(array) for name, array in arrays.items()}
    return found


def write_contents(command: str, folder: Path, file: Path) -> None:
    """For a process of its own: it computes by JAX, and so can fork no others."""
    write_json(file, contents(command, folder))


def finished(command: str, folder: Path) -> dict[str, Any]:
    """Finished results, which must not be lost: the newest steps, or the digests of batches."""
    if command == "evaluate":
        batches = folder.glob("trials/*/batch-*.npz")
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in batches}
    newest = {}
    for name in ("latest", "best"):
        names = (re.fullmatch(r"(\d+)(\.damaged-\d+)?", path.name) for path in folder.glob(f"checkpoints/{name}/*"))
        newest[name] = max((int(match[1]) for match in names if match), default=-1)
    return newest


def is_lost(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether something that was finished is not there any more."""
    return any(
        after[name] < value if isinstance(value, int) else after.get(name) != value for name, value in before.items()
    )


def first_difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """The first place in which two contents differ."""
    places = expected | found
    return next((place for place in places if expected.get(place) != found.get(place)), None)


def _of(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _without(tree: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


def _without_times(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_without_times(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    return {name: _without_times(part) for name, part in _without(tree, TIMES).items()}


def numbers_of(rows: list[Row]) -> Row:
    """The injections of the page: those that came while the command ran."""
    in_time = [row for row in rows if row["came"] or row["problems"]]
    return {"late": len(rows) - len(in_time), "injections": in_time}


def tables(numbers: Row) -> str:
    """Outcomes by kind of fault, and by command and processes, as Markdown."""
    rows = numbers["injections"]
    names = ["all", "no harm", "resumed", "refused, then resumed", *PROBLEMS]

    def part(title: str, groups: dict[str, list[Row]]) -> list[str]:
        lines = [f"| {' | '.join([title, *names])} |", "|---" * (1 + len(names)) + "|"]
        for name, group in groups.items():
            outcomes = Counter(row["outcome"] for row in group if not row["problems"])
            problems = Counter(problem for row in group for problem in row["problems"])
            counts = [len(group), *(outcomes[outcome] for outcome in OUTCOMES), *(problems[one] for one in PROBLEMS)]
            lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
        return lines

    kinds = dict.fromkeys(row["kind"] for row in sorted(rows, key=lambda row: row["kind"].lower()))
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    where = sorted({(row["command"], row["processes"]) for row in rows}, reverse=True)
    by_place = {
        f"{command}, {processes} process{'es' if processes > 1 else ''}": [
            row for row in rows if (row["command"], row["processes"]) == (command, processes)
        ]
        for command, processes in where
    }
    return "\n".join([*part("fault", by_kind | {"**all**": rows}), "", *part("command", by_place)])
