"""Projected gradient descent [Madry et al. 2018], for any per-example loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.attacks.threat import Linf
from deq_jax.losses import cross_entropy
from deq_jax.types import Array, Keys, Loss, Oracle, require

Start = Callable[[Keys, Array, float], Array]
"""``(keys, x, epsilon) -> x_0``; the attack projects what it returns."""


def uniform_start(keys: Keys, x: Array, epsilon: float) -> Array:
    """Uniform in the ℓ∞ ball of radius epsilon around x."""
    noise = keys.draw(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, -1, 1))
    return x + epsilon * noise


def gaussian_start(keys: Keys, x: Array, epsilon: float) -> Array:
    """x + 0.001 N(0, 1), the start of TRADES, which has no gradient at x itself."""
    return x + 0.001 * keys.draw(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))


def clean_start(keys: Keys, x: Array, epsilon: float) -> Array:
    """x itself."""
    return x


@dataclass(frozen=True)
class PGD:
    """``x <- project(x + step_size sign(grad))``, in the ℓ∞ ball.

    Attributes:
      epsilon: radius, in the unit of x ([0, 1]).
      step_size: in the same unit.
      steps: per restart; each costs one gradient query.
      restarts: number of random starts.
      loss: maximised, ``(logits, target) -> [B]``.
      start: where a restart begins.
      best_of: return, per image, a misclassified iterate if there was one (judged where the target is
        labels), and among equals the one of highest loss; costs one more query per restart. Otherwise
        the last iterate of the last restart, as in adversarial training.
    """

    epsilon: float
    step_size: float
    steps: int
    restarts: int = 1
    loss: Loss = cross_entropy
    start: Start = uniform_start
    best_of: bool = True

    def __post_init__(self):
        require(self.epsilon >= 0, f"PGD: epsilon must be >= 0, got {self.epsilon!r}")
        require(self.step_size > 0, f"PGD: step_size must be > 0, got {self.step_size!r}")
        require(self.steps >= 1, f"PGD: steps must be >= 1, got {self.steps!r}")
        require(self.restarts >= 1, f"PGD: restarts must be >= 1, got {self.restarts!r}")

    def __call__(self, oracle: Oracle, x: Array, target: Array, key: Array | Keys) -> Array:
        """Adversarial images.

        Args:
          oracle: of the predictor.
          x: images [B, H, W, C] in [0, 1].
          target: what the loss compares with: labels [B] int, or reference logits [B, K].
          key: PRNG key, or `Keys` to number the images.

        Returns:
          [B, H, W, C], within epsilon of x and within [0, 1].
        """
        keys = Keys.of(key, x.shape[0])

        def restart(best, number):
            return self._restart(oracle, x, target, keys.fold(number), best), None

        worst = jnp.full(x.shape[0], -jnp.inf, x.dtype)
        best = x, jnp.zeros(x.shape[0], bool), worst
        return lax.scan(restart, best, jnp.arange(self.restarts))[0][0]

    def _restart(self, oracle, x, target, keys, best):
        project = Linf(self.epsilon).project

        def step(carry, number):
            x_adv, best = carry
            losses, logits, gradient = oracle.grad(self.loss, x_adv, target, keys.fold(number))
            best = self._keep_better(best, x_adv, losses, logits, target)
            x_adv = project(x_adv + self.step_size * jnp.sign(gradient), x)
            return (x_adv, best), None

        x_adv = project(self.start(keys, x, self.epsilon), x)
        (x_adv, best), _ = lax.scan(step, (x_adv, best), 1 + jnp.arange(self.steps))
        if not self.best_of:
            return x_adv, *best[1:]
        logits = oracle.logits(x_adv, keys.fold(self.steps + 1))
        return self._keep_better(best, x_adv, self.loss(logits, target), logits, target)

    def _keep_better(self, best, x_adv, losses, logits, target):
        if not self.best_of:
            return best
        kept, kept_fooled, kept_losses = best
        is_labels = jnp.issubdtype(target.dtype, jnp.integer)
        fooled = jnp.argmax(logits, axis=-1) != target if is_labels else jnp.zeros_like(kept_fooled)
        better = (fooled & ~kept_fooled) | ((fooled == kept_fooled) & (losses > kept_losses))
        kept = jnp.where(better[:, None, None, None], x_adv, kept)
        return kept, jnp.where(better, fooled, kept_fooled), jnp.where(better, losses, kept_losses)
