"""Random noise of the full radius: a baseline that every attack must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deq_jax.attacks.inputs import carry_out
from deq_jax.attacks.oracles import Oracle
from deq_jax.attacks.threats import Threat, check_threat
from deq_jax.core.errors import require
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array


@dataclass(frozen=True)
class Noise:
    """A random perturbation of length epsilon: a baseline that every attack must beat.

    Attributes:
      threat: norm and radius.

    Examples:
      >>> from deq_jax.attacks import Linf, Noise
      >>> Noise(Linf(8 / 255)).gradient_queries
      0
    """

    threat: Threat

    uses_gradients: ClassVar[bool] = False
    gradient_queries: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_threat("Noise", self.threat)

    def __call__(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Array:
        """Perturbed images; see `APGD.__call__`. The oracle is not asked, and a start is refused."""
        require(start is None, "Noise: expected no start, since noise is added to the images themselves")
        return carry_out(self._run, oracle, x, labels, key, asks=False)

    def _run(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        return self.threat.project(x + self.threat.epsilon * self.threat.random_direction(keys, x), x)
