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

Array = jax.Array
AnyArray = Any  # of jax on a device, or of numpy on the host
PyTree = Any
Params = PyTree
Variables = dict[str, PyTree]  # {"params": ..., "batch_stats": ...}

Cell = Callable[[Params, PyTree, PyTree], PyTree]
"""``(params, z, u) -> f(z; u)``; every leaf of z and u has a leading batch axis, samples independent."""

Loss = Callable[[Array, Array], Array]
"""``(logits [B, K], target [B] or [B, K]) -> [B]``; larger is worse for the classifier."""


class InputError(ValueError):
    """An input that whoever gave it can mend: one line with what was wrong, expected, and where.

    The command lines print it without a traceback and leave with exit code 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless the condition holds."""
    if not condition:
        raise InputError(message)


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
      residuals: ``[T, B]``, relative residuals ``||f(z_t) - z_t|| / (||f(z_t)|| + 1e-9)``.
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
    def of(cls, key: Array | Keys, batch_size: int) -> Keys:
        """Keys of a batch whose images are numbered from 0; returns `key` if it is `Keys` already."""
        return key if isinstance(key, Keys) else cls(key, jnp.arange(batch_size, dtype=jnp.int32))

    def fold(self, number: int | Array) -> Keys:
        """Fresh keys for the purpose (a step, a restart, a pass) with this number."""
        return self._replace(shared=jax.random.fold_in(self.shared, number))

    def each(self) -> Array:
        """``[B]`` keys, one per image."""
        return jax.vmap(lambda image: jax.random.fold_in(self.shared, image))(self.images)

    def draw(self, sampler: Callable[[Array], Array]) -> Array:
        """``[B, ...]``: `sampler(key)` once per image."""
        return jax.vmap(sampler)(self.each())


class Solver(Protocol):
    """Finds a fixed point step by step; see `deq_jax.solvers`."""

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


class Prediction(NamedTuple):
    """What a classifier returns.

    Attributes:
      logits: ``[B, K]``.
      batch_stats: BatchNorm running statistics, updated in training mode.
      solution: of the equilibrium, whose `evaluations` count those of the gradient estimator, too; None for an explicit
        network.
      penalty: ``[B]``, to be added to the loss of each image in training; 0 where nothing is penalised.
    """

    logits: Array
    batch_stats: PyTree
    solution: Solution | None
    penalty: Array | float = 0.0


class Classifier(Protocol):
    """A trainable map from images ``[B, H, W, C]`` in [0, 1] to logits ``[B, K]``."""

    def init(self, key: Array, x: Array) -> Variables: ...

    def __call__(
        self,
        variables: Variables,
        x: Array,
        *,
        train: bool = False,
        keys: Keys | None = None,
        axis_name: str | None = None,
    ) -> Prediction: ...


class Oracle(NamedTuple):
    """All that an attacker may ask. The gradient need not be that of the logits.

    Attributes:
      logits: ``(x, keys) -> [B, K]``, of the predictor on which success is judged.
      grad: ``(loss, x, target, keys) -> (loss [B], logits [B, K], gradient [B, H, W, C])``, the
        gradient of the summed loss with respect to x.
    """

    logits: Callable[[Array, Keys], Array]
    grad: Callable[[Loss, Array, Array, Keys], tuple[Array, Array, Array]]


class Attack(Protocol):
    """``(oracle, x, target, key) -> x_adv``, within the threat model's ball and [0, 1]."""

    def __call__(self, oracle: Oracle, x: Array, target: Array, key: Array | Keys) -> Array: ...
