"""Losses by hand, at any integer type, of few classes, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError
from deq_jax.core import LowEntropy, logit_difference, losses, targeted_dlr

LOGITS = jnp.array([[2.0, 1.0, -1.0, 0.0], [0.5, 3.0, 1.0, 1.0]])
LABELS = jnp.array([0, 2])


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_values_by_hand():
    p, other = softmax(LOGITS), LOGITS[::-1]
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS), -np.log([p[0, 0], p[1, 2]]), rtol=1e-6)
    np.testing.assert_allclose(losses.margin(LOGITS, LABELS), [-1, 2])
    np.testing.assert_allclose(losses.dlr(LOGITS, LABELS), [-1 / 2, 2 / 2], rtol=1e-6)
    np.testing.assert_allclose(losses.entropy(LOGITS), -np.sum(p * np.log(p), axis=1), rtol=1e-6)
    q = softmax(other)
    np.testing.assert_allclose(losses.kl(LOGITS, other), np.sum(q * np.log(q / p), axis=1), rtol=1e-5)


def test_kl_of_itself_is_zero_and_flat():
    value, gradient = jax.value_and_grad(lambda logits: losses.kl(logits, LOGITS).sum())(LOGITS)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_margin_is_positive_exactly_when_misclassified():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 5)))
    labels = jnp.arange(50) % 5
    np.testing.assert_array_equal(losses.margin(logits, labels) > 0, logits.argmax(1) != labels)


@pytest.mark.parametrize("weight", [0, 0.5])
def test_low_entropy_aims_at_the_likeliest_wrong_class_or_at_the_given_one(weight):
    p = softmax(LOGITS)
    entropy = -np.sum(p * np.log(p), axis=1)
    for labels, aimed in ((LABELS, [1, 1]), (jnp.array([[0, 3], [2, 0]]), [3, 0])):
        expected = np.log(p[[0, 1], aimed]) - weight * entropy
        np.testing.assert_allclose(LowEntropy(weight)(LOGITS, labels), expected, rtol=1e-6)


def test_low_entropy_refuses_a_negative_weight():
    with pytest.raises(InputError, match="LowEntropy: weight must be >= 0, got -1"):
        LowEntropy(-1)


def test_label_smoothing_is_the_mean_over_smoothed_labels():
    smoothed = 0.7 * np.eye(4)[LABELS] + 0.3 / 4
    expected = -np.sum(smoothed * np.log(softmax(LOGITS)), axis=1)
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS, 0.3), expected, rtol=1e-6)


def test_logit_difference_by_hand():
    np.testing.assert_allclose(logit_difference(LOGITS, jnp.array([[0, 3], [2, 1]])), [-2, 2])


def test_targeted_dlr_by_hand():
    logits = jnp.array([[4.0, 1.0, 3.0, 0.0, -2.0]])
    # -(4 - 1) / (4 - (1 + 0) / 2)
    np.testing.assert_allclose(targeted_dlr(logits, jnp.array([[0, 1]])), [-3 / 3.5], rtol=1e-6)
    np.testing.assert_allclose(targeted_dlr(7 * logits, jnp.array([[0, 1]])), [-3 / 3.5], rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.margin, losses.dlr])
def test_losses_of_labels_refuse_other_targets(loss):
    for rows in (jax.nn.one_hot(LABELS, 4), jax.nn.one_hot(LABELS, 4, dtype=int), jnp.stack([LABELS, LABELS], 1)):
        with pytest.raises(InputError, match=r"expected integer labels \[B\], got .*; a loss of pairs is logit_diff"):
            loss(LOGITS, rows)


@pytest.mark.parametrize("loss", [logit_difference, targeted_dlr])
def test_losses_of_pairs_refuse_other_targets(loss):
    for target in (LABELS, jax.nn.one_hot(LABELS, 4)):
        with pytest.raises(InputError, match=r"expected pairs \(label, class aimed at\) \[B, 2\]"):
            loss(LOGITS, target)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint16, jnp.int16])
def test_losses_take_labels_of_any_integer_type(dtype):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300))).at[:, 260].set(5.0)
    y = jnp.array([4, 100, 3, 127])
    for loss in (losses.cross_entropy, losses.margin, losses.dlr, LowEntropy()):
        np.testing.assert_array_equal(loss(logits, y.astype(dtype)), loss(logits, y))
    pairs = jnp.stack([y, (y + 1) % 100], axis=1)
    for loss in (logit_difference, targeted_dlr, LowEntropy()):
        np.testing.assert_array_equal(loss(logits, pairs.astype(dtype)), loss(logits, pairs))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_losses_of_few_classes_lead_to_every_class(num_classes):
    """Their gradient is that of the logit difference, up to a factor: a constant ratio would have none."""
    logits = jnp.array([[4.0, 1.0, -2.0], [4.0, -2.0, 1.0]])[:, :num_classes]
    pairs = jnp.array([[0, 1], [0, 1]])
    values, pull = jax.vjp(lambda logits: targeted_dlr(logits, pairs), logits)
    np.testing.assert_array_equal(values, logits[:, 1] - logits[:, 0])
    gradient = pull(jnp.ones(2))[0]
    np.testing.assert_array_equal(jnp.sign(gradient[:, :2]), [[-1, 1], [-1, 1]])
    untargeted = jax.grad(lambda logits: losses.dlr(logits, pairs[:, 0]).sum())(logits)
    assert jnp.all(untargeted[:, 0] < 0)
