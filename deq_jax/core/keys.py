"""PRNG keys: one for each image, by its number, and one for each purpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import define_prng_impl, threefry_prng_impl

from deq_jax.core.errors import InputError, require

PRNG = "threefry2x32"


def prng_key(seed: Any) -> Array:
    """A PRNG key of the one kind that is used here, threefry, whatever JAX's default kind is.

    Args:
      seed: an integer, modulo 2^32, or a key: typed, or raw as ``jax.random.PRNGKey`` makes it. A key of another kind
        becomes the threefry key of its first 64 bits; for ``jax.random.key(seed, impl="rbg")`` that is the key of the
        same seed.

    Raises:
      InputError: neither of these.

    Examples:
      >>> import jax
      >>> from deq_jax.core import prng_key
      >>> jax.random.key_data(prng_key(7)).tolist()
      [0, 7]
    """
    expected = "key: expected one PRNG key or an integer seed, got"
    if isinstance(seed, int) and not isinstance(seed, bool):
        return jax.random.key(np.uint32(seed % 2**32), impl=PRNG)
    is_array = isinstance(seed, jax.Array | np.ndarray | np.generic)
    if not is_array:
        raise InputError(f"{expected} {seed!r}")
    is_key = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(seed) if is_key else seed
    if words.shape == () and jnp.issubdtype(words.dtype, jnp.integer):
        return jax.random.key(words.astype(jnp.uint32), impl=PRNG)
    is_one = words.dtype == jnp.uint32 and words.shape in ((2,), (4,))
    require(is_one, f"{expected} {seed.dtype} of shape {seed.shape}")
    return seed if is_key and str(jax.random.key_impl(seed)) == PRNG else jax.random.wrap_key_data(words[:2], impl=PRNG)


def flat_draws(key: Array) -> Array:
    """The same threefry key, for the initial variables of a model: the same numbers, drawn as flat arrays and reshaped.

    XLA's CPU compiler takes several times as long for random bits of four dimensions as for bits of one.

    Examples:
      >>> import jax
      >>> from deq_jax.core.keys import flat_draws, prng_key
      >>> key = prng_key(0)
      >>> bool((jax.random.normal(flat_draws(key), (2, 3)) == jax.random.normal(key, (2, 3))).all())
      True
    """
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_flat())


@cache
def _flat() -> Any:
    """Threefry as JAX has it, but for the shape of a draw."""
    kind = threefry_prng_impl

    def bits(key: Array, width: int, shape: tuple[int, ...]) -> Array:
        flat: Array = kind.random_bits(key, width, (math.prod(shape),))
        return flat.reshape(shape)

    return define_prng_impl(
        key_shape=kind.key_shape,
        seed=kind.seed,
        split=kind.split,
        random_bits=bits,
        fold_in=kind.fold_in,
        name="flat threefry",
        tag="flat",
    )


class Purpose(IntEnum):
    """The purpose of a key, for ``keys.fold(Purpose.READOUT)``. Each purpose has a number of its own.

    Keys are folded with counters too (steps, restarts, draws) and with the numbers of images. Those stay below 2^30.
    Where one of them meets a purpose, the purpose lies above, so that no key serves two draws.

    A training step has keys for

    * ATTACK, the draws of an attack, also as one of several (`AutoAttack`, `Targeted`);
    * NATURAL and ADVERSARIAL, the forward passes of an objective;
    * AUGMENTATION;
    * PENALTY, whether the step is penalised (drawn on the host).

    A forward pass has its own keys for the encoder, and from them keys for

    * READOUT, a random state;
    * PROBES of the Jacobian's norm or spectral radius;
    * MODULE, the draws of Flax modules with ``make_rng("dropout")``;
    * DECODER, the same of the decoder.

    An attack has keys for its restarts and steps, and from them keys for

    * QUERY, the draws of a random predictor at a query;
    * START, the same where the attack is given images to begin at;
    * RADIUS, the length of a random start in ℓ2, beside its direction.

    DEPLOYED is for the draws of a random predictor when it is measured; attacks never see them. BATCH is a draw that is
    common to all images of the batch; see `Keys.common`.

    Examples:
      >>> from deq_jax.core import Purpose
      >>> Purpose.ATTACK < 2**30 <= Purpose.READOUT
      True
    """

    ATTACK = 0
    NATURAL = 1
    ADVERSARIAL = 2
    AUGMENTATION = 17
    PENALTY = 29
    DEPLOYED = 1 << 30
    BATCH = DEPLOYED + 1
    READOUT = DEPLOYED + 2
    PROBES = DEPLOYED + 3
    MODULE = DEPLOYED + 4
    DECODER = DEPLOYED + 5
    QUERY = DEPLOYED + 6
    RADIUS = DEPLOYED + 7
    START = DEPLOYED + 8


class Keys(NamedTuple):
    """The randomness of a batch: one shared key, and which image each row of the batch is.

    A draw for an image depends only on the key and the image's number. So neither the batch size, nor padding, nor the
    number of devices changes a result.

    Attributes:
      shared: a PRNG key. Other keys are folded from it, so nothing is drawn from it; see `common`.
      images: ``[B]`` int32, number of each image, below 2^30.

    Examples:
      >>> import jax
      >>> from deq_jax.core import Keys, Purpose
      >>> keys = Keys.of(0, batch_size=2)
      >>> keys.images.tolist()
      [0, 1]
      >>> keys.fold(Purpose.ATTACK).draw(lambda key: jax.random.normal(key, (8, 8, 1))).shape
      (2, 8, 8, 1)
    """

    shared: Array
    images: Array

    @classmethod
    def of(cls, key: int | Array | Keys, batch_size: int) -> Keys:
        """Keys of a batch with images numbered from 0; returns `key` if it is `Keys` already.

        Args:
          key: a seed or a PRNG key; see `prng_key`.
          batch_size: B.

        Raises:
          InputError: `key` is `Keys` of another number of images, or no key.
        """
        if not isinstance(key, Keys):
            return cls(prng_key(key), jnp.arange(batch_size, dtype=jnp.int32))
        images = jnp.shape(key.images)
        require(images == (batch_size,), f"keys: expected Keys of {batch_size} images, got images of shape {images}")
        return key

    def fold(self, number: Purpose | int | Array) -> Keys:
        """Fresh keys for a purpose, or for the step or restart with this number, below 2^30."""
        return self._replace(shared=jax.random.fold_in(prng_key(self.shared), number))

    def each(self) -> Array:
        """``[B]`` keys, one per image."""
        return jax.vmap(jax.random.fold_in, (None, 0))(prng_key(self.shared), self.images)

    def common(self) -> Array:
        """One key, for a draw that is common to the batch."""
        return self.fold(Purpose.BATCH).shared

    def draw(self, sampler: Callable[[Array], Array]) -> Array:
        """``[B, ...]``: `sampler(key)` once per image."""
        drawn: Array = jax.vmap(sampler)(self.each())
        return drawn
