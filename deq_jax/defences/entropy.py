"""Input entropy reduction: the input of a DEQ is updated while its equilibrium is being solved.

Between blocks of solver steps the input moves, within a small ball around the given input, so that the entropy of
the current prediction falls. The solver then continues for the new injection.

References: Yang et al. 2023, section 4.2. This is an adaptive test-time defence: Croce et al. 2022 found none of
nine such defences to beat its static base once attacked adaptively; `surrogates.adaptive` has those attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.core.cells import flat_cell
from deq_jax.core.compilation import compiled
from deq_jax.core.errors import described, require, require_count
from deq_jax.core.gradients import straight_through
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import entropy
from deq_jax.core.norms import MeasuredMemory
from deq_jax.core.readouts import LastState
from deq_jax.core.solve import advance, begin
from deq_jax.core.types import Array, FlatCell, Injection, PyTree, Readout, Solution, Solver
from deq_jax.defences.carries import Carry, FullCarry, lowest_residual
from deq_jax.models.base import Prediction, Variables
from deq_jax.models.classifiers import Equilibrium

Entropies = Callable[[Array], Array]
"""``x [B, H, W, C] -> [B]``, in nats, of each image's prediction."""


class Direction(Protocol):
    """Where an update of the input goes: ``(entropies, x, keys) -> (entropies(x) [B], direction [B, H, W, C])``.

    The direction's entries lie in [-1, 1]; `entropies` maps images to the entropy of each one's prediction.

    Examples:
      >>> import jax.numpy as jnp
      >>> class Brighter:  # a control that does not look at the entropy
      ...     applications = 0
      ...     def __call__(self, entropies, x, keys):
      ...         return entropies(x), jnp.ones_like(x)
      >>> entropies, direction = Brighter()(lambda x: jnp.zeros(len(x)), jnp.zeros((2, 8, 8, 1)), None)
      >>> entropies.shape, direction.shape
      ((2,), (2, 8, 8, 1))
    """

    @property
    def applications(self) -> int:
        """Applications of the cell in an update; a vector-Jacobian product counts as one."""

    def __call__(self, entropies: Entropies, x: Array, keys: Keys | None) -> tuple[Array, Array]: ...


def sign(gradient: Array) -> Array:
    """The sign of every entry, 0 where it is NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.defences import sign
      >>> sign(jnp.array([-2.0, jnp.nan])).tolist()
      [-1.0, 0.0]
    """
    return jnp.where(jnp.isnan(gradient), 0, jnp.sign(gradient))


@dataclass(frozen=True)
class EntropyGradient:
    """Along the gradient of each image's own entropy.

    Attributes:
      ascent: -1 lowers the entropy; 1 raises it, a control.
      steepest: gradient -> direction.

    Differs from the reference: the entropies are summed over the images, so that an image's update does not depend on
    its batch. The sign is the same.

    Examples:
      >>> from deq_jax.defences import EntropyGradient
      >>> EntropyGradient(ascent=1).applications
      2
    """

    ascent: int = -1
    steepest: Callable[[Array], Array] = sign

    def __post_init__(self) -> None:
        require(self.ascent in (-1, 1), f"EntropyGradient: ascent must be -1 or 1, got {self.ascent!r}")

    @property
    def applications(self) -> int:
        """Number of cell applications in an update; a vector-Jacobian product counts as one."""
        return 2

    def __call__(self, entropies: Entropies, x: Array, keys: Keys | None) -> tuple[Array, Array]:
        def total(x: Array) -> tuple[Array, Array]:
            values = entropies(x)
            return jnp.sum(values), values

        gradient, values = jax.grad(total, has_aux=True)(x)
        return values, self.ascent * self.steepest(gradient)


@dataclass(frozen=True)
class RandomDirection:
    """A control: each pixel up or down by chance, drawn for each image by its number. The classifier needs keys.

    Examples:
      >>> from deq_jax.defences import RandomDirection
      >>> RandomDirection().applications
      1
    """

    @property
    def applications(self) -> int:
        """Number of cell applications in an update; a vector-Jacobian product counts as one."""
        return 1

    def __call__(self, entropies: Entropies, x: Array, keys: Keys | None) -> tuple[Array, Array]:
        require(
            keys is not None,
            "RandomDirection: the defence is random, expected keys (in an evaluation: draws), got none",
        )
        assert keys is not None
        return entropies(x), keys.draw(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))


