"""The config of a training run: `TrainConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import cast

from deq_jax.attacks.oracles import Attack
from deq_jax.attacks.pgd import PGD
from deq_jax.attacks.threats import Linf, Threat
from deq_jax.core.errors import InputError, require, require_count, require_role
from deq_jax.core.gradients import Unrolled
from deq_jax.core.readouts import FinalState
from deq_jax.core.types import Optimizer, Readout
from deq_jax.data.batches import CropFlip
from deq_jax.data.datasets import Dataset
from deq_jax.models.base import check_classifier
from deq_jax.models.classifiers import Equilibrium, Explicit
from deq_jax.training.objectives import Objective, Standard
from deq_jax.training.optimizers import AdamCosine
from deq_jax.training.schedules import PenaltySchedule, RadiusSchedule, with_radius


class Phase(Enum):
    """The kind of a training step; each phase is compiled once.

    Examples:
      >>> from deq_jax.training import Phase
      >>> [phase.name for phase in Phase]
      ['PRETRAINING', 'PLAIN', 'PENALISED']
    """

    PRETRAINING = "shallow pre-training"
    PLAIN = "training"
    PENALISED = "training with Jacobian penalty"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run.

    Attributes:
      classifier: `Equilibrium` or `Explicit`.
      objective: the loss, and the images for it.
      dataset: where the images come from; see `Dataset` for arrays in memory.
      validation_attack: crafts the images on which the best checkpoint is chosen, on held-out
        training images.
      optimizer: `AdamCosine`, `Sgd`, `AdamW`, any of them in a `WeightAverage`, or one of your own; see `Optimizer`.
      batch_size: images per step, over all devices.
      accumulate: parts into which each device divides its images of a step, one after the other, to save memory;
        their gradients are averaged, and each part is normalised by its own statistics.
      epochs: passes over the training images.
      pretrain_steps: first steps, clean and shallow: z = f^T(0), plain backpropagation.
      penalty_schedule: chooses the other steps that have the classifier's Jacobian penalty, if it has one.
      radius: how the radius of the objective's attack grows; None: it is the whole one at every step. The validation
        attack always has its own.
      augmentation: random changes of training images; None for none.
      seed: random seed of initialisation, data order and all else.
      log_every: steps between two lines of training metrics.
      checkpoint_every: steps between two checkpoints; None for every epoch.
      validate_every: epochs between two validations; None for every epoch.
      validation_images: how many of the held-out images are used; None for all.
      patience: the run ends after so many validations without a new best one; None for never.

    Differs from the reference: the best checkpoint is chosen on held-out training images.

    Examples:
      >>> import deq_jax as dj
      >>> model = dj.models.small_deq(num_classes=10, channels=12, dynamics=dj.Dynamics(dj.Broyden(8)))
      >>> config = dj.TrainConfig(model, dj.Standard(), dj.data.Digits(), batch_size=64, epochs=6, pretrain_steps=34)
      >>> config.phase(step=0, steps_per_epoch=17).name, config.phase(step=34, steps_per_epoch=17).name
      ('PRETRAINING', 'PLAIN')
    """

    classifier: Equilibrium | Explicit
    objective: Objective
    dataset: Dataset
    validation_attack: Attack = PGD(Linf(8 / 255), steps=10)
    optimizer: Optimizer = field(default_factory=AdamCosine)
    batch_size: int = 96
    accumulate: int = 1
    epochs: int = 220
    pretrain_steps: int = 0
    penalty_schedule: PenaltySchedule = field(default_factory=PenaltySchedule)
    radius: RadiusSchedule | None = None
    augmentation: CropFlip | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None
    validate_every: int | None = None
    validation_images: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        check_classifier("TrainConfig: classifier", self.classifier)
        objective = "an objective, such as Standard() or PGDAdversarialTraining(PGD(Linf(8 / 255)))"
        require_role("TrainConfig: objective", self.objective, ("perturb", "loss"), objective)
        dataset = "a dataset, such as Npz('mine.npz'), or for arrays in memory one of your own (see data.Dataset)"
        require_role("TrainConfig: dataset", self.dataset, ("load",), dataset)
        attack = "an attack, such as PGD(Linf(8 / 255))"
        require_role("TrainConfig: validation_attack", self.validation_attack, ("__call__",), attack)
        optimizer = "an optimiser, such as AdamCosine(), or for optax one of your own (see training.Optimizer)"
        require_role("TrainConfig: optimizer", self.optimizer, ("transformation",), optimizer)
        for name in ("batch_size", "accumulate", "epochs", "log_every"):
            require_count(f"TrainConfig: {name}", getattr(self, name))
        for name in ("pretrain_steps", "seed"):
            require_count(f"TrainConfig: {name}", getattr(self, name), 0)
        for name in ("checkpoint_every", "validate_every", "validation_images", "patience"):
            require_count(f"TrainConfig: {name}", getattr(self, name), optional=True)
        divides = self.batch_size % self.accumulate == 0
        parts = f"accumulate = {self.accumulate} parts"
        require(divides, f"TrainConfig: batch_size {self.batch_size} does not divide into {parts}")
        if self.radius is not None:
            with_radius(self.objective, 1.0)  # checks that there is one
        if self.pretrain_steps > 0:
            self.pretraining()  # checks that there is a solver

    def pretraining(self) -> TrainConfig:
        """The config of the pre-training phase: standard training of the cell applied T times to 0."""
        solver = self.classifier.dynamics.solver if isinstance(self.classifier, Equilibrium) else None
        if solver is None:
            raise InputError(
                "TrainConfig: pretrain_steps > 0 needs an Equilibrium with a solver; expected 0 for any other"
            )
        classifier = cast(Equilibrium, self.classifier)
        gradient = Unrolled(solver.steps)
        shallow = classifier.with_dynamics(solver=None, readout=FinalState(), gradient=gradient)
        shallow = dataclasses.replace(shallow, jacobian=None)
        return dataclasses.replace(self, classifier=shallow, objective=Standard(), radius=None, pretrain_steps=0)

    def phase(self, step: int, steps_per_epoch: int) -> Phase:
        """The phase of training step `step` (from 0).

        For example, with 100 steps an epoch and ``pretrain_steps=34``::

            config.phase(0, 100)   # Phase.PRETRAINING
            config.phase(34, 100)  # Phase.PLAIN, or PENALISED where the schedule draws it
        """
        if step < self.pretrain_steps:
            return Phase.PRETRAINING
        drawn = self._has_penalty and self.penalty_schedule.is_drawn(self.seed, step, step // steps_per_epoch)
        return Phase.PENALISED if drawn else Phase.PLAIN

    def during(self, phase: Phase) -> TrainConfig:
        """The config of the steps of a phase.

        Raises:
          InputError: the classifier has no such phase: pre-training needs a solver, a penalised step a penalty.
        """
        if phase is Phase.PRETRAINING:
            return self.pretraining()
        if phase is Phase.PENALISED:
            require(self._has_penalty, "TrainConfig: penalised steps are for an Equilibrium with a Jacobian penalty")
            return self
        if not self._has_penalty:
            return self
        plain = dataclasses.replace(cast(Equilibrium, self.classifier), jacobian=None)
        return dataclasses.replace(self, classifier=plain)

    @property
    def _has_penalty(self) -> bool:
        return isinstance(self.classifier, Equilibrium) and self.classifier.jacobian is not None


def with_readout(config: TrainConfig, readout: Readout) -> TrainConfig:
    """The config with another readout of the equilibrium's dynamics.

    Raises:
      InputError: the classifier is not an `Equilibrium`.

    Examples:
      >>> from deq_jax import Broyden, Dynamics, LastState, Standard, TrainConfig
      >>> from deq_jax.data import Digits
      >>> from deq_jax.models import small_deq
      >>> from deq_jax.training import with_readout
      >>> config = TrainConfig(small_deq(10, 12, Dynamics(Broyden(8))), Standard(), Digits())
      >>> with_readout(config, LastState()).classifier.dynamics.readout
      LastState()
    """
    classifier = config.classifier
    if not isinstance(classifier, Equilibrium):
        raise InputError(f"with_readout: expected an Equilibrium, got {type(classifier).__name__}")
    return dataclasses.replace(config, classifier=classifier.with_dynamics(readout=readout))


def threat_of(train: TrainConfig) -> Threat:
    """The ball that a training run validates with.

    Raises:
      InputError: its validation attack declares no threat model.

    Examples:
      >>> from deq_jax import Standard, TrainConfig
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.data import Digits
      >>> from deq_jax.models import small_cnn
      >>> from deq_jax.training import threat_of
      >>> threat_of(TrainConfig(small_cnn(10, 12), Standard(), Digits(), validation_attack=PGD(Linf(0.1))))
      Linf(epsilon=0.1)
    """
    attack = train.validation_attack
    threat = getattr(attack, "threat", None)
    expected = "expected one that has, such as PGD(Linf(8 / 255))"
    require(threat is not None, f"the run's validation_attack, {type(attack).__name__}, declares no threat; {expected}")
    return cast(Threat, threat)
