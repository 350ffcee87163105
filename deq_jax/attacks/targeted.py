"""Targeted attacks: one attempt for each of the likeliest wrong classes."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from deq_jax.attacks.best import Best, until_fooled
from deq_jax.attacks.inputs import carry_out
from deq_jax.attacks.oracles import Attack, Oracle
from deq_jax.attacks.threats import Threat
from deq_jax.core.errors import require
from deq_jax.core.losses import margin
from deq_jax.core.types import Array, Keys


@dataclass(frozen=True)
class Targeted:
    """Runs an attack once for each of the likeliest wrong classes of the clean image.

    Attributes:
      attack: takes pairs (label, class aimed at) as its target.
      classes: how many classes to aim at; all the wrong ones if there are fewer.
    """

    attack: Attack
    classes: int = 9

    def __post_init__(self):
        require(self.classes >= 1, f"Targeted: classes must be >= 1, got {self.classes!r}")

    @property
    def threat(self) -> Threat | None:
        """The threat model of the attack within."""
        return getattr(self.attack, "threat", None)

    @property
    def uses_gradients(self) -> bool | None:
        """Whether the attack within uses gradients."""
        return getattr(self.attack, "uses_gradients", None)

    @property
    def gradient_queries(self) -> int | None:
        """Number of gradients per image for all classes, at most."""
        queries = getattr(self.attack, "gradient_queries", None)
        return None if queries is None else queries * self.classes

    def __call__(self, oracle: Oracle, x: Array, target: Array, key: int | Array | Keys) -> Array:
        """Adversarial images; see `APGD.__call__`. The target is labels [B].

        Images fooled by one class are not attacked by the next.
        """
        return carry_out(self._run, oracle, x, target, key, pairs=False)

    def _run(self, oracle, x, target, keys):
        wrong = _wrong_classes(oracle.logits(x, keys.fold(0)), target)

        def attempt(number, best):
            pairs = jnp.stack([target, wrong[:, number]], axis=1)
            own = keys.fold(1 + number)
            x_adv = self.attack(oracle, x, pairs, own.fold(0))
            logits = oracle.logits(x_adv, own.fold(1))
            return best.update(x_adv, margin(logits, target), logits, target)

        best = Best.clean(oracle, margin, x, target, keys.fold(0))
        return until_fooled(attempt, best, min(self.classes, wrong.shape[1])).x


def _wrong_classes(logits: Array, labels: Array) -> Array:
    """[B, K - 1] the classes other than the label, likeliest first."""
    is_label = jnp.arange(logits.shape[-1]) == labels[:, None]
    order = jnp.argsort(jnp.where(is_label, jnp.inf, -logits), axis=-1)  # the label comes last
    return order[:, :-1].astype(jnp.int32)
