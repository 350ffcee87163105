"""Objectives against their formulas, written out once more."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deq_jax as dj
from deq_jax import Backprop, InputError, Keys, PGDAdversarialTraining, RandomIntermediateState, Standard, Trades
from deq_jax.attacks import PGD
from deq_jax.core import Purpose, losses
from deq_jax.surrogates import ThroughSolver, classifier_oracle
from tests.helpers import tiny
from tests.helpers.cases import mostly_slow

CLASSIFIER = tiny.classifier()
KEYS = Keys.of(jax.random.key(2), 8)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(8, 8, 8, 1)), jnp.float32)
    x_adv = jnp.clip(x + 0.1, 0, 1)
    return CLASSIFIER.init(jax.random.key(0), x), x, x_adv, jnp.arange(8)


def forward(variables, x, purpose):
    return CLASSIFIER(variables, x, train=True, keys=KEYS.fold(purpose))


@pytest.mark.slow
def test_standard_ignores_the_attack(batch):
    variables, x, _, y = batch
    assert Standard().perturb(CLASSIFIER, variables, x, y, KEYS) is x
    value, outcome = Standard().loss(CLASSIFIER, variables, x, x, y, KEYS, None)
    prediction = forward(variables, x, Purpose.NATURAL)
    np.testing.assert_allclose(value, losses.cross_entropy(prediction.logits, y).mean(), rtol=1e-5)
    jax.tree.map(np.testing.assert_allclose, outcome.batch_stats, prediction.batch_stats)
    np.testing.assert_allclose(outcome.metrics["accuracy"], np.mean(prediction.logits.argmax(1) == y))


@pytest.mark.slow
def test_pgd_at_trains_on_the_attacked_images(batch):
    variables, x, x_adv, y = batch
    objective = PGDAdversarialTraining(tiny.ATTACK)
    crafted = objective.perturb(CLASSIFIER, variables, x, y, KEYS)
    expected = tiny.ATTACK(classifier_oracle(CLASSIFIER, variables), x, y, KEYS.fold(Purpose.ATTACK))
    np.testing.assert_allclose(crafted, expected, atol=1e-6)
    value, outcome = objective.loss(CLASSIFIER, variables, x, x_adv, y, KEYS, None)
    prediction = forward(variables, x_adv, Purpose.ADVERSARIAL)
    np.testing.assert_allclose(value, losses.cross_entropy(prediction.logits, y).mean(), rtol=1e-5)
    jax.tree.map(np.testing.assert_allclose, outcome.batch_stats, prediction.batch_stats)


@pytest.mark.parametrize("objective", mostly_slow([PGDAdversarialTraining(tiny.ATTACK), Trades(tiny.TRADES_ATTACK)], 0))
def test_attacks_draw_random_states_or_see_the_full_dynamics(batch, objective):
    variables, x, _, y = batch
    random = tiny.classifier(RandomIntermediateState(best_so_far=False))
    expected = objective.perturb(CLASSIFIER, variables, x, y, KEYS)
    full = replace(objective, random_attack=False).perturb(random, variables, x, y, KEYS)
    np.testing.assert_allclose(full, expected, atol=1e-6)
    assert not np.allclose(objective.perturb(random, variables, x, y, KEYS), expected, atol=1e-3)


@pytest.mark.parametrize("objective", mostly_slow([PGDAdversarialTraining(tiny.ATTACK), Trades(tiny.TRADES_ATTACK)], 0))
def test_attacks_take_their_gradient_from_the_surrogate(batch, objective):
    variables, x, _, y = batch
    through = replace(objective, surrogate=ThroughSolver())
    own = CLASSIFIER.with_dynamics(gradient=Backprop(CLASSIFIER.dynamics.gradient))
    crafted = through.perturb(CLASSIFIER, variables, x, y, KEYS)
    np.testing.assert_allclose(crafted, objective.perturb(own, variables, x, y, KEYS), atol=1e-6)
    assert not np.allclose(crafted, objective.perturb(CLASSIFIER, variables, x, y, KEYS), atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_smoothed_labels_are_those_of_optax(share):
    logits, labels = jax.random.normal(jax.random.key(0), (5, 7)), jnp.array([0, 6, 3, 3, 1])
    soft = optax.smooth_labels(jax.nn.one_hot(labels, 7), share)
    expected = optax.softmax_cross_entropy(logits, soft)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, share), expected, rtol=1e-5)


OBJECTIVES = [Standard(), PGDAdversarialTraining(tiny.ATTACK), Trades(tiny.TRADES_ATTACK, beta=0.0)]


@pytest.mark.parametrize("objective", mostly_slow(OBJECTIVES, 0), ids=lambda one: type(one).__name__)
def test_objectives_smooth_the_labels_of_their_loss(batch, objective):
    variables, x, x_adv, y = batch
    smooth = replace(objective, label_smoothing=0.1)
    value, _ = smooth.loss(CLASSIFIER, variables, x, x_adv, y, KEYS, None)
    adversarial = isinstance(objective, PGDAdversarialTraining)
    seen = x if isinstance(objective, Trades) else x_adv
    logits = forward(variables, seen, Purpose.ADVERSARIAL if adversarial else Purpose.NATURAL).logits
    np.testing.assert_allclose(value, losses.cross_entropy(logits, y, 0.1).mean(), rtol=1e-5)
    with pytest.raises(InputError, match=r"label_smoothing must be a share in \[0, 1\), got 1.0"):
        replace(objective, label_smoothing=1.0)


def test_trades(batch):
    variables, x, x_adv, y = batch
    value, outcome = Trades(tiny.TRADES_ATTACK, beta=6.0).loss(CLASSIFIER, variables, x, x_adv, y, KEYS, None)
    natural = forward(variables, x, Purpose.NATURAL)
    variables = {**variables, "batch_stats": natural.batch_stats}
    adversarial = forward(variables, x_adv, Purpose.ADVERSARIAL)
    p, q = jax.nn.softmax(natural.logits), jax.nn.softmax(adversarial.logits)
    divergence = jnp.sum(p * jnp.log(p / q)) / 8
    expected = losses.cross_entropy(natural.logits, y).mean() + 6 * divergence
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(outcome.metrics["divergence"], divergence, rtol=1e-3)
    jax.tree.map(np.testing.assert_allclose, outcome.batch_stats, adversarial.batch_stats)


@pytest.mark.slow
def test_trades_gradient_flows_through_both_predictions(batch):
    variables, x, x_adv, y = batch

    def value(params, x):
        inputs = {**variables, "params": params}
        return Trades(tiny.TRADES_ATTACK, beta=1e3).loss(CLASSIFIER, inputs, x, x_adv, y, KEYS, None)[0]

    assert float(jnp.abs(jax.grad(value, argnums=1)(variables["params"], x)).max()) > 1


def test_trades_attack_is_given_the_clean_logits_once(batch):
    variables, x, _, y = batch
    seen = []

    class Recording(PGD):
        def __call__(self, oracle, x, labels, key, start=None):
            seen.append(labels)
            return x

    attack = Recording(tiny.ATTACK.threat, loss=losses.kl)
    Trades(attack).perturb(CLASSIFIER, variables, x, y, KEYS)
    np.testing.assert_allclose(seen[0], CLASSIFIER(variables, x).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("classifier", dj.Equilibrium, "got the class Equilibrium"),
        ("objective", dj.Standard, r"such as Standard\(\) or .* got the class Standard"),
        ("dataset", dj.data.Digits, "got the class Digits"),
        (
            "dataset",
            dj.data.Images(np.zeros((2, 8, 8, 1)), np.zeros(2, int)),
            r"see data.Dataset.* an? Images of float64",
        ),
        ("optimizer", optax.adam(1e-3), "for optax one of your own .* got a GradientTransformation"),
        ("validation_attack", tiny.ATTACK.threat, "such as PGD.* got a Linf"),
    ],
)
def test_a_config_names_the_part_that_is_none(field, value, found):
    with pytest.raises(InputError, match=f"TrainConfig: {field}: expected an? .*{found}") as error:
        replace(tiny.get_config(), **{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("objective", [PGDAdversarialTraining, Trades])
def test_objectives_refuse_parts_that_are_none(objective):
    with pytest.raises(InputError, match=r"attack: expected an attack, .* got 0.1"):
        objective(0.1)
    with pytest.raises(InputError, match=r"surrogate: expected a surrogate, .* got the class ThroughSolver"):
        objective(tiny.TRADES_ATTACK, surrogate=ThroughSolver)


def test_trades_refuses_an_attack_on_labels():
    with pytest.raises(InputError, match="must maximise"):
        Trades(tiny.ATTACK)
    with pytest.raises(InputError, match="beta must be >= 0"):
        Trades(tiny.TRADES_ATTACK, beta=-1.0)
