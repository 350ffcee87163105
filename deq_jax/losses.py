"""Per-example losses ``(logits [B, K], target) -> [B]``; the caller reduces.

An attack maximises them: larger is worse for the classifier.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deq_jax.types import Array, require


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
    return jnp.max(without(logits, labels), axis=-1) - _pick(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Difference of logits ratio ``-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))``.

    With 2 classes it is the `margin`: of two logits every ratio is constant.

    References: Croce & Hein 2020, eq. 6.
    """
    if logits.shape[-1] < 3:
        return margin(logits, labels)
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def entropy(logits: Array, labels: Array | None = None) -> Array:
    """Entropy of softmax(logits) in nats, [B]. The labels are not used: it is a loss without target."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def class_numbers(target: Array, *, pairs: bool = False) -> Array:
    """Labels [B], or pairs (label, class aimed at) [B, 2], as int32: narrower types cannot hold all classes.

    Raises:
      InputError: the target is something else.
    """
    integer, shape = jnp.issubdtype(target.dtype, jnp.integer), jnp.shape(target)
    fits = integer and (shape[1:] == (2,) if pairs else len(shape) == 1)
    expected = "pairs (label, class aimed at) [B, 2], as Targeted gives them" if pairs else "integer labels [B]"
    way = "a loss of pairs is logit_difference, of one-hot rows take rows.argmax(axis=1)"
    way = "" if pairs or len(shape) == 1 else f"; {way}"
    require(fits, f"loss: expected {expected}, got {target.dtype} {shape}{way}")
    return jnp.asarray(target, jnp.int32)


def _pick(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, class_numbers(labels)[:, None], axis=-1)[:, 0]


def without(logits: Array, labels: Array) -> Array:
    """Logits [B, K] with -inf for the label."""
    return jnp.where(jax.nn.one_hot(class_numbers(labels), logits.shape[-1], dtype=bool), -jnp.inf, logits)
