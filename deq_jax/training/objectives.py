"""Training objectives: a loss, and the images for it.

An objective has two parts. ``perturb`` makes the images to train on, with the model in evaluation mode
and its parameters held constant; ``loss`` is differentiated. Both are pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from deq_jax.attacks.oracles import Attack, Oracle
from deq_jax.core.errors import require, require_role
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import cross_entropy, kl
from deq_jax.core.types import Array, PyTree
from deq_jax.models.base import Classifier, Prediction, Variables
from deq_jax.surrogates.base import Surrogate, check_surrogate, classifier_oracle, judged


class Outcome(NamedTuple):
    """Results of a loss besides its value.

    Attributes:
      batch_stats: running statistics after the step.
      metrics: scalars of the local batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.training import Outcome
      >>> float(Outcome(batch_stats={}, metrics={"accuracy": jnp.float32(0.5)}).metrics["accuracy"])
      0.5
    """

    batch_stats: PyTree
    metrics: dict[str, Array]


class Objective(Protocol):
    """An objective of training."""

    def perturb(self, classifier: Classifier, variables: Variables, x: Array, labels: Array, keys: Keys) -> Array:
        """Images to train on, [B, H, W, C]."""
        ...

    def loss(
        self,
        classifier: Classifier,
        variables: Variables,
        x: Array,
        x_adv: Array,
        labels: Array,
        keys: Keys,
        axis_name: str | None,
    ) -> tuple[Array, Outcome]:
        """The mean loss of the batch, and the other results of the forward passes."""
        ...


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on the clean images.

    Attributes:
      label_smoothing: share of each label's probability that is spread over all classes; see `core.cross_entropy`.

    Examples:
      >>> from deq_jax import Standard, TrainConfig
      >>> from deq_jax.data import Digits
      >>> from deq_jax.models import small_cnn
      >>> TrainConfig(small_cnn(num_classes=10, channels=12), Standard(), Digits(), epochs=6).objective
      Standard(label_smoothing=0.0)
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self)

    def perturb(self, classifier: Classifier, variables: Variables, x: Array, labels: Array, keys: Keys) -> Array:
        return x

    def loss(
        self,
        classifier: Classifier,
        variables: Variables,
        x: Array,
        x_adv: Array,
        labels: Array,
        keys: Keys,
        axis_name: str | None,
    ) -> tuple[Array, Outcome]:
        prediction = classifier(variables, x_adv, train=True, keys=keys.fold(Purpose.NATURAL), axis_name=axis_name)
        loss = jnp.mean(cross_entropy(prediction.logits, labels, self.label_smoothing) + prediction.penalty)
        metrics = {"accuracy": _accuracy(prediction, labels), **_solver_metrics(prediction)}
        return loss, Outcome(prediction.batch_stats, metrics)


@dataclass(frozen=True)
class PGDAdversarialTraining:
    """Cross-entropy on adversarial images only (PGD-AT); batch statistics come from them.

    Attributes:
      attack: crafts them.
      random_attack: let random readouts draw a state at every attack step, as in the training passes;
        otherwise the attack sees the full dynamics.
      surrogate: gives the attack's gradients, e.g. `ThroughSolver()`, which sees the full dynamics; None for the
        classifier's own gradient estimator.
      label_smoothing: as in `Standard`, of the loss that is trained; the attack has its own loss.

    References: Madry et al. 2018, eq. 2.1.

    Examples:
      >>> from deq_jax import PGDAdversarialTraining
      >>> from deq_jax.attacks import PGD, Linf
      >>> PGDAdversarialTraining(PGD(Linf(8 / 255), steps=10, best_of=False)).attack.gradient_queries
      10
    """

    attack: Attack
    random_attack: bool = True
    surrogate: Surrogate | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self)
        _check_attack(self)

    def perturb(self, classifier: Classifier, variables: Variables, x: Array, labels: Array, keys: Keys) -> Array:
        oracle = _attacked(self, classifier, variables)
        return self.attack(oracle, x, labels, keys.fold(Purpose.ATTACK))

    def loss(
        self,
        classifier: Classifier,
        variables: Variables,
        x: Array,
        x_adv: Array,
        labels: Array,
        keys: Keys,
        axis_name: str | None,
    ) -> tuple[Array, Outcome]:
        prediction = classifier(variables, x_adv, train=True, keys=keys.fold(Purpose.ADVERSARIAL), axis_name=axis_name)
        loss = jnp.mean(cross_entropy(prediction.logits, labels, self.label_smoothing) + prediction.penalty)
        metrics = {"adversarial_accuracy": _accuracy(prediction, labels), **_solver_metrics(prediction)}
        return loss, Outcome(prediction.batch_stats, metrics)


@dataclass(frozen=True)
class Trades:
    """``CE(x) + beta KL(p(x) || p(x'))``, gradient through both terms.

    Two forward passes, natural then adversarial, each normalised by its own batch statistics; running
    statistics are updated in that order.

    Attributes:
      attack: maximises the divergence; its loss must be `kl`, and it gets the clean logits in place of labels.
      beta: weight of the divergence.
      random_attack: as in `PGDAdversarialTraining`.
      tied: draw the same random state and dropout masks in both passes, rather than independent ones.
      surrogate: as in `PGDAdversarialTraining`.
      label_smoothing: as in `Standard`, of the cross-entropy.

    References: Zhang et al. 2019, eq. 5.

    Differs from the reference: the clean prediction is computed once per training step.

    Examples:
      >>> from deq_jax import Trades
      >>> from deq_jax.attacks import PGD, Linf, gaussian_start
      >>> from deq_jax.core import kl
      >>> Trades(PGD(Linf(8 / 255), steps=10, loss=kl, start=gaussian_start, best_of=False)).beta
      6.0
    """

    attack: Attack
    beta: float = 6.0
    random_attack: bool = True
    tied: bool = False
    surrogate: Surrogate | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self)
        _check_attack(self)
        require(self.beta >= 0, f"Trades: beta must be >= 0, got {self.beta!r}")
        loss = getattr(self.attack, "loss", kl)
        expected = "the attack must maximise core.kl, since it gets clean logits for labels"
        require(loss is kl, f"Trades: {expected}; take PGD(threat, loss=core.kl)")

    def perturb(self, classifier: Classifier, variables: Variables, x: Array, labels: Array, keys: Keys) -> Array:
        oracle = _attacked(self, classifier, variables)
        clean_logits = oracle.logits(x, keys.fold(Purpose.NATURAL))
        return self.attack(oracle, x, clean_logits, keys.fold(Purpose.ATTACK))

    def loss(
        self,
        classifier: Classifier,
        variables: Variables,
        x: Array,
        x_adv: Array,
        labels: Array,
        keys: Keys,
        axis_name: str | None,
    ) -> tuple[Array, Outcome]:
        natural = classifier(variables, x, train=True, keys=keys.fold(Purpose.NATURAL), axis_name=axis_name)
        variables = {**variables, "batch_stats": natural.batch_stats}
        adversarial_keys = keys.fold(Purpose.NATURAL if self.tied else Purpose.ADVERSARIAL)
        adversarial = classifier(variables, x_adv, train=True, keys=adversarial_keys, axis_name=axis_name)
        natural_loss = jnp.mean(cross_entropy(natural.logits, labels, self.label_smoothing))
        divergence = jnp.mean(kl(adversarial.logits, natural.logits))
        metrics = {
            "accuracy": _accuracy(natural, labels),
            "adversarial_accuracy": _accuracy(adversarial, labels),
            "natural_loss": natural_loss,
            "divergence": divergence,
            **_solver_metrics(adversarial),
        }
        loss = natural_loss + self.beta * divergence + jnp.mean(natural.penalty + adversarial.penalty)
        return loss, Outcome(adversarial.batch_stats, metrics)


def _check_smoothing(objective: Standard | PGDAdversarialTraining | Trades) -> None:
    name, share = type(objective).__name__, objective.label_smoothing
    require(0 <= share < 1, f"{name}: label_smoothing must be a share in [0, 1), got {share!r}")


def _check_attack(objective: PGDAdversarialTraining | Trades) -> None:
    name = type(objective).__name__
    require_role(f"{name}: attack", objective.attack, ("__call__",), "an attack, such as PGD(Linf(8 / 255))")
    if objective.surrogate is not None:
        check_surrogate(f"{name}: surrogate", objective.surrogate)


def _attacked(objective: PGDAdversarialTraining | Trades, classifier: Classifier, variables: Variables) -> Oracle:
    """The oracle that the attack of a training step asks."""
    if objective.surrogate is None:
        return classifier_oracle(classifier, variables, random=objective.random_attack)
    return judged(objective.surrogate, classifier, variables)


def _accuracy(prediction: Prediction, labels: Array) -> Array:
    return jnp.mean(jnp.argmax(prediction.logits, axis=-1) == labels)


def _solver_metrics(prediction: Prediction) -> dict[str, Array]:
    """Lowest relative residual and cell evaluations per image, where there is a solver."""
    solution = prediction.solution
    if solution is None or not len(solution.residuals):
        return {}
    lowest = jnp.min(solution.residuals, axis=0)
    return {
        "residual": jnp.mean(lowest),
        "residual_max": jnp.max(lowest),
        "cell_evaluations": jnp.mean(solution.evaluations),
    }
