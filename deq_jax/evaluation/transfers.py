"""Precomputed adversarial images, read from files and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from deq_jax.attacks.threats import Threat
from deq_jax.core.box import clip_to_box
from deq_jax.core.errors import InputError, require
from deq_jax.data.datasets import Images
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.storage.files import read_json, read_npz

TOLERANCE = 1e-6  # of a perturbation's length, for rounding


@dataclass(frozen=True)
class Transfer:
    """Precomputed adversarial images, made against this or another predictor.

    Attributes:
      path: an npz file with x_adv [N, H, W, C], floating in [0, 1], and, if it has them, the labels y [N], such as the
        evaluation.npz of another evaluation of the same images; or the folder of one of its trials, which stands for
        clean images where the trial attacked none.

    Examples:
      >>> from deq_jax.evaluation import Transfer, Trial
      >>> Trial("transferred", Transfer("others/x_adv.npz")).attack.uses_gradients  # nothing is read before load()
      False
    """

    path: str

    uses_gradients: ClassVar[bool] = False
    gradient_queries: ClassVar[int] = 0

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Manifest of the trial's evaluation, as JSON data; None for a file."""
        path = Path(self.path)
        return read_manifest(EvaluationFolder.of_trial(path).manifest) if path.is_dir() else None

    def load(self, images: Images, x: np.ndarray, threat: Threat) -> np.ndarray:
        """The images [N, H, W, C], float32.

        Args:
          images: images that are evaluated.
          x: the same ones, float32 in [0, 1].
          threat: the adversarial images must lie within it.

        Raises:
          InputError: they cannot be read, or are not adversarial images of these ones.
        """
        path = Path(self.path)
        x_adv, y = _read_folder(path, x) if path.is_dir() else _read_images(path)
        require(x_adv.shape == x.shape, f"{self.path}: expected x_adv of shape {x.shape}, got {x_adv.shape}")
        same = y is None or np.array_equal(y, images.y)
        require(same, f"{self.path}: its labels y are not the labels of the {len(x)} images that are evaluated")
        found: np.ndarray = clip_to_box(x_adv, f"{self.path}: x_adv").astype(np.float32)
        check_radius(self.path, found, x, threat)
        return found


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an evaluation, as JSON data; raises `InputError` where it is none."""
    found = read_json(path)
    known = isinstance(found, dict) and isinstance(found.get("config"), dict)
    require(known, f"{path}: not the manifest of an evaluation: expected names and values, with a config")
    return cast(dict[str, Any], found)


def _read_images(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    arrays = read_npz(path)
    require("x_adv" in arrays, f"{path}: expected an array x_adv, found {', '.join(arrays) or 'none'}")
    return arrays["x_adv"], arrays.get("y")


def read_trial(path: Path, x: np.ndarray) -> np.ndarray:
    """The images [N, H, W, C] in a trial's folder, and x where it attacked none."""
    return with_batches(x, _read_batches(path))


def with_batches(x: np.ndarray, batches: Sequence[tuple[Any, dict[str, np.ndarray]]]) -> np.ndarray:
    """The images x [N, H, W, C], where a trial's batches have others in their place; each has a name for errors."""
    x_adv = x.copy()
    for file, arrays in batches:
        known = {"x_adv", "number"} <= set(arrays) and are_numbers(arrays["number"], len(x))
        known = known and arrays["x_adv"].shape == (len(arrays["number"]), *x.shape[1:])
        known = known and np.issubdtype(arrays["x_adv"].dtype, np.floating)
        require(known, f"{file}: expected x_adv of images of shape {x.shape[1:]}, numbered below {len(x)}")
        x_adv[arrays["number"]] = arrays["x_adv"]
    return x_adv


def are_numbers(number: np.ndarray, count: int) -> bool:
    """Whether an array [B] holds numbers of so many images."""
    is_list = number.ndim == 1 and np.issubdtype(number.dtype, np.integer)
    return is_list and bool(np.all((number >= 0) & (number < count)))


def _read_folder(path: Path, x: np.ndarray) -> tuple[np.ndarray, None]:
    x_adv = read_trial(path, x)
    evaluated = sum(
        len(arrays.get("number", ())) for _, arrays in _read_batches(EvaluationFolder.of_trial(path).trial("clean"))
    )
    require(evaluated == len(x), f"{path}: its evaluation is of {evaluated} images, expected the {len(x)} of this one")
    return x_adv, None


def _read_batches(path: Path) -> list[tuple[Path, dict[str, np.ndarray]]]:
    files = EvaluationFolder.batches_of(path)
    require(len(files) > 0, f"{path}: expected a trial's files batch-*.npz, found none")
    return [(file, read_npz(file)) for file in files]


def is_within(x_adv: np.ndarray, x: np.ndarray, threat: Threat) -> np.ndarray:
    """[N] bool: whether each image lies in the ball around the clean one, but for rounding."""
    return np.asarray(threat.length(x_adv - x)) <= threat.epsilon + TOLERANCE


def check_radius(name: str, x_adv: np.ndarray, x: np.ndarray, threat: Threat) -> None:
    """Raises `InputError` if an adversarial image is not within the ball around the clean one."""
    outside = np.flatnonzero(~is_within(x_adv, x, threat))
    if len(outside) > 0:
        length = float(np.max(np.asarray(threat.length(x_adv - x))))
        which = f"{name}: {len(outside)} adversarial images (first: {outside[0]})"
        raise InputError(f"{which} are up to {length:g} away from the clean ones, more than {threat}")
