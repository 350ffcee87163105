"""Datasets as arrays in memory.

A dataset is a frozen object; ``dataset.load()`` returns its `Splits`. Images are uint8, or float32 in
[0, 1]; `to_unit` turns either into float32 in [0, 1] on the device. The validation split is held out
of the training data, so that nothing is ever chosen on the test set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from deq_jax.core.box import clip_to_box
from deq_jax.core.errors import InputError, described, first_line, require
from deq_jax.storage.files import read_npz

SPLIT_SEED = 0

COLOURS = (1, 3)  # usual numbers of channels, by which a shape tells the axis


class Images(NamedTuple):
    """Labelled images.

    Attributes:
      x: ``[N, H, W, C]``, uint8 or float32 in [0, 1].
      y: ``[N]``, int32, classes from 0.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.data import Images
      >>> Images(np.zeros((2, 8, 8, 1), np.float32), np.array([3, 4], np.int32)).x.shape
      (2, 8, 8, 1)
    """

    x: np.ndarray
    y: np.ndarray


class Splits(NamedTuple):
    """The three disjoint parts of a dataset.

    Attributes:
      train: images to train on.
      validation: held out of the training images; every choice is made on them.
      test: images for the final numbers.

    Examples:
      >>> from deq_jax.data import Digits
      >>> [len(part.y) for part in Digits().load()]
      [1149, 288, 360]
    """

    train: Images
    validation: Images
    test: Images


class Dataset(Protocol):
    """Anything with ``load() -> Splits``. Where it has ``class_names``, tables use them: see `class_names`.

    A training config holds it, so it is a frozen dataclass of numbers and strings, and its arrays are made in ``load``.
    A run in a workdir imports the class again, so there it belongs in a file of its own; `Npz` reads arrays in a file.

    Examples:
      >>> from dataclasses import dataclass
      >>> import numpy as np
      >>> from deq_jax.data import Images, Splits, hold_out
      >>> @dataclass(frozen=True)
      ... class Mine:
      ...     seed: int = 0
      ...     def load(self):
      ...         x = np.random.default_rng(self.seed).random((100, 8, 8, 1), np.float32)  # in [0, 1], or uint8
      ...         rest, test = hold_out(Images(x, np.arange(100) % 10), 20)
      ...         return Splits(*hold_out(rest, 10), test)
      >>> [len(part.y) for part in Mine().load()]
      [70, 10, 20]
    """

    def load(self) -> Splits: ...


@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 8x8 pixels, shipped with the package.

    Always split alike: 1,149 for training, 288 for validation, 360 for testing.

    References: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (UCI, CC BY 4.0), the
    test part that scikit-learn distributes.

    Examples:
      >>> from deq_jax.data import Digits
      >>> Digits().load().train.x.shape
      (1149, 8, 8, 1)
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return tuple("0123456789")

    def load(self) -> Splits:
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            images, labels = file["images"], file["labels"]
        data = Images((images / np.float32(16))[..., None], labels.astype(np.int32))
        rest, test = hold_out(data, 360)
        return Splits(*hold_out(rest, 288), test)


@dataclass(frozen=True)
class Npz:
    """Anyone's images: an npz file with ``x_train, y_train, x_test, y_test``.

    Images are [N, H, W, C] (or [N, H, W] for grey ones), uint8 in 0..255 or floating in [0, 1]; labels
    are [N] integers from 0 on.

    Attributes:
      path: the npz file.
      validation: share of the training images that is held out.
      channels: "last" for [N, H, W, C]; "first" for [N, C, H, W], as PyTorch has them; None: last, but a shape that
        looks like channels first, such as [N, 3, 32, 32], is refused.

    Examples:
      >>> from deq_jax.data import Npz
      >>> Npz("mine.npz", channels="first").validation  # nothing is read before load()
      0.1
    """

    path: str
    validation: float = 0.1
    channels: str | None = None

    def __post_init__(self) -> None:
        check_share("Npz", self.validation)
        known = self.channels in ("last", "first", None)
        require(known, f"Npz: channels must be 'last', 'first' or None, got {self.channels!r}")

    def load(self) -> Splits:
        arrays = self._read()
        train, test = (self._images(arrays, part) for part in ("train", "test"))
        same = train.x.shape[1:] == test.x.shape[1:]
        require(
            same,
            f"{self.path}: expected images of one shape, x_train has {train.x.shape[1:]}, x_test {test.x.shape[1:]}",
        )
        return Splits(*hold_out_share(train, self.validation), test)

    def _images(self, arrays: dict[str, np.ndarray], part: str) -> Images:
        x, where = arrays[f"x_{part}"], f"{self.path}: {part}"
        if x.ndim == 4 and self.channels == "first":
            x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        if self.channels is None and _looks_channels_first(x.shape):
            found = f"images must be [N, H, W, C], and {x.shape} looks like [N, C, H, W]"
            ways = 'pass Npz(..., channels="first") for that, or channels="last" if it is not so'
            raise InputError(f"{where}: {found}: {ways}")
        return checked_images(x, arrays[f"y_{part}"], where)

    def _read(self) -> dict[str, np.ndarray]:
        names, path = ["x_train", "y_train", "x_test", "y_test"], chosen_path("Npz", self.path)
        require(path.exists(), f"{self.path}: no such npz file")
        arrays = read_npz(path, only=names)
        missing = [name for name in names if name not in arrays]
        require(not missing, f"{self.path}: expected arrays {', '.join(names)}; missing {', '.join(missing)}")
        return arrays


@dataclass(frozen=True)
class Tfds:
    """A TensorFlow Datasets image dataset, read without TensorFlow.

    Attributes:
      name: name in TFDS, for instance cifar10, cifar100, svhn_cropped, mnist, fashion_mnist.
      validation: share of the training images that is held out.
      data_dir: where the prepared dataset lies; None for TFDS' own default.

    Examples:
      >>> from deq_jax.data import Tfds
      >>> Tfds("cifar10").validation  # nothing is read before load()
      0.1
    """

    name: str
    validation: float = 0.1
    data_dir: str | None = None

    def __post_init__(self) -> None:
        check_share("Tfds", self.validation)

    def load(self) -> Splits:
        train, test = (self._read(split) for split in ("train", "test"))
        return Splits(*hold_out_share(train, self.validation), test)

    def _read(self, split: str) -> Images:
        import tensorflow_datasets as tfds  # noqa: PLC0415 (seconds to import)

        where = f", data_dir={self.data_dir!r}" if self.data_dir else ""
        try:
            builder = tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
        except (AssertionError, ImportError, ValueError) as error:
            usable = f"Tfds: TensorFlow Datasets has no usable dataset named {self.name!r}{where}"
            raise InputError(f"{usable} ({first_line(error)})") from None
        splits = list(builder.info.splits)
        require(split in splits or not splits, f"Tfds {self.name}: expected a split {split}, found {', '.join(splits)}")
        try:
            source = builder.as_data_source(split)
        except (AssertionError, ImportError, KeyError, NotImplementedError, OSError, ValueError) as error:
            raise InputError(
                f"Tfds: {self.name} is not prepared in array_record format on this machine. Prepare it once with:"
                ' pip install tensorflow importlib_resources && python -c "import tensorflow_datasets as tfds;'
                f" tfds.builder({self.name!r}, file_format='array_record'{where}).download_and_prepare()\""
                f" ({first_line(error)})"
            ) from None
        try:
            examples = [source[i] for i in range(len(source))]
            images, labels = (np.stack([example[key] for example in examples]) for key in ("image", "label"))
        except (KeyError, ValueError) as error:
            expected = f"Tfds {self.name} {split}: expected examples with an image, all of one size, and a label"
            raise InputError(f"{expected} ({first_line(error)})") from None
        return checked_images(images, labels, f"Tfds {self.name} {split}")


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """The names of a dataset's classes, in the order of their labels; empty where it has none, or they are missing.

    Raises:
      InputError: they are not a tuple of strings.

    Examples:
      >>> from deq_jax.data import Digits, Npz, class_names
      >>> class_names(Digits())[:3], class_names(Npz("my.npz"))
      (('0', '1', '2'), ())
    """
    try:
        names = getattr(dataset, "class_names", ())
    except InputError:  # the file of names is missing
        return ()
    fits = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    where = f"{type(dataset).__name__}.class_names"
    require(fits, f"{where}: expected a tuple of the names, got {described(names)}")
    return tuple(names)


def load_splits(dataset: Dataset) -> Splits:
    """The splits of a dataset, in the forms of `Images`; raises `InputError` where a split is in no such form."""
    splits, name = dataset.load(), type(dataset).__name__
    fits = isinstance(splits, tuple) and len(splits) == 3 and all(len(part) == 2 for part in splits)
    require(fits, f"{name}.load: expected Splits(train, validation, test) of Images, got {described(splits)}")
    checked = (
        checked_images(np.asarray(part[0]), np.asarray(part[1]), f"{name}.load: {split}")
        for split, part in zip(Splits._fields, splits, strict=True)
    )
    return Splits(*checked)


def hold_out(data: Images, count: int) -> tuple[Images, Images]:
    """Splits off `count` images, always the same ones for the same number of images.

    Examples:
      >>> from deq_jax.data import Digits, hold_out
      >>> rest, held_out = hold_out(Digits().load().train, 100)
      >>> len(rest.y), len(held_out.y)
      (1049, 100)
    """
    shuffled = mixed(data)
    return Images(*(a[count:] for a in shuffled)), Images(*(a[:count] for a in shuffled))


def mixed(data: Images) -> Images:
    """The images in a random order, always the same one for the same number of images: the first ones are a sample."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.y))
    return Images(*(a[order] for a in data))


