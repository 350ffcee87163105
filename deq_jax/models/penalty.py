"""The Jacobian penalty of a classifier."""

from __future__ import annotations

from dataclasses import dataclass

from deq_jax.core.errors import require, require_count
from deq_jax.core.jacobian import gaussian_probes, jacobian_norm
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.types import Array, Cell, Params, PyTree


@dataclass(frozen=True)
class JacobianRegularization:
    """Penalty ``weight * ||J||_F^2 / N`` on a pass in training mode, N the state's size.

    `training.PenaltySchedule` chooses the training steps that have it.

    Attributes:
      weight: factor of the penalty, >= 0.
      probes: number of Gaussian vectors in Hutchinson's estimate.
      fewer, more: a penalised training pass reads out the state after T - fewer .. T + more solver steps,
        drawn at random, where it would have read out the final one.

    References: Bai et al. 2021, eq. 6 and section 4.2.

    Examples:
      >>> from deq_jax import Broyden, Dynamics
      >>> from deq_jax.models import JacobianRegularization, small_deq
      >>> small_deq(10, 12, Dynamics(Broyden(8)), jacobian=JacobianRegularization(weight=2.0)).jacobian.probes
      2
    """

    weight: float = 0.4
    probes: int = 2
    fewer: int = 2
    more: int = 1

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"JacobianRegularization: weight must be >= 0, got {self.weight!r}")
        require_count("JacobianRegularization: probes", self.probes)
        counts = self.fewer >= 0 and self.more >= 0
        require(counts, f"JacobianRegularization: fewer and more must be >= 0, got {self}")

    def penalty(self, cell: Cell, params: Params, u: PyTree, z: PyTree, keys: Keys) -> Array:
        """The penalty of each image, [B]; see `jacobian_norm`."""
        probes = gaussian_probes(keys.fold(Purpose.PROBES), z, self.probes)
        return self.weight * jacobian_norm(cell, params, u, z, probes)
