"""What an attacker may ask of a predictor, as an `Oracle`; attacks see oracles, never models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from deq_jax.types import Array, Classifier, Keys, Loss, Oracle, Variables


def oracle_of(logits: Callable[[Array, Keys], Array]) -> Oracle:
    """Oracle of a differentiable predictor ``(x [B, H, W, C], keys) -> logits [B, K]``; equal for the same one."""
    return Oracle(logits, _Gradient(logits))


@dataclass(frozen=True)
class _Gradient:
    logits: Callable[[Array, Keys], Array]

    def __call__(self, loss: Loss, x: Array, target: Array, keys: Keys) -> tuple[Array, Array, Array]:
        def total(x):
            scores = self.logits(x, keys)
            losses = loss(scores, target)
            return jnp.sum(losses), (losses, scores)

        gradient, (losses, scores) = jax.grad(total, has_aux=True)(x)
        return losses, scores, gradient


def classifier_oracle(classifier: Classifier, variables: Variables, *, random: bool = False) -> Oracle:
    """Oracle of a classifier in evaluation mode, with the gradient of its own dynamics.

    Args:
      classifier: to be attacked.
      variables: its parameters and batch statistics.
      random: let random readouts draw a state at every query, as in training; otherwise the
        deterministic predictor that is deployed.
    """

    def logits(x: Array, keys: Keys) -> Array:
        return classifier(variables, x, keys=keys if random else None).logits

    return oracle_of(logits)
