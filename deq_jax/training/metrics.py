"""The lines of metrics.jsonl, and the same as TensorBoard events."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from deq_jax.core.errors import InputError, described, require
from deq_jax.storage.files import parsed_json, read_text, write_whole, writing


def line_of(step: int, epoch: float, split: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics: of the steps up to this one ("train"), or of the state after it ("validation")."""
    return {"step": step, "epoch": round(epoch, 4), "split": split, **metrics}


def digest_of(records: Iterable[dict[str, Any]]) -> hashlib._Hash:
    """SHA-256 of JSON data of a run, such as its lines of metrics."""
    return hashlib.sha256("".join(map(_text, records)).encode())


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its `step`, in order, none twice; and TensorBoard events.

    Args:
      path: the file.
      events: folder of the events.
      step: last step that counts; later lines, of a run that was killed after them, are dropped.
    """

    def __init__(self, path: Path, events: Path, step: int):
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        write_whole(path, lambda file: file.writelines(_text(line).encode() for line in lines))
        self._path, self._sum = path, digest_of(lines)
        with writing(path):
            self._file = path.open("a")
            self._events = Events(events, step + 1)

    def append(self, line: dict[str, Any]) -> dict[str, Any]:
        """Appends a line, hands it to the operating system at once, and returns it; its numbers become events.

        Raises:
          WriteError: it cannot be written.
        """
        numbers = {
            f"{line['split']}/{name}": value
            for name, value in line.items()
            if isinstance(value, int | float) and name not in ("step", "epoch")
        }
        with writing(self._path):
            self._file.write(_text(line))
            self._file.flush()
            self._sum.update(_text(line).encode())
            self._events.append(line["step"], numbers)
        return line

    @property
    def digest(self) -> str:
        """The digest of all lines so far; see `digest_of`."""
        return self._sum.hexdigest()

    def close(self) -> None:
        """Closes the files."""
        with writing(self._path), closing(self._file):
            self._events.close()


class Events:
    """A file of TensorBoard events, written at once. (`SummaryWriter` has a thread. Nobody would see its failures.)

    Args:
      folder: gets the file.
      first: step from which events of earlier files do not count.
    """

    def __init__(self, folder: Path, first: int):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._writer = RecordWriter(str(folder / name))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def append(self, step: int, numbers: dict[str, float]) -> None:
        """Appends numbers by their tags."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self._write(Event(step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an incomplete last one, of a run killed while writing it, is skipped.

    Raises:
      InputError: another line is not one of metrics, or the file cannot be read.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from deq_jax.training import read_metrics
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "metrics.jsonl")
      ...     _ = path.write_text('{"step": 10, "split": "train", "loss": 2.5}')
      ...     read_metrics(path)
      [{'step': 10, 'split': 'train', 'loss': 2.5}]
    """
    lines: list[dict[str, Any]] = []
    texts = read_text(path).split("\n") if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            line = parsed_json(text, f"{path}: line {number}")
        except InputError:
            if number == len(texts):
                break
            raise
        fits = isinstance(line, dict) and isinstance(line.get("step"), int)
        require(fits, f"{path}: line {number}: expected metrics with their step, found {described(line)}")
        lines.append(line)
    return lines
