"""Aliases, roles and the few records that every layer shares.

A deep equilibrium model (DEQ) is a cell ``f(z; u)``. Its equilibrium ``z* = f(z*; u)`` is the
representation of an input with injection ``u``. Running one is three independent choices, each an
object with value equality: a `Solver` (which trajectory), a `Readout` (which state of it) and a
`Gradient` (how that state is differentiated).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import optax

from deq_jax.core.errors import require_role
from deq_jax.core.keys import Keys

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
          memory: the result of `init` or `update`.
          active: [B] bool; a sample that is not active has converged and must stay where it is.
        """
        ...


def check_solver(where: str, solver: Any) -> None:
    """Refuses anything but a `Solver`; `where` begins the message."""
    require_role(where, solver, ("steps", "tolerance", "init", "update"), "a solver, such as Broyden(8)")


class Gradient(Protocol):
    """``(cell, params, u, z) -> state``: the solved state, or a few steps on, carrying gradients.

    Attributes:
      applications: number of cell applications in the forward pass.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax import Broyden, deq
      >>> class OneStep:  # one application, with the state held constant
      ...     applications = 1
      ...     def __call__(self, cell, params, u, z):
      ...         return cell(params, jax.lax.stop_gradient(z), u)
      >>> def value(u):
      ...     half = lambda params, z, u: 0.5 * z + u
      ...     z, _ = deq(half, {}, u, jnp.zeros((1, 1)), solver=Broyden(4), gradient=OneStep())
      ...     return z.sum()
      >>> jax.grad(value)(jnp.ones((1, 1))).item()  # the exact one is 2
      1.0
    """

    @property
    def applications(self) -> int | Array: ...

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree: ...


class Readout(Protocol):
    """``(solution, keys) -> state`` ``[B, ...]``; without keys a random readout is deterministic.

    The keys are the readout's own (`Purpose.READOUT`): ``keys.draw`` draws for each image, ``keys.common`` is a key for
    one draw for the whole batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import FixedPoint, solve
      >>> def first(solution, keys=None):
      ...     return solution.states[0]
      >>> half = lambda params, z, u: 0.5 * z + u
      >>> solution = solve(FixedPoint(3), half, {}, jnp.zeros((1, 1)), jnp.ones((1, 1)))
      >>> first(solution).item(), solution.z.item()
      (1.0, 1.75)
    """

    def __call__(self, solution: Solution, keys: Keys | None = None) -> PyTree: ...


class Optimizer(Protocol):
    """How gradients become steps: an optax optimiser and its schedule, made for a run of a known length.

    Any frozen dataclass with this method is one; it is written into config.json, and ``--set optimizer.momentum=0.8``
    reaches its fields.

    The structure of the optimiser's state must not depend on `steps`. A method ``schedule(steps)``, which returns the
    learning rate as a function of the step (from 0), is not needed; it lets the metrics tell the learning rate.

    Examples:
      >>> from dataclasses import dataclass
      >>> import optax
      >>> @dataclass(frozen=True)
      ... class Nesterov:  # momentum, weight decay, clipping and a warm-up
      ...     learning_rate: float = 0.1
      ...     momentum: float = 0.9
      ...     weight_decay: float = 5e-4
      ...     warmup: int = 500
      ...     def schedule(self, steps):
      ...         return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup, steps)
      ...     def transformation(self, steps):
      ...         sgd = optax.sgd(self.schedule(steps), self.momentum, nesterov=True)
      ...         return optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(self.weight_decay), sgd)
      >>> round(float(Nesterov().schedule(2000)(250)), 3), len(Nesterov().transformation(2000))
      (0.05, 2)
    """

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optax optimiser of a run of `steps` steps."""
        ...
