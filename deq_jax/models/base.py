"""The roles of classifiers, and the record that they return."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from flax import linen as nn

from deq_jax.core.errors import require, require_role
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array, PyTree, Solution

Variables = dict[str, PyTree]  # {"params": ..., "batch_stats": ...}


class Prediction(NamedTuple):
    """The output of a classifier.

    Attributes:
      logits: ``[B, K]``.
      batch_stats: BatchNorm running statistics, updated in training mode.
      solution: the equilibrium; its `evaluations` also count the gradient estimator; None for an explicit
        network.
      penalty: ``[B]``, to be added to the loss of each image in training; 0 where nothing is penalised.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.models import Prediction
      >>> Prediction(logits=jnp.zeros((2, 10)), batch_stats={}, solution=None).penalty
      0.0
    """

    logits: Array
    batch_stats: PyTree
    solution: Solution | None
    penalty: Array | float = 0.0


def check_classifier(where: str, classifier: Any) -> None:
    """Refuses anything but a classifier, such as a `Predictor`; `where` begins the message."""
    expected = "a classifier, such as an Equilibrium or the classifier of a Predictor, predictor.classifier"
    advice = f"Explicit({type(classifier).__name__}(...)) makes a classifier of a Flax module"
    require(not isinstance(classifier, nn.Module), f"{where}: expected {expected}; {advice}")
    require_role(where, classifier, ("__call__",), expected)


class Classifier(Protocol):
    """A trainable map from images ``[B, H, W, C]`` in [0, 1] to logits ``[B, K]``.

    Any hashable object with these two methods will do; only training calls `init`. `Explicit` makes one of a Flax
    module.
    """

    def init(self, key: Array, x: Array) -> Variables:
        """Variables ``{"params", "batch_stats"}`` for images like x."""
        ...

    def __call__(
        self,
        variables: Variables,
        x: Array,
        *,
        train: bool = False,
        keys: Keys | None = None,
        axis_name: str | None = None,
    ) -> Prediction:
        """Classifies images; keys make a random classifier draw; `axis_name` names the axis of devices in training."""
        ...
