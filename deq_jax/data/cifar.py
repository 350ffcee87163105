"""CIFAR-10 and CIFAR-100 from the archives and folders that people have."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deq_jax.core.errors import InputError, first_line, require
from deq_jax.data.datasets import Images, Splits, check_share, checked_images, chosen_path, hold_out_share
from deq_jax.data.folders import ImageFolder

PIXELS = 3 * 32 * 32
LARGEST = 2**28  # bytes of a file; a file of CIFAR-100 has 154 million
HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Version(NamedTuple):
    """The files of one of the four versions.

    Attributes:
      train, test: names of the files of images.
      names: name of the file with the names of the classes.
      labels: number of labels in a record of the binary version, the last is used; 0 for a pickle.
      prefix: beginning of the keys "labels" and "label_names" in a pickle.
    """

    train: tuple[str, ...]
    test: str
    names: str
    labels: int = 0
    prefix: str = ""


VERSIONS = (
    _Version(tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
    _Version(("train",), "test", "meta", prefix="fine_"),
    _Version(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", labels=1),
    _Version(("train.bin",), "test.bin", "fine_label_names.txt", labels=2),
)
WANTED = {name for version in VERSIONS for name in (*version.train, version.test, version.names)}


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 or CIFAR-100 as downloaded from its home page: the Python or the binary version, packed or unpacked.

    The files tell the dataset and the version: ``cifar-10-python.tar.gz``, ``cifar-10-batches-py``,
    ``cifar-10-binary.tar.gz``, ``cifar-10-batches-bin`` and the same for CIFAR-100, with its fine labels. A folder with
    ``train/CLASS/*.png`` and ``test/CLASS/*.png``, as others hand it on, is read by `ImageFolder`.
    No code that a file holds is run: its pickles may make arrays, lists, dicts, texts and numbers only.

    Attributes:
      path: the archive or the folder; "" in a config that leaves it to ``--set dataset.path=PLACE``.
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
        if self._of_images is not None:
            return self._of_images.class_names
        version, files = self._read()
        require(version.names in files, f"{self.path}: no {version.names}, which names the classes, beside the images")
        content = files[version.names]
        if version.labels:
            return tuple(content.decode("latin1").split())
        names = self._unpickled(version.names, content).get(f"{version.prefix}label_names")
        if not isinstance(names, list):
            raise InputError(f"{self.path}: {version.names} has no names of classes")
        return tuple(str(text) for text in names)

    def load(self) -> Splits:
        """Reads the images."""
        if self._of_images is not None:
            return self._of_images.load()
        version, files = self._read()
        names = (*version.train, version.test)
        missing = [name for name in names if name not in files]
        require(not missing, f"{self.path}: incomplete, {', '.join(missing)} missing")
        decode = self._from_bytes if version.labels else self._from_pickle
        *parts, test = (decode(name, files[name], version) for name in names)
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        train = self._checked(version.train[0], pixels, labels)
        return Splits(*hold_out_share(train, self.validation), self._checked(version.test, *test))

    @property
    def _of_images(self) -> ImageFolder | None:
        """The dataset of a folder of image files, if it is one."""
        folder = chosen_path("Cifar", self.path)
        return ImageFolder(str(folder), self.validation) if (folder / "train").is_dir() else None

    def _read(self) -> tuple[_Version, dict[str, bytes]]:
        """The version that is there, and its files."""
        files = self._files()
        found = [version for version in VERSIONS if any(name in files for name in (*version.train, version.test))]
        expected = "expected the files of CIFAR, such as data_batch_1 or train.bin"
        require(bool(found), f"{self.path}: {expected}")
        require(len(found) == 1, f"{self.path}: holds more than one version of CIFAR; name one of them")
        return found[0], files

    def _checked(self, name: str, pixels: np.ndarray, labels: np.ndarray) -> Images:
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return checked_images(images, labels, f"{self.path}: {name}")

    def _from_bytes(self, name: str, content: bytes, version: _Version) -> tuple[np.ndarray, np.ndarray]:
        labels, length = version.labels, version.labels + PIXELS
        whole = len(content) > 0 and len(content) % length == 0
        require(whole, f"{self.path}: {name} is damaged: {len(content)} bytes are not records of {length}")
        records = np.frombuffer(content, np.uint8).reshape(-1, length)
        return records[:, labels:], records[:, labels - 1].astype(np.int32)

    def _from_pickle(self, name: str, content: bytes, version: _Version) -> tuple[np.ndarray, np.ndarray]:
        batch = self._unpickled(name, content)
        pixels, labels = batch.get("data"), batch.get(f"{version.prefix}labels")
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
        if not isinstance(value, dict):
            raise InputError(f"{self.path}: {name}: expected a dict, found a {type(value).__name__}")
        return {_text(key): [_text(item) for item in v] if isinstance(v, list) else v for key, v in value.items()}

    def _files(self) -> dict[str, bytes]:
        """Contents by name of the files of CIFAR that there are, in the archive or the folder."""
        path, files = chosen_path("Cifar", self.path), {}
        require(path.exists(), f"{path}: no such archive or folder of CIFAR")
        try:
            for name, content in _folder(path) if path.is_dir() else _archive(path):
                require(name not in files, f"{path}: holds {name} twice; name one of its folders")
                files[name] = content
        except InputError:
            raise
        except Exception as error:  # tarfile, zlib and lzma each have their own
            raise InputError(f"{path}: cannot be read ({first_line(error)})") from None
        return files


def _folder(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(path.rglob("*")):
        if file.name in WANTED and file.is_file():
            yield file.name, file.read_bytes()


def _archive(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            name, opened = Path(member.name).name, archive.extractfile(member) if member.isfile() else None
            if name in WANTED and opened is not None:
                require(
                    member.size <= LARGEST, f"{path}: {name} has {member.size} bytes, more than a file of CIFAR has"
                )
                yield name, opened.read()


class _DataOnly(pickle._Unpickler):
    """Reads pickles that hold arrays and plain values, and nothing else.

    Python's own reader keeps values in a dict. The reader in C keeps them in a list, as long as the largest number
    that the file has for one: a few bytes of a damaged file would take gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
        return super().find_class(module, name)


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value
