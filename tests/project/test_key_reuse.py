"""No PRNG key is used for two things: by purpose, by independence, and by JAX's own checker of key reuse."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deq_jax import (
    Dynamics,
    EntropyReduced,
    Equilibrium,
    FixedPoint,
    Keys,
    PGDAdversarialTraining,
    Phantom,
    RandomIntermediateState,
    Standard,
    Trades,
)
from deq_jax.attacks import APGD, FAB, L2, PGD, SPSA, AutoAttack, Linf, Square, Targeted
from deq_jax.core import AtState, Injection, Purpose, logit_difference
from deq_jax.data import CropFlip
from deq_jax.defences import RandomDirection
from deq_jax.models import JacobianRegularization, Variables
from deq_jax.models.layers import dropout_mask
from deq_jax.surrogates import WithGradient, classifier_oracle, judged
from deq_jax.training import Batch, TrainState, train_step
from tests.helpers import tiny

PACKAGE = Path(__file__).parents[2] / "deq_jax"
X = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 1)), jnp.float32)
LABELS = jnp.arange(4)
RANDOM = [RandomIntermediateState(), RandomIntermediateState(per_sample=True)]
ATTACKS = [
    PGD(Linf(0.1), steps=2, restarts=2),
    PGD(L2(0.5), steps=2),
    APGD(Linf(0.1), steps=2),
    FAB(Linf(0.1), steps=2),
    Square(Linf(0.1), queries=3),
    Square(L2(0.5), queries=3),
    SPSA(Linf(0.1), steps=2, samples=2),
    Targeted(APGD(Linf(0.1), steps=2, loss=logit_difference), classes=2),
    AutoAttack((APGD(Linf(0.1), steps=2), Square(Linf(0.1), queries=2))),
]


@pytest.fixture
def checker():
    """JAX's checker of key reuse."""
    with jax.debug_key_reuse(True):
        yield


class Encoder(nn.Module):
    """A number drawn at random as the features, and a dropout mask."""

    @nn.compact
    def __call__(self, x, train=False, keys=None, axis_name=None):
        drawn = keys.draw(lambda key: jax.random.uniform(key, ()))
        features = jnp.stack([drawn, jnp.zeros(len(x)), jnp.zeros(len(x))], axis=1)
        return Injection(features, dropout_mask(keys, 1, 0.5, x.dtype))


class Cell(nn.Module):
    """A state counts the applications, and holds the features and the mask."""

    @nn.compact
    def __call__(self, z, u):
        return jnp.stack([u.features[:, 0], z[:, 1] + 1, u.masks[:, 0, 0, 0]], axis=1)


class Decoder(nn.Module):
    """The state as the logits."""

    @nn.compact
    def __call__(self, z, train=False, axis_name=None):
        return z


@dataclass(frozen=True)
class RandomReadout:
    """The last state, with numbers drawn at random in place of the count."""

    is_shared: bool

    def __call__(self, solution, keys=None):
        def draw(key):
            return jax.random.uniform(key, solution.z.shape[:1] if self.is_shared else ())

        drawn = draw(keys.common()) if self.is_shared else keys.draw(draw)
        return solution.states[-1].at[:, 1].set(drawn)


def drawn(readout, seed, images):
    """For each image what the encoder draws, what the readout does, and the mask."""
    dynamics = Dynamics(FixedPoint(4, tolerance=0.0), readout, AtState(Phantom(0)))
    classifier = Equilibrium(Encoder(), Cell(), Decoder(), dynamics)
    variables: Variables = {name: {"encoder": {}, "cell": {}, "decoder": {}} for name in ("params", "batch_stats")}
    x = jnp.zeros((images, 2, 2, 1))
    return np.asarray(classifier(variables, x, train=True, keys=Keys.of(seed, images)).logits).T


def correlation(first, second):
    return abs(np.corrcoef(first, second)[0, 1])


