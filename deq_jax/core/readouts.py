"""Readouts: they choose the state of the neural dynamics that represents the input.

``readout(solution, keys=None) -> state [B, ...]``. Without keys a readout is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from deq_jax.core.errors import require
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array, PyTree, Solution


@dataclass(frozen=True)
class FinalState:
    """The equilibrium: per sample the state with the lowest residual, leaves [B, ...].

    Examples:
      >>> import numpy as np
      >>> from deq_jax.core import FinalState, Solution
      >>> states = np.array([[[1.5]], [[2.5]]])  # z_1 and z_2 of one sample
      >>> solution = Solution(states[0], states, np.array([[0.25], [0.5]]), np.array([3]), None)
      >>> FinalState()(solution).tolist()
      [[1.5]]
    """

    def __call__(self, solution: Solution, keys: Keys | None = None) -> PyTree:
        return solution.z


@dataclass(frozen=True)
class IntermediateState:
    """The state z_t after exactly t solver steps (the early state of Yang et al. 2022), leaves [B, ...].

    Attributes:
      state: t, counts the solver's steps from 1 to T.

    Raises:
      InputError: t is below 1, or, when it is called, above T.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.core import IntermediateState, Solution
      >>> states = np.array([[[1.0]], [[1.5]]])  # z_1 and z_2 of one sample
      >>> solution = Solution(states[1], states, np.array([[0.5], [0.25]]), np.array([3]), None)
      >>> IntermediateState(1)(solution).tolist()
      [[1.0]]
    """

    state: int

    def __post_init__(self) -> None:
        require(self.state >= 1, f"IntermediateState: state counts from 1, got {self.state!r}")

    def __call__(self, solution: Solution, keys: Keys | None = None) -> PyTree:
        steps = len(solution.residuals)
        within = self.state <= steps
        require(within, f"IntermediateState: state must be at most the solver's {steps} steps, got {self.state}")
        return jax.tree.map(lambda states: states[self.state - 1], solution.states)


@dataclass(frozen=True)
class LastState:
    """The state z_T after the last step, even if its residual is not the lowest; leaves [B, ...].

    Raises:
      InputError: when it is called, there was no solver.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.core import LastState, Solution
      >>> states = np.array([[[1.5]], [[2.5]]])  # z_1 and z_2 of one sample
      >>> solution = Solution(states[0], states, np.array([[0.25], [0.5]]), np.array([3]), None)
      >>> LastState()(solution).tolist()
      [[2.5]]
    """

    def __call__(self, solution: Solution, keys: Keys | None = None) -> PyTree:
        _require_states("LastState", solution)
        return jax.tree.map(lambda states: states[-1], solution.states)


@dataclass(frozen=True)
class RandomIntermediateState:
    """The state after t ~ U{first..T} solver steps; the equilibrium where no keys are given (deployment).

    Attributes:
      per_sample: draw t for every sample, rather than once for the batch.
      best_so_far: take the lowest residual among z_1 .. z_t, rather than z_t itself.
      first: the smallest t.

    References: Yang et al. 2023, section 4.1.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.core import RandomIntermediateState, Solution
      >>> states = np.array([[[1.0]], [[1.5]]])  # z_1 and z_2 of one sample
      >>> solution = Solution(states[1], states, np.array([[0.5], [0.25]]), np.array([3]), None)
      >>> RandomIntermediateState()(solution).tolist()  # without keys: the equilibrium
      [[1.5]]
    """

    per_sample: bool = False
    best_so_far: bool = True
    first: int = 1

    def __post_init__(self) -> None:
        require(self.first >= 1, f"RandomIntermediateState: first counts from 1, got {self.first!r}")

    def __call__(self, solution: Solution, keys: Keys | None = None) -> PyTree:
        if keys is None:
            return solution.z
        steps, batch = solution.residuals.shape
        within = self.first <= steps
        require(within, f"RandomIntermediateState: first must be at most the solver's {steps} steps, got {self.first}")

        def draw(key: Array) -> Array:
            return jax.random.randint(key, (), self.first - 1, steps)

        last = keys.draw(draw) if self.per_sample else jnp.full(batch, draw(keys.common()))
        if self.best_so_far:
            residuals = jnp.where(jnp.isnan(solution.residuals), jnp.inf, solution.residuals)
            last = jnp.argmin(jnp.where(jnp.arange(steps)[:, None] <= last, residuals, jnp.inf), axis=0)
        return jax.tree.map(lambda states: states[last, jnp.arange(batch)], solution.states)


@dataclass(frozen=True)
class EnsembleState:
    """The mean of the states z_1 .. z_T (Yang et al. 2022, section 5).

    Differs from the reference: only these states are averaged.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.core import EnsembleState, Solution
      >>> states = np.array([[[1.0]], [[1.5]]])  # z_1 and z_2 of one sample
      >>> solution = Solution(states[1], states, np.array([[0.5], [0.25]]), np.array([3]), None)
      >>> EnsembleState()(solution).tolist()
      [[1.25]]
    """

    def __call__(self, solution: Solution, keys: Keys | None = None) -> PyTree:
        _require_states("EnsembleState", solution)
        return jax.tree.map(lambda states: jnp.mean(states, axis=0), solution.states)


def _require_states(name: str, solution: Solution) -> None:
    require(len(solution.residuals) > 0, f"{name}: expected a solver's states z_1 .. z_T, got none (no solver)")
