"""SPSA [Uesato et al. 2018]: ascent along gradients estimated from logits, for predictors without useful ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.attacks.best import Best
from deq_jax.attacks.inputs import carry_out, check_settings
from deq_jax.attacks.oracles import Oracle
from deq_jax.attacks.threats import Threat, per_image
from deq_jax.core.errors import require, require_count
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import margin
from deq_jax.core.types import Array, Loss


@dataclass(frozen=True)
class SPSA:
    """``x <- project(x + step_size steepest(estimate))`` from x or a start on; asks for logits only.

    The estimate is the mean over random sign vectors v of ``(loss(x + probe v) - loss(x - probe v)) v``, the
    points clipped to [0, 1].

    Attributes:
      threat: norm and radius.
      steps: each costs 2 samples + 1 queries of the logits.
      samples: sign vectors per step.
      step_size: length of a step, in the unit of x.
      probe: distance of the points from x in every pixel.
      loss: maximised, ``(logits, labels) -> [B]``, such as `cross_entropy`, `dlr` or `margin`, all in `deq_jax.core`.

    References: Uesato et al. 2018, algorithm 1.

    Differs from the reference: it takes steps of steepest ascent, so that the scale of the loss does not matter.

    Examples:
      >>> from deq_jax.attacks import SPSA, Linf
      >>> attack = SPSA(Linf(8 / 255), steps=10, samples=64)
      >>> attack.steps * (2 * attack.samples + 1), attack.uses_gradients  # queries of the logits
      (1290, False)
    """

    threat: Threat
    steps: int = 100
    samples: int = 128
    step_size: float = 0.01
    probe: float = 0.01
    loss: Loss = margin

    uses_gradients: ClassVar[bool] = False
    gradient_queries: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_settings(self)
        require_count("SPSA: steps", self.steps)
        require_count("SPSA: samples", self.samples)
        require(self.step_size > 0, f"SPSA: step_size must be > 0, got {self.step_size!r}")
        require(self.probe > 0, f"SPSA: probe must be > 0, got {self.probe!r}")

    def __call__(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Array:
        """Adversarial images; see `APGD.__call__`. An image is not attacked further once it is misclassified."""
        return carry_out(self._run, oracle, x, labels, key, start, threat=self.threat)

    def _run(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        def ascend(number: Array, carry: tuple[Array, Best]) -> tuple[Array, Best]:
            x_adv, best = carry
            own = keys.fold(number)
            estimate = self._estimate(oracle, x_adv, labels, own.fold(Purpose.ATTACK))
            x_adv = self.threat.project(x_adv + self.step_size * self.threat.steepest(estimate), x)
            tried = best.query(oracle, self.loss, x_adv, labels, own.fold(Purpose.QUERY))
            return x_adv, best.where(best.fooled, tried)

        def step(carry: tuple[Array, Best], number: Array) -> tuple[tuple[Array, Best], None]:
            return lax.cond(jnp.all(carry[1].fooled), lambda number, carry: carry, ascend, number, carry), None

        best = Best.clean(oracle, self.loss, x, labels, keys.fold(Purpose.QUERY), start)
        best = lax.scan(step, (x if start is None else start, best), 1 + jnp.arange(self.steps))[0][1]
        x_adv: Array = best.x
        return x_adv

    def _estimate(self, oracle: Oracle, x: Array, labels: Array, keys: Keys) -> Array:
        def add(total: Array, number: Array) -> tuple[Array, None]:
            own = keys.fold(number // 2)  # the same direction and, of a random predictor, the same draw
            side = 1 - 2 * (number % 2)
            direction = side * own.draw(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))
            logits = oracle.logits(jnp.clip(x + self.probe * direction, 0, 1), own.fold(Purpose.QUERY))
            losses = self.loss(logits, labels).astype(x.dtype)
            return total + per_image(losses, x) * direction, None

        return lax.scan(add, jnp.zeros_like(x), jnp.arange(2 * self.samples))[0]
