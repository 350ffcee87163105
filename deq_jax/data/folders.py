"""Images as files in a folder for each class."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from deq_jax.core.errors import InputError, first_line, require
from deq_jax.data.datasets import Splits, check_share, checked_images, chosen_path, hold_out_share, mixed
from deq_jax.storage.files import read_npz, write_npz

MODES = {"rgb": "RGB", "grey": "L"}
TEST_NAMES = ("test", "val", "validation", "valid")
MOST_PIXELS = 2**26  # of an image; a small file may promise more than the memory holds

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it also raises each error that it reports
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of images that are refused


@dataclass(frozen=True)
class ImageFolder:
    """Image files in a folder for each class: ``train/CLASS/*.png`` and ``test/CLASS/*.png``, or ``CLASS/*.png``.

    The test images lie in ``test``, ``val``, ``validation`` or ``valid``. Without such folders the classes lie in
    `path` itself, and a share of their images becomes the test set, always the same one. Classes are numbered by
    name; the images of all classes are mixed, always in the same way. All formats of pixels that Pillow reads will do.
    Hidden files and files of other kinds are passed over, and links are followed.

    Attributes:
      path: the folder; "" in a config that leaves it to ``--set dataset.path=PLACE``.
      validation: share of the training images that is held out.
      test: share of all images that becomes the test set, where the folder has none.
      size: images are scaled and cropped in the middle to ``size`` x ``size`` pixels; None: they must be of one size.
      colours: "rgb" or "grey" converts every image; None: they must be all colour or all grey.
      cache: npz file that keeps the images that were read. It is made again when a file, or the way of reading,
        has changed.

    Raises:
      InputError: in ``load``, for a missing, empty or damaged folder or file, named.
      WriteError: in ``load``, if the cache cannot be written.

    Examples:
      >>> import tempfile, numpy as np
      >>> from pathlib import Path
      >>> from PIL import Image
      >>> from deq_jax.data import ImageFolder
      >>> folder = Path(tempfile.mkdtemp())
      >>> for name in ("cat", "dog"):
      ...     (folder / name).mkdir()
      ...     for i in range(10):
      ...         Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / name / f"{i}.png")
      >>> ImageFolder(str(folder)).class_names
      ('cat', 'dog')
      >>> [part.x.shape for part in ImageFolder(str(folder)).load()]
      [(14, 8, 8, 3), (2, 8, 8, 3), (4, 8, 8, 3)]
    """

    path: str
    validation: float = 0.1
    test: float = 0.2
    size: int | None = None
    colours: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        check_share("ImageFolder", self.validation)
        check_share("ImageFolder", self.test, "test")
        sized = self.size is None or (type(self.size) is int and self.size > 0)
        require(sized, f"ImageFolder: size must be a positive number of pixels or None, got {self.size!r}")
        known = self.colours is None or self.colours in MODES
        require(known, f"ImageFolder: colours must be 'rgb', 'grey' or None, got {self.colours!r}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return tuple(_classes(self._parts()["train"]))

    def load(self) -> Splits:
        """Reads the images, or the cache."""
        files = {part: _files(folder, self.class_names) for part, folder in self._parts().items()}
        arrays = self._cached(files)
        parts = [checked_images(arrays[f"x_{part}"], arrays[f"y_{part}"], f"{self.path}: {part}") for part in files]
        train, test = (parts[0], mixed(parts[1])) if len(parts) == 2 else hold_out_share(parts[0], self.test)
        return Splits(*hold_out_share(train, self.validation), test)

    def _parts(self) -> dict[str, Path]:
        """The folder of each part that there is: train and test, or train alone where both lie in one."""
        top = chosen_path("ImageFolder", self.path)
        require(top.is_dir(), f"{top}: no such folder of images")
        train, tests = top / "train", [top / name for name in TEST_NAMES if (top / name).is_dir()]
        if not train.is_dir():
            require(not tests, f"{top}: has a folder of test images, but no folder train beside it")
            return {"train": top}
        require(bool(tests), f"{top}: has train, but none of {', '.join(TEST_NAMES)} beside it")
        require(
            len(tests) == 1, f"{top}: expected one folder of test images, found {' and '.join(t.name for t in tests)}"
        )
        classes, others = set(_classes(train)), set(_classes(tests[0]))
        alone = f"only in train: {_named(classes - others)}; only in {tests[0].name}: {_named(others - classes)}"
        require(classes == others, f"{top}: train and {tests[0].name} must have the same classes; {alone}")
        return {"train": train, "test": tests[0]}

    def _cached(self, files: dict[str, list[tuple[Path, int]]]) -> dict[str, np.ndarray]:
        if self.cache is None:
            return self._read(files)
        cache, digest = Path(self.cache).expanduser(), self._digest(files)
        if cache.exists():
            arrays = read_npz(cache)
            names = {f"{kind}_{part}" for kind in "xy" for part in files}
            is_other = f"{cache}: is not a cache of ImageFolder, and is not changed; choose another name"
            require("digest" in arrays, is_other)
            if str(arrays.pop("digest")) == digest:
                require(arrays.keys() == names, is_other)
                return arrays
        arrays = self._read(files)
        write_npz(cache, {**arrays, "digest": np.array(digest)})
        return arrays

    def _digest(self, files: dict[str, list[tuple[Path, int]]]) -> str:
        """Digest of the files' names, sizes and times of change, and of the way they are read."""
        total = hashlib.sha256(f"{self.size} {self.colours}".encode())
        for part, found in files.items():
            for path, label in found:
                status = _status(path)
                total.update(os.fsencode(f"{part} {path} {label} {status.st_size} {status.st_mtime_ns}\n"))
        return total.hexdigest()

    def _read(self, files: dict[str, list[tuple[Path, int]]]) -> dict[str, np.ndarray]:
        paths = [path for found in files.values() for path, _ in found]
        with ThreadPoolExecutor() as pool:
            images = list(_shown(pool.map(self._decode, paths), len(paths), f"reading {self.path}"))
        for path, image in zip(paths, images, strict=True):
            self._check_alike(path, image, paths[0], images[0])
        arrays, start = {}, 0
        for part, found in files.items():
            arrays[f"x_{part}"] = np.stack(images[start : start + len(found)])
            arrays[f"y_{part}"] = np.array([label for _, label in found])
            start += len(found)
        return arrays

    def _decode(self, path: Path) -> np.ndarray:
        try:
            require(path.is_file(), f"{path}: cannot be read as an image (it is not a file)")
            with Image.open(path, formats=_formats()) as image:
                pixels = image.width * image.height
                require(pixels <= MOST_PIXELS, f"{path}: has {pixels} pixels, more than {MOST_PIXELS}")
                image.load()
                return self._converted(image, path)
        except InputError:
            raise
        except Exception as error:  # each format of Pillow has its own
            raise InputError(f"{path}: cannot be read as an image ({first_line(error)})") from None

    def _converted(self, image: Image.Image, path: Path) -> np.ndarray:
        if self.colours is not None:
            image = image.convert(MODES[self.colours])
        if image.mode not in MODES.values():
            ways = 'ImageFolder(..., colours="rgb") or "grey" converts all images'
            raise InputError(
                f"{path}: expected a colour (RGB) or a grey (L) image of 8 bits, found {image.mode}; {ways}"
            )
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        return pixels if pixels.ndim == 3 else pixels[..., None]

    @staticmethod
    def _check_alike(path: Path, image: np.ndarray, first_path: Path, first: np.ndarray) -> None:
        (height, width, colours), (first_height, first_width, first_colours) = image.shape, first.shape
        if colours != first_colours:
            kinds = {1: "grey", 3: "colour"}
            found = f"{path}: is {kinds[colours]}, and {first_path} is {kinds[first_colours]}"
            raise InputError(f'{found}; ImageFolder(..., colours="rgb") or "grey" converts all images')
        if (height, width) != (first_height, first_width):
            found = f"{path}: has {width} x {height} pixels, and {first_path} has {first_width} x {first_height}"
            raise InputError(f"{found}; ImageFolder(..., size=32) scales and crops all images")


def _classes(folder: Path) -> list[str]:
    """The names of the folders inside, in order, without hidden ones."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    require(bool(names), f"{folder}: expected a folder for each class, found none")
    require(len(names) > 1, f"{folder}: expected a folder for each of two or more classes, found only {names[0]}")
    return names


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The image files of each class, in order, with the labels."""
    known = set(Image.registered_extensions())
    found = []
    for label, name in enumerate(classes):
        images = sorted(path for path in _visible(folder / name) if path.suffix.lower() in known)
        require(bool(images), f"{folder / name}: the class has no images")
        found += [(path, label) for path in images]
    return found


def _formats() -> list[str]:
    """The formats of Pillow that hold pixels. EPS and WMF hold programs, which Pillow has other software run."""
    Image.init()
    return [name for name in Image.OPEN if name not in ("EPS", "WMF")]


def _visible(folder: Path) -> Iterator[Path]:
    """All files below that are not hidden, each folder's once; links are followed."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _status(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:  # a link to nowhere
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _named(names: set[str]) -> str:
    """A few of the names, and how many there are beyond."""
    shown = sorted(names)[:3]
    return (", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"


def _shown(decoded: Iterator[np.ndarray], total: int, what: str) -> Iterator[np.ndarray]:
    """The same images, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return iter(track(decoded, what, total, console=console, transient=True, disable=not sys.stderr.isatty()))
