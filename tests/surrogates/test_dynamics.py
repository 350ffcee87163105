"""Surrogates against plain dynamics and the authors' numbers; the simultaneous adjoint against exact gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    Anderson,
    Broyden,
    Dynamics,
    EnsembleState,
    EntropyReduced,
    Equilibrium,
    Explicit,
    Implicit,
    InputError,
    IntermediateState,
    Keys,
    Phantom,
)
from deq_jax.attacks import PGD, Linf
from deq_jax.core import AtState, Injection, cross_entropy, margin
from deq_jax.defences import deployed
from deq_jax.models import Prediction
from deq_jax.parallel import replicate_and_split
from deq_jax.storage import from_tree, to_tree
from deq_jax.surrogates import (
    BPDA,
    Direct,
    Intermediate,
    MeanOverStates,
    SimultaneousAdjoint,
    ThroughSolver,
    WithGradient,
    classifier_oracle,
    judged,
)
from deq_jax.surrogates.adaptive import identity
from tests.golden.case import Case, compiled
from tests.helpers.ranges import assert_range

T, WIDTH = 4, 8
X = jax.random.uniform(jax.random.key(0), (3, 4, 4, 1))
Y = jnp.array([1, 2, 3])
SURROGATES = [
    Direct(),
    WithGradient(Implicit(Broyden(7))),
    Intermediate(2, 5, 1),
    MeanOverStates(),
    SimultaneousAdjoint(3),
    ThroughSolver(),
]
EVERY = pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda surrogate: type(surrogate).__name__)


class Encoder(nn.Module):
    """Dense layers, here and below: they compile in no time."""

    @nn.compact
    def __call__(self, x, train=False, keys=None, axis_name=None):
        return Injection(3 * nn.Dense(WIDTH)(x.reshape(len(x), -1)))


class Cell(nn.Module):
    """tanh(W z + u), contractive at its initialisation by key 0."""

    @nn.compact
    def __call__(self, z, u):
        return jnp.tanh(0.8 * nn.Dense(WIDTH)(z) + u.features)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z, train=False, axis_name=None):
        return nn.Dense(5)(jnp.sin(3 * z))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, keys=None, axis_name=None):
        return nn.Dense(5)(x.reshape(len(x), -1))


DEQ = Equilibrium(Encoder(), Cell(), Decoder(), Dynamics(Broyden(T), gradient=Phantom(2, 0.5)))


@cache
def variables():
    with jax.ensure_compile_time_eval():  # whichever test asks first, be it within jit
        return DEQ.init(jax.random.key(0), X)


def query(surrogate, x=X, y=Y):
    return surrogate(DEQ, variables()).grad(cross_entropy, x, y, None)


ask = jax.jit(query)


def run_as(**changes):
    """The DEQ with other dynamics."""
    return replace(DEQ, dynamics=replace(DEQ.dynamics, **changes))


def assert_close(got, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


# --- what each one computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("state, steps, damping", [(1, 5, 0.5), (4, 0, 1), (3, 9, 1)])
def test_intermediate_is_the_phantom_gradient_at_that_state(state, steps, damping):
    by_hand = run_as(readout=IntermediateState(state), gradient=Phantom(steps, damping))
    expected = jax.jit(partial(classifier_oracle(by_hand, variables()).grad, cross_entropy))(X, Y, None)
    assert_close(ask(Intermediate(state, steps, damping)), expected)


def test_one_compilation_serves_a_whole_family():
    traced = jax.jit(chex.assert_max_traces(query, n=1))
    family = [Intermediate(i, steps, damping) for i in (1, 4) for steps in (1, 5, 9) for damping in (0.5, 1)]
    gradients = [np.asarray(traced(surrogate)[2]) for surrogate in family]
    assert len({gradient.tobytes() for gradient in gradients}) == len(family)
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(query, n=1))
    one, four = (traced(SimultaneousAdjoint(step))[2] for step in (1, 4))
    assert not np.array_equal(one, four)


@pytest.mark.slow
@pytest.mark.parametrize(
    "predictor",
    [
        run_as(solver=Broyden(T, tolerance=0)),
        run_as(solver=Broyden(T, tolerance=0), gradient=Implicit(Broyden(7))),
        run_as(solver=Anderson(T, tolerance=0), readout=IntermediateState(3)),
        deployed(run_as(solver=Broyden(T, tolerance=0)), EnsembleState()),
    ],
    ids=["phantom", "exact", "anderson", "ensemble"],
)
def test_through_solver_is_the_derivative_of_what_is_computed(predictor, x64):
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables())
    x = X.astype(jnp.float64)
    _, logits, gradient = jax.jit(partial(ThroughSolver()(predictor, wide).grad, cross_entropy))(x, Y, None)
    assert_close(logits, predictor(wide, x).logits, 1e-9)
    total = jax.jit(lambda x: cross_entropy(predictor(wide, x).logits, Y).sum())
    pixels = np.eye(X.size).reshape(X.size, *X.shape)
    differences = np.array([(total(x + 1e-6 * e) - total(x - 1e-6 * e)) / 2e-6 for e in pixels])
    np.testing.assert_allclose(np.ravel(gradient), differences, rtol=1e-4, atol=1e-7)
    own = classifier_oracle(predictor, wide).grad(cross_entropy, x, Y, None)[2]
    assert not np.allclose(own, gradient, rtol=0.05)  # the estimators do not see the solver's steps


def test_mean_over_states_is_the_gradient_of_mean_logits():
    params, solution = variables()["params"]["cell"], DEQ(variables(), X).solution

    def mean(x):
        u = DEQ.encode(variables(), x)
        states = [DEQ.apply_cell(params, jax.tree.map(lambda z, i=i: z[i], solution.states), u) for i in (1, 2, 3)]
        states.append(Phantom(9, 0.5)(DEQ.apply_cell, params, u, solution.z))
        return sum(DEQ.decode(variables(), state) for state in states) / 4

    _, logits, gradient = ask(MeanOverStates())
    assert_close(logits, mean(X))
    assert_close(gradient, jax.grad(lambda x: jnp.sum(cross_entropy(mean(x), Y)))(X))


def test_direct_and_other_gradients_are_the_predictors_own():
    own = classifier_oracle(DEQ, variables()).grad(cross_entropy, X, Y, None)
    assert_close(ask(Direct()), own)
    exact = run_as(gradient=Implicit(Broyden(7)))
    assert_close(
        ask(WithGradient(Implicit(Broyden(7)))),
        classifier_oracle(exact, variables()).grad(cross_entropy, X, Y, None),
        1e-4,
    )


def test_simultaneous_adjoint_by_hand():
    """Its first two steps: u_1 = dL/dz at z_0, u_2 = u_1 - (u_1 J_g(z_1) + dL/dz_1) B_1."""
    params, u = variables()["params"]["cell"], DEQ.encode(variables(), X)
    solution = DEQ(variables(), X).solution

    def cotangent(z):
        return jax.grad(lambda z: jnp.sum(cross_entropy(DEQ.decode(variables(), z), Y)))(z)

    first = solution.states[0]
    one = cotangent(jnp.zeros_like(first))
    defect = jax.vjp(lambda z: DEQ.apply_cell(params, z, u), first)[1](one)[0] - one + cotangent(first)
    dz, dg = first, DEQ.apply_cell(params, first, u) - 2 * first  # from z_0 = 0, where g is z_1
    pair_u, pair_v = (dz + dg) / -jnp.sum(dz * dg, axis=1, keepdims=True), -dz
    two = one - (jnp.sum(defect * pair_u, axis=1, keepdims=True) * pair_v - defect)

    def direction(z, adjoint):
        return jax.vjp(lambda x: DEQ.apply_cell(params, z, DEQ.encode(variables(), x)), X)[1](adjoint)[0]

    for step, adjoint in ((1, one), (2, two)):
        losses, logits, gradient = ask(SimultaneousAdjoint(step))
        state = solution.states[step - 1]
        assert_close(logits, DEQ.decode(variables(), state))
        assert_close(losses, cross_entropy(logits, Y))
        assert_close(gradient, direction(state, adjoint), 1e-4)


def test_simultaneous_adjoint_tends_to_the_exact_gradient():
    def gradient(surrogate, steps):
        solved = run_as(solver=Broyden(steps, tolerance=0.0))
        ask = jax.jit(lambda x, y: surrogate(solved, variables()).grad(cross_entropy, x, y, None)[2])
        return np.asarray(ask(X, Y)).ravel()

    exact = gradient(WithGradient(Implicit(Broyden(40, tolerance=0.0))), 40)
    found = [gradient(SimultaneousAdjoint(steps), steps) for steps in (1, 4, 30)]
    errors = [np.linalg.norm(g - exact) / np.linalg.norm(exact) for g in found]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3
    assert found[2] @ exact > 0.999 * np.linalg.norm(found[2]) * np.linalg.norm(exact)


@EVERY
def test_logits_are_those_of_its_own_forward_pass(surrogate):
    logits = surrogate(DEQ, variables()).logits(X, None)
    assert_close(logits, ask(surrogate)[1])


# --- the contract ----------------------------------------------------------------------------------------


@EVERY
def test_an_image_does_not_depend_on_its_batch(surrogate):
    order = jnp.array([2, 0, 1])
    whole, permuted = ask(surrogate), ask(surrogate, X[order], Y[order])
    assert_close(permuted, jax.tree.map(lambda part: part[order], whole))


@EVERY
def test_success_is_judged_on_the_deployed_predictor(surrogate):
    losses, logits, gradient = jax.jit(lambda s: judged(s, DEQ, variables()).grad(margin, X, Y, None))(surrogate)
    expected = DEQ(variables(), X).logits
    assert_close(logits, expected)
    assert_close(losses, margin(expected, Y))
    assert_close(gradient, jax.jit(lambda s: s(DEQ, variables()).grad(margin, X, Y, None)[2])(surrogate))
    assert float(jnp.abs(gradient).max()) > 0


def test_surrogates_are_values():
    assert Intermediate(2, 5, 1) == Intermediate(2, 5, 1.0) and hash(Intermediate(2)) == hash(Intermediate(2, 5, 0.5))
    assert jax.tree.leaves(Intermediate(2, 5, 1)) == [2, 5, 1.0]
    assert not jax.tree.leaves(WithGradient(Implicit()))
    assert jax.tree.map(lambda leaf: leaf, SURROGATES) == SURROGATES
    assert len({str(to_tree(surrogate)) for surrogate in SURROGATES}) == len(SURROGATES)


def test_surrogates_cross_devices():
    devices = jax.local_device_count()
    x, y = jnp.resize(X, (devices, *X.shape[1:])), jnp.resize(Y, devices)
    attack = PGD(Linf(0.1), steps=2, step_size=0.05)

    def perturb(surrogate, batch):
        x, y, numbers = batch
        return attack(judged(surrogate, DEQ, variables()), x, y, Keys(jax.random.key(1), numbers))

    split = replicate_and_split(perturb, joint=False)
    batch = np.asarray(x), np.asarray(y), np.arange(devices, dtype=np.int32)
    for surrogate in (Intermediate(1, 1, 1), Intermediate(3, 5, 0.5)):
        np.testing.assert_allclose(split(surrogate, batch), jax.jit(perturb)(surrogate, batch), atol=1e-5)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Intermediate(0), "Intermediate: state must be an integer >= 1, got 0"),
        (lambda: Intermediate(1, 10), "Intermediate: steps must be an integer from 0 to 9, got 10"),
        (lambda: Intermediate(1, 1.5), "Intermediate: steps must be an integer"),
        (lambda: SimultaneousAdjoint(0), "SimultaneousAdjoint: state must be an integer >= 1"),
        (lambda: Intermediate(5)(DEQ, variables()), "Intermediate: state must be an integer from 1 to 4, got 5"),
        (lambda: SimultaneousAdjoint(5)(DEQ, variables()), "SimultaneousAdjoint: state must be an integer from 1 to 4"),
        (lambda: SimultaneousAdjoint(2)(run_as(solver=Anderson(4)), {}), "the solver must be Broyden, got Anderson"),
    ],
)
def test_settings_are_checked(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_the_ends_of_a_range_are_allowed_and_nothing_beyond():
    for make in (partial(Intermediate, 1), MeanOverStates):
        assert_range(make, "steps", [0, 9], [-1, 10])
        assert_range(make, "damping", [1e-9, 1], [0, 1.001])
    for make in (Intermediate, SimultaneousAdjoint):
        assert_range(make, "state", [1], [0])


def test_explicit_networks_have_their_own_gradient_only():
    network = Explicit(Linear())
    parameters = network.init(jax.random.key(0), X)
    assert Direct()(network, parameters).logits(X, None).shape == (3, 5)
    for surrogate in SURROGATES[1:]:
        with pytest.raises(InputError, match="expected an Equilibrium with a solver, got an Explicit"):
            surrogate(network, parameters)
    with pytest.raises(InputError, match="expected an Equilibrium with a solver, got one with solver=None"):
        deployed(run_as(solver=None), EnsembleState())


# --- deployed on raw states ------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", [IntermediateState(2), EnsembleState()], ids=repr)
def test_deployed_on_a_raw_state(readout):
    predictor = deployed(DEQ, readout)
    assert predictor.dynamics.gradient == AtState(DEQ.dynamics.gradient)
    prediction = predictor(variables(), X)
    state = readout(prediction.solution)
    assert_close(prediction.logits, DEQ.decode(variables(), state))

    u, vjp = jax.vjp(partial(DEQ.encode, variables()), X)
    cotangent = jax.grad(lambda z: jnp.sum(cross_entropy(DEQ.decode(variables(), z), Y)))(state)
    pull = jax.vjp(lambda u: Phantom(2, 0.5)(DEQ.apply_cell, variables()["params"]["cell"], u, state), u)[1]
    gradient = classifier_oracle(predictor, variables()).grad(cross_entropy, X, Y, None)[2]
    assert_close(gradient, vjp(pull(cotangent)[0])[0])


# --- anyone's defence -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantised:
    """Eight levels, and with keys random noise: its own gradient vanishes."""

    base: Any

    def __call__(self, variables, x, *, keys=None, **options):
        noise = 0.0 if keys is None else 0.1 * keys.draw(lambda key: jax.random.normal(key, x.shape[1:]))
        return self.base(variables, jnp.round(8 * x + noise) / 8, **options)


def doubled(x):
    """Twice the image."""
    return 2 * x


def halved_in_size(x):
    """Every second row."""
    return x[:, ::2]


class TestBPDA:
    def test_the_gradient_is_that_of_the_classifier_at_what_it_is_given(self):
        predictor, keys = Quantised(DEQ), Keys.of(jax.random.key(1), 3)
        seen = jnp.round(8 * X) / 8
        losses, logits, expected = classifier_oracle(DEQ, variables()).grad(cross_entropy, seen, Y, keys)
        assert not np.any(Direct()(predictor, variables()).grad(cross_entropy, X, Y, keys)[2])
        for proxy, factor in ((identity, 1), (doubled, 2)):
            found = BPDA(proxy)(predictor, variables()).grad(cross_entropy, X, Y, keys)
            for answer, value in zip(found, (losses, logits, factor * expected), strict=True):
                assert_close(answer, value)

    def test_a_random_predictor_draws_from_the_keys_of_a_query(self):
        predictor, keys = Quantised(DEQ), Keys.of(jax.random.key(1), 3)
        drawn = BPDA(random=True)(predictor, variables()).logits(X, keys)
        assert_close(drawn, predictor(variables(), X, keys=keys).logits)
        assert np.abs(drawn - BPDA()(predictor, variables()).logits(X, keys)).max() > 1e-3

    def test_what_it_is_not_for_is_refused(self):
        keys = Keys.of(jax.random.key(1), 3)
        with pytest.raises(InputError, match="calls the classifier in its field 'model', got Quantised"):
            BPDA(part="model")(Quantised(DEQ), variables())
        with pytest.raises(InputError, match="got Equilibrium"):
            BPDA()(DEQ, variables())
        with pytest.raises(InputError, match=r"is given images \(3, 4, 4, 1\), the proxy has \(3, 2, 4, 1\)"):
            BPDA(halved_in_size)(Quantised(DEQ), variables()).logits(X, keys)
        with pytest.raises(InputError, match="got EntropyReduced"):
            BPDA()(EntropyReduced(DEQ), variables())

        @dataclass(frozen=True)
        class Inside:
            base: Any

            def __call__(self, variables, x, **options):
                return Prediction(self.base.decode(variables, self.base.encode(variables, x).features), {}, None)

        with pytest.raises(InputError, match=r"asks nothing else of it .*decode"):
            BPDA()(Inside(DEQ), variables()).logits(X, keys)

    def test_it_can_be_written_and_read_again(self):
        assert from_tree(to_tree(BPDA(doubled))) == BPDA(doubled)
        assert jax.tree.leaves(BPDA()) == []


# --- the authors' numbers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    jax.config.update("jax_enable_x64", True)
    yield Case("float64")
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def golden_query(golden):
    def query(surrogate, x, y):
        return surrogate(golden.classifier, golden.variables).grad(cross_entropy, x, y, None)

    return compiled(query)


def golden_close(case, key, answer):
    losses, logits, gradient = answer
    case.close(f"{key}/logits", logits)
    case.close(f"{key}/loss", jnp.mean(losses))
    case.image_close(f"{key}/grad_x", gradient / len(losses))


@pytest.mark.slow
@pytest.mark.parametrize("state, steps, damping", [(0, 1, 1), (2, 5, 1), (3, 5, 1), (3, 5, 0.5), (7, 9, 0.5)])
def test_golden_intermediate_gradients(golden, golden_query, state, steps, damping):
    key = f"unroll/{'F' if damping == 1 else 'M'}unroll-{state}-{steps}"
    golden_close(golden, key, golden_query(Intermediate(state + 1, steps, damping), golden.x, golden.y))


@pytest.mark.slow
def test_golden_gradient_of_averaged_predictions(golden, golden_query):
    golden_close(golden, "unroll/Funroll-es-0", golden_query(MeanOverStates(), golden.x, golden.y))
