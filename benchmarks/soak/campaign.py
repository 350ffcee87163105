"""Each fault at work: the disturbed command, its end, the same command again, and the comparison."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.soak.jobs import POLL, ROOT, Command, Ended, Job, forked, read_to_end
from benchmarks.soak.kinds import KINDS, NEEDS
from benchmarks.soak.results import Row, finished, first_difference, is_lost, write_contents
from deq_jax.storage import make_folder, read_json, write_json

LIMIT = 300.0  # seconds after which a command hangs; a lost peer is noticed after about two minutes
ATTEMPTS = 8  # at a fault that comes too late, because the command has ended
DOCUMENTED = {0, 2, 74, 130, 134, 137, 143}  # exit codes, of docs/errors.md
ONE_LINE = {2, 74}  # of these, the ones that are never without a line
SHARE = 0.5  # of a run or an evaluation, after which a half one is killed
CONFIGS = {"train": "benchmarks/soak/tiny.py", "evaluate": "benchmarks/soak/evaluation.py"}


@dataclass(frozen=True)
class Injection:
    """A fault that is to be made.

    Attributes:
      number: its number in the campaign.
      kind: one of `KINDS`.
      command: train or evaluate.
      processes: 1 or 2.
    """

    number: int
    kind: str
    command: str
    processes: int


def drawn(seed: int, kinds: Iterable[str]) -> Iterator[Injection]:
    """Injections without end: in each round each of these kinds in every place once, in a random order."""
    places = [
        (name, command, processes)
        for name, kind in KINDS.items()
        if name in kinds
        for command in kind.commands
        for processes in kind.processes
    ]
    rng, number = random.Random(seed), 0
    while True:
        for place in rng.sample(places, len(places)):
            yield Injection(number, *place)
            number += 1


class Campaign:
    """The folder of a campaign: undisturbed runs, halves of runs, and the outcomes.

    Args:
      out: the folder.
      seed: random seed of all choices.
    """

    def __init__(self, out: Path, seed: int):
        self.out, self.seed, self.code = out.absolute(), seed, revision()
        self.left_out = {name for name, possible in NEEDS.items() if not possible(self._new("probe"))}

    def made(self, command: str, processes: int, part: str = "whole") -> Path:
        """The folder of an undisturbed run or evaluation, whole or half."""
        return self.out / "made" / f"{command}-{processes}-{part}"

    def outcome_file(self, number: int) -> Path:
        """The outcome of an injection."""
        return self.out / f"outcomes-{self.seed}" / f"{number:04d}.json"

    def outcomes(self) -> list[Row]:
        """All outcomes so far."""
        return [read_json(path) for path in sorted(self.outcome_file(0).parent.glob("*.json"))]

    def prepare(self, injections: Iterable[Injection]) -> None:
        """Makes the undisturbed runs and evaluations that these need, and their halves; existing ones are kept."""
        needed = {(one.command, one.processes) for one in injections}
        for_evaluations = {("train", 1)} if any(command == "evaluate" for command, _ in needed) else set()
        for command, processes in sorted(needed | for_evaluations, reverse=True):
            if not self.made(command, processes, "half").exists():
                self._prepare(command, processes)

    def _prepare(self, command: str, processes: int) -> None:
        whole = Case(self, Injection(-1, "SIGKILL", command, processes), 0)
        job = whole.start("first")
        while not whole.progress() and job.running():
            time.sleep(POLL)
        startup = time.monotonic() - job.began
        ended = job.wait(LIMIT)
        assert set(ended.codes) == {0}, ended
        files = [path for path in whole.folder.rglob("*") if path.is_file()]
        about = {"startup": startup, "seconds": ended.seconds, "parts": whole.progress(), "files": len(files)}
        about |= {"size": sum(path.stat().st_size for path in files), "contents": whole.contents()}
        made = self.made(command, processes)
        make_folder(made.parent)
        write_json(made.with_suffix(".json"), about)
        whole.folder.rename(made)
        half = Case(self, Injection(-2, "SIGKILL", command, processes), 0)
        job = half.start("first")
        while half.progress() < SHARE * about["parts"] and job.running():
            time.sleep(POLL)
        assert job.running(), "the half has become whole"
        job.kill()
        half.folder.rename(self.made(command, processes, "half"))
        for case in (whole, half):
            shutil.rmtree(case.place)

    def about(self, command: str, processes: int) -> Row:
        """Size, times and contents of an undisturbed run or evaluation."""
        found: Row = read_json(self.made(command, processes).with_suffix(".json"))
        return found

    def _new(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class Case:
    """An injection at work, in a folder of its own.

    Attributes:
      place: the folder.
      run: workdir of the training run.
      folder: what the command writes to: the workdir, or the folder of the evaluation.
      rng: makes its choices.
      damaged: files that were spoiled on purpose.
    """

    def __init__(self, campaign: Campaign, injection: Injection, attempt: int):
        self.campaign, self.injection, self.limit = campaign, injection, LIMIT
        self.rng = random.Random(f"{campaign.seed} {injection.number} {attempt}")
        self.place = campaign.out / "work" / f"{campaign.seed}-{injection.number}-{attempt}"
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.run = self.place / "run"
        self.folder = self.run if injection.command == "train" else self.place / "evaluation"
        if injection.command == "evaluate":
            shutil.copytree(campaign.made("train", 1), self.run)
        if KINDS[injection.kind].is_half:
            shutil.copytree(campaign.made(injection.command, injection.processes, "half"), self.folder)
        self.damaged: set[str] = set()
        self.before: Row = {}

    def __getattr__(self, name: str) -> Any:
        """Startup, parts, files and size of the undisturbed run or evaluation."""
        if name not in ("startup", "parts", "files", "size"):
            raise AttributeError(name)
        return self.campaign.about(self.injection.command, self.injection.processes)[name]

    @property
    def command(self) -> Command:
        where = ["--workdir", str(self.run)]
        out = [] if self.injection.command == "train" else ["--out", str(self.folder)]
        arguments = ("--config", CONFIGS[self.injection.command], *where, *out)
        return Command(self.injection.command, arguments, self.injection.processes)

    def move_to(self, folder: Path) -> None:
        """The command writes there."""
        self.run = folder if self.injection.command == "train" else self.run
        self.folder = folder

    def start(self, name: str, *, as_command: bool = False) -> Job:
        """Starts the command; what it prints goes to the folder of this name."""
        return Job(self.command, self.place / "logs" / name, as_command=as_command)

    def progress(self) -> int:
        """How many parts are done: lines of metrics, or batches."""
        if self.injection.command == "evaluate":
            return len(list(self.folder.glob("trials/*/batch-*.npz")))
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def note_finished(self) -> None:
        """Notes the finished results at the moment of the fault."""
        self.before = finished(self.injection.command, self.folder)

    def is_lost(self) -> bool:
        """Whether something is lost that was finished then."""
        before = {name: value for name, value in self.before.items() if name not in self.damaged}
        return is_lost(before, finished(self.injection.command, self.folder))

    def contents(self) -> Any:
        """Digests of what was made, or a line on why there are none."""
        file = self.place / "contents.json"
        pid, errors = forked(
            lambda: write_contents(self.injection.command, self.folder, file), self.place / "contents.out"
        )
        lines = read_to_end(errors)
        os.waitpid(pid, 0)
        return read_json(file) if file.exists() else lines[-1]


def carry_out(campaign: Campaign, injection: Injection) -> Row:
    """Makes the fault, at another moment where it came too late, and says what has become of it."""
    for attempt in range(ATTEMPTS):
        case = Case(campaign, injection, attempt)
        hit, row = _tried(case)
        if not row["problems"]:
            shutil.rmtree(case.place)
        if hit or row["problems"]:
            break
    return asdict(injection) | {"came": hit} | row | {"code": campaign.code}


def revision() -> Row:
    """The git revision of this checkout, and whether its files are as committed."""
    git = ["git", "-C", str(ROOT)]
    said = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {"revision": said.stdout.strip() or None, "unchanged": said.returncode == 0 and not changes.stdout}


def _tried(case: Case) -> tuple[bool, Row]:
    fault = KINDS[case.injection.kind](case)
    began = time.monotonic()
    try:
        fault.before()
        case.note_finished()
        job = case.start("first", as_command=fault.as_command)
        hit = fault.during(job)
        ended = [job.wait(LIMIT), *fault.others()]
        problems = {name for one in ended for name in problems_of(one)}
        lost = case.is_lost()
        fault.undo()
        first, again = ended[0], None
        if set(first.codes) != {0}:
            again = case.start("again").wait(LIMIT)
            ended.append(again)
            problems |= ({"not resumed"} if set(again.codes) != {0} else set()) | problems_of(again)
        lost |= case.is_lost()
        found = case.contents()
    finally:
        fault.clear()
    expected = campaign_contents(case)
    difference = first_difference(expected, found) if isinstance(found, dict) else found
    problems |= ({"differs"} if difference else set()) | ({"lost"} if lost else set())
    outcome = "no harm" if again is None else "refused, then resumed" if 2 in first.codes else "resumed"
    return hit, {
        "about": fault.about.strip(),
        "codes": [one.codes for one in ended],
        "errors": [[[line[:300] for line in lines[-3:]] for lines in one.errors] for one in ended],
        "outcome": outcome,
        "problems": sorted(problems),
        "difference": difference,
        "seconds": round(time.monotonic() - began, 1),
    }


def campaign_contents(case: Case) -> dict[str, str]:
    """Results of the undisturbed command."""
    contents: dict[str, str] = case.campaign.about(case.injection.command, case.injection.processes)["contents"]
    return contents


def problems_of(ended: Ended) -> set[str]:
    """Names of the outcomes that a job must not end with."""
    problems = {"hang"} if ended.hung else set()
    for code, lines in zip(ended.codes, ended.errors, strict=True):
        if any(line.startswith("Traceback") for line in lines):
            problems.add("traceback")
        if len(lines) > 1 or (code in ONE_LINE and len(lines) != 1) or (code == 0 and lines):
            problems.add("lines")
        if code not in DOCUMENTED:
            problems.add("exit code")
    return problems
