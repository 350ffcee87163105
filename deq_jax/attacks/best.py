"""The best adversarial image so far, per image, and a loop that stops once all are fooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.attacks.inputs import all_finite, has_labels
from deq_jax.attacks.oracles import Oracle
from deq_jax.attacks.threats import per_image
from deq_jax.core.types import AnyArray, Array, Keys, Loss


class Best(NamedTuple):
    """Per image: a misclassified candidate before any other, then the one of highest loss.

    Candidates whose logits are not finite are never taken. The target that they are judged by is that of
    the attack, see `is_fooled`.

    Attributes:
      x: [B, H, W, C].
      fooled: [B], whether x is misclassified.
      loss: [B], at x.
    """

    x: AnyArray
    fooled: AnyArray
    loss: AnyArray

    @classmethod
    def clean(cls, oracle: Oracle, loss: Loss, x: Array, target: Array, keys: Keys) -> Best:
        """The images themselves; costs one query of the logits. The loss is NaN where a logit is not finite."""
        return cls.of(x, loss, oracle.logits(x, keys), target)

    @classmethod
    def of(cls, x: Array, loss: Loss, logits: Array, target: Array) -> Best:
        """Images with these logits."""
        losses = jnp.where(all_finite(logits), loss(logits, target), jnp.nan)
        return cls(x, is_fooled(logits, target), losses.astype(x.dtype))

    def update(self, x: Array, losses: Array, logits: Array, target: Array) -> Best:
        """The better of this and a candidate x, per image."""
        fooled = is_fooled(logits, target)
        gain = (fooled & ~self.fooled) | ((fooled == self.fooled) & (losses > self.loss))
        better = gain & all_finite(logits)
        return Best(x, fooled, losses.astype(self.loss.dtype)).where(better, self)

    def where(self, condition: Array, other: Best) -> Best:
        """This where the condition [B] holds, else the other."""
        return jax.tree.map(lambda a, b: jnp.where(per_image(condition, a), a, b), self, other)


def until_fooled(attempt: Callable[[Array, Best], Best], best: Best, attempts: int) -> Best:
    """``best <- attempt(number, best)`` for number = 0, 1, ..., as long as any image resists.

    A fooled image no longer changes, so it does not depend on its batch-mates.
    """

    def resists(carry):
        number, best = carry
        return (number < attempts) & jnp.any(~best.fooled)

    def body(carry):
        number, best = carry
        return number + 1, best.where(best.fooled, attempt(number, best))

    return lax.while_loop(resists, body, (jnp.int32(0), best))[1]


def is_fooled(logits: Array, target: Array) -> Array:
    """[B], whether the most likely class is not the label; False where a logit is not finite.

    The target is labels [B], pairs (label, class aimed at) [B, 2], or reference logits [B, K], float, by
    which nothing is misclassified.
    """
    if not has_labels(target):
        return jnp.zeros(logits.shape[:1], bool)
    return (jnp.argmax(logits, axis=-1) != labels_of(target)) & all_finite(logits)


def labels_of(target: Array) -> Array:
    """The labels [B] of a target: labels [B], or pairs (label, class aimed at) [B, 2]."""
    return target if target.ndim == 1 else target[:, 0]
