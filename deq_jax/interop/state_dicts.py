"""Files of a PyTorch network's ``state_dict``: arrays by name, read without running any code in them.

Files of PyTorch itself need torch, `.safetensors` needs safetensors; both are optional and imported when needed.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from deq_jax.core.errors import InputError, require
from deq_jax.storage.files import write_npz, write_whole

Function = TypeVar("Function")

Arrays = dict[str, np.ndarray]

Entries = dict[str, dict[str, Any]]  # of a file: by place, arrays of numpy or torch by name

SAFE_TORCH = (2, 10)  # older ones can be made to corrupt memory or run code by a file, weights_only or not

DEPTH = 3  # of entries within entries

RENAMED = {  # by torch.nn.utils.parametrizations.weight_norm, which torch.nn.utils.weight_norm has become
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


class StateDict(NamedTuple):
    """The entries that were read of a network.

    Attributes:
      arrays: arrays by name, without a prefix.
      left_out: names beside it, that do not have its prefix.
    """

    arrays: Arrays
    left_out: list[str]


def read_state_dict(path: str | Path, expected: Collection[str]) -> StateDict:
    """The arrays of the network that has the expected names, under these names.

    The network may be the whole file, or an entry of a file of PyTorch at any depth (``state_dict``, ``ema``). All its
    names may have a prefix (``module.`` of DataParallel, ``_orig_mod.`` of compiled modules, ``model.``). The entry and
    prefix with all expected names are taken, or else with most of them. Weights normalised by a
    parametrisation of PyTorch 2 have the names of PyTorch 1, ``weight_g`` and ``weight_v``.

    Args:
      path: ``.pth.tar``, ``.pth`` or ``.pt``; ``.safetensors``; ``.npz``.
      expected: names of the network's arrays.

    Raises:
      InputError: if the file is missing, damaged, or holds anything but arrays by name; if two of its entries or
        prefixes have all expected names; if torch >= 2.10 or safetensors is needed and missing.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from deq_jax.interop import read_state_dict, write_state_dict
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "network.npz")
      ...     write_state_dict(path, {"module.weight": np.ones((4, 3)), "epoch": np.array(7)})
      ...     arrays, left_out = read_state_dict(path, expected=["weight"])
      >>> arrays["weight"].shape, left_out
      ((4, 3), ['epoch'])
    """
    path = Path(path)
    read = _by_ending(path, _READERS)
    require(path.is_file(), f"{path}: no such file")
    try:
        entries = {
            place: {_classic(name): array for name, array in arrays.items()} for place, arrays in read(path).items()
        }
        found = _network(path, entries, frozenset(expected))
        return found._replace(arrays={name: _to_numpy(array) for name, array in found.arrays.items()})
    except InputError:
        raise
    except Exception as error:  # torch, pickle, numpy, zipfile and safetensors each have their own
        message = "not read: damaged, or more than arrays by name; no code in it was run"
        raise InputError(f"{path}: {message} ({_reason(error)}){_way_out(path)}") from None


def _classic(name: str) -> str:
    for new, old in RENAMED.items():
        if name == new or name.endswith(f".{new}"):
            return name.removesuffix(new) + old
    return name


def _network(path: Path, entries: Entries, expected: frozenset[str]) -> StateDict:
    """The network under the entry and the prefix that have all expected names, or most of them."""
    found = {
        (entry, prefix): count
        for entry, arrays in entries.items()
        for prefix, count in _prefixes(arrays, expected).items()
    }
    whole = [where for where, count in found.items() if count == len(expected)]
    places = [".".join(filter(None, (entry, prefix.rstrip(".")))) for entry, prefix in whole]
    named = ", ".join(repr(place) if place else "the whole file" for place in places)
    message = f"{path}: holds {len(whole)} networks with the expected names: {named}; save one of them alone"
    require(len(whole) < 2, message)
    entry, prefix = max(found, key=found.__getitem__, default=(next(iter(entries), ""), ""))
    arrays = entries.get(entry, {})
    inside = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return StateDict(inside, sorted(name for name in arrays if not name.startswith(prefix)))


def _prefixes(arrays: Mapping[str, Any], expected: frozenset[str]) -> Counter[str]:
    """How many expected names are there under each prefix; a prefix ends with a dot or is empty."""
    counts: Counter[str] = Counter()
    deepest = max((name.count(".") for name in expected), default=0)
    for name in arrays:
        parts = name.split(".")
        for i in range(max(0, len(parts) - 1 - deepest), len(parts)):
            if ".".join(parts[i:]) in expected:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    return counts


def write_state_dict(path: str | Path, arrays: Arrays) -> None:
    """Writes arrays by name, whole or not at all; raises `InputError` as `check_writable` does.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from deq_jax.interop import write_state_dict
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_state_dict(Path(folder, "network.npz"), {"weight": np.ones((4, 3))})
      ...     [path.name for path in Path(folder).iterdir()]
      ['network.npz']
    """
    check_writable(path)
    _by_ending(Path(path), _WRITERS)(Path(path), arrays)


def check_writable(path: str | Path) -> None:
    """Raises `InputError` unless `path` is a new file, ``.npz`` or ``.safetensors``, that can be written here."""
    path = Path(path)
    if _by_ending(path, _WRITERS) is _write_safetensors:
        _import_safetensors(path)
    require(not path.exists(), f"{path} exists already; choose another file")


def _by_ending(path: Path, functions: dict[str, Function]) -> Function:
    for ending, function in functions.items():
        if path.name.endswith(ending):
            return function
    raise InputError(f"{path}: expected a file ending in {', '.join(functions)}")


def _read_npz(path: Path) -> Entries:
    with path.open("rb") as opened:  # numpy leaves a damaged file open
        file = np.load(opened, allow_pickle=False)
        require(isinstance(file, Mapping), f"{path}: expected an npz file, found a single array")
        return {"": dict(file)}


def _read_safetensors(path: Path) -> Entries:
    return {"": _import_safetensors(path).load_file(path)}


def _write_safetensors(path: Path, arrays: Arrays) -> None:
    content = _import_safetensors(path).save(arrays)
    write_whole(path, lambda file: file.write(content))


def _import_safetensors(path: Path) -> Any:
    try:
        import safetensors.numpy  # noqa: PLC0415 (optional)
    except ImportError:
        raise InputError(f"{path}: needs safetensors: pip install safetensors; or use an npz file") from None
    return safetensors.numpy


def _read_torch(path: Path) -> Entries:
    torch = _import_torch(path)
    with warnings.catch_warnings(action="ignore"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"expected a state_dict, found {type(loaded).__name__}")
    entries = _tensors(torch, loaded)
    wanted = "expected tensors by name, themselves or in an entry"
    require(bool(entries), f"{path}: {wanted}; found {', '.join(map(repr, loaded)) or 'nothing'}")
    return entries


def _tensors(torch: Any, node: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Entries:
    """Entries that hold tensors, at any place: name with dots -> tensors by name."""
    named = {name: value for name, value in node.items() if isinstance(name, str)}
    own = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    found = {".".join(path): own} if own else {}
    for name, value in named.items():
        if isinstance(value, Mapping) and len(path) < DEPTH:
            found |= _tensors(torch, value, (*path, name))
    return found


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


def _to_numpy(array: Any) -> np.ndarray:
    """An array of numpy or torch as one of numpy."""
    if isinstance(array, np.ndarray):
        return array
    tensor = array.detach()
    tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor  # numpy has no bfloat16
    own: np.ndarray = tensor.numpy()
    return own


def _way_out(path: Path) -> str:
    if _by_ending(path, _READERS) is not _read_torch:
        return ""
    alone = 'torch.save(torch.load(path, weights_only=False)["state_dict"], out)'
    return f"; where the file is trusted, save its state_dict alone: {alone}"


def _reason(error: Exception) -> str:
    """The reason of the failure, without torch's advice to load the file unsafely."""
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
