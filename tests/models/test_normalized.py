"""Normalised classifiers: the network sees (x - mean) / std, everyone else images in [0, 1]."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import EntropyReduced, Equilibrium, Explicit, FixedPoint, InputError, Keys
from deq_jax.core import cross_entropy
from deq_jax.defences import reduce_entropy
from deq_jax.evaluation import measure
from deq_jax.models import SmallCNN, mdeq, normalized
from deq_jax.storage import from_tree, to_tree
from deq_jax.surrogates import ThroughSolver, classifier_oracle
from tests.helpers import tiny

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
X = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 3)), jnp.float32)
NORMAL_X = (X - jnp.float32(MEAN)) / jnp.float32(STD)
Y = jnp.arange(4)
KEYS = Keys.of(jax.random.key(1), 4)
DYNAMICS = tiny.classifier().dynamics
CLASSIFIERS = {
    "small": tiny.classifier(),
    "mdeq": Equilibrium(*mdeq(10, (8, 8), (2, 2), final_channels=8, expansion=1), DYNAMICS),
    "explicit": Explicit(SmallCNN(num_classes=10, channels=4)),
}


@pytest.fixture(scope="module", params=CLASSIFIERS)
def pair(request):
    """A classifier, its variables, and the same one normalised."""
    classifier = CLASSIFIERS[request.param]
    return classifier, classifier.init(jax.random.key(0), X), normalized(classifier, MEAN, STD)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_variables_are_those_of_the_classifier(pair):
    """By the same names and with the same initial values; so a checkpoint of one is a checkpoint of the other."""
    classifier, variables, whole = pair
    equal(whole.init(jax.random.key(0), X), variables)
    assert type(whole) is type(classifier)


@pytest.mark.slow
def test_the_network_sees_normalised_images(pair):
    classifier, variables, whole = pair
    expected = classifier(variables, NORMAL_X)
    equal(whole(variables, X).logits, expected.logits)
    trained, bare = (c(variables, x, train=True, keys=KEYS) for c, x in ((whole, X), (classifier, NORMAL_X)))
    equal((trained.logits, trained.batch_stats), (bare.logits, bare.batch_stats))


@pytest.mark.slow
def test_the_gradient_is_that_of_the_composition(pair):
    """d loss / dx is the network's own gradient, divided by the deviations."""
    classifier, variables, whole = pair
    _, _, found = classifier_oracle(whole, variables).grad(cross_entropy, X, Y, KEYS)
    _, _, inner = classifier_oracle(classifier, variables).grad(cross_entropy, NORMAL_X, Y, KEYS)
    np.testing.assert_allclose(found, inner / jnp.float32(STD), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_is_attacked_in_the_box(pair):
    _, variables, whole = pair
    x_adv = tiny.ATTACK(classifier_oracle(whole, variables), X, Y, jax.random.key(0))
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and float(jnp.abs(x_adv - X).max()) <= 0.1 + 1e-6
    before, after = (cross_entropy(whole(variables, x).logits, Y).mean() for x in (X, x_adv))
    assert after > before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "mdeq"])
def test_states_are_measured_and_surrogates_work(name):
    classifier = CLASSIFIERS[name]
    variables = classifier.init(jax.random.key(0), X)
    whole = normalized(classifier, MEAN, STD)
    equal(measure(whole, variables, X, Y), measure(classifier, variables, NORMAL_X, Y))
    _, _, gradient = ThroughSolver()(whole, variables).grad(cross_entropy, X, Y, KEYS)
    _, _, inner = ThroughSolver()(classifier, variables).grad(cross_entropy, NORMAL_X, Y, KEYS)
    np.testing.assert_allclose(gradient, inner / jnp.float32(STD), rtol=1e-3, atol=1e-6)


def test_entropy_reduction_stays_in_the_box():
    dynamics = replace(DYNAMICS, solver=FixedPoint(4))
    base = normalized(replace(tiny.classifier(), dynamics=dynamics), MEAN, STD)
    variables = base.init(jax.random.key(0), X)
    found = reduce_entropy(EntropyReduced(base, steps=2, step_size=0.1, epsilon=0.2), variables, X.at[0].set(0.0))
    assert found.inputs.min() >= 0 and found.inputs.max() <= 1
    assert float(jnp.abs(found.x - X).max()) > 0.01


def test_configs_hold_it(pair):
    classifier, _, whole = pair
    assert from_tree(to_tree(whole)) == whole == normalized(classifier, list(MEAN), np.array(STD))
    assert hash(whole) == hash(normalized(classifier, MEAN, STD))
    assert whole != normalized(classifier, MEAN, (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((), (), "a mean and a std for each channel, got 0 and 0"),
        ((0.5,), (0.2, 0.2), "a mean and a std for each channel, got 1 and 2"),
        ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), r"mean must lie in \[0, 1\], as the images do, got \(125.3"),
        ((float("nan"),), (0.2,), "mean must lie in"),
        ((0.5,), (0.0,), "std must be positive"),
        ((0.5,), (-0.2,), "std must be positive"),
        ((0.5,), (float("inf"),), "std must be positive"),
        ((0.5,), (float("nan"),), "std must be positive"),
    ],
)
def test_other_numbers_are_refused(mean, std, words):
    with pytest.raises(InputError, match=f"normalized: .*{words}"):
        normalized(CLASSIFIERS["small"], mean, std)


def test_other_images_and_classifiers_are_refused(pair):
    _, variables, whole = pair
    with pytest.raises(InputError, match="Normalized: expected images of 3 channels, got 1"):
        whole(variables, X[..., :1])
    with pytest.raises(InputError, match="expected a classifier without normalisation, got one that has it"):
        normalized(whole, MEAN, STD)
    with pytest.raises(InputError, match="expected an Equilibrium or Explicit, got EntropyReduced"):
        normalized(EntropyReduced(tiny.classifier()), MEAN, STD)
