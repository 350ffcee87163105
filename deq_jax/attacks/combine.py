"""Oracles made of oracles."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.types import Array, Keys, Loss, Oracle, require


def average(oracles: Sequence[Oracle]) -> Oracle:
    """The mean of several oracles: of their logits, and of their losses and gradients.

    The gradient is that of the mean loss, not of the loss of the mean logits.

    Args:
      oracles: at least one; the i-th draws from keys folded with i.
    """
    oracles = tuple(oracles)
    require(len(oracles) > 0, "average: expected at least one oracle, got none")

    def logits(x: Array, keys: Keys) -> Array:
        return jnp.mean(jnp.stack([oracle.logits(x, keys.fold(i)) for i, oracle in enumerate(oracles)]), axis=0)

    def grad(loss: Loss, x: Array, target: Array, keys: Keys) -> tuple[Array, Array, Array]:
        answers = [oracle.grad(loss, x, target, keys.fold(i)) for i, oracle in enumerate(oracles)]
        return jax.tree.map(lambda *parts: sum(parts) / len(oracles), *answers)

    return Oracle(logits, grad)


def expectation(oracle: Oracle, draws: int) -> Oracle:
    """Expectation over transformation (EOT): the mean of a random oracle over several draws.

    Logits are averaged too, so that an attack does not select what one lucky draw misclassified.

    Args:
      oracle: random in its keys.
      draws: per query; the i-th uses keys folded with i.

    References: Athalye et al. 2018, section 3.
    """
    require(draws >= 1, f"expectation: draws must be >= 1, got {draws!r}")

    def mean(query):
        def add(total, number):
            return jax.tree.map(jnp.add, total, query(number)), None

        total, _ = lax.scan(add, query(0), jnp.arange(1, draws))
        return jax.tree.map(lambda part: part / draws, total)

    def logits(x: Array, keys: Keys) -> Array:
        return mean(lambda number: oracle.logits(x, keys.fold(number)))

    def grad(loss: Loss, x: Array, target: Array, keys: Keys) -> tuple[Array, Array, Array]:
        return mean(lambda number: oracle.grad(loss, x, target, keys.fold(number)))

    return Oracle(logits, grad)


def surrogate(source: Oracle, judge: Oracle) -> Oracle:
    """Gradients of one predictor, success and loss judged on another.

    Args:
      source: gives the gradients.
      judge: the deployed predictor; it is asked once more with every gradient.
    """

    def grad(loss: Loss, x: Array, target: Array, keys: Keys) -> tuple[Array, Array, Array]:
        gradient = source.grad(loss, x, target, keys)[2]
        logits = judge.logits(x, keys)
        return loss(logits, target), logits, gradient

    return Oracle(judge.logits, grad)
