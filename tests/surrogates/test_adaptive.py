"""Adaptive surrogates of the defended classifier: their gradients against finite differences and by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Broyden, EnsembleState, FixedPoint, InputError, IntermediateState, Keys, LastState
from deq_jax.attacks import PGD, Linf, expectation, gradient_from
from deq_jax.core import cross_entropy
from deq_jax.defences import EntropyGradient, RandomDirection, deployed, reduce_entropy
from deq_jax.surrogates import (
    BPDAHead,
    BPDAIdentity,
    BPDASolver,
    Direct,
    EndToEnd,
    Intermediate,
    OnBase,
    PathAverage,
    SmoothSign,
    ThroughSolver,
    classifier_oracle,
)
from tests.helpers.dense import WIDTH, defence_of
from tests.helpers.ranges import assert_range

X = 0.3 + 0.4 * jax.random.uniform(jax.random.key(0), (2, 3, 3, 1))
Y = jnp.array([1, 2])
KEYS = Keys.of(jax.random.key(1), 2)

READOUTS = [LastState(), IntermediateState(2), EnsembleState()]
DEFENCE = defence_of()
VARIABLES = DEFENCE.init(jax.random.key(0), X)
EVERY = [
    BPDAIdentity(),
    BPDAHead(),
    BPDASolver(),
    EndToEnd(),
    EndToEnd(smooth=True),
    PathAverage(),
    PathAverage(EndToEnd()),
]
EVERY += [PathAverage(), PathAverage(EndToEnd()), OnBase(Direct()), OnBase(Intermediate(2))]


@cache
def compiled(surrogate, defence, loss):
    """Gradient query and logits in one; numbers of the surrogate are traced."""

    def query(surrogate, x):
        oracle = surrogate(defence, VARIABLES)
        return oracle.grad(loss, x, Y, KEYS), oracle.logits(x, KEYS)

    return partial(jax.jit(query), surrogate)


def ask(surrogate, defence=DEFENCE, loss=cross_entropy, x=X):
    return compiled(surrogate, defence, loss)(x)[0]


@pytest.mark.parametrize("surrogate", EVERY, ids=repr)
def test_loss_logits_and_gradient_agree(surrogate):
    (losses, logits, gradient), again = compiled(surrogate, DEFENCE, cross_entropy)(X)
    assert losses.shape == (2,) and logits.shape == (2, 4) and gradient.shape == X.shape
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4
    np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-5)
    if not isinstance(surrogate, PathAverage):
        np.testing.assert_allclose(cross_entropy(logits, Y), losses, rtol=1e-4)
    other = ask(surrogate, x=X.at[0].set(0.5))  # the other image's gradient does not change
    np.testing.assert_allclose(other[2][1], gradient[1], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "solver",
    [Broyden(4, tolerance=0), pytest.param(Anderson(4, tolerance=0), marks=pytest.mark.slow), FixedPoint(4, 0.7)],
    ids=lambda solver: type(solver).__name__,
)
def test_end_to_end_gradient_equals_finite_differences_of_the_smooth_defence(x64, solver):
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), VARIABLES)
    x = X.astype(jnp.float64)
    oracle = EndToEnd(temperature=2.0, smooth=True)(defence_of(solver, steps=2), variables)
    gradient = np.asarray(jax.jit(partial(oracle.grad, cross_entropy))(x, Y, KEYS)[2])
    total = jax.jit(lambda x: cross_entropy(oracle.logits(x, KEYS), Y).sum())
    pixels = np.eye(X.size).reshape(X.size, *X.shape)
    differences = np.array([(total(x + 1e-6 * e) - total(x - 1e-6 * e)) / 2e-6 for e in pixels])
    cosine = np.vdot(differences, gradient) / np.linalg.norm(differences) / np.linalg.norm(gradient)
    assert cosine >= 0.99
    np.testing.assert_allclose(np.linalg.norm(differences), np.linalg.norm(gradient), rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("readout", READOUTS, ids=repr)
def test_end_to_end_forward_is_the_defence_itself(readout):
    """The sign stays a sign, and the differentiable solver takes the same steps."""
    defence = replace(DEFENCE, readout=readout)
    found = jax.jit(lambda x: defence(VARIABLES, x).logits)(X)
    np.testing.assert_allclose(ask(EndToEnd(), defence)[1], found, rtol=1e-4, atol=1e-5)
    if readout != LastState():
        assert not np.allclose(found, ask(EndToEnd())[1], atol=1e-4)


@pytest.mark.slow
def test_a_smooth_forward_pass_and_the_temperature_change_the_result():
    found = ask(EndToEnd())[1]
    assert not np.allclose(ask(EndToEnd(smooth=True))[1], found, atol=1e-4)
    assert not np.allclose(ask(EndToEnd(0.1))[2], ask(EndToEnd())[2], rtol=1e-2)


def test_without_updates_end_to_end_is_backpropagation_through_the_solver():
    defence = defence_of(FixedPoint(4, tolerance=0), steps=0)

    def total(x):
        u, z = defence.base.encode(VARIABLES, x), jnp.zeros((2, WIDTH))
        for _ in range(5):  # z_1 = f(0) is evaluated once more by the iteration
            last, z = z, defence.base.apply_cell(VARIABLES["params"]["cell"], z, u)
        return cross_entropy(defence.decode(VARIABLES, last), Y).sum()

    np.testing.assert_allclose(ask(EndToEnd(), defence)[2], jax.grad(total)(X), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("readout", READOUTS, ids=repr)
def test_without_updates_the_gradient_through_the_solver_is_that_of_the_undefended_state(readout):
    undefended = ThroughSolver()(deployed(DEFENCE.base, readout), VARIABLES)
    expected = jax.jit(partial(undefended.grad, cross_entropy))(X, Y, KEYS)[2]
    found = ask(BPDASolver(), defence_of(steps=0, readout=readout))[2]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_through_the_solver_holds_updates_constant():
    """It is the derivative end to end where updates do not depend on the input, as random ones, and only there."""
    assert not np.allclose(ask(BPDASolver())[2], ask(EndToEnd())[2], rtol=1e-2)
    random = defence_of(direction=RandomDirection())
    np.testing.assert_allclose(ask(BPDASolver(), random)[2], ask(EndToEnd(), random)[2], rtol=1e-3, atol=1e-5)


def test_bpda_passes_on_the_gradient_at_the_purified_input():
    found = reduce_entropy(DEFENCE, VARIABLES, X)
    base = classifier_oracle(DEFENCE.base, VARIABLES).grad(cross_entropy, found.x, Y, KEYS)
    for one, other in zip(ask(BPDAIdentity()), base, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    params = VARIABLES["params"]["cell"]

    def head(z, x):
        fz = DEFENCE.base.apply_cell(params, z, DEFENCE.base.encode(VARIABLES, x))
        return cross_entropy(DEFENCE.decode(VARIABLES, fz), Y).sum()

    for readout in READOUTS:
        gradient = jax.grad(head, 1)(readout(found.solution), found.x)
        defence = replace(DEFENCE, readout=readout)
        np.testing.assert_allclose(ask(BPDAHead(), defence)[2], gradient, rtol=1e-3, atol=1e-5)


def test_path_average_is_the_mean_loss_of_all_states():
    states = reduce_entropy(DEFENCE, VARIABLES, X).solution.states
    logits = jnp.stack([DEFENCE.decode(VARIABLES, z) for z in states])
    losses, mean, _ = ask(PathAverage(EndToEnd()))
    np.testing.assert_allclose(losses, np.mean([cross_entropy(row, Y) for row in logits], axis=0), rtol=1e-4)
    np.testing.assert_allclose(mean, logits.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_path_average_leads_on_from_each_state_with_the_input_of_its_block():
    found = reduce_entropy(DEFENCE, VARIABLES, X)

    def loss_and_logits(t, x):
        u, params = DEFENCE.base.encode(VARIABLES, x), VARIABLES["params"]["cell"]
        logits = DEFENCE.decode(VARIABLES, DEFENCE.base.apply_cell(params, found.solution.states[t], u))
        return cross_entropy(logits, Y).sum(), logits

    inputs = jnp.repeat(found.inputs, DEFENCE.every, axis=0)
    assert not np.allclose(inputs[0], inputs[-1], atol=1e-3)
    parts = [jax.grad(partial(loss_and_logits, t), has_aux=True)(x) for t, x in enumerate(inputs)]
    _, mean, gradient = ask(PathAverage(BPDAHead()))
    np.testing.assert_allclose(mean, np.mean([logits for _, logits in parts], axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, np.mean([one for one, _ in parts], axis=0), rtol=1e-3, atol=1e-5)


def test_attacks_judge_the_defended_predictor():
    attack = PGD(Linf(0.1), steps=4, step_size=0.03)
    judge = classifier_oracle(DEFENCE, VARIABLES)
    clean = cross_entropy(judge.logits(X, KEYS), Y)
    oracle = gradient_from(BPDAIdentity()(DEFENCE, VARIABLES), judge)
    x_adv = jax.jit(partial(attack, oracle))(X, Y, jax.random.key(0))
    assert np.all(cross_entropy(judge.logits(x_adv, KEYS), Y) > clean)


@pytest.mark.slow
def test_a_random_defence_is_attacked_in_expectation():
    defence = defence_of(direction=RandomDirection())
    oracle = BPDAHead()(defence, VARIABLES)
    mean = jax.jit(partial(expectation(oracle, 3).grad, cross_entropy))(X, Y, KEYS)
    single = jax.jit(partial(oracle.grad, cross_entropy))
    draws = [single(X, Y, KEYS.fold(i)) for i in range(3)]
    np.testing.assert_allclose(mean[2], np.mean([draw[2] for draw in draws], axis=0), rtol=1e-3, atol=1e-5)
    assert not np.allclose(draws[0][1], draws[1][1])
    assert np.abs(ask(EndToEnd(), defence)[2]).max() > 1e-4


def test_smooth_sign():
    gradient = jnp.array([[-2.0, 0.0, 1.0]])
    np.testing.assert_array_equal(SmoothSign(1.0)(gradient), [[-1, 0, 1]])
    np.testing.assert_allclose(SmoothSign(0.5, True)(gradient), np.tanh([[-4.0, 0.0, 2.0]]), rtol=1e-6)
    hard, soft = (jax.jacobian(SmoothSign(0.5, smooth))(gradient) for smooth in (False, True))
    np.testing.assert_allclose(hard, soft, rtol=1e-6)
    assert np.isfinite(jax.jacobian(SmoothSign(1.0))(jnp.zeros((1, 2)))).all()


def test_mistakes_are_named():
    with pytest.raises(InputError, match="expected an EntropyReduced classifier, got an Equilibrium"):
        BPDAIdentity()(DEFENCE.base, VARIABLES)
    assert_range(EndToEnd, "temperature", [1e-9], [0])

    def own(entropies, x, keys):
        return EntropyGradient()(entropies, x, keys)

    with pytest.raises(InputError, match="expected EntropyGradient or RandomDirection"):
        EndToEnd()(replace(DEFENCE, direction=own), VARIABLES)
