"""Oracles made of oracles; a targeted attack finds all that a linear program says can be found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from deq_jax import InputError, Keys
from deq_jax.attacks import (
    APGD,
    FAB,
    L2,
    PGD,
    SPSA,
    AutoAttack,
    Linf,
    Square,
    Targeted,
    aimed_at,
    average,
    expectation,
    gradient_from,
    oracle_of,
)
from deq_jax.core import margin, targeted_dlr

KEY = jax.random.key(0)
PIXELS, CLASSES, BATCH, TARGET = 8, 5, 24, 3
WEIGHTS = np.random.default_rng(0).normal(size=(PIXELS, CLASSES)).astype(np.float32)
X = jax.random.uniform(jax.random.key(1), (BATCH, 2, 4, 1))
OTHERS = jnp.zeros(BATCH, int)
EPSILON = 0.12


def model(x):
    return x.reshape(len(x), PIXELS) @ WEIGHTS


ORACLE = aimed_at(oracle_of(model), TARGET)


def greatest_lead(image):
    """The target's greatest lead over all other classes within the ball of Linf and the box, by linear programming."""
    lead = np.delete(WEIGHTS[:, [TARGET]] - WEIGHTS, TARGET, axis=1).T  # [K - 1, pixels]
    bounds = [(max(0, p - EPSILON), min(1, p + EPSILON)) for p in np.ravel(image)]
    solved = linprog(
        np.r_[np.zeros(PIXELS), -1],
        A_ub=np.c_[-lead, np.ones(len(lead))],
        b_ub=np.zeros(len(lead)),
        bounds=[*bounds, (None, None)],
    )
    assert solved.success
    return -solved.fun


def test_an_aimed_attack_answers_the_target_wherever_that_can_be():
    lead = np.array([greatest_lead(image) for image in X])
    can_be, is_clear = lead > 0, np.abs(lead) > 0.02
    assert 4 < np.sum(can_be & is_clear) < np.sum(is_clear) - 4
    x_adv = APGD(Linf(EPSILON), steps=60, loss=margin)(ORACLE, X, OTHERS, KEY)
    answers = np.argmax(model(x_adv), axis=1)
    assert np.max(np.abs(x_adv - X)) <= EPSILON + 1e-6
    np.testing.assert_array_equal((answers == TARGET)[is_clear], can_be[is_clear])


def test_the_gradient_leads_to_the_target_and_from_the_nearest_other_class():
    scores = model(X)
    losses, logits, gradient = ORACLE.grad(margin, X, OTHERS, Keys.of(0, BATCH))
    others = np.argmax(np.where(np.arange(CLASSES) == TARGET, -np.inf, scores), axis=1)
    np.testing.assert_allclose(logits[:, 1], scores[:, TARGET], rtol=1e-6)
    np.testing.assert_allclose(logits[:, 0], scores[np.arange(BATCH), others], rtol=1e-6)
    np.testing.assert_allclose(losses, logits[:, 1] - logits[:, 0], rtol=1e-5, atol=1e-6)
    expected = (WEIGHTS[:, TARGET, None] - WEIGHTS[:, others]).T
    np.testing.assert_allclose(gradient.reshape(BATCH, PIXELS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(EPSILON), L2(0.4)], ids=["linf", "l2"])
@pytest.mark.parametrize(
    "make",
    [
        lambda threat: PGD(threat, steps=20),
        lambda threat: APGD(threat, steps=20),
        lambda threat: Targeted(APGD(threat, steps=20, loss=targeted_dlr)),
        lambda threat: FAB(threat, steps=20),
        lambda threat: Square(threat, queries=200),
        lambda threat: SPSA(threat, steps=20, samples=32),
        lambda threat: AutoAttack((APGD(threat, steps=20), Square(threat, queries=50)), batch_size=16),
    ],
    ids=["pgd", "apgd", "apgd_t", "fab", "square", "spsa", "auto"],
)
def test_every_attack_can_be_aimed(make, threat):
    x_adv = make(threat)(ORACLE, X, OTHERS, KEY)
    before, after = np.argmax(model(X), axis=1) == TARGET, np.argmax(model(x_adv), axis=1) == TARGET
    assert np.all(threat.length(x_adv - X) <= threat.epsilon + 1e-5) and np.all((x_adv >= 0) & (x_adv <= 1))
    assert np.all(after[before]) and np.sum(after) >= np.sum(before) + 3


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: aimed_at(model, 3), "aimed_at: oracle"),
        (lambda: expectation(model, 2), "expectation: oracle"),
        (lambda: average([ORACLE, model]), "average: oracle 1"),  # type: ignore[list-item]
        (lambda: gradient_from(model, ORACLE), "gradient_from: source"),
        (lambda: gradient_from(ORACLE, model), "gradient_from: judge"),
    ],
)
def test_a_function_is_no_oracle(make, where):
    with pytest.raises(
        InputError, match=rf"^{where}: expected an Oracle, such as oracle_of\(logits\) .*, got a function$"
    ):
        make()


@pytest.mark.parametrize("target", [CLASSES, -1, 1.5, True])
def test_a_target_that_is_no_class(target):
    with pytest.raises(InputError, match=r"aimed_at: target must (be an integer >= 0|lie in 0\.\.4), got"):
        aimed_at(oracle_of(model), target).logits(X, Keys.of(0, BATCH))