@dataclass(frozen=True)
class EntropyReduced:
    """An equilibrium classifier with input entropy reduction: logits = decoder(z_T), in evaluation mode only.

    After every block of `every` solver steps the input makes `steps` updates, each followed by a projection onto the
    ball around the given input and onto [0, 1]. The last updates change the purified input, not z_T. Solver,
    parameters and T are the base's; its readout is not used. The logits' gradient is the one the base's estimator
    has at the state and the purified input, passed on to the given input as if that were the purified one.

    Attributes:
      base: the undefended classifier.
      every: T_f, solver steps between two purifications; divides T.
      steps: R, updates of the input in each.
      step_size: size of an update, in the unit of x ([0, 1]).
      epsilon: ℓ∞ radius, in the same unit, of the ball around the given input.
      direction: direction of an update.
      carry: the state and memory from which the next block starts.
      readout: choice of the regulated state that is classified, without a further application of the cell.

    References: Yang et al. 2023, section 4.2.

    Differs from the reference: the solver's memory is kept from block to block.

    Examples:
      >>> from deq_jax import Broyden, Dynamics, EntropyReduced, Equilibrium
      >>> from deq_jax.models import SmallCell, SmallDecoder, SmallEncoder
      >>> model = Equilibrium(SmallEncoder(4), SmallCell(4), SmallDecoder(10), Dynamics(Broyden(8)))
      >>> EntropyReduced(model, step_size=0.025, epsilon=0.1).blocks
      4
    """

    base: Equilibrium
    every: int = 2
    steps: int = 10
    step_size: float = 2 / 255
    epsilon: float = 8 / 255
    direction: Direction = EntropyGradient()
    carry: Carry = FullCarry()
    readout: Readout = LastState()

    def __post_init__(self) -> None:
        is_equilibrium = isinstance(self.base, Equilibrium) and self.base.dynamics.solver is not None
        require(
            is_equilibrium, f"EntropyReduced: base must be an Equilibrium with a solver, got {described(self.base)}"
        )
        total = self.solver.steps
        divides = self.every >= 1 and total % self.every == 0
        require(divides, f"EntropyReduced: every must divide the solver's {total} steps, got {self.every!r}")
        require_count("EntropyReduced: steps", self.steps, 0)
        require(self.step_size > 0, f"EntropyReduced: step_size must be > 0, got {self.step_size!r}")
        require(self.epsilon >= 0, f"EntropyReduced: epsilon must be >= 0, got {self.epsilon!r}")

    @property
    def solver(self) -> Solver:
        """The base's, as the carry needs it."""
        solver = self.base.dynamics.solver
        assert solver is not None
        return self.carry.adapt(solver)

    @property
    def blocks(self) -> int:
        """Number of blocks, each ending in a purification."""
        return self.solver.steps // self.every

    def init(self, key: int | Array, x: Array) -> Variables:
        """Variables of the base; see `Equilibrium.init`."""
        return self.base.init(key, x)

    def __call__(
        self,
        variables: Variables,
        x: Array,
        *,
        train: bool = False,
        keys: Keys | None = None,
        axis_name: str | None = None,
    ) -> Prediction:
        """Classifies images; see `Equilibrium.__call__`.

        Returns:
          `Prediction`; its solution holds the regulated dynamics, see `Purified`.

        Raises:
          InputError: in training mode.
        """
        require(not train, "EntropyReduced: the defence is for inference, got train=True; train its base")
        base = self.base
        found = reduce_entropy(self, *lax.stop_gradient((variables, x)), keys)
        state = self.read(found.solution, keys)
        u = base.encode(variables, straight_through(found.x, x))
        estimate = base.dynamics.gradient(base.apply_cell, variables["params"]["cell"], u, state)
        logits = base.decode(variables, straight_through(state, estimate))
        return Prediction(logits, variables["batch_stats"], found.solution)

    def decode(self, variables: Variables, z: PyTree) -> Array:
        """The logits [B, K] of states z; see `Equilibrium.decode`."""
        return self.base.decode(variables, z)

    def read(self, solution: Solution, keys: Keys | None) -> PyTree:
        """The regulated state that is classified."""
        return self.readout(solution, None if keys is None else keys.fold(Purpose.READOUT))

    def project(self, x_hat: Array, x: Array) -> Array:
        """Onto the ball around x, then onto [0, 1]."""
        return jnp.clip(jnp.clip(x_hat, x - self.epsilon, x + self.epsilon), 0, 1)


class Purified(NamedTuple):
    """The result of input entropy reduction.

    Attributes:
      x: ``[B, H, W, C]``, the purified input.
      inputs: ``[blocks, B, H, W, C]``, the input with which each block was solved; the first is the given one.
      entropies: ``[blocks, R + 1, B]`` in nats: of softmax(decoder(f(z; x))) before each update and after the last.
      solution: states, leaves ``[T, B, ...]``, and residuals ``[T, B]`` of the regulated dynamics. A residual belongs
        to the input of its block. `evaluations` counts cell applications, including those in updates; a vector-Jacobian
        product counts as one.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.defences import Purified
      >>> x = np.zeros((1, 8, 8, 1))
      >>> purified = Purified(x, inputs=x[None], entropies=np.array([[[0.75], [0.25]]]), solution=None)
      >>> (purified.entropies[0, 0] - purified.entropies[-1, -1]).tolist()  # by how much the entropy has fallen
      [0.5]
    """

    x: Array
    inputs: Array
    entropies: Array
    solution: Solution


