"""Solvers from outside: whatever satisfies the protocol, and has nothing more, works wherever one of ours does."""

import inspect
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deq_jax import (
    Backprop,
    Broyden,
    EntropyReduced,
    FixedPoint,
    Implicit,
    Keys,
    Neumann,
    PGDAdversarialTraining,
    Phantom,
    RandomIntermediateState,
    Unrolled,
    deq,
    solve,
)
from deq_jax.core import AtState, PhantomUpTo, Solver, cross_entropy
from deq_jax.models import JacobianRegularization
from deq_jax.surrogates import (
    BPDAHead,
    BPDAIdentity,
    BPDASolver,
    Direct,
    EndToEnd,
    Intermediate,
    MeanOverStates,
    ThroughSolver,
    WithGradient,
)
from deq_jax.training import Batch, TrainState, train_step
from tests.helpers import tiny


class Pair(NamedTuple):
    z: Any
    fz: Any


@dataclass(frozen=True)
class Damped:
    """z <- (z + f(z)) / 2."""

    steps: int
    tolerance: float = 1e-3

    def init(self, f, z, u):
        return Pair(z, f(z, u))

    def update(self, f, memory, u, active):
        z = jnp.where(active[:, None], (memory.z + memory.fz) / 2, memory.z)
        return Pair(z, f(z, u))


class Derived(Broyden):
    """Broyden's method under another name."""


def example():
    """The class in the protocol's docstring."""
    text = inspect.cleandoc(Solver.__doc__)
    code = text.split("::\n", 1)[1].split("\n\nThat is all")[0]
    scope = {"__name__": __name__}
    exec(textwrap.dedent(code), scope)
    return scope["HeavyBall"]


HeavyBall = example()
HEAVY = HeavyBall(40)
SOLVERS = [Damped(60), HEAVY]
X = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 1)), jnp.float32)
LABELS = jnp.arange(4)
MATRIX = jnp.asarray(np.random.default_rng(1).normal(size=(6, 6)) / 6, jnp.float32)
U = jnp.asarray(np.random.default_rng(2).normal(size=(4, 6)), jnp.float32)

named = partial(pytest.mark.parametrize, ids=lambda thing: type(thing).__name__)


def cell(params, z, u):
    return jnp.tanh(z @ params.T + u)


def with_solver(solver, **changes):
    return replace(tiny.classifier(dropout=0.2).with_dynamics(solver=solver), **changes)


def finite_and_not_zero(tree):
    leaves = jax.tree.leaves(tree)
    return all(np.isfinite(leaf).all() for leaf in leaves) and any(np.abs(leaf).max() > 0 for leaf in leaves)


@named("solver", SOLVERS)
class TestOutsider:
    @pytest.mark.parametrize("scale", [1.0, 1e-30])
    def test_it_finds_the_equilibrium(self, solver, scale):
        def linear(params, z, u):
            return z @ params.T + u

        solution = solve(solver, linear, MATRIX, jnp.zeros_like(U), scale * U)
        expected = np.linalg.solve(np.eye(6) - np.asarray(MATRIX), scale * U.T).T
        np.testing.assert_allclose(solution.z / scale, expected / scale, atol=1e-2)
        assert float(solution.residuals[-1].max()) < 1e-3
        assert int(solution.evaluations.max()) < solver.steps + 1  # samples stop when they have converged

    def test_an_equilibrium_at_zero_is_reached(self, solver):
        longer = replace(solver, steps=300)
        solution = solve(longer, lambda params, z, u: z / 2 + 0 * u, None, jnp.ones((2, 3)), jnp.zeros((2, 3)))
        assert float(solution.residuals[-1].max()) < 1e-3 and float(jnp.abs(solution.z).max()) < 1e-6

    def test_it_is_resumed(self, solver):
        half = replace(solver, steps=5, tolerance=0.0)
        first = solve(half, cell, MATRIX, jnp.zeros_like(U), U)
        second = solve(half, cell, MATRIX, jnp.zeros_like(U), U, memory=first.memory)
        whole = solve(replace(half, steps=10), cell, MATRIX, jnp.zeros_like(U), U)
        np.testing.assert_allclose(np.concatenate([first.states, second.states]), whole.states, rtol=1e-5, atol=1e-7)

    @named(
        "gradient",
        [
            Backprop(),
            Phantom(20, 1.0),
            PhantomUpTo(20, 20, 1.0),
            Unrolled(20),
            Neumann(60),
            Implicit(),
            AtState(Implicit()),
            None,
        ],
    )
    def test_estimators(self, solver, gradient):
        """The last one is the exact gradient whose adjoint equation the solver itself solves."""
        gradient = gradient or Implicit(solver)

        def total(params, u, solver, gradient):
            z, _ = deq(cell, params, u, jnp.zeros_like(u), solver=solver, gradient=gradient)
            return jnp.sum(jnp.sin(z))

        found = jax.grad(total, (0, 1))(MATRIX, U, solver, gradient)
        expected = jax.grad(total, (0, 1))(MATRIX, U, Broyden(20, tolerance=1e-6), Implicit(Broyden(20, tolerance=0.0)))
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-2), found, expected)


