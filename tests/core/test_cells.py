"""What a cell and its state must be, whatever runs it."""

from dataclasses import replace
from functools import cache

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    Broyden,
    Dynamics,
    EnsembleState,
    Equilibrium,
    Explicit,
    Implicit,
    InputError,
    Keys,
    LastState,
    Phantom,
    Unrolled,
    deq,
    solve,
)
from deq_jax.core import Injection, jacobian_norm, spectral_radius
from deq_jax.evaluation import measure, named
from deq_jax.evaluation.measure import spectral_radii
from tests.helpers import dense
from tests.helpers.cells import GRADIENTS, SOLVER, SOLVERS, P, U, cell, layer

X = jnp.linspace(0, 1, 2 * 16).reshape(2, 4, 4, 1)
Y = jnp.array([0, 1])
KEYS = Keys.of(0, 2)


@cache
def defended():
    defence = dense.defence_of(SOLVER, every=3, steps=1)
    return defence, defence.init(0, X)


# What a cell may not return, or be given.
OTHER_CELLS = {
    "structure": (lambda p, z, u: (z,), r"cell: expected a state of structure .*, as z has, got"),
    "shape": (lambda p, z, u: z[:, :2], r"cell: f\(z\): expected shape \(2, 3\), as z has, got \(2, 2\)"),
    "batch": (lambda p, z, u: z[:1], r"cell: f\(z\): expected shape \(2, 3\), as z has, got \(1, 3\)"),
    "integers": (lambda p, z, u: jnp.round(z).astype(int), r"cell: f\(z\): expected a floating dtype, got int32"),
    "complex": (lambda p, z, u: z + 1j, r"cell: f\(z\): expected a floating dtype, got complex64"),
}
OTHER_STATES = {
    "integers": (jnp.zeros((2, 3), int), "state: expected a floating dtype, got int32"),
    "scalar": ({"a": U, "b": jnp.array(0.0)}, r"state\['b'\]: expected a batch axis, got a scalar"),
    "batches": ((U, U[:1]), "state leaves need one common batch size"),
    "nothing": ((), "state: expected floating arrays"),
}
OTHER_INJECTIONS = {
    "batch": (U[:1], r"injection: expected a batch of 2, as the state is, got shape \(1, 3\)"),
    "scalar": ({"a": jnp.array(1.0)}, r"injection\['a'\]: expected a batch of 2, as the state is, got shape \(\)"),
}


def runs():
    """``(cell, params, u, z) -> anything`` by every function that applies a cell."""
    yield "deq", lambda f, p, u, z: deq(f, p, u, z, solver=SOLVER, gradient=Phantom())
    yield "deq without a solver", lambda f, p, u, z: deq(f, p, u, z, solver=None, gradient=Unrolled(2))
    for solver in SOLVERS[:3]:
        yield f"solve {type(solver).__name__}", lambda f, p, u, z, s=solver: solve(s, f, p, z, u)
    for gradient in GRADIENTS:
        yield type(gradient).__name__, lambda f, p, u, z, g=gradient: g(f, p, u, z)
    yield "jacobian_norm", lambda f, p, u, z: jacobian_norm(f, p, u, z, jax.tree.map(lambda leaf: leaf[None], z))
    yield "spectral_radius", lambda f, p, u, z: spectral_radius(f, p, u, z, z, 2)


RUNS = pytest.mark.parametrize("run", [run for _, run in runs()], ids=[name for name, _ in runs()])


@RUNS
class TestRefused:
    @pytest.mark.parametrize("kind", OTHER_CELLS)
    def test_cells(self, run, kind):
        f, message = OTHER_CELLS[kind]
        self.refuses(message, lambda: run(f, P, U, jnp.zeros_like(U)))

    @pytest.mark.parametrize("kind", OTHER_INJECTIONS)
    def test_injections(self, run, kind):
        u, message = OTHER_INJECTIONS[kind]
        self.refuses(message, lambda: run(lambda p, z, u: z, P, u, jnp.zeros_like(U)))

    @staticmethod
    def refuses(message, call):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", OTHER_STATES)
def test_other_states_are_refused(kind):
    z0, message = OTHER_STATES[kind]

    def identity(p, z, u):
        return z

    for call in (
        lambda: deq(identity, P, U, z0, solver=SOLVER, gradient=Phantom()),
        lambda: deq(identity, P, U, z0, solver=None, gradient=Unrolled(1)),
        lambda: solve(SOLVER, identity, P, z0, U),
        lambda: Implicit()(identity, P, U, z0),
    ):
        with pytest.raises(InputError, match=message):
            call()