_Carry = tuple[Array, Injection, MeasuredMemory]
"""The input, its injection and the solver's memory."""

_Pair = tuple[MeasuredMemory, MeasuredMemory]
"""The memory before the last step, and after it."""


@compiled("defence")
def reduce_entropy(defence: EntropyReduced, variables: Variables, x: Array, keys: Keys | None = None) -> Purified:
    """Solves the equilibrium of images x [B, H, W, C] in [0, 1] while lowering the entropy of their predictions.

    Differentiable where solver and direction are; blocks and updates are computed again in the backward pass.

    Args:
      defence: settings of the defence.
      variables: variables of the base classifier.
      x: the given images.
      keys: randomness of a random direction.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax import Dynamics, EntropyReduced, FixedPoint
      >>> from deq_jax.defences import reduce_entropy
      >>> from deq_jax.models import small_deq
      >>> defence = EntropyReduced(small_deq(10, 4, Dynamics(FixedPoint(4))), steps=3)
      >>> x = jnp.ones((2, 8, 8, 1))
      >>> found = jax.eval_shape(lambda x: reduce_entropy(defence, defence.init(0, x), x), x)
      >>> found.inputs.shape, found.entropies.shape
      ((2, 2, 8, 8, 1), (2, 4, 2))
    """
    base, solver = defence.base, defence.solver
    encode, decode = partial(base.encode, variables), partial(base.decode, variables)
    u = encode(x)
    start = jax.tree.map(jnp.zeros_like, u.features)
    f, z0, unravel = flat_cell(base.apply_cell, variables["params"]["cell"], start)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(carry: _Carry, number: Array) -> tuple[_Carry, tuple[Array, Array, Array, Array, Array]]:
        x_hat, u, memory = carry
        before, states, residuals, active = _solve_block(solver, f, memory, u, defence.every)
        z = defence.carry.choose(states, residuals)

        def entropies(x: Array) -> Array:
            return entropy(decode(unravel(f(z, encode(x)))))

        purified, values = _purify(defence, entropies, x, x_hat, keys and keys.fold(number))
        u = encode(purified)
        memory = defence.carry.resume(solver, f, before, z, u)
        values = jnp.concatenate([values, entropy(decode(unravel(memory.fz)))[None]])
        return (purified, u, memory), (x_hat, values, states, residuals, active)

    carry = x, u, begin(solver, f, z0, u)
    (x_hat, _, memory), (inputs, values, *trace) = lax.scan(block, carry, jnp.arange(defence.blocks))
    states, residuals, active = (part.reshape(solver.steps, *part.shape[2:]) for part in trace)
    purification = defence.steps * defence.direction.applications + 1
    evaluations = 1 + jnp.sum(active, axis=0, dtype=jnp.int32) + defence.blocks * purification
    lowest = unravel(lowest_residual(states, residuals))
    solution = Solution(lowest, jax.vmap(unravel)(states), residuals, evaluations, memory)
    return Purified(x_hat, inputs, values, solution)


def _solve_block(
    solver: Solver, f: FlatCell, memory: MeasuredMemory, u: PyTree, steps: int
) -> tuple[MeasuredMemory, Array, Array, Array]:
    """The memory before the last step, and of all steps the states, residuals and which samples moved."""

    def step(carry: _Pair, _: None) -> tuple[_Pair, tuple[Array, Array, Array]]:
        _, memory = carry
        following, residual, active = advance(solver, f, memory, u)
        return (memory, following), (following.z, residual, active)

    (before, _), trace = lax.scan(step, (memory, memory), length=steps)
    return before, *trace


def _purify(
    defence: EntropyReduced, entropies: Entropies, x: Array, x_hat: Array, keys: Keys | None
) -> tuple[Array, Array]:
    """The input after the updates of one block, and the entropies [R, B] before each of them."""

    @partial(jax.checkpoint, prevent_cse=False)
    def update(x_hat: Array, number: Array) -> tuple[Array, Array]:
        values, direction = defence.direction(entropies, x_hat, keys and keys.fold(number))
        return defence.project(x_hat + defence.step_size * direction, x), values

    return lax.scan(update, x_hat, jnp.arange(defence.steps))