class TestPurposes:
    def test_all_differ(self):
        assert len(Purpose) == len(Purpose.__members__) == len({int(purpose) for purpose in Purpose})

    def test_keys_of_images_steps_and_restarts_have_none(self):
        """What is drawn from by image, or folded with a counter, is folded with purposes above all such numbers."""
        counted = {Purpose.ATTACK, Purpose.NATURAL, Purpose.ADVERSARIAL, Purpose.AUGMENTATION, Purpose.PENALTY}
        assert all(purpose >= 1 << 30 for purpose in set(Purpose) - counted)

    def test_no_number_without_a_name_is_folded(self):
        folds = [
            (path.name, folded)
            for path in PACKAGE.rglob("*.py")
            for folded in re.findall(r"\bfold\(([^)]*)\)", path.read_text())
            if re.fullmatch(r"[\d\s+]+|[A-Z_]{2,}", folded)
        ]
        assert folds == []

    def test_a_batch_wide_draw_has_a_key_of_its_own(self):
        keys = Keys.of(7, 3)
        key = jax.random.key_data(keys.common())
        others = [keys.shared, *keys.each(), *(keys.fold(number).shared for number in range(50))]
        assert all(np.any(key != jax.random.key_data(other)) for other in others)


@pytest.mark.parametrize("is_shared", [False, True], ids=["per sample", "batch-wide"])
@pytest.mark.parametrize("seed", range(3))
def test_encoder_and_readout_draw_independently(is_shared, seed):
    """What the encoder draws for an image tells nothing about what the readout draws, for it or for its neighbour."""
    features, readout, _ = drawn(RandomReadout(is_shared), seed, 2000)
    assert len(set(features)) > 1990 and len(set(readout)) > 1990
    assert correlation(features, readout) < 0.1
    assert correlation(features[1:], readout[:-1]) < 0.1


def test_mask_and_random_state_are_independent():
    """How often each state is drawn does not depend on the image's dropout mask: chi-squared over seeds and images."""
    readout = RandomIntermediateState(per_sample=True, best_so_far=False)
    _, states, masks = np.concatenate([drawn(readout, seed, 500) for seed in range(20)], axis=1)
    counts = np.array([[np.sum((states == t) & ((masks > 0) == kept)) for t in range(1, 5)] for kept in (False, True)])
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / len(states)
    assert counts.sum() == len(states) == 10_000 and counts.min() > 1000
    assert np.sum((counts - expected) ** 2 / expected) < 25  # 3 degrees of freedom: once in 65,000 times by chance


@pytest.mark.parametrize("readout", RANDOM, ids=["batch-wide", "per sample"])
class TestUnderTheChecker:
    def test_it_finds_reuse(self, readout, checker):
        def twice(key):
            return jax.random.uniform(key, ()) + jax.random.normal(key, ())

        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(twice).trace(jax.random.key(0))

    @pytest.mark.parametrize(
        "objective",
        [
            Standard(),
            PGDAdversarialTraining(tiny.ATTACK),
            Trades(tiny.TRADES_ATTACK),
            Trades(tiny.TRADES_ATTACK, tied=True),
        ],
        ids=["standard", "pgd_at", "trades", "tied"],
    )
    def test_training_step(self, readout, objective, checker):
        classifier = replace(tiny.classifier(readout), jacobian=JacobianRegularization())
        config = tiny.get_config(classifier=classifier, objective=objective, augmentation=CropFlip(1))
        variables, optimizer = jax.eval_shape(classifier.init, 0, X), optax.sgd(0.1)
        state = TrainState(jnp.int32(0), **variables, opt_state=jax.eval_shape(optimizer.init, variables["params"]))
        jax.jit(partial(train_step, config, optimizer)).trace(state, Batch(X, LABELS, jnp.arange(4)))

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{type(attack).__name__} {attack.threat}")
    def test_attack_on_a_random_predictor(self, readout, attack, checker):
        classifier = tiny.classifier(readout)
        variables = jax.eval_shape(classifier.init, 0, X)

        def run(variables, x, key):
            oracle = judged(WithGradient(Phantom(1)), classifier, variables, draws=2)
            return attack(oracle, x, LABELS, key), attack(classifier_oracle(classifier, variables), x, LABELS, key)

        jax.jit(run).trace(variables, X, jax.random.key(0))

    @pytest.mark.slow
    def test_entropy_reduction(self, readout, checker):
        defence = EntropyReduced(tiny.classifier(readout), steps=2, direction=RandomDirection(), readout=readout)
        variables = jax.eval_shape(defence.init, 0, X)
        run = jax.jit(lambda variables, x, key: defence(variables, x, keys=Keys.of(key, 4)).logits)
        run.trace(variables, X, jax.random.key(0))
