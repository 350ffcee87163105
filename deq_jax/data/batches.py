"""Batches as a pure function of (seed, step), padded batches of an evaluation, and augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.core.keys import Keys
from deq_jax.core.types import AnyArray, Array
from deq_jax.data.datasets import Images


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The images of training step `step` (from 0): a new order every epoch, without an incomplete batch.

    Examples:
      >>> from deq_jax.data import batch_indices
      >>> first, second, third = (batch_indices(5, batch_size=2, seed=0, step=step) for step in range(3))
      >>> len({*first.tolist(), *second.tolist()})  # one epoch: two batches, one image is dropped
      4
    """
    epoch, position = divmod(step, size // batch_size)
    return _order(size, seed, epoch)[position * batch_size : (position + 1) * batch_size]


@lru_cache(maxsize=1)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(size)
    order.flags.writeable = False
    return order


class EvaluationBatch(NamedTuple):
    """Images in their order, padded by repetition to a full batch.

    Attributes:
      x, y: as in `Images`, [B, ...].
      number: [B] int32, the image's number in its split.
      is_padding: [B] bool.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.data import Images, evaluation_batches
      >>> data = Images(np.zeros((3, 8, 8, 1), np.float32), np.array([4, 5, 6]))
      >>> evaluation_batches(data, batch_size=2)[-1].is_padding.tolist()
      [False, True]
    """

    x: AnyArray
    y: AnyArray
    number: AnyArray
    is_padding: AnyArray


def evaluation_batches(data: Images, batch_size: int) -> list[EvaluationBatch]:
    """Every image exactly once, in batches of one size, the last one padded.

    Examples:
      >>> from deq_jax.data import Digits, evaluation_batches
      >>> batches = evaluation_batches(Digits().load().test, batch_size=100)
      >>> len(batches), int(batches[-1].is_padding.sum())
      (4, 40)
    """
    batches = []
    for start in range(0, len(data.y), batch_size):
        number = np.arange(start, start + batch_size, dtype=np.int32)
        is_padding = number >= len(data.y)
        number = np.where(is_padding, start, number)
        batches.append(EvaluationBatch(data.x[number], data.y[number], number, is_padding))
    return batches


def to_unit(x: Array) -> Array:
    """uint8 images as float32 in [0, 1]; floating images in float32.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.data import to_unit
      >>> to_unit(np.array([0, 255], np.uint8)).tolist()
      [0.0, 1.0]
    """
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x.astype(jnp.float32)


@dataclass(frozen=True)
class CropFlip:
    """Random crop after zero padding, and horizontal flip: the usual augmentation for CIFAR, on the device.

    Attributes:
      padding: pixels on every side.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax import Keys
      >>> from deq_jax.data import CropFlip
      >>> jax.eval_shape(CropFlip(padding=4), jnp.ones((2, 32, 32, 3)), Keys.of(0, 2)).shape
      (2, 32, 32, 3)
    """

    padding: int = 4

    def __call__(self, x: Array, keys: Keys) -> Array:
        """x: [B, H, W, C] -> the same shape."""

        def one(image: Array, key: Array) -> Array:
            crop, flip = jax.random.split(key)
            edge = self.padding
            padded = jnp.pad(image, ((edge, edge), (edge, edge), (0, 0)))
            corner = jax.random.randint(crop, (2,), 0, 2 * edge + 1)
            image = lax.dynamic_slice(padded, (corner[0], corner[1], 0), image.shape)
            return jnp.where(jax.random.bernoulli(flip), image[:, ::-1], image)

        return jax.vmap(one)(x, keys.each())
