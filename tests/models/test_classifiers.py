"""Classifiers: what they predict, on whom it depends, and what an attacker is told."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Dynamics, Explicit, InputError, IntermediateState, Keys, RandomIntermediateState, Unrolled
from deq_jax.core import cross_entropy, prng_key
from deq_jax.models import SmallCNN, explicit_twin
from deq_jax.surrogates import classifier_oracle
from tests.helpers import tiny
from tests.helpers.cases import mostly_slow

X = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 8, 8, 1)), jnp.float32)
DEQ = tiny.classifier()
CNN = Explicit(SmallCNN(num_classes=10, channels=4, dropout=0.2))
TWIN = explicit_twin(DEQ, depth=3)
KEYS = Keys.of(jax.random.key(1), 6)


@pytest.fixture(scope="module", params=mostly_slow([DEQ, CNN, TWIN], 0, 1), ids=["equilibrium", "explicit", "twin"])
def fitted(request):
    """A classifier, and variables whose batch statistics are not the initial ones."""
    classifier = request.param
    variables = classifier.init(jax.random.key(0), X)
    stats = classifier(variables, X, train=True, keys=KEYS).batch_stats
    return classifier, {"params": variables["params"], "batch_stats": stats}


def test_jit_equals_eager_and_images_are_independent(fitted):
    classifier, variables = fitted
    predict = jax.jit(lambda x: classifier(variables, x).logits)
    whole = predict(X)
    assert whole.shape == (6, 10)
    np.testing.assert_allclose(classifier(variables, X).logits, whole, rtol=1e-4, atol=1e-5)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(predict(X[order]), whole[order], rtol=1e-4, atol=1e-5)
    single = jnp.concatenate([predict(X[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(single, whole, rtol=1e-4, atol=1e-5)


def test_initial_variables_are_those_of_the_modules():
    key = prng_key(3)
    encoder = {name: parts["encoder"] for name, parts in DEQ.init(3, X).items()}
    for found, expected in (
        (CNN.init(3, X), CNN.module.init(key, X)),
        (encoder, DEQ.encoder.init(jax.random.split(key, 3)[0], X)),
    ):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_evaluation_mode_changes_no_statistics_and_needs_no_keys(fitted):
    classifier, variables = fitted
    prediction = classifier(variables, X)
    jax.tree.map(np.testing.assert_array_equal, prediction.batch_stats, variables["batch_stats"])
    np.testing.assert_array_equal(classifier(variables, X, keys=KEYS).logits, prediction.logits)


def test_training_mode_normalises_by_the_batch_and_drops_out(fitted):
    classifier, variables = fitted
    first, again = (classifier(variables, X, train=True, keys=KEYS) for _ in range(2))
    other = classifier(variables, X, train=True, keys=KEYS.fold(1))
    np.testing.assert_array_equal(first.logits, again.logits)
    assert not np.allclose(first.logits, other.logits)
    before, after = (jax.tree.leaves(stats) for stats in (variables["batch_stats"], first.batch_stats))
    assert len(before) == 4 and not any(np.allclose(a, b) for a, b in zip(before, after, strict=True))


def test_equal_sizes():
    def count(classifier):
        return sum(leaf.size for leaf in jax.tree.leaves(classifier.init(jax.random.key(0), X)["params"]))

    assert count(DEQ) == count(CNN)


@pytest.mark.slow
def test_a_twin_applies_the_cell_of_a_deq_to_the_injection():
    variables = DEQ.init(jax.random.key(0), X)
    assert jax.tree.structure(TWIN.init(0, X)["params"]) == jax.tree.structure(variables["params"])
    u = DEQ.encode(variables, X)
    z = u.features
    for _ in range(3):
        z = DEQ.apply_cell(variables["params"]["cell"], z, u)
    np.testing.assert_allclose(TWIN(variables, X).logits, DEQ.decode(variables, z), rtol=1e-4, atol=1e-5)


def test_a_twin_of_one_application_is_the_small_network():
    twin = explicit_twin(tiny.classifier())
    variables = twin.init(jax.random.key(0), X)
    renamed = {"encoder": "SmallEncoder_0", "cell": "SmallCell_0", "decoder": "SmallDecoder_0"}
    own = {kind: {renamed[name]: part for name, part in parts.items()} for kind, parts in variables.items()}
    np.testing.assert_allclose(twin(variables, X).logits, CNN(own, X).logits, rtol=1e-4, atol=1e-5)


def test_a_twin_is_of_a_deq_and_has_a_depth():
    with pytest.raises(InputError, match="explicit_twin: expected an Equilibrium, got Explicit"):
        explicit_twin(CNN)
    with pytest.raises(InputError, match="WeightTied: depth must be >= 1, got 0"):
        explicit_twin(DEQ, depth=0).init(0, X)


def test_the_prediction_is_the_head_of_the_unrolled_equilibrium():
    variables = DEQ.init(jax.random.key(0), X)
    prediction = DEQ(variables, X)
    u, params = DEQ.encode(variables, X), variables["params"]["cell"]
    z = DEQ.apply_cell(params, prediction.solution.z, u)
    for _ in range(2):
        z = 0.5 * z + 0.5 * DEQ.apply_cell(params, z, u)
    np.testing.assert_allclose(prediction.logits, DEQ.decode(variables, z), rtol=1e-4, atol=1e-5)


def test_shallow_dynamics_are_repeated_application_from_zero():
    variables = DEQ.init(jax.random.key(0), X)
    shallow = replace(DEQ, dynamics=Dynamics(None, gradient=Unrolled(3)))
    u = DEQ.encode(variables, X)
    z = jnp.zeros_like(u.features)
    for _ in range(3):
        z = DEQ.apply_cell(variables["params"]["cell"], z, u)
    np.testing.assert_allclose(shallow(variables, X).logits, DEQ.decode(variables, z), rtol=1e-4, atol=1e-5)


def test_random_states_are_deployed_as_the_equilibrium():
    variables = DEQ.init(jax.random.key(0), X)
    random = tiny.classifier(RandomIntermediateState(best_so_far=False))
    np.testing.assert_allclose(random(variables, X).logits, DEQ(variables, X).logits, rtol=1e-5, atol=1e-6)
    draw = jax.jit(lambda keys: random(variables, X, keys=keys).logits)
    draws = [draw(KEYS.fold(i)) for i in range(8)]
    assert len({np.asarray(draw).tobytes() for draw in draws}) > 1


@pytest.mark.slow
def test_the_oracle_differentiates_the_deployed_prediction():
    classifier = tiny.classifier(IntermediateState(2))
    variables = classifier.init(jax.random.key(0), X)
    y = jnp.arange(6)
    oracle = classifier_oracle(classifier, variables)
    losses, logits, gradient = oracle.grad(cross_entropy, X, y, KEYS)
    np.testing.assert_allclose(logits, classifier(variables, X).logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(oracle.logits(X, KEYS), logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses, cross_entropy(logits, y), rtol=1e-5)

    def total(x):
        return cross_entropy(classifier(variables, x).logits, y).sum()

    np.testing.assert_allclose(gradient, jax.grad(total)(X), rtol=1e-4, atol=1e-6)


def test_a_random_oracle_draws_and_a_deployed_one_does_not():
    classifier = tiny.classifier(RandomIntermediateState())
    variables = classifier.init(jax.random.key(0), X)

    def distinct(random):
        logits = jax.jit(classifier_oracle(classifier, variables, random=random).logits)
        return len({np.asarray(logits(X, KEYS.fold(i))).tobytes() for i in range(8)})

    assert distinct(random=False) == 1 < distinct(random=True)
