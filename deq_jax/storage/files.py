"""Files that are there whole or not at all: JSON and npz, and digests of arrays."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax
import numpy as np

from deq_jax.core.errors import InputError, WriteError, first_line, require
from deq_jax.core.types import PyTree

DEPTH = 50  # of JSON data, so that whatever walks through it ends

TOO_DEEP = f"not as this package writes JSON: more than {DEPTH} levels"


def make_folder(folder: Path) -> Path:
    """Creates the folder; raises `InputError` where nothing can be written.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from deq_jax.storage import make_folder
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     make_folder(Path(folder) / "runs" / "a").is_dir()
      True
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder / "writable")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror})") from None
    return folder


def write_json(path: Path, value: Any) -> None:
    """Writes a file as indented JSON, whole or not at all.

    Args:
      path: the file, in a folder that exists.
      value: JSON data.

    Raises:
      WriteError: it cannot be written.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from deq_jax.storage import read_json, write_json
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_json(Path(folder, "a.json"), {"step": 7})
      ...     read_json(Path(folder, "a.json"))
      {'step': 7}
    """
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises `InputError` where there is none, or it is damaged or nested absurdly deep.

    Examples:
      >>> from pathlib import Path
      >>> from deq_jax.storage import read_json
      >>> read_json(Path("runs/none/config.json"))
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: runs/none/config.json: no such file
    """
    return parsed_json(read_text(path), str(path))


def parsed_json(text: str, where: str) -> Any:
    """The data of a JSON text; raises `InputError`, beginning with `where`, as `read_json` does."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: {TOO_DEEP}") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    require(_is_shallow(tree, DEPTH), f"{where}: {TOO_DEEP}")
    return tree


def _is_shallow(tree: Any, levels: int) -> bool:
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in below)


def read_text(path: Path) -> str:
    """The text of a file; raises `InputError` where there is none, or it holds something else."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text ({error})") from None


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays as a compressed npz file, whole or not at all.

    Args:
      path: the file, in a folder that exists.
      arrays: arrays by name.

    Raises:
      WriteError: it cannot be written.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from deq_jax.storage import read_npz, write_npz
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_npz(Path(folder, "a.npz"), {"y": np.arange(3)})
      ...     read_npz(Path(folder, "a.npz"))["y"].tolist()
      [0, 1, 2]
    """
    write_whole(path, lambda file: np.savez_compressed(file, **cast(Any, arrays)))


def digest(tree: PyTree) -> str:
    """SHA-256 of all arrays of a pytree and of where they are, shortened to 16 digits.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.storage import digest
      >>> len(digest({"weight": np.zeros(3)}))
      16
    """
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def write_whole(path: Path, writer: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is there whole or not at all, by `writer(file)`; raises `WriteError` if it cannot be."""
    temporary = _temporary(path)
    with writing(path):
        try:
            with temporary.open("wb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A path beside this one that nobody else takes: on two hosts processes may have the same number."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A failure to write inside is a `WriteError` that names the path."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from None


def read_npz(path: Path, *, only: Collection[str] | None = None, skip: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an npz file, by name.

    Args:
      path: the file.
      only: names of arrays that are read, where they are there; None for all.
      skip: names of arrays that are not read.

    Raises:
      InputError: there is no such file, or it is damaged.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from deq_jax.storage import read_npz, write_npz
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_npz(Path(folder, "a.npz"), {"x": np.zeros(3), "y": np.ones(3)})
      ...     list(read_npz(Path(folder, "a.npz"), skip=["x"]))
      ['y']
    """
    try:
        with path.open("rb") as file:  # numpy leaves a damaged file open
            arrays = np.load(file, allow_pickle=False)
            there = getattr(arrays, "files", ())
            names = [name for name in there if name not in skip and (only is None or name in only)]
            found = {name: arrays[name] for name in names}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise InputError(f"{path}: cannot be read as an npz file ({first_line(error)})") from None
    for name, array in found.items():  # numpy returns other files as bytes
        require(isinstance(array, np.ndarray), f"{path}: cannot be read as an npz file ({name} is not an array)")
    return found
