"""Targeted attacks: one attempt for each of the likeliest wrong classes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from deq_jax.attacks.best import Best, until_fooled
from deq_jax.attacks.inputs import carry_out
from deq_jax.attacks.oracles import Attack, Oracle
from deq_jax.attacks.threats import Threat
from deq_jax.core.errors import require_count, require_role
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import margin
from deq_jax.core.types import Array


@dataclass(frozen=True)
class Targeted:
    """Runs an attack once for each of the likeliest wrong classes of the clean image.

    Attributes:
      attack: takes pairs (label, class aimed at) in place of labels.
      classes: how many classes to aim at; all the wrong ones if there are fewer.

    Examples:
      >>> from deq_jax.attacks import APGD, Linf, Targeted
      >>> from deq_jax.core import targeted_dlr
      >>> Targeted(APGD(Linf(8 / 255), steps=100, loss=targeted_dlr), classes=9).gradient_queries
      909
    """

    attack: Attack
    classes: int = 9

    def __post_init__(self) -> None:
        expected = "an attack on pairs, such as APGD(threat, loss=core.targeted_dlr)"
        require_role("Targeted: attack", self.attack, ("__call__",), expected)
        require_count("Targeted: classes", self.classes)

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

    def __call__(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Array:
        """Adversarial images; see `APGD.__call__`. The labels are [B].

        Images that one class has fooled are not attacked for the next. The attempt at each class begins at the start.
        """
        return carry_out(self._run, oracle, x, labels, key, start, threat=self.threat, pairs=False)

    def attempts(self, num_classes: int) -> int:
        """How many classes there are to aim at; see `InParts`."""
        return min(self.classes, num_classes - 1)

    def attempt(
        self,
        number: int | Array,
        so_far: Best,
        oracle: Oracle,
        x: Array,
        labels: Array,
        keys: Keys,
        start: Array | None,
    ) -> Best:
        """The better of this and the result of the attempt at one class; see `InParts`."""
        wrong = _wrong_classes(oracle.logits(x, keys.fold(Purpose.QUERY)), labels)
        own, pairs = keys.fold(1 + number), jnp.stack([labels, wrong[:, number]], axis=1)
        begin = {} if start is None else {"start": start}
        x_adv = self.attack(oracle, x, pairs, own.fold(Purpose.ATTACK), **begin)
        return so_far.query(oracle, margin, x_adv, labels, own.fold(Purpose.QUERY))

    def _run(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        def attempt(number: Array, best: Best) -> Best:
            return self.attempt(number, best, oracle, x, labels, keys, start)

        num_classes = jax.eval_shape(lambda: oracle.logits(x, keys)).shape[-1]
        best = Best.clean(oracle, margin, x, labels, keys.fold(Purpose.QUERY), start)
        x_adv: Array = until_fooled(attempt, best, self.attempts(num_classes)).x
        return x_adv


def _wrong_classes(logits: Array, labels: Array) -> Array:
    """[B, K - 1] the classes other than the label, likeliest first."""
    is_label = jnp.arange(logits.shape[-1]) == labels[:, None]
    order = jnp.argsort(jnp.where(is_label, jnp.inf, -logits), axis=-1)  # the label comes last
    return order[:, :-1].astype(jnp.int32)