class TestDtypes:
    @pytest.mark.slow
    @pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: type(g).__name__)
    @pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
    def test_a_cell_may_compute_in_half_precision(self, solver, gradient):

        def half(p, z, u):
            return cell(p, z, u).astype(jnp.bfloat16)

        def loss(p, u, f=cell):
            return jnp.sum(layer(p, u, f=f, solver=solver, gradient=gradient) ** 2)

        got, expected = (jax.grad(lambda p, u, f=f: loss(p, u, f), argnums=(0, 1))(P, U) for f in (half, cell))
        assert layer(f=half, solver=solver, gradient=gradient).dtype == jnp.float32
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())

    @pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: type(g).__name__)
    def test_leaves_keep_their_own(self, gradient):
        z0 = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 2), jnp.bfloat16)}

        def mixed(p, z, u):
            return {"a": jnp.tanh(z["a"] @ p + u), "b": 0.5 * z["b"] + z["a"][:, :2]}

        z, solution = deq(mixed, P, U, z0, solver=Broyden(8), gradient=gradient)
        kinds = jax.tree.map(lambda leaf: leaf.dtype, z0)
        for tree in (z, solution.z, solution.states):
            assert jax.tree.map(lambda leaf: leaf.dtype, tree) == kinds
        np.testing.assert_allclose(solution.z["a"], solve(Broyden(8), cell, P, jnp.zeros_like(U), U).z, atol=1e-2)
        np.testing.assert_allclose(solution.z["b"].astype(float), 2 * solution.z["a"][:, :2], atol=2e-2)
        gradient_of_params = jax.grad(lambda p: jnp.sum(deq(mixed, p, U, z0, solver=SOLVER, gradient=gradient)[0]["a"]))
        assert np.isfinite(gradient_of_params(P)).all()

    def test_compute_dtype_leaves_integers_alone(self):
        class Encoder(nn.Module):
            @nn.compact
            def __call__(self, x, train=False, keys=None, axis_name=None):
                return Injection(nn.Dense(4)(x.reshape(len(x), -1)), jnp.full((len(x), 1), 257))

        class Cell(nn.Module):
            @nn.compact
            def __call__(self, z, u):
                assert u.masks.dtype == jnp.int32
                assert self.is_initializing() or z.dtype == jnp.bfloat16
                return nn.Dense(4)(z) + nn.Embed(300, 4)(u.masks[:, 0])

        dynamics = Dynamics(SOLVER, gradient=Implicit(Broyden(3)), compute_dtype=jnp.bfloat16)
        model = Equilibrium(Encoder(), Cell(), dense.Decoder(), dynamics)
        prediction = model(model.init(0, X), X)
        assert prediction.solution.z.dtype == prediction.logits.dtype == jnp.float32


class TestEmptyBatches:
    @RUNS
    def test_runs(self, run):
        def flat(p, z, u):
            return cell(p, z.reshape(len(z), -1), u)  # which does not reshape an empty batch

        found = run(flat, P, U[:0], jnp.zeros((0, 3)))
        assert all(0 in leaf.shape for leaf in jax.tree.leaves(found) if leaf.ndim)

    @pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: type(g).__name__)
    def test_gradients_are_zero(self, gradient):
        found = jax.grad(lambda p: jnp.sum(layer(p, U[:0], jnp.zeros((0, 3)), gradient=gradient)))(P)
        np.testing.assert_array_equal(found, 0)

    @pytest.mark.parametrize("train", [False, True])
    def test_classifiers(self, train):
        defence, variables = defended()
        network = Explicit(dense.Net("all"))
        cases = [(defence.base, variables), (network, network.init(0, X))]
        if not train:
            cases += [(defence, variables), (replace(defence, readout=EnsembleState()), variables)]
        for classifier, variables in cases:
            prediction = classifier(variables, X[:0], train=train, keys=Keys.of(0, 0))
            assert prediction.logits.shape == (0, prediction.logits.shape[1])
            chex.assert_trees_all_equal(prediction.batch_stats, variables["batch_stats"])
            if prediction.solution is not None:
                assert prediction.solution.residuals.shape == (3, 0)

    def test_init(self):
        for classifier in (defended()[0], Explicit(dense.Net())):
            chex.assert_trees_all_equal(classifier.init(0, X[:0]), classifier.init(0, X[:1]))


def test_without_a_solver_there_are_no_states_to_read():
    solution = solve(None, cell, P, jnp.zeros_like(U), U)
    assert solution.residuals.shape == (0, 2)
    for readout in (LastState(), EnsembleState()):
        with pytest.raises(InputError, match="got none"):
            readout(solution)


def test_a_deq_without_a_solver_is_measured_as_it_is_deployed():
    model = replace(defended()[0].base, dynamics=Dynamics(None, gradient=Unrolled(2)))
    measured = measure(model, defended()[1], X, Y)
    assert list(named(measured)) == ["deployed"] and measured.deployed.label.shape == (2,)
    assert np.isnan(measured.deployed.residual).all() and np.isfinite(measured.deployed.margin).all()
    assert np.isnan(spectral_radii(model, defended()[1], X, KEYS).radius).all()
