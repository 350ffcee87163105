"""Projected gradient descent [Madry et al. 2018], for any per-example loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.attacks.best import Best
from deq_jax.attacks.inputs import carry_out, check_settings
from deq_jax.attacks.oracles import Oracle
from deq_jax.attacks.threats import Threat, is_traced
from deq_jax.core.errors import require, require_count
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import cross_entropy
from deq_jax.core.types import Array, Loss

Start = Callable[[Keys, Array, Threat], Array]
"""``(keys, x, threat) -> x_0``; the attack projects the result."""

Kept = TypeVar("Kept", Best, None)


def uniform_start(keys: Keys, x: Array, threat: Threat) -> Array:
    """Uniform in the threat's ball around x, [B, H, W, C].

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Keys
      >>> from deq_jax.attacks import Linf, uniform_start
      >>> x = jnp.full((2, 1, 1, 3), 0.5)
      >>> bool((abs(uniform_start(Keys.of(0, 2), x, Linf(0.125)) - x) <= 0.125).all())
      True
    """
    return x + threat.random(keys, x)


def gaussian_start(keys: Keys, x: Array, threat: Threat) -> Array:
    """x + 0.001 N(0, 1), [B, H, W, C]: the start of TRADES, because its loss has no gradient at x itself.

    References: Zhang et al. 2019.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf, gaussian_start
      >>> from deq_jax.core import kl
      >>> PGD(Linf(8 / 255), steps=10, loss=kl, start=gaussian_start, best_of=False).gradient_queries
      10
    """
    return x + 0.001 * keys.draw(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))


def clean_start(keys: Keys, x: Array, threat: Threat) -> Array:
    """x itself, [B, H, W, C]: FGSM starts there.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf, clean_start
      >>> fgsm = PGD(Linf(8 / 255), steps=1, step_size=8 / 255, start=clean_start, best_of=False)
      >>> fgsm.gradient_queries
      1
    """
    return x


@dataclass(frozen=True)
class PGD:
    """``x <- project(x + step_size steepest(grad))``, where steepest is the sign in ℓ∞ and the unit vector in ℓ2.

    Attributes:
      threat: norm and radius, such as ``Linf(8 / 255)``.
      steps: per restart; each costs one gradient query.
      step_size: length of a step, in the unit of x ([0, 1]); None for ``2.5 epsilon / steps`` [Madry et al. 2018].
      restarts: number of random starts.
      loss: maximised, ``(logits, labels) -> [B]``, such as `cross_entropy`, `dlr` or `margin`, all in `deq_jax.core`.
      start: where a restart begins, unless images are given to start from.
      best_of: return, per image, a misclassified iterate if there was one (unless the labels are reference logits), and
        among equals the one of highest loss, x itself if none was better; costs one more query per restart, and one at
        x. Otherwise the last iterate of the one restart, as in adversarial training.

    Differs from the reference: a random start is clipped to [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.attacks import PGD, Linf, oracle_of
      >>> oracle = oracle_of(lambda x: x.reshape(len(x), -1))  # an image of two pixels is its own logits
      >>> x = jnp.array([0.625, 0.5]).reshape(1, 1, 1, 2)
      >>> x_adv = PGD(Linf(0.125), steps=3)(oracle, x, jnp.array([0]), key=0)
      >>> x_adv.reshape(-1).tolist()
      [0.5, 0.625]
    """

    threat: Threat
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    loss: Loss = cross_entropy
    start: Start = uniform_start
    best_of: bool = True

    uses_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)
        positive = self.step_size is None or is_traced(self.step_size) or self.step_size > 0
        require(positive, f"PGD: step_size must be > 0, got {self.step_size!r}")
        require_count("PGD: steps", self.steps)
        require_count("PGD: restarts", self.restarts)
        alone = self.best_of or self.restarts == 1
        require(alone, f"PGD: without best_of there is one restart, got restarts={self.restarts!r}")

    @property
    def gradient_queries(self) -> int:
        """Number of gradients per image, at most."""
        return self.steps * self.restarts

    def __call__(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Array:
        """Adversarial images.

        Args:
          oracle: answers for the predictor.
          x: images [B, H, W, C] in [0, 1].
          labels: second argument of the loss: labels [B] or pairs [B, 2], int, or reference logits [B, K].
          key: PRNG key, or `Keys` to number the images.
          start: images [B, H, W, C] in the ball, where the first restart begins; None for its own start.

        Returns:
          [B, H, W, C], within epsilon of x and within [0, 1]; with best_of never worse than the start.

        Raises:
          InputError: see `types.Attack`; whether clean logits are finite is looked at with best_of alone.
        """
        checks: Any = {"threat": self.threat, "reference": True, "asks": self.best_of}
        return carry_out(self._run, oracle, x, labels, key, start, **checks)

    def _run(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        def restart(number: int | Array, best: Kept) -> tuple[Array, Kept]:
            own = keys.fold(number)
            first = None if start is None else jnp.where(number == 0, start, self.start(own, x, self.threat))
            return self._restart(oracle, x, labels, own, best, first)

        if not self.best_of:
            return restart(0, None)[0]
        best = Best.clean(oracle, self.loss, x, labels, keys.fold(Purpose.QUERY), start)
        best = lax.scan(lambda best, number: (restart(number, best)[1], None), best, jnp.arange(self.restarts))[0]
        x_adv: Array = best.x
        return x_adv

    def _restart(
        self, oracle: Oracle, x: Array, labels: Array, keys: Keys, best: Kept, start: Array | None
    ) -> tuple[Array, Kept]:
        """The last iterate, and the best so far; None stays None."""
        threat, step_size, queries = self.threat, self.step_size, keys.fold(Purpose.QUERY)
        if step_size is None:
            step_size = 2.5 * threat.epsilon / self.steps

        def step(carry: tuple[Array, Kept], number: Array) -> tuple[tuple[Array, Kept], None]:
            x_adv, best = carry
            losses, logits, gradient = oracle.grad(self.loss, x_adv, labels, queries.fold(number))
            if best is not None:
                best = best.update(x_adv, losses, logits, labels)
            return (threat.project(x_adv + step_size * threat.steepest(gradient), x), best), None

        begin = threat.project(self.start(keys, x, threat) if start is None else start, x)
        (x_adv, best), _ = lax.scan(step, (begin, best), 1 + jnp.arange(self.steps))
        if best is None:
            return x_adv, None
        return x_adv, best.query(oracle, self.loss, x_adv, labels, queries.fold(self.steps + 1))
