"""Aliases, roles and the few records that every layer shares.

A deep equilibrium model (DEQ) is a cell ``f(z; u)`` whose equilibrium ``z* = f(z*; u)`` is the
representation of an input with injection ``u``. Running one is three independent choices, each an
object with value equality: a `Solver` (which trajectory), a `Readout` (which state of it) and a
`Gradient` (how that state is differentiated).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
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

FlatCell = Callable[[Array, PyTree], Array]
"""``f(z [B, N], u) -> [B, N]``: a cell with its parameters, over flat states; see `cells.flat_cell`."""

Loss = Callable[[Array, Array], Array]
"""``(logits [B, K], labels) -> [B]``; larger is worse for the classifier. See `attacks.Attack` for the labels."""


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


class Injection(NamedTuple):
    """The encoder's output for the cell: computed once per forward pass, constant along the dynamics.

    Attributes:
      features: pytree shaped like a state, ``[B, ...]`` leaves; added inside the cell.
      masks: pytree of variational dropout masks, ``[B, 1, 1, C]`` leaves, already scaled by
        1 / (1 - rate); None outside training.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import Injection
      >>> Injection(features=jnp.ones((2, 3))).masks is None
      True
    """

    features: PyTree
    masks: PyTree = None


class Solution(NamedTuple):
    """The result of a solver, per sample.

    Attributes:
      z: ``[B, ...]`` leaves, the iterate with the lowest residual (z_0 is not a candidate).
      states: ``[T, B, ...]`` leaves, the neural dynamics z_1 .. z_T; the entries of a sample that
        has converged repeat its converged state.
      residuals: ``[T, B]``, relative residuals ``||f(z_t) - z_t|| / (||f(z_t)|| + 1e-9 s)``, where s is the largest
        entry of the sample's f(z_0), to a power of two; in at least float32. Without a solver T is 0: ``[0, B]``, of
        which no minimum can be taken.
      evaluations: ``[B]`` int32, cell applications that the sample needed.
      memory: the solver's resumable memory, to be passed to the next `solve`.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.core import Solution
      >>> states = np.array([[[1.0]], [[1.5]]])  # z_1 and z_2 of one sample
      >>> solution = Solution(states[1], states, np.array([[0.5], [0.25]]), np.array([3]), None)
      >>> solution.residuals.shape, solution.residuals.min(axis=0).tolist()
      ((2, 1), [0.25])
    """

    z: PyTree
    states: PyTree
    residuals: Array
    evaluations: Array
    memory: Any


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
        return jax.vmap(sampler)(self.each())


class Memory(Protocol):
    """The state of a solver after a step: a pytree with these two arrays, and anything else that the solver keeps.

    If it has a field ``unit``, that is the unit of residuals, [B, 1]; see `norms.unit_of`. Otherwise `solve` adds one.

    Attributes:
      z: ``[B, N]``, the last iterate.
      fz: ``[B, N]``, f(z; u), so that T steps cost T + 1 evaluations.
    """

    @property
    def z(self) -> Array: ...

    @property
    def fz(self) -> Array: ...


class Solver(Protocol):
    """Finds a fixed point step by step; any frozen dataclass with these two fields and two methods is one.

    For example fixed-point iteration with momentum::

        from dataclasses import dataclass
        from typing import NamedTuple

        import jax
        import jax.numpy as jnp


        class HeavyBallMemory(NamedTuple):
            z: jax.Array
            fz: jax.Array
            previous: jax.Array


        @dataclass(frozen=True)
        class HeavyBall:
            steps: int
            tolerance: float = 1e-3
            momentum: float = 0.2

            def init(self, f, z, u):
                return HeavyBallMemory(z, f(z, u), z)

            def update(self, f, memory, u, active):
                following = memory.fz + self.momentum * (memory.z - memory.previous)
                z = jnp.where(active[:, None], following, memory.z)
                return HeavyBallMemory(z, f(z, u), memory.z)

    That is all a solver needs. `solve` counts the steps, measures residuals, stops samples that have converged and
    keeps the best state. A solver may also have

    * ``batch_joint`` (bool): residuals by the norm over the whole batch, not by each sample's; otherwise False;
    * ``reverse_mode()``: the same solver in a form that JAX can differentiate in reverse mode, for surrogates such as
      `ThroughSolver`. It is needed where steps have loops of unknown length; otherwise the solver itself is
      differentiated.

    Attributes:
      steps: T, the number of iterates.
      tolerance: relative residual below which a sample has converged.
    """

    @property
    def steps(self) -> int: ...

    @property
    def tolerance(self) -> float: ...

    def init(self, f: FlatCell, z: Array, u: PyTree) -> Memory:
        """The memory at the start.

        Args:
          f: the cell with its parameters, over flat states: ``f(z [B, N], u) -> [B, N]``.
          z: the start z_0, [B, N].
          u: injection, leaves [B, ...].
        """
        ...

    def update(self, f: FlatCell, memory: Any, u: PyTree, active: Array) -> Memory:
        """The memory after one new iterate and one evaluation of f, of the same shapes and dtypes as before.

        Args:
          f, u: as in `init`.
          memory: what `init` or `update` returned.
          active: [B] bool; a sample that is not active has converged and must stay where it is.
        """
        ...


class Gradient(Protocol):
    """``(cell, params, u, z) -> state``: the solved state, or a few steps on, carrying gradients.

    Attributes:
      applications: number of cell applications in the forward pass.
    """

    @property
    def applications(self) -> int | Array: ...

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree: ...


class Readout(Protocol):
    """``(solution, keys) -> state`` ``[B, ...]``; without keys a random readout is deterministic.

    The keys are the readout's own (`Purpose.READOUT`): ``keys.draw`` draws for each image, ``keys.common`` is a key for
    one draw for the whole batch.
    """

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
