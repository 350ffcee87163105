"""Changes from step to step of a training run: penalised steps, and the radius of the attack."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import optax

from deq_jax.core.errors import InputError, require, require_count
from deq_jax.core.keys import Purpose
from deq_jax.core.types import Array
from deq_jax.training.objectives import Objective


@dataclass(frozen=True)
class PenaltySchedule:
    """Chooses the training steps with the classifier's Jacobian penalty: a few, drawn at random in the first epochs.

    Attributes:
      probability: probability of a penalty at a training step.
      epochs: number of epochs with penalised steps.

    References: Bai et al. 2021, section 4.2.

    Examples:
      >>> from deq_jax.training import PenaltySchedule
      >>> schedule = PenaltySchedule(probability=1.0, epochs=90)
      >>> schedule.is_drawn(seed=0, step=3, epoch=0), schedule.is_drawn(seed=0, step=9000, epoch=90)
      (True, False)
    """

    probability: float = 0.02
    epochs: int = 90

    def __post_init__(self) -> None:
        valid = 0 <= self.probability <= 1
        require(valid, f"PenaltySchedule: probability must be in [0, 1], got {self.probability!r}")
        require_count("PenaltySchedule: epochs", self.epochs, 0)

    def is_drawn(self, seed: int, step: int, epoch: int) -> bool:
        """Whether training step `step`, in epoch `epoch` (both from 0), is penalised."""
        return epoch < self.epochs and np.random.default_rng((seed, step, Purpose.PENALTY)).random() < self.probability


@dataclass(frozen=True)
class RadiusSchedule:
    """The radius of the attack on which a run trains: it grows linearly, then stays at the threat's epsilon.

    The steps of the attack grow with it. Pre-training steps count as steps of the run.

    Attributes:
      rise: share of the run's steps in which the radius grows; the last of them has the whole radius.
      start: the radius before the first step, as a share of the whole one.

    Examples:
      >>> from deq_jax.training import RadiusSchedule
      >>> share = RadiusSchedule(rise=0.5).over(steps=100)
      >>> [round(float(share(step)), 2) for step in (0, 24, 49, 99)]
      [0.02, 0.5, 1.0, 1.0]
    """

    rise: float = 0.5
    start: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.rise <= 1, f"RadiusSchedule: rise must be a share in (0, 1], got {self.rise!r}")
        require(0 <= self.start <= 1, f"RadiusSchedule: start must be a share in [0, 1], got {self.start!r}")

    def over(self, steps: int) -> optax.Schedule:
        """The share of the whole radius at each step, from 0, of a run of `steps` steps."""
        growth = optax.linear_schedule(self.start, 1.0, max(1, round(self.rise * steps)))
        return lambda step: growth(step + 1)


def with_radius(objective: Objective, share: float | Array) -> Objective:
    """The objective with a share of its attack's radius, and with attack steps that are as much shorter.

    Args:
      objective: has an attack that holds its threat, and its step size if it has one, as fields.
      share: in (0, 1]; may be traced.

    Raises:
      InputError: the objective has no such attack.
    """
    attack: Any = getattr(objective, "attack", None)
    fields = {f.name for f in dataclasses.fields(attack)} if dataclasses.is_dataclass(attack) else set()
    if "threat" not in fields:
        expected = "expected an objective with an attack of one radius, such as PGDAdversarialTraining(PGD(...))"
        raise InputError(f"TrainConfig: radius: {expected}, got {objective!r}")
    changes = {"threat": dataclasses.replace(attack.threat, epsilon=share * attack.threat.epsilon)}
    if getattr(attack, "step_size", None) is not None:
        changes["step_size"] = share * attack.step_size
    return cast(Objective, dataclasses.replace(cast(Any, objective), attack=dataclasses.replace(attack, **changes)))
