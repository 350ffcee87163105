"""Files of a PyTorch network's ``state_dict``: arrays by name, read without running any code in them.

Files of PyTorch itself need torch, `.safetensors` needs safetensors; both are optional and imported when needed.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deq_jax.records import write_npz
from deq_jax.types import InputError, require

Arrays = dict[str, np.ndarray]

SAFE_TORCH = (2, 10)  # older ones can be made to corrupt memory or run code by a file, weights_only or not
STATE_DICTS = ("state_dict", "model_state_dict", "model")  # entries under which trainings save it
PREFIX = "module."  # of every name under DataParallel


def read_state_dict(path: str | Path) -> Arrays:
    """Arrays by their PyTorch names; DataParallel's prefix ``module.`` is left out.

    Args:
      path: ``.pth.tar``, ``.pth`` or ``.pt``, with the state_dict itself or under ``state_dict``,
        ``model_state_dict`` or ``model``; ``.safetensors``; ``.npz``.

    Raises:
      InputError: if the file is missing, damaged, or holds anything but arrays by name; if torch >= 2.10 or
        safetensors is needed and missing.
    """
    path = Path(path)
    read = _by_ending(path, _READERS)
    require(path.is_file(), f"{path}: no such file")
    try:
        arrays = read(path)
    except InputError:
        raise
    except Exception as error:  # torch, pickle, numpy, zipfile and safetensors each have their own
        message = "not read: damaged, or more than arrays by name; no code in it was run"
        raise InputError(f"{path}: {message} ({_reason(error)})") from None
    wrapped = all(name.startswith(PREFIX) for name in arrays)
    return {name.removeprefix(PREFIX): array for name, array in arrays.items()} if wrapped else arrays


def write_state_dict(path: str | Path, arrays: Arrays) -> None:
    """Writes arrays by name, whole or not at all; raises `InputError` as `check_writable` does."""
    check_writable(path)
    _by_ending(Path(path), _WRITERS)(Path(path), arrays)


def check_writable(path: str | Path) -> None:
    """Raises `InputError` unless `path` is a new file, ``.npz`` or ``.safetensors``, that can be written here."""
    path = Path(path)
    if _by_ending(path, _WRITERS) is _write_safetensors:
        _import_safetensors(path)
    require(not path.exists(), f"{path} exists already; choose another file")


def _by_ending(path: Path, functions: dict[str, Callable]) -> Callable:
    for ending, function in functions.items():
        if path.name.endswith(ending):
            return function
    raise InputError(f"{path}: expected a file ending in {', '.join(functions)}")


def _read_npz(path: Path) -> Arrays:
    with path.open("rb") as opened:  # numpy leaves a damaged file open
        file = np.load(opened, allow_pickle=False)
        require(isinstance(file, Mapping), f"{path}: expected an npz file, found a single array")
        return dict(file)


def _read_safetensors(path: Path) -> Arrays:
    return _import_safetensors(path).load_file(path)


def _write_safetensors(path: Path, arrays: Arrays) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _import_safetensors(path).save_file(arrays, temporary)
    temporary.replace(path)


def _import_safetensors(path: Path) -> Any:
    try:
        import safetensors.numpy  # noqa: PLC0415 (optional)
    except ImportError:
        raise InputError(f"{path}: needs safetensors: pip install safetensors; or use an npz file") from None
    return safetensors.numpy


def _read_torch(path: Path) -> Arrays:
    torch = _import_torch(path)
    with warnings.catch_warnings(action="ignore"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    tensors = _find_state_dict(loaded)
    for name, tensor in tensors.items():
        wanted = f"expected tensors by name, themselves or under {', '.join(STATE_DICTS)}"
        is_entry = isinstance(name, str) and isinstance(tensor, torch.Tensor)
        require(is_entry, f"{path}: {wanted}; found {name!r}, {type(tensor).__name__}")
    return {name: _to_numpy(torch, tensor) for name, tensor in tensors.items()}


def _import_torch(path: Path) -> Any:
    try:
        import torch  # noqa: PLC0415 (optional)
    except ImportError:
        other = "or save its state_dict as .npz or .safetensors where PyTorch is"
        raise InputError(f"{path}: reading it needs PyTorch: pip install torch; {other}") from None
    safe = ".".join(map(str, SAFE_TORCH))
    message = f"reading it safely needs torch >= {safe}, found {torch.__version__}: pip install -U torch"
    require(torch.__version__ >= SAFE_TORCH, f"{path}: {message}")
    return torch


def _find_state_dict(loaded: Any) -> Mapping:
    """The state_dict in what was loaded; beside it `model` may be a mere name."""
    if not isinstance(loaded, Mapping):
        raise ValueError(f"expected a state_dict, found {type(loaded).__name__}")
    inner = (loaded[name] for name in STATE_DICTS if isinstance(loaded.get(name), Mapping))
    return next(inner, loaded)


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _reason(error: Exception) -> str:
    """What went wrong, without torch's advice to load the file unsafely."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it names {refused[1]}"
    text = f"{type(error).__name__}: {error}".rpartition("WeightsUnpickler error: ")[2].strip()
    return text.splitlines()[0][:120]


_READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth.tar": _read_torch,
    ".pth": _read_torch,
    ".pt": _read_torch,
}
_WRITERS = {".npz": write_npz, ".safetensors": _write_safetensors}
