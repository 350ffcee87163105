"""The fast adaptive boundary attack [Croce & Hein 2020b]: adversarial images of minimal norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.attacks.best import Best, is_fooled, labels_of, until_fooled
from deq_jax.attacks.inputs import carry_out, check_settings
from deq_jax.attacks.oracles import Oracle
from deq_jax.attacks.threats import Threat, per_image
from deq_jax.core.errors import require, require_count
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import logit_difference, margin
from deq_jax.core.norms import power_of_two
from deq_jax.core.types import Array


@dataclass(frozen=True)
class FAB:
    """Walks along the decision boundary towards the image.

    Each step linearises the boundary at the iterate. It goes to that hyperplane (within the box) from the iterate and
    from the image, overshoots, and takes a mean of the two, biased towards the iterate. A misclassified iterate is
    pulled back to the image.

    With pairs (label, class aimed at) in place of labels the boundary is the one between the two, one gradient
    query a step; with labels it is the nearest of all K - 1, at K - 1 queries a step.

    Attributes:
      threat: norm, and the radius within which an adversarial image counts.
      steps: per restart.
      restarts: the first starts at the image, the others at random at half the radius.
      alpha_max: largest weight of the image's own projection.
      eta: overshoot, as a factor.
      beta: share of the perturbation kept when pulling back.

    Examples:
      >>> from deq_jax.attacks import FAB, L2
      >>> FAB(L2(0.5), restarts=5).threat
      L2(epsilon=0.5)
    """

    threat: Threat
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    uses_gradients: ClassVar[bool] = True
    gradient_queries: ClassVar[None] = None  # depends on the number of classes

    def __post_init__(self) -> None:
        check_settings(self)
        require_count("FAB: steps", self.steps)
        require_count("FAB: restarts", self.restarts)
        require(0 <= self.alpha_max <= 1, f"FAB: alpha_max must be in [0, 1], got {self.alpha_max!r}")
        require(self.eta >= 1, f"FAB: eta must be >= 1, got {self.eta!r}")
        require(0 < self.beta < 1, f"FAB: beta must be in (0, 1), got {self.beta!r}")

    def __call__(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Array:
        """Adversarial images of minimal norm; see `APGD.__call__`.

        Where the nearest one lies outside the ball, its projection if that has a higher margin loss than
        x, else x. A start that is misclassified already is returned unchanged.
        """
        return carry_out(self._run, oracle, x, labels, key, start, threat=self.threat)

    def _run(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        given, labels = labels, labels_of(labels)
        num_classes = jax.eval_shape(lambda: oracle.logits(x, keys)).shape[-1]
        aims = given[None, :, 1] if given.ndim == 2 else _others(labels, num_classes)

        def restart(number: Array, best: Best) -> Best:
            own = keys.fold(1 + number)
            radius = jnp.where(number == 0, 0, self.threat.epsilon / 2)
            begin = jnp.clip(x + radius * self.threat.random_direction(own, x), 0, 1)
            begin = begin if start is None else jnp.where(number == 0, start, begin)
            queries = own.fold(Purpose.QUERY)
            found = self.threat.project(self._walk(oracle, x, begin, labels, aims, queries), x)
            return best.query(oracle, margin, found, labels, queries.fold(2 * self.steps + 1))

        best = Best.clean(oracle, margin, x, labels, keys.fold(Purpose.QUERY), start)
        found: Array = until_fooled(restart, best, self.restarts).x
        return found

    def _walk(self, oracle: Oracle, x: Array, start: Array, labels: Array, aims: Array, queries: Keys) -> Array:
        """The nearest misclassified iterate, x where there was none."""
        length = self.threat.length

        def step(carry: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], None]:
            point, found, distance = carry
            gap = self._nearest_boundary(oracle, point, labels, aims, queries.fold(2 * number - 1))
            point = self._step(x, point, *gap)
            fooled, reached = is_fooled(oracle.logits(point, queries.fold(2 * number)), labels), length(point - x)
            closer = fooled & (reached < distance)
            found = jnp.where(per_image(closer, x), point, found)
            point = jnp.where(per_image(fooled, x), x + self.beta * (point - x), point)
            return (point, found, jnp.where(closer, reached, distance)), None

        carry = start, x, jnp.full(x.shape[0], jnp.inf, x.dtype)
        return lax.scan(step, carry, 1 + jnp.arange(self.steps))[0][1]

    def _step(self, x: Array, point: Array, gap: Array, normal: Array) -> Array:
        """From the iterate and the image towards the hyperplane ``gap + <normal, z - point> = 0``."""
        to_plane, length = self.threat.to_hyperplane, self.threat.length
        tilt = jnp.sum(normal * (x - point), axis=tuple(range(1, x.ndim)))
        from_point, from_x = to_plane(point, normal, -gap), to_plane(x, normal, -gap - tilt)
        near, far = jnp.maximum(length(from_point), 1e-8), jnp.maximum(length(from_x), 1e-8)
        alpha = per_image(jnp.minimum(near / (near + far), self.alpha_max), x)
        return jnp.clip((1 - alpha) * (point + self.eta * from_point) + alpha * (x + self.eta * from_x), 0, 1)

    def _nearest_boundary(
        self, oracle: Oracle, point: Array, labels: Array, aims: Array, keys: Keys
    ) -> tuple[Array, Array]:
        """Gap [B] and its gradient, in a common unit, for the class (of aims [C, B]) with the nearest boundary."""

        def linearise(aim: Array) -> tuple[Array, Array, Array]:
            pairs = jnp.stack([labels, aim], axis=1)
            gap, _, normal = oracle.grad(logit_difference, point, pairs, keys)
            unit = power_of_two(
                jnp.max(jnp.abs(normal), axis=tuple(range(1, point.ndim)))
            )  # a unit in which squares are in range
            gap, normal = gap / unit, normal / per_image(unit, normal)
            return gap, normal, jnp.abs(gap) / jnp.maximum(self.threat.dual_length(normal), 1e-12)

        def nearer(nearest: tuple[Array, Array, Array], aim: Array) -> tuple[tuple[Array, Array, Array], None]:
            other = linearise(aim)
            closer = other[2] < nearest[2]
            return jax.tree.map(lambda a, b: jnp.where(per_image(closer, a), a, b), other, nearest), None

        (gap, normal, _), _ = lax.scan(nearer, linearise(aims[0]), aims[1:])
        return gap, normal


def _others(labels: Array, num_classes: int) -> Array:
    """[K - 1, B] the classes other than the label."""
    return (labels + jnp.arange(1, num_classes, dtype=jnp.int32)[:, None]) % num_classes
