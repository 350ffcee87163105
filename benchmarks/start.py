"""How long commands take to start: a part of benchmarks/speed.py.

The quickstart's network is trained for three epochs and evaluated on its 360 test images, each in two fresh processes:
"cold" with an empty compilation cache, "warm" with the cache of the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from jax import monitoring

from benchmarks.pages import Row
from deq_jax import evaluate, train

COMMANDS = {
    "train, three epochs": ["train", "--config", "configs/digits_pgd_at.py", "--set", "epochs=3"],
    "evaluate": ["evaluate"],
}

COMPILATION, HIT = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"


def rows(repeats: int) -> list[Row]:
    """Each command, cold, then warm; once, whatever the number of repetitions."""
    found: dict[str, Row] = {name: {"command": name} for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
        for state in ("cold", "warm"):
            for name, command in COMMANDS.items():
                arguments = [*command, "--workdir", str(Path(folder) / state)]
                out = Path(folder) / "out.json"
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.start", str(out), *arguments],
                    env=environment,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                found[name][state] = json.loads(out.read_text())
    return list(found.values())


def table(rows: list[Row]) -> str:
    """One line per command, as Markdown."""
    columns = ["command", "programs", "found in the cache when warm", "compiling, cold (s)", "cold (s)", "warm (s)"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cold, warm = row["cold"], row["warm"]
        numbers = f"{cold['programs']} | {warm['hits']} | {cold['compiling']:.1f}"
        lines.append(f"| {row['command']} | {numbers} | {cold['seconds']:.1f} | {warm['seconds']:.1f} |")
    return "\n".join(lines)


def measure(arguments: list[str]) -> Row:
    """Seconds of a command in this process, those of its compilations, and the number of programs."""
    durations: list[float] = []
    events: Counter[str] = Counter()

    def timed(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILATION:
            durations.append(duration_secs)

    def happened(event: str, **_: str | int) -> None:
        events[event] += 1

    monitoring.register_event_duration_secs_listener(timed)
    monitoring.register_event_listener(happened)
    command = {"train": train.main, "evaluate": evaluate.main}[arguments[0]]
    started = time.perf_counter()
    command(arguments[1:])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "programs": len(durations), "compiling": sum(durations), "hits": events[HIT]}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(sys.argv[2:])))
