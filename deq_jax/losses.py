"""Per-example losses ``(logits [B, K], target) -> [B]``; the caller reduces.

An attack maximises them: larger is worse for the classifier.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deq_jax.types import Array


def cross_entropy(logits: Array, labels: Array) -> Array:
    """``-log softmax(logits)[label]``.

    Args:
      logits: [B, K].
      labels: [B] int.

    Returns:
      [B], in nats.
    """
    return -_pick(jax.nn.log_softmax(logits), labels)


def kl(logits: Array, reference_logits: Array) -> Array:
    """Kullback-Leibler divergence KL(softmax(reference) || softmax(logits)), in nats.

    Args:
      logits: [B, K], of the attacked input.
      reference_logits: [B, K], of the clean input.

    Returns:
      [B].

    References: Zhang et al. 2019 (TRADES), eq. 5.
    """
    log_p, log_q = jax.nn.log_softmax(reference_logits), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def margin(logits: Array, labels: Array) -> Array:
    """Best wrong logit minus the true one: positive exactly when misclassified (Carlini & Wagner 2017)."""
    return jnp.max(_without(logits, labels), axis=-1) - _pick(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Difference of logits ratio ``-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))``.

    Needs at least 3 classes. References: Croce & Hein 2020, eq. 6.
    """
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def entropy(logits: Array, labels: Array | None = None) -> Array:
    """Entropy of softmax(logits) in nats, [B]. The labels are not used: it is a loss without target."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _pick(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _without(logits: Array, labels: Array) -> Array:
    return jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)
