"""Attacks that begin at given images: the contract of `start`, the same for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError, Keys
from deq_jax.attacks import (
    APGD,
    FAB,
    L2,
    PGD,
    SPSA,
    AutoAttack,
    Linf,
    Noise,
    Square,
    Targeted,
    clean_start,
    oracle_of,
)
from deq_jax.core import margin, targeted_dlr
from tests.helpers.cases import mostly_slow

KEY = jax.random.key(0)
BATCH = 4
X = jax.random.uniform(jax.random.key(1), (BATCH, 3, 3, 1), minval=0.35, maxval=0.45)
NORMAL = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 1)), jnp.float32)
Y = jnp.zeros(BATCH, jnp.int32)


def model(x, keys=None):
    """Label 0 resists within the balls below, where the worst image is known, but for an island without a gradient."""
    score = 0.1 * jnp.sum((x - 0.5) * NORMAL, axis=(1, 2, 3)) - 1
    island = jnp.where(jnp.abs(x[:, 0, 0, 0] - 0.5) < 1e-4, 10.0, 0.0)
    return jnp.stack([-score, score + island, jnp.full(len(x), -5.0)], axis=1)


ORACLE = oracle_of(model)


def attacks_within(threat):
    return {
        "pgd": PGD(threat, steps=2, restarts=2, loss=margin),
        "pgd_last": PGD(threat, steps=2, best_of=False),
        "apgd": APGD(threat, steps=3, restarts=2, loss=margin),
        "apgd_t": Targeted(APGD(threat, steps=2, loss=targeted_dlr), classes=2),
        "fab": FAB(threat, steps=2, restarts=2),
        "square": Square(threat, queries=4),
        "spsa": SPSA(threat, steps=2, samples=2),
        "auto": AutoAttack((APGD(threat, steps=2), FAB(threat, steps=2)), batch_size=3),
    }


THREATS = [Linf(0.15), L2(0.2)]
CASES = [(threat, name) for threat in THREATS for name in attacks_within(threat)]
EVERY = pytest.mark.parametrize(("threat", "name"), CASES, ids=[f"{type(t).__name__}-{name}" for t, name in CASES])


@pytest.mark.parametrize("threat", mostly_slow(THREATS, 0), ids=str)
@pytest.mark.parametrize("name", attacks_within(THREATS[0]))
def test_the_contract(threat, name):
    attack = attacks_within(threat)[name]
    run = jax.jit(lambda start: attack(ORACLE, X, Y, KEY, start))
    island = X.at[:2, 0, 0, 0].set(0.5)
    optimum = threat.project(X + threat.epsilon * threat.steepest(jnp.broadcast_to(NORMAL, X.shape)), X)
    somewhere = threat.project(X + threat.random(Keys.of(3, BATCH), X), X)
    assert (margin(model(island), Y) > 0).tolist() == [True, True, False, False]
    assert (margin(model(optimum), Y) < 0).all() and (margin(model(optimum), Y) > margin(model(somewhere), Y)).all()
    for start in (island, optimum, somewhere, jnp.clip(X + 0.3, 0, 1)):  # the last one is outside: it is projected
        x_adv = run(start)
        assert x_adv.shape == X.shape and x_adv.dtype == X.dtype
        assert float(jnp.max(threat.length(x_adv - X))) <= threat.epsilon + 1e-6
        assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
        if name != "pgd_last":
            before, after = (margin(model(x), Y) for x in (threat.project(start, X), x_adv))
            assert (after >= before - 1e-6).all(), "worse than the start"
    eager = attack(ORACLE, X, Y, KEY, np.asarray(somewhere))
    if name != "auto":  # draws other numbers for batches of another size
        np.testing.assert_allclose(run(somewhere), eager, atol=1e-6)
    assert float(jnp.max(threat.length(eager - X))) <= threat.epsilon + 1e-6
    assert (margin(model(attack(ORACLE, X, Y, KEY, island)), Y) > 0)[:2].all() or name == "pgd_last"


@EVERY
@pytest.mark.parametrize(
    ("start", "found"),
    [
        (X[:2], r"expected a start of float images \(4, 3, 3, 1\), got float32 \(2, 3, 3, 1\)"),
        ((255 * X).astype(jnp.uint8), r"expected a start of float images \(4, 3, 3, 1\), got uint8"),
        (X.at[1, 0, 0, 0].add(0.25), r"start must lie within L\w+\(epsilon=0\.\d+\) of the images, found 0\.25 for i"),
        (X + 1, r"start: images must lie in \[0, 1\]"),
        (X.at[0].set(jnp.nan), r"start: images must lie in \[0, 1\], found \[nan, nan\]"),
    ],
    ids=["shape", "integers", "far", "box", "nan"],
)
def test_what_is_refused(threat, name, start, found):
    with pytest.raises(InputError, match=found):
        attacks_within(threat)[name](ORACLE, X, Y, KEY, start)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("best_of", [True, False])
def test_pgd_from_the_images_is_pgd_without_a_random_start(threat, best_of):
    named = PGD(threat, steps=3, start=clean_start, best_of=best_of)
    given = PGD(threat, steps=3, best_of=best_of)
    np.testing.assert_array_equal(given(ORACLE, X, Y, KEY, start=X), named(ORACLE, X, Y, KEY))


def test_only_the_first_restart_begins_there():
    """The others find what they find without it."""

    def found(restarts):
        attack = PGD(Linf(0.1), steps=1, step_size=1e-6, restarts=restarts)
        return margin(model(attack(ORACLE, X, Y, KEY, start=X)), Y)

    assert (found(4) >= found(1) - 1e-6).all() and (found(4) > found(1) + 1e-3).any()


@pytest.mark.parametrize("name", ["pgd", "auto"])
def test_half_precision_stays_in_the_ball(name):
    threat, x = Linf(0.15), X.astype(jnp.bfloat16)
    start = jnp.clip(x.astype(jnp.float32) + 0.15, 0, 1)
    oracle = oracle_of(lambda x, keys: model(x.astype(jnp.float32)))
    x_adv = attacks_within(threat)[name](oracle, x, Y, KEY, start)
    assert x_adv.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(x_adv.astype(jnp.float32) - x.astype(jnp.float32)))) <= 0.15 + 1e-6


def test_noise_begins_at_the_images():
    with pytest.raises(InputError, match="Noise: expected no start"):
        Noise(Linf(0.1))(ORACLE, X, Y, KEY, start=X)


def test_one_step_of_apgd_is_two_radii_long_and_follows_the_gradient_at_the_start():
    threat, x = Linf(0.125), jnp.full((1, 2, 2, 1), 0.5)

    def logits(x):  # its loss rises with x, and the label stays the most likely class
        return jnp.stack([jnp.full(len(x), 5.0), x.sum(axis=(1, 2, 3))], axis=1)

    found = APGD(threat, steps=1)(oracle_of(logits), x, jnp.array([0]), 0, start=x - 0.125)
    np.testing.assert_array_equal(found, x + 0.125)
