"""A trained classifier as one value: a network together with its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.attacks.oracles import Oracle
from deq_jax.core.compilation import compiled
from deq_jax.core.keys import Keys
from deq_jax.core.types import AnyArray, Array
from deq_jax.data.batches import evaluation_batches, to_unit
from deq_jax.data.datasets import Images, checked_images
from deq_jax.evaluation.measure import measure
from deq_jax.evaluation.rows import Measured
from deq_jax.models.base import Variables, check_classifier
from deq_jax.surrogates.base import Direct, Surrogate, judged


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Predictor:
    """A classifier and its variables; a pytree with the variables as leaves.

    Images are [B, H, W, C], floating in [0, 1] or uint8. A random predictor draws from the keys, and is deterministic
    without them.

    Attributes:
      classifier: the network, such as an `Equilibrium`, or a defence around one.
      variables: its parameters and batch statistics.

    Examples:
      >>> import jax, jax.numpy as jnp, deq_jax as dj
      >>> model, x = dj.models.small_cnn(num_classes=10, channels=4), jnp.zeros((2, 8, 8, 1))
      >>> dj.Predictor(model, model.init(0, x)).logits(x).shape
      (2, 10)
    """

    classifier: Any = field(metadata={"static": True})  # a Classifier; surrogates know the class of a defence
    variables: Variables

    def __post_init__(self) -> None:
        check_classifier("Predictor: classifier", self.classifier)

    def logits(self, x: AnyArray, keys: Keys | None = None) -> Array:
        """Logits [B, K]."""
        return _logits(self, x, keys)

    def measure(self, x: AnyArray, labels: AnyArray, keys: Keys | None = None) -> Measured:
        """Label, margin, entropy and residual of z_1 .. z_T, their ensemble and the deployed one; see `measure`."""
        return _measure(self, x, labels, keys)

    def accuracy(self, x: AnyArray, labels: AnyArray, batch_size: int = 128) -> float:
        """Share of the images that are classified correctly, without keys.

        Args:
          x: images [N, H, W, C].
          labels: [N].
          batch_size: images at a time.

        Raises:
          InputError: images or labels are of another kind, or lie outside of [0, 1].
        """
        images = Images(np.asarray(x), np.asarray(labels))
        if len(images.x) > 0:
            images = checked_images(*images, "Predictor.accuracy")
        right = [
            np.argmax(self.logits(batch.x), axis=-1)[~batch.is_padding] == batch.y[~batch.is_padding]
            for batch in evaluation_batches(images, min(batch_size, max(len(images.y), 1)))
        ]
        return float(np.mean(np.concatenate(right))) if right else float("nan")

    def oracle(self, surrogate: Surrogate | None = None, draws: int | None = None) -> Oracle:
        """The oracle of an attack: gradients of the surrogate, success on this predictor.

        Args:
          surrogate: source of the gradient, such as ``surrogates.Intermediate(4)``; None for the predictor's own;
            ``surrogates.WithGradient(Implicit())`` for another gradient estimator.
          draws: number of draws of a random predictor; every answer is their mean (EOT). None for a deterministic one.
        """
        return judged(Direct() if surrogate is None else surrogate, self.classifier, self.variables, draws)


@compiled()
def _logits(predictor: Predictor, x: Array, keys: Keys | None) -> Array:
    logits: Array = predictor.classifier(predictor.variables, to_unit(jnp.asarray(x)), keys=keys).logits
    return logits


@compiled()
def _measure(predictor: Predictor, x: Array, labels: Array, keys: Keys | None) -> Measured:
    return measure(predictor.classifier, predictor.variables, to_unit(jnp.asarray(x)), labels, keys)
