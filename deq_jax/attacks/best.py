"""The best adversarial image so far, per image, and a loop that stops once all are fooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.attacks.inputs import all_finite, has_labels
from deq_jax.attacks.oracles import Attack, Oracle
from deq_jax.attacks.threats import per_image
from deq_jax.core.keys import Keys
from deq_jax.core.types import AnyArray, Array, Loss


class Best(NamedTuple):
    """Per image: a misclassified candidate before any other, then the one of highest loss.

    Candidates with logits that are not finite are never taken. They are evaluated by the labels of the
    attack, see `is_fooled`.

    Attributes:
      x: [B, H, W, C].
      fooled: [B], whether x is misclassified.
      loss: [B], at x.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.attacks import Best
      >>> from deq_jax.core import margin
      >>> logits, labels = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0])
      >>> best = Best.of(jnp.zeros((2, 1, 1, 1)), margin, logits, labels)
      >>> best.fooled.tolist(), best.loss.tolist()
      ([False, True], [-1.0, 1.0])
    """

    x: AnyArray
    fooled: AnyArray
    loss: AnyArray

    @classmethod
    def clean(cls, oracle: Oracle, loss: Loss, x: Array, labels: Array, keys: Keys, start: Array | None = None) -> Best:
        """The images themselves, or the start where it is better; costs a query of the logits each.

        The loss is NaN where a logit is not finite.
        """
        best = cls.of(x, loss, oracle.logits(x, keys), labels)
        if start is None:
            return best
        return best.query(oracle, loss, start, labels, keys)

    @classmethod
    def of(cls, x: Array, loss: Loss, logits: Array, labels: Array) -> Best:
        """Images with these logits."""
        losses = jnp.where(all_finite(logits), loss(logits, labels), jnp.nan)
        return cls(x, is_fooled(logits, labels), losses.astype(x.dtype))

    def update(self, x: Array, losses: Array, logits: Array, labels: Array) -> Best:
        """The better of this and a candidate x, per image."""
        fooled = is_fooled(logits, labels)
        gain = (fooled & ~self.fooled) | ((fooled == self.fooled) & (losses > self.loss))
        better = gain & all_finite(logits)
        return Best(x, fooled, losses.astype(self.loss.dtype)).where(better, self)

    def query(self, oracle: Oracle, loss: Loss, x: Array, labels: Array, keys: Keys) -> Best:
        """The better of this and images x; costs one query of the logits."""
        logits = oracle.logits(x, keys)
        return self.update(x, loss(logits, labels), logits, labels)

    def where(self, condition: Array, other: Best) -> Best:
        """This where the condition [B] holds, else the other."""
        chosen: Best = jax.tree.map(lambda a, b: jnp.where(per_image(condition, a), a, b), self, other)
        return chosen


@runtime_checkable
class InParts(Attack, Protocol):
    """An attack that can be carried out part by part; `AutoAttack` leaves fooled images out of the parts to come.

    The parts one after another give what the attack gives as a whole.
    """

    def attempts(self, num_classes: int) -> int:
        """The number of parts, for logits of so many classes."""

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
        """The state after a part.

        Args:
          number: the number of the part, from 0.
          so_far: the state after the part before; before the first one the images themselves, with margins as losses.
          oracle, x, labels, start: as for `Attack`, checked; the labels are [B].
          keys: the same for all parts.
        """


def until_fooled(attempt: Callable[[Array, Best], Best], best: Best, attempts: int | Array) -> Best:
    """``best <- attempt(number, best)`` for number = 0, 1, ..., as long as any image resists.

    A fooled image no longer changes, so it does not depend on its batch-mates.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.attacks import Best, until_fooled
      >>> def attempt(number, best):
      ...     return best._replace(fooled=number == jnp.array([2]), loss=number * jnp.ones(1))
      >>> start = Best(jnp.zeros((1, 1, 1, 1)), jnp.array([False]), jnp.zeros(1))
      >>> until_fooled(attempt, start, attempts=5).loss.tolist()  # the third attempt was the last
      [2.0]
    """

    def resists(carry: tuple[Array, Best]) -> Array:
        number, best = carry
        return (number < attempts) & jnp.any(~best.fooled)

    def body(carry: tuple[Array, Best]) -> tuple[Array, Best]:
        number, best = carry
        return number + 1, best.where(best.fooled, attempt(number, best))

    return lax.while_loop(resists, body, (jnp.int32(0), best))[1]


def is_fooled(logits: Array, labels: Array) -> Array:
    """[B], whether the most likely class is not the label; False where a logit is not finite.

    The labels are [B], pairs (label, class aimed at) [B, 2], or reference logits [B, K], float; with these nothing
    counts as misclassified.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.attacks import is_fooled
      >>> is_fooled(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0])).tolist()
      [False, True]
    """
    if not has_labels(labels):
        return jnp.zeros(logits.shape[:1], bool)
    return (jnp.argmax(logits, axis=-1) != labels_of(labels)) & all_finite(logits)


def labels_of(labels: Array) -> Array:
    """The labels [B] alone, of labels [B] or pairs (label, class aimed at) [B, 2]."""
    return labels if labels.ndim == 1 else labels[:, 0]
