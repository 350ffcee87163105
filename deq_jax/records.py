"""Results on disk: written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax
import numpy as np
from tensorboardX import SummaryWriter

from deq_jax.types import InputError, PyTree


def make_folder(folder: Path) -> Path:
    """Creates the folder; raises `InputError` where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror})") from None
    return folder


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises `InputError` where there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays as a compressed npz file."""
    write_whole(path, lambda file: np.savez_compressed(file, **cast(Any, arrays)))


def digest(tree: PyTree) -> str:
    """SHA-256 of all arrays of a pytree and of where they are, shortened to 16 digits."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def write_whole(path: Path, writer: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is there whole or not at all, by `writer(file)`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        writer(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its `step`, in order, none twice; and TensorBoard events.

    Args:
      folder: gets metrics.jsonl and tensorboard/.
      step: last step that counts; later lines, left by a run that was killed after them, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / "metrics.jsonl"
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        write_whole(path, lambda file: file.writelines(f"{json.dumps(line)}\n".encode() for line in lines))
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def append(self, step: int, epoch: float, split: str, metrics: dict[str, Any]) -> dict[str, Any]:
        """Appends a line, hands it to the operating system at once, and returns it; its numbers become events."""
        line = {"step": step, "epoch": round(epoch, 4), "split": split, **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{split}/{name}", value, step)
        return line

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an incomplete last one, of a run killed while writing it, is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
