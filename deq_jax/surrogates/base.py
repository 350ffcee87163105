"""Surrogates: they give the gradient that attacks a DEQ. Success is measured on the deployed predictor.

A surrogate is a frozen object called as ``surrogate(classifier, variables) -> Oracle``. Its numbers are
leaves of a pytree: a compiled function that takes a surrogate as an argument serves every state, number of
steps and damping. The oracle's logits come from the surrogate's own forward pass; `judged` replaces
them by the deployed predictor's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from deq_jax.attacks.oracles import Oracle, expectation, gradient_from, oracle_of
from deq_jax.core.errors import described, require, require_role
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array, Gradient
from deq_jax.models.base import Classifier, Variables, check_classifier
from deq_jax.models.classifiers import require_deq


def classifier_oracle(classifier: Classifier, variables: Variables, *, random: bool = False) -> Oracle:
    """Oracle of a classifier in evaluation mode, with the gradient of its own dynamics.

    Args:
      classifier: the classifier that is attacked.
      variables: its parameters and batch statistics.
      random: let random readouts draw a state at every query, as in training; otherwise the
        deterministic predictor that is deployed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Explicit, Keys
      >>> from deq_jax.models import SmallCNN
      >>> from deq_jax.surrogates import classifier_oracle
      >>> model, x = Explicit(SmallCNN(num_classes=3, channels=4)), jnp.ones((2, 4, 4, 1))
      >>> classifier_oracle(model, model.init(0, x)).logits(x, Keys.of(0, 2)).shape
      (2, 3)
    """

    def logits(x: Array, keys: Keys) -> Array:
        return classifier(variables, x, keys=keys if random else None).logits

    return oracle_of(logits)


class Surrogate(Protocol):
    """``(classifier, variables) -> Oracle``: where an attack takes its gradients from."""

    def __call__(self, classifier: Any, variables: Variables) -> Oracle: ...


def check_surrogate(where: str, surrogate: Any) -> None:
    """Refuses anything but a surrogate, such as a gradient estimator; `where` begins the message."""
    expected = "a surrogate, such as ThroughSolver(), or WithGradient(Implicit()) of a gradient estimator"
    require_role(where, surrogate, ("__call__",), expected)
    require(not hasattr(surrogate, "applications"), f"{where}: expected {expected}, got {described(surrogate)}")


def judged(surrogate: Surrogate, classifier: Classifier, variables: Variables, draws: int | None = None) -> Oracle:
    """Gradients of the surrogate; loss and success of the classifier itself, as deployed.

    Args:
      surrogate: gives the gradients.
      classifier: as deployed.
      variables: variables of the classifier.
      draws: number of draws of a random classifier; every answer is their mean (EOT). None for a deterministic one.

    Raises:
      InputError: the surrogate is none, such as a gradient estimator, or does not fit the classifier.

    Differs from the reference: success is measured on the deployed predictor, also where another one gave the
    gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Explicit, Keys
      >>> from deq_jax.models import SmallCNN
      >>> from deq_jax.surrogates import Direct, judged
      >>> model, x = Explicit(SmallCNN(num_classes=3, channels=4)), jnp.ones((2, 4, 4, 1))
      >>> oracle = judged(Direct(), model, model.init(0, x))
      >>> oracle.logits(x, Keys.of(0, 2)).shape
      (2, 3)
    """
    check_classifier("classifier", classifier)
    check_surrogate("surrogate", surrogate)
    judge = classifier_oracle(classifier, variables, random=draws is not None)
    oracle = judge if isinstance(surrogate, Direct) else gradient_from(surrogate(classifier, variables), judge)
    return oracle if draws is None else expectation(oracle, draws)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Direct:
    """The predictor's own gradient; also for explicit networks.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.evaluation import Trial
      >>> Trial("pgd-10", PGD(Linf(0.1))).surrogate  # unless another one is named
      Direct()
    """

    def __call__(self, classifier: Classifier, variables: Variables) -> Oracle:
        return classifier_oracle(classifier, variables)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WithGradient:
    """The predictor with another gradient estimator, such as `Implicit(Broyden(30))`.

    Attributes:
      gradient: replaces the estimator of the dynamics; a static field, so each one is compiled.

    Examples:
      >>> from deq_jax import Broyden, Implicit
      >>> from deq_jax.surrogates import WithGradient
      >>> WithGradient(Implicit(Broyden(30))).gradient.solver.steps
      30
    """

    gradient: Gradient = field(metadata={"static": True})

    def __call__(self, classifier: Classifier, variables: Variables) -> Oracle:
        model, _ = require_deq(classifier, type(self).__name__)
        return classifier_oracle(model.with_dynamics(gradient=self.gradient), variables)
