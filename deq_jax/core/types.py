"""Aliases, roles and the few records that every layer shares.

A deep equilibrium model (DEQ) is a cell ``f(z; u)`` whose equilibrium ``z* = f(z*; u)`` is the
representation of an input with injection ``u``. Running one is three independent choices, each an
object with value equality: a `Solver` (which trajectory), a `Readout` (which state of it) and a
`Gradient` (how that state is differentiated).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deq_jax.core.errors import InputError, require

PRNG = "threefry2x32"

Array = jax.Array

AnyArray = Any  # of jax on a device, or of numpy on the host

PyTree = Any

Params = PyTree

Cell = Callable[[Params, PyTree, PyTree], PyTree]
"""``(params, z, u) -> f(z; u)``; every leaf of z and u has a leading batch axis, samples independent."""

Loss = Callable[[Array, Array], Array]
"""``(logits [B, K], target [B] or [B, K]) -> [B]``; larger is worse for the classifier."""


def prng_key(seed: Any) -> Array:
    """A PRNG key of the one kind that is used here, threefry, whatever JAX's default kind is.

    Args:
      seed: an integer, modulo 2^32, or a key: typed, or raw as ``jax.random.PRNGKey`` makes it. A key of another kind
        becomes the threefry key of its first 64 bits; for ``jax.random.key(seed, impl="rbg")`` that is the key of the
        same seed.

    Raises:
      InputError: neither of these.
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


class Injection(NamedTuple):
    """What an encoder hands to the cell: computed once per forward, constant along the dynamics.

    Attributes:
      features: pytree shaped like a state, ``[B, ...]`` leaves; added inside the cell.
      masks: pytree of variational dropout masks, ``[B, 1, 1, C]`` leaves, already scaled by
        1 / (1 - rate); None outside training.
    """

    features: PyTree
    masks: PyTree = None


class Solution(NamedTuple):
    """What a solver found, per sample.

    Attributes:
      z: ``[B, ...]`` leaves, the iterate with the lowest residual (z_0 is no candidate).
      states: ``[T, B, ...]`` leaves, the neural dynamics z_1 .. z_T; the entries of a sample that
        has converged repeat its converged state.
      residuals: ``[T, B]``, relative residuals ``||f(z_t) - z_t|| / (||f(z_t)|| + 1e-9 s)``, where s is the largest
        entry of the sample's f(z_0), to a power of two; in at least float32. Without a solver T is 0: ``[0, B]``, of
        which no minimum can be taken.
      evaluations: ``[B]`` int32, cell applications that the sample needed.
      memory: the solver's resumable memory, to be passed to the next `solve`.
    """

    z: PyTree
    states: PyTree
    residuals: Array
    evaluations: Array
    memory: Any


class Keys(NamedTuple):
    """The randomness of a batch: one shared key, and which image each row of the batch is.

    What is drawn for an image depends on the key and on the image's number alone, so neither the
    batch size, nor padding, nor the number of devices changes a result.

    Attributes:
      shared: a PRNG key, for draws that are common to the batch.
      images: ``[B]`` int32, number of each image.
    """

    shared: Array
    images: Array

    @classmethod
    def of(cls, key: int | Array | Keys, batch_size: int) -> Keys:
        """Keys of a batch whose images are numbered from 0; returns `key` if it is `Keys` already.

        Args:
          key: a seed or a PRNG key; see `prng_key`.
          batch_size: B.

        Raises:
          InputError: `key` is `Keys` of another number of images, or no key.
        """
        if not isinstance(key, Keys):
            return cls(prng_key(key), jnp.arange(batch_size, dtype=jnp.int32))
        images = jnp.shape(key.images)
        require(images == (batch_size,), f"keys: expected those of {batch_size} images, got images of shape {images}")
        return key

    def fold(self, number: int | Array) -> Keys:
        """Fresh keys for the purpose (a step, a restart, a pass) with this number."""
        return self._replace(shared=jax.random.fold_in(prng_key(self.shared), number))

    def each(self) -> Array:
        """``[B]`` keys, one per image."""
        return jax.vmap(jax.random.fold_in, (None, 0))(prng_key(self.shared), self.images)

    def draw(self, sampler: Callable[[Array], Array]) -> Array:
        """``[B, ...]``: `sampler(key)` once per image."""
        return jax.vmap(sampler)(self.each())


class Solver(Protocol):
    """Finds a fixed point step by step; see `core.solvers`."""

    @property
    def steps(self) -> int: ...

    @property
    def tolerance(self) -> float: ...

    def init(self, f: Callable, z: Array, u: PyTree) -> Any: ...

    def update(self, f: Callable, memory: Any, u: PyTree, active: Array) -> Any: ...


class Gradient(Protocol):
    """``(cell, params, u, z) -> state``: the solved state, or a few steps on, carrying gradients.

    Attributes:
      applications: of the cell, to give the state.
    """

    @property
    def applications(self) -> int | Array: ...

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree: ...


class Readout(Protocol):
    """``(solution, keys) -> state`` ``[B, ...]``; without keys a random readout is deterministic."""

    def __call__(self, solution: Solution, keys: Keys | None = None) -> PyTree: ...


class Optimizer(Protocol):
    """How gradients become steps: an optax optimiser and its schedule, made for a run of a known length.

    Any frozen dataclass with this method is one; it is written into config.json, and ``--set optimizer.momentum=0.8``
    reaches its fields. For example SGD with Nesterov momentum, weight decay, clipping and a warm-up::

        @dataclass(frozen=True)
        class Nesterov:
            learning_rate: float = 0.1
            momentum: float = 0.9
            weight_decay: float = 5e-4
            warmup: int = 500

            def schedule(self, steps):
                return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup, steps)

            def transformation(self, steps):
                sgd = optax.sgd(self.schedule(steps), self.momentum, nesterov=True)
                return optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(self.weight_decay), sgd)

    The structure of the optimiser's state must not depend on `steps`. A method ``schedule(steps)``, which returns the
    learning rate as a function of the step (from 0), is not needed; it lets the metrics tell the learning rate.
    """

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optax optimiser of a run of `steps` steps."""
        ...
