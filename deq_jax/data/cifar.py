"""CIFAR-10 and CIFAR-100 from the archives and folders that people have."""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deq_jax.core.errors import InputError, require
from deq_jax.data.datasets import Images, Splits, check_share, checked_images, hold_out_share

PIXELS = 3 * 32 * 32
HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
TEN = [f"data_batch_{i}" for i in range(1, 6)]


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 or CIFAR-100 as downloaded from its home page: the Python or the binary version, packed or unpacked.

    The files tell the dataset and the version: ``cifar-10-python.tar.gz``, ``cifar-10-batches-py``,
    ``cifar-10-binary.tar.gz``, ``cifar-10-batches-bin`` and the same for CIFAR-100, with its fine labels.
    No code that a file holds is run: its pickles may make arrays, lists, dicts, texts and numbers only.

    Attributes:
      path: the archive or the folder.
      validation: share of the training images that is held out.

    Raises:
      InputError: in ``load``, for a missing, incomplete, damaged or hostile file, named.

    References: Krizhevsky 2009, Learning multiple layers of features from tiny images.

    Examples:
      >>> from deq_jax.data import Cifar
      >>> Cifar("~/data/cifar-10-python.tar.gz").validation
      0.1
    """

    path: str
    validation: float = 0.1

    def __post_init__(self) -> None:
        check_share("Cifar", self.validation)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        for name in ("batches.meta.txt", "fine_label_names.txt"):
            if name in (files := self._files((name,))):
                return tuple(files[name].decode().split())
        metas = self._files(("batches.meta", "meta"))
        for name, content in metas.items():
            meta = self._unpickled(name, content)
            names = meta.get("label_names", meta.get("fine_label_names"))
            if not isinstance(names, list):
                raise InputError(f"{self.path}: {name} has no names of classes")
            return tuple(str(text) for text in names)
        raise InputError(f"{self.path}: no file with the names of the classes beside the images")

    def load(self) -> Splits:
        """Reads the images."""
        train, test = self._images()
        return Splits(*hold_out_share(train, self.validation), test)

    def _images(self) -> tuple[Images, Images]:
        wanted = (*TEN, "test_batch", "train", "test")
        files = self._files((*wanted, *(f"{name}.bin" for name in wanted)))
        for suffix, decode in (("", self._from_pickle), (".bin", self._from_bytes)):
            for train, test, hundred in ((TEN, "test_batch", False), (["train"], "test", True)):
                names = [f"{name}{suffix}" for name in (*train, test)]
                if any(name in files for name in names):
                    missing = [name for name in names if name not in files]
                    require(not missing, f"{self.path}: incomplete, {', '.join(missing)} missing")
                    parts = [decode(name, files[name], hundred) for name in names]
                    merged = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
                    return self._checked(names[0], *merged), self._checked(names[-1], *parts[-1])
        raise InputError(
            f"{self.path}: expected the files of CIFAR, such as data_batch_1, data_batch_1.bin or train.bin"
        )

    def _checked(self, name: str, pixels: np.ndarray, labels: np.ndarray) -> Images:
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return checked_images(images, labels, f"{self.path}: {name}")

    def _from_bytes(self, name: str, content: bytes, hundred: bool) -> tuple[np.ndarray, np.ndarray]:
        labels = 2 if hundred else 1  # coarse and fine ones, or one kind
        length = labels + PIXELS
        whole = len(content) > 0 and len(content) % length == 0
        require(whole, f"{self.path}: {name} is damaged: {len(content)} bytes are not records of {length}")
        records = np.frombuffer(content, np.uint8).reshape(-1, length)
        return records[:, labels:], records[:, labels - 1].astype(np.int32)

    def _from_pickle(self, name: str, content: bytes, hundred: bool) -> tuple[np.ndarray, np.ndarray]:
        batch = self._unpickled(name, content)
        pixels, labels = batch.get("data"), batch.get("fine_labels" if hundred else "labels")
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (PIXELS,)):
            raise InputError(f"{self.path}: {name}: expected data of shape [N, {PIXELS}] and type uint8")
        numbers = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
        require(numbers, f"{self.path}: {name}: expected labels, a list of integers")
        return pixels, np.array(labels)

    def _unpickled(self, name: str, content: bytes) -> dict[str, Any]:
        """The dict of a pickle, by text keys; raises `InputError` for anything that is not plain data."""
        try:
            value = _DataOnly(io.BytesIO(content), encoding="bytes").load()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise InputError(f"{self.path}: {name} cannot be read as plain data ({error})") from None
        require(isinstance(value, dict), f"{self.path}: {name} holds no dict")
        return {_text(key): [_text(item) for item in v] if isinstance(v, list) else v for key, v in value.items()}

    def _files(self, names: tuple[str, ...]) -> dict[str, bytes]:
        """Contents by name of the files that exist, in the archive or the folder."""
        path = Path(self.path).expanduser()
        require(path.exists(), f"{path}: no such archive or folder of CIFAR")
        try:
            if path.is_dir():
                return {file.name: file.read_bytes() for file in sorted(path.rglob("*")) if file.name in names}
            with tarfile.open(path) as archive:
                members = [member for member in archive if member.isfile() and Path(member.name).name in names]
                return {Path(m.name).name: file.read() for m in members if (file := archive.extractfile(m)) is not None}
        except (OSError, EOFError, tarfile.TarError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None


class _DataOnly(pickle.Unpickler):
    """Reads pickles that hold arrays and plain values, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
        return super().find_class(module, name)


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value
