"""Auto-PGD [Croce & Hein 2020a]: projected gradient ascent with momentum and its own step sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.attacks.best import Best, until_fooled
from deq_jax.attacks.inputs import carry_out, check_settings
from deq_jax.attacks.oracles import Oracle
from deq_jax.attacks.threats import Threat, per_image
from deq_jax.core.errors import require_count
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import cross_entropy
from deq_jax.core.types import AnyArray, Array, Loss


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size may be halved.

    ``w_j = ceil(p_j steps)`` with p_0 = 0, p_1 = 0.22, ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)``.

    References: Croce & Hein 2020a, section 3.
    """
    before, percent, found = 0, 22, []
    while percent <= 100:
        found.append(-(-percent * steps // 100))
        before, percent = percent, percent + max(percent - before - 3, 6)
    return found


class _Ascent(NamedTuple):
    """The state of an ascent; ``[B, ...]`` leaves.

    Attributes:
      x, previous: the iterate and the one before.
      gradient, loss: at x.
      peak, peak_gradient, peak_loss: the iterate of highest loss.
      step_size: 0-th axis B, in the unit of x.
      rises: how often the loss has risen since the last checkpoint.
      halved: whether the step size was halved at the last checkpoint.
      last_peak_loss: peak_loss at the last checkpoint.
    """

    x: Array
    previous: Array
    gradient: Array
    loss: Array
    peak: Array
    peak_gradient: Array
    peak_loss: Array
    step_size: Array
    rises: Array
    halved: Array
    last_peak_loss: Array


@dataclass(frozen=True)
class APGD:
    """Auto-PGD.

    ``z = P(x_k + step_size steepest(grad))``, ``x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))``.
    The step size starts at 2 epsilon. There are checkpoints. Two cases halve the step size and let the ascent resume
    at its highest point: the loss rose in fewer than 75 % of the steps since the last checkpoint, or neither the step
    size nor the highest loss has changed since then.

    Attributes:
      threat: norm and radius.
      steps: per restart; a restart costs steps + 1 gradient queries.
      restarts: number of random starts, for the images that resisted the ones before.
      loss: maximised, ``(logits, labels) -> [B]``, such as `core.dlr`; should be invariant to the scale of the logits.

    Examples:
      >>> from deq_jax.attacks import APGD, Linf
      >>> APGD(Linf(8 / 255), steps=100, restarts=2).gradient_queries
      202
    """

    threat: Threat
    steps: int = 100
    restarts: int = 1
    loss: Loss = cross_entropy

    uses_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)
        require_count("APGD: steps", self.steps)
        require_count("APGD: restarts", self.restarts)

    @property
    def gradient_queries(self) -> int:
        """Number of gradients per image, at most."""
        return (self.steps + 1) * self.restarts

    def __call__(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Array:
        """Adversarial images.

        Args:
          oracle: answers for the predictor.
          x: images [B, H, W, C] in [0, 1].
          labels: second argument of the loss: labels [B], or pairs (label, class aimed at) [B, 2].
          key: PRNG key, or `Keys` to number the images.
          start: images [B, H, W, C] in the ball, where the first restart begins; None for a random one.

        Returns:
          [B, H, W, C], within the ball around x and within [0, 1]: a misclassified iterate if there was
          one, and among equals the one of highest loss; x itself if none was better. Never worse than the start.

        Raises:
          InputError: see `Attack`.
        """
        return carry_out(self._run, oracle, x, labels, key, start, threat=self.threat)

    def _run(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        def restart(number: Array, best: Best) -> Best:
            own = keys.fold(1 + number)
            begin = self.threat.project(x + self.threat.epsilon * self.threat.random_direction(own, x), x)
            begin = begin if start is None else jnp.where(number == 0, start, begin)
            return self._restart(oracle, x, labels, own, best, begin)

        best = Best.clean(oracle, self.loss, x, labels, keys.fold(Purpose.QUERY), start)
        x_adv: Array = until_fooled(restart, best, self.restarts).x
        return x_adv

    def _restart(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, best: Best, start: Array) -> Best:
        queries = keys.fold(Purpose.QUERY)

        def query(x_adv: Array, number: int | Array, best: Best) -> tuple[Array, Array, Best]:
            losses, logits, gradient = oracle.grad(self.loss, x_adv, labels, queries.fold(number))
            return losses, gradient, best.update(x_adv, losses, logits, labels)

        def step(carry: tuple[_Ascent, Best], schedule: tuple[Array, AnyArray]) -> tuple[tuple[_Ascent, Best], None]:
            number, interval = schedule
            ascent, best = carry
            is_start = number == 0
            x_adv = jnp.where(is_start, start, self._move(ascent, x, jnp.where(number == 1, 1, 0.75).astype(x.dtype)))
            loss, gradient, best = query(x_adv, number, best)
            moved = self._adapt(_visit(ascent, x_adv, gradient, loss), interval)
            begun = self._begin(x_adv, gradient, loss)
            return (jax.tree.map(partial(jnp.where, is_start), begun, moved), best), None

        answers = jax.eval_shape(query, start, 0, best)
        loss, gradient = (jnp.zeros(answer.shape, answer.dtype) for answer in answers[:2])
        ascent = self._begin(start, gradient, loss)  # the first step is the start: the query is compiled once
        schedule = jnp.arange(self.steps + 1), np.concatenate([[0], _intervals(self.steps)])
        return lax.scan(step, (ascent, best), schedule)[0][1]

    def _begin(self, x: Array, gradient: Array, loss: Array) -> _Ascent:
        step_size = jnp.full_like(loss, 2 * self.threat.epsilon)
        count, halved = jnp.zeros(loss.shape, jnp.int32), jnp.ones(loss.shape, bool)
        return _Ascent(x, x, gradient, loss, x, gradient, loss, step_size, count, halved, loss)

    def _move(self, ascent: _Ascent, x: Array, inertia: Array) -> Array:
        project, here = self.threat.project, ascent.x
        ahead = project(here + per_image(ascent.step_size, x) * self.threat.steepest(ascent.gradient), x)
        return project(here + inertia * (ahead - here) + (1 - inertia) * (here - ascent.previous), x)

    def _adapt(self, ascent: _Ascent, interval: Array) -> _Ascent:
        """Halves the step size and goes back to the peak, if this is a checkpoint and it is called for."""
        few_rises = ascent.rises < 0.75 * interval
        stuck = ~ascent.halved & (ascent.peak_loss <= ascent.last_peak_loss)
        is_checkpoint = interval > 0
        halve = is_checkpoint & (few_rises | stuck)
        back = per_image(halve, ascent.x)
        return ascent._replace(
            x=jnp.where(back, ascent.peak, ascent.x),
            gradient=jnp.where(back, ascent.peak_gradient, ascent.gradient),
            step_size=jnp.where(halve, ascent.step_size / 2, ascent.step_size),
            rises=jnp.where(is_checkpoint, 0, ascent.rises),
            halved=jnp.where(is_checkpoint, halve, ascent.halved),
            last_peak_loss=jnp.where(is_checkpoint, ascent.peak_loss, ascent.last_peak_loss),
        )


def _visit(ascent: _Ascent, x: Array, gradient: Array, loss: Array) -> _Ascent:
    """The ascent after a step to x."""
    higher = loss > ascent.peak_loss
    here, peak = (x, gradient, loss), (ascent.peak, ascent.peak_gradient, ascent.peak_loss)
    peak = jax.tree.map(lambda a, b: jnp.where(per_image(higher, a), a, b), here, peak)
    rises = ascent.rises + (loss > ascent.loss)
    moved = ascent._replace(x=x, previous=ascent.x, gradient=gradient, loss=loss, rises=rises)
    return moved._replace(peak=peak[0], peak_gradient=peak[1], peak_loss=peak[2])


def _intervals(steps: int) -> np.ndarray:
    """[steps]: at a checkpoint the number of steps since the last one, elsewhere 0."""
    ends = np.unique(checkpoints(steps))
    intervals = np.zeros(steps, np.int32)
    intervals[ends - 1] = np.diff(ends, prepend=0)
    return intervals
