"""Losses of logits, one number per example: larger is worse for the classifier. Attacks maximise them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.core.errors import require
from deq_jax.core.types import Array


@dataclass(frozen=True)
class LowEntropy:
    """Aims for confident mistakes, which an entropy-lowering defence only reinforces:
    ``log softmax(logits)[wrong] - weight * entropy``.

    Attributes:
      weight: weight of the entropy in nats, >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import LowEntropy
      >>> round(float(LowEntropy(weight=0.5)(jnp.zeros((1, 2)), jnp.array([[0, 1]]))[0]), 2)  # -1.5 log 2
      -1.04
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"LowEntropy: weight must be >= 0, got {self.weight!r}")

    def __call__(self, logits: Array, labels: Array) -> Array:
        """Per-example loss [B].

        Args:
          logits: [B, K].
          labels: [B, 2] int, (label, class aimed at), as `attacks.Targeted` gives it; or labels [B], to aim at the
            class that is the likeliest wrong one at this query.
        """
        wrong = jnp.argmax(without(logits, labels), axis=-1) if labels.ndim == 1 else labels[:, 1]
        return -cross_entropy(logits, wrong) - self.weight * entropy(logits)


def logit_difference(logits: Array, labels: Array) -> Array:
    """Logit of the class aimed at minus the label's, [B].

    Args:
      logits: [B, K].
      labels: [B, 2] int, (label, class aimed at).

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import logit_difference
      >>> logit_difference(jnp.array([[3.0, 1.0, 0.0]]), jnp.array([[0, 2]])).tolist()
      [-3.0]
    """
    picked = jnp.take_along_axis(logits, class_numbers(labels, pairs=True), axis=-1)
    return picked[:, 1] - picked[:, 0]


def targeted_dlr(logits: Array, labels: Array) -> Array:
    """Targeted difference of logits ratio ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)``, [B].

    Args:
      logits: [B, K]. With fewer than 4 classes it is the `logit_difference`: of 2 logits every ratio is constant, of 3
        that for the least likely class.
      labels: [B, 2] int, (label y, class t aimed at).

    References: Croce & Hein 2020a, eq. 7.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import targeted_dlr
      >>> targeted_dlr(jnp.array([[4.0, 3.0, 2.0, 2.0]]), jnp.array([[0, 1]])).tolist()
      [-0.5]
    """
    if logits.shape[-1] < 4:
        return logit_difference(logits, labels)
    top = lax.top_k(logits, 4)[0]
    return logit_difference(logits, labels) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def cross_entropy(logits: Array, labels: Array, label_smoothing: float = 0.0) -> Array:
    """``-log softmax(logits)[label]``, or its mean with a share of the probability spread over all K classes.

    Args:
      logits: [B, K].
      labels: [B] int.
      label_smoothing: that share; 0 for none.

    Returns:
      [B], in nats.

    References: Szegedy et al. 2016, section 7.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import cross_entropy
      >>> round(float(cross_entropy(jnp.zeros((1, 2)), jnp.array([0]))[0]), 3)  # log 2
      0.693
    """
    log_p = jax.nn.log_softmax(logits)
    loss = -_pick(log_p, labels)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * jnp.mean(log_p, axis=-1)


def kl(logits: Array, reference_logits: Array) -> Array:
    """Kullback-Leibler divergence KL(softmax(reference) || softmax(logits)), in nats.

    Args:
      logits: [B, K], of the attacked input.
      reference_logits: [B, K], of the clean input.

    Returns:
      [B].

    References: Zhang et al. 2019 (TRADES), eq. 5.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import kl
      >>> kl(jnp.zeros((1, 2)), jnp.zeros((1, 2))).tolist()
      [0.0]
    """
    log_p, log_q = jax.nn.log_softmax(reference_logits), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def margin(logits: Array, labels: Array) -> Array:
    """Best wrong logit minus the true one, [B]: positive exactly when misclassified.

    Args:
      logits: [B, K].
      labels: [B] int.

    Raises:
      InputError: the labels are not integers [B].

    References: Carlini & Wagner 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import margin
      >>> margin(jnp.array([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]), jnp.array([0, 1])).tolist()
      [-2.0, 2.0]
    """
    return jnp.max(without(logits, labels), axis=-1) - _pick(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Difference of logits ratio ``-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))``, [B].

    With 2 classes it is the `margin`: of two logits every ratio is constant.

    Args:
      logits: [B, K].
      labels: [B] int.

    Raises:
      InputError: the labels are not integers [B].

    References: Croce & Hein 2020a, eq. 6.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import dlr
      >>> dlr(jnp.array([[4.0, 2.0, 0.0]]), jnp.array([0])).tolist()
      [-0.5]
    """
    if logits.shape[-1] < 3:
        return margin(logits, labels)
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def entropy(logits: Array, labels: Array | None = None) -> Array:
    """Entropy of softmax(logits) in nats, [B].

    Args:
      logits: [B, K].
      labels: not used; with them it has the signature of a loss.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.core import entropy
      >>> round(float(entropy(jnp.zeros((1, 2)))[0]), 3)  # log 2
      0.693
    """
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def class_numbers(labels: Array, *, pairs: bool = False) -> Array:
    """Labels [B], or pairs (label, class aimed at) [B, 2], as int32: narrower types cannot hold all classes.

    Raises:
      InputError: the labels are something else.
    """
    integer, shape = jnp.issubdtype(labels.dtype, jnp.integer), jnp.shape(labels)
    fits = integer and (shape[1:] == (2,) if pairs else len(shape) == 1)
    expected = "pairs (label, class aimed at) [B, 2], as Targeted gives them" if pairs else "integer labels [B]"
    way = "a loss of pairs is logit_difference, of one-hot rows take rows.argmax(axis=1)"
    way = "" if pairs or len(shape) == 1 else f"; {way}"
    require(fits, f"loss: expected {expected}, got {labels.dtype} {shape}{way}")
    return jnp.asarray(labels, jnp.int32)


def _pick(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, class_numbers(labels)[:, None], axis=-1)[:, 0]


def without(logits: Array, labels: Array) -> Array:
    """Logits [B, K] with -inf for the label."""
    return jnp.where(jax.nn.one_hot(class_numbers(labels), logits.shape[-1], dtype=bool), -jnp.inf, logits)
