"""The lines of metrics.jsonl, and the same as TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from deq_jax.storage.files import write_whole


def line_of(step: int, epoch: float, split: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics: of the steps up to this one ("train"), or of the state after it ("validation")."""
    return {"step": step, "epoch": round(epoch, 4), "split": split, **metrics}


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its `step`, in order, none twice; and TensorBoard events.

    Args:
      path: the file.
      events: folder of the events.
      step: last step that counts; later lines, of a run that was killed after them, are dropped.
    """

    def __init__(self, path: Path, events: Path, step: int):
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        write_whole(path, lambda file: file.writelines(f"{json.dumps(line)}\n".encode() for line in lines))
        self._file = path.open("a")
        self._events = SummaryWriter(str(events), purge_step=step + 1)

    def append(self, line: dict[str, Any]) -> dict[str, Any]:
        """Appends a line, hands it to the operating system at once, and returns it; its numbers become events."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._events.add_scalar(f"{line['split']}/{name}", value, line["step"])
        return line

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an incomplete last one, of a run killed while writing it, is skipped.

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
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