class TestClassifier:
    """A classifier with a solver from outside."""

    @named("surrogate", [Direct(), WithGradient(Implicit()), ThroughSolver(), Intermediate(2), MeanOverStates(1)])
    def test_surrogates(self, surrogate):
        classifier = with_solver(replace(HEAVY, steps=3))
        variables = classifier.init(0, X)
        oracle = surrogate(classifier, variables)
        assert finite_and_not_zero(jax.jit(partial(oracle.grad, cross_entropy))(X, LABELS, Keys.of(0, 4)))

    @pytest.mark.slow
    @named("surrogate", [Direct(), BPDAIdentity(), BPDAHead(), BPDASolver(), EndToEnd()])
    def test_entropy_reduction(self, surrogate):
        defence = EntropyReduced(with_solver(replace(HEAVY, steps=2)), steps=1)
        variables = defence.init(0, X)
        oracle = surrogate(defence, variables)
        assert finite_and_not_zero(jax.jit(partial(oracle.grad, cross_entropy))(X, LABELS, Keys.of(0, 4)))

    def test_training_step(self):
        dynamics = {"solver": replace(HEAVY, steps=4), "readout": RandomIntermediateState()}
        classifier = replace(tiny.classifier().with_dynamics(**dynamics), jacobian=JacobianRegularization())
        config = tiny.get_config(classifier=classifier, objective=PGDAdversarialTraining(tiny.ATTACK))
        optimizer = optax.sgd(0.1)
        variables = classifier.init(0, X)
        state = TrainState(jnp.int32(0), **variables, opt_state=optimizer.init(variables["params"]))
        after, metrics = jax.jit(partial(train_step, config, optimizer))(state, Batch(X, LABELS, jnp.arange(4)))
        assert finite_and_not_zero(jax.tree.map(jnp.subtract, after.params, state.params))
        assert np.isfinite(metrics["loss"]) and float(metrics["cell_evaluations"]) > 1


def test_jittered_training_passes_have_more_steps_of_it():
    classifier = with_solver(HeavyBall(4), jacobian=JacobianRegularization())
    variables = jax.eval_shape(classifier.init, 0, X)
    run = partial(classifier, x=X, train=True, keys=Keys.of(0, 4))
    assert jax.eval_shape(run, variables).solution.residuals.shape == (5, 4)


@pytest.mark.slow
def test_a_solver_derived_from_broyden_is_differentiated():
    def gradient(solver):
        classifier = with_solver(solver)
        oracle = ThroughSolver()(classifier, classifier.init(0, X))
        return jax.jit(partial(oracle.grad, cross_entropy))(X, LABELS, Keys.of(0, 4))[2]

    np.testing.assert_allclose(gradient(Derived(2)), gradient(Broyden(2)), rtol=1e-5)


@named("solver", [FixedPoint(3), Broyden(3), *SOLVERS])
def test_the_protocol_is_all_there_is(solver):
    members = {name for name in vars(Solver) if not name.startswith("_")} | set(Solver.__annotations__)
    assert members == {"steps", "tolerance", "init", "update"}
    assert all(hasattr(solver, name) for name in members)
    memory = solver.init(lambda z, u: z / 2 + u, jnp.zeros((2, 3)), jnp.ones((2, 3)))
    assert memory.z.shape == memory.fz.shape == (2, 3)
