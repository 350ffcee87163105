"""The faults: what happens before, during or beside a command, and how its cause is undone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.soak.jobs import POLL, Ended, Job

BOTH = ("train", "evaluate")
DAY = 86400.0
START = 0.5, 6.0  # seconds: Python itself has begun; a command has imported all and begun
LATE = 0.3  # seconds by which a fault at a moment may be later
LONGEST_WRITE = 0.03  # seconds, about the time that a checkpoint of the run takes


class Fault:
    """A fault of one kind, in one place; its choices are drawn.

    Attributes:
      commands, processes: where it can happen.
      is_half: the command resumes a run that was killed half way.
      as_command: the command is started as from a shell, imports included.
      case: see `campaign.Case`.
      about: what was done, in words.
    """

    commands: ClassVar[Sequence[str]] = BOTH
    processes: ClassVar[Sequence[int]] = (1, 2)
    is_half: ClassVar[bool] = False
    as_command: ClassVar[bool] = False

    def __init__(self, case: Any):
        self.case, self.rng = case, case.rng
        self.about = ""

    def before(self) -> None:
        """Happens before the command is started."""

    def during(self, job: Job) -> bool:
        """Happens while it runs; False if it had ended before."""
        return True

    def others(self) -> list[Ended]:
        """How further jobs ended that were started beside it."""
        return []

    def undo(self) -> None:
        """Takes the cause away, before the same command is run again."""

    def clear(self) -> None:
        """Leaves nothing behind, whatever has happened."""

    def at_a_moment(self, job: Job) -> bool:
        """Waits for a random moment of the job; False if it ended before."""
        case, rng = self.case, self.rng
        done = rng.randrange(case.parts)  # lines of metrics, or batches
        self.about += f" after {done} of {case.parts} parts"
        while case.progress() < done and job.running():
            time.sleep(POLL)
        time.sleep(rng.uniform(0, LATE if done else case.startup))
        case.note_finished()
        return len(job.running()) == len(job.pids)


class Signal(Fault):
    """A signal at a random moment: to all processes, or to one of two."""

    number: ClassVar[int]
    to_all: ClassVar[bool] = False

    def during(self, job: Job) -> bool:
        chosen = range(len(job.pids)) if self.to_all else [self.rng.randrange(len(job.pids))]
        self.about = f"to {'all' if self.to_all else f'process {chosen[0]}'}"
        hit = self.at_a_moment(job)
        job.send(self.number, *chosen)
        return hit


class Kill(Signal):
    """SIGKILL, as at a power failure: no process lives on."""

    number, to_all = signal.SIGKILL, True


class Terminate(Signal):
    """SIGTERM."""

    number = signal.SIGTERM


class Interrupt(Signal):
    """SIGINT to all, as by Ctrl-C."""

    number, to_all = signal.SIGINT, True


class InterruptAtStart(Fault):
    """SIGINT while the command imports and begins."""

    processes, as_command = (1,), True

    def during(self, job: Job) -> bool:
        moment = self.rng.uniform(*START)
        self.about = f"after {moment:.2f} s"
        time.sleep(moment)
        self.case.note_finished()
        hit = bool(job.running())
        job.send(signal.SIGINT, 0)
        return hit


class KillInWrite(Fault):
    """SIGKILL while a checkpoint is written."""

    commands = ("train",)

    def during(self, job: Job) -> bool:
        written = self.rng.randrange(1, 6)
        self.about = f"in write {written}"
        was = False
        while job.running() and written:
            now = any(self.case.folder.glob("checkpoints/*/.unfinished*"))
            written -= now and not was
            was = now
            if written:
                time.sleep(POLL / 4)
        time.sleep(self.rng.uniform(0, LONGEST_WRITE))
        self.case.note_finished()
        hit = len(job.running()) == len(job.pids)
        job.send(signal.SIGKILL, *range(len(job.pids)))
        return hit


class Damage(Fault):
    """A file cut off, or some of its bits flipped, between two runs."""

    is_half = True

    def candidates(self) -> list[Path]:
        """The files to choose from; one is damaged."""
        raise NotImplementedError

    def before(self) -> None:
        self.file = self.rng.choice(sorted(path for path in self.candidates() if path.is_file()))
        self.good = self.file.read_bytes()
        if self.rng.random() < 0.5:
            size = self.rng.randrange(len(self.good))
            self.bad, how = self.good[:size], f"cut to {size} of {len(self.good)} bytes"
        else:
            changed, count = bytearray(self.good), self.rng.choice([1, 1, 3])
            for _ in range(count):
                changed[self.rng.randrange(len(changed))] ^= 1 << self.rng.randrange(8)
            self.bad, how = bytes(changed), f"{count} bits flipped"
        self.file.write_bytes(self.bad)
        self.case.damaged.add(str(self.file))
        self.about = f"{self.file.relative_to(self.case.place)}: {how}"

    def undo(self) -> None:
        if self.file.exists() and self.file.read_bytes() == self.bad:  # else it was set aside, or written anew
            self.file.write_bytes(self.good)


class DamagedCheckpoint(Damage):
    """A file of the newest checkpoint that the command reads."""

    def candidates(self) -> list[Path]:
        name = "latest" if self.case.command.name == "train" else "best"
        steps = sorted(self.case.run.glob(f"checkpoints/{name}/*"), key=lambda path: int(path.name))
        return list(steps[-1].rglob("*"))


class DamagedConfig(Damage):
    """The config of the run."""

    def candidates(self) -> list[Path]:
        return [self.case.run / "config.json"]


class DamagedMetrics(Damage):
    """The lines of metrics."""

    commands = ("train",)

    def candidates(self) -> list[Path]:
        return [self.case.run / "metrics.jsonl"]


class DamagedEnvironment(Damage):
    """The record of the environment."""

    commands = ("train",)

    def candidates(self) -> list[Path]:
        return [self.case.run / "environment.json"]


class DamagedBatch(Damage):
    """A batch of the evaluation, or its manifest."""

    commands = ("evaluate",)

    def candidates(self) -> list[Path]:
        batches = list(self.case.folder.glob("trials/*/*.npz"))
        return [self.case.folder / "manifest.json"] if self.rng.random() < 0.3 else batches


class FullDisk(Fault):
    """A file system of its own, with too little room: in bytes, or in files."""

    def before(self) -> None:
        case = self.case
        self.disk = case.place / "disk"
        self.disk.mkdir()
        if self.rng.random() < 0.7:
            room = f"size={self.rng.randrange(4, max(case.size // 1024, 5))}k"
        else:
            room = f"nr_inodes={self.rng.randrange(2, max(case.files, 3))}"
        mounted(self.disk, room)
        case.move_to(self.disk / "folder")
        self.about = f"room for {room}"

    def undo(self) -> None:
        mounted(self.disk, "remount,size=64m,nr_inodes=10000")

    def clear(self) -> None:
        subprocess.run(["umount", "-l", self.disk], check=False, stderr=subprocess.DEVNULL)


class ReadOnly(Fault):
    """A folder in which nothing can be created, before the command starts or while it runs."""

    def before(self) -> None:
        self.is_before = self.rng.random() < 0.3
        if self.is_before:
            self.case.folder.mkdir(parents=True, exist_ok=True)
            self._choose()

    def during(self, job: Job) -> bool:
        if self.is_before:
            return True
        hit = self.at_a_moment(job)
        return hit and self._choose()

    def _choose(self) -> bool:
        top = self.case.folder
        folders = [top, *(path for path in top.rglob("*") if path.is_dir() and "unfinished" not in str(path))]
        folder = self.rng.choice(sorted(folders))
        self.about += f" {folder.relative_to(self.case.place)}"
        try:
            frozen(folder, True)
        except (OSError, subprocess.CalledProcessError):  # it has gone meanwhile, or is not there yet
            return False
        return True

    def undo(self) -> None:
        for folder in [self.case.folder, *(path for path in self.case.folder.rglob("*") if path.is_dir())]:
            if folder.exists():
                frozen(folder, False)

    clear = undo


class KilledPeer(Signal):
    """SIGKILL to one process of two."""

    processes = (2,)
    number = signal.SIGKILL


class StoppedPeer(Signal):
    """SIGSTOP to one process of two. Once the other one has ended, it is continued or killed."""

    processes = (2,)
    number = signal.SIGSTOP

    def during(self, job: Job) -> bool:
        hit = super().during(job)
        end = time.monotonic() + self.case.limit
        while len(job.running()) == 2 and time.monotonic() < end:
            time.sleep(POLL)
        if len(job.running()) == 1:
            job.send(self.rng.choice([signal.SIGCONT, signal.SIGKILL]), 0, 1)
        return hit


class SecondStart(Fault):
    """The same command, started again while it runs."""

    def during(self, job: Job) -> bool:
        hit = self.at_a_moment(job)
        self.second = self.case.start("second")
        return hit

    def others(self) -> list[Ended]:
        return [self.second.wait(self.case.limit)]


class Clock(Fault):
    """A clock that was set back: all files are of the future; sometimes the lock of another host is among them."""

    is_half = True

    def before(self) -> None:
        self.ahead = self.rng.choice([0.01, 1, 400]) * DAY
        self.is_elsewhere = self.rng.random() < 0.3
        lock = self.case.folder / "lock.json"
        if self.is_elsewhere:
            holder = {"host": "elsewhere", "process": 1, "started": "2026-01-01 00:00:00 UTC"}
            lock.write_text(json.dumps(holder) + "\n")
        self.about = f"files {self.ahead / DAY:g} days ahead{', lock of another host' if self.is_elsewhere else ''}"
        self._age()

    def during(self, job: Job) -> bool:
        if not self.is_elsewhere and self.rng.random() < 0.5:
            self.at_a_moment(job)
            self._age()
        return True

    def _age(self) -> None:
        then = time.time() + self.ahead
        for path in [self.case.folder, *self.case.folder.rglob("*")]:
            try:
                os.utime(path, (then, then))
            except FileNotFoundError:  # it was replaced meanwhile
                continue

    def undo(self) -> None:
        if self.is_elsewhere:
            (self.case.folder / "lock.json").unlink(missing_ok=True)  # as its line says


def mounted(disk: Path, options: str) -> None:
    """A file system in memory, made or changed; needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True, capture_output=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount."""
    try:
        mounted(folder, "size=64k")
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", folder], check=True)
    return True


def frozen(folder: Path, is_frozen: bool) -> None:
    """Nothing can be created in the folder any more, or again; root is not bound by the folder's mode."""
    if os.geteuid():
        folder.chmod(0o555 if is_frozen else 0o755)
    else:
        subprocess.run(["chattr", "+i" if is_frozen else "-i", folder], check=True, capture_output=True)


def can_freeze(folder: Path) -> bool:
    """Whether this process may make a folder read-only."""
    try:
        frozen(folder, True)
        frozen(folder, False)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


KINDS: dict[str, type[Fault]] = {
    "SIGKILL": Kill,
    "SIGKILL while a checkpoint is written": KillInWrite,
    "SIGTERM": Terminate,
    "SIGINT": Interrupt,
    "SIGINT while it starts": InterruptAtStart,
    "a damaged checkpoint": DamagedCheckpoint,
    "a damaged config": DamagedConfig,
    "damaged metrics": DamagedMetrics,
    "a damaged environment": DamagedEnvironment,
    "a damaged batch or manifest": DamagedBatch,
    "a full disk": FullDisk,
    "a read-only folder": ReadOnly,
    "a killed peer": KilledPeer,
    "a stopped peer": StoppedPeer,
    "a second start": SecondStart,
    "a clock set back": Clock,
}
NEEDS: dict[str, Callable[[Path], bool]] = {"a full disk": can_mount, "a read-only folder": can_freeze}
"""What must be possible here for a kind of fault."""