def chosen_path(name: str, path: str) -> Path:
    """The path of a dataset's files; raises `InputError` for one that a config leaves open."""
    way = "name the files, as in --set dataset.path=PLACE"
    require(path != "", f"{name}: path is not set; {way}")
    return Path(path).expanduser()


def check_share(name: str, share: float, field: str = "validation") -> None:
    """Raises `InputError` for a share that splits nothing off, or all."""
    require(0 < share < 1, f"{name}: {field} must be a share in (0, 1), got {share!r}")


def hold_out_share(data: Images, share: float) -> tuple[Images, Images]:
    """Splits off a share of the images, at least one; see `hold_out`."""
    return hold_out(data, max(1, round(len(data.y) * share)))


def _looks_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether axis 1 has as many entries as colours, and the last one more than colours and transparency."""
    return len(shape) == 4 and shape[1] in COLOURS and shape[2] > 1 and shape[3] > 4


def checked_images(x: np.ndarray, y: np.ndarray, where: str) -> Images:
    """Images in one of the two forms, with a label each; raises `InputError`, beginning with `where`."""
    if x.ndim == 3:
        x = x[..., None]
    require(x.ndim == 4, f"{where}: images must be [N, H, W, C], got shape {x.shape}")
    require(y.shape == (len(x),), f"{where}: expected one label per image, got {len(x)} images and labels {y.shape}")
    require(x.size > 0, f"{where}: holds no images, or images without pixels: shape {x.shape}")
    require(np.issubdtype(y.dtype, np.integer), f"{where}: labels must be integers, got {y.dtype}")
    in_range = y.min() >= 0 and y.max() < 2**31
    require(in_range, f"{where}: labels must count from 0, found {y.min()} to {y.max()}")
    if x.dtype != np.uint8:
        require(jnp.issubdtype(x.dtype, jnp.floating), f"{where}: images must be uint8 or floating, got {x.dtype}")
        x = clip_to_box(x, where).astype(np.float32, copy=False)
    return Images(x, y.astype(np.int32, copy=False))
