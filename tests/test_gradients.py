"""The DEQ layer's gradients against finite differences and against each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from deq_jax.gradients import AtState, Implicit, Neumann, Phantom, PhantomUpTo, Unrolled, deq, simultaneous_adjoint
from deq_jax.readouts import EnsembleState, FinalState, IntermediateState, LastState, RandomIntermediateState
from deq_jax.solvers import Anderson, Broyden, FixedPoint, solve
from deq_jax.types import InputError, Keys

BATCH, SIZE = 3, 10
EXACT = Broyden(60, tolerance=1e-14)
IMPLICIT = Implicit(EXACT)


def cell(params, z, u):
    return jnp.tanh(z @ params["w"].T + params["b"] + u)


def problem(dtype=np.float64):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(SIZE, SIZE))
    w *= 0.8 / np.abs(np.linalg.eigvals(w)).max()
    params = {"w": w, "b": rng.normal(size=SIZE)}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, rng.normal(size=(BATCH, SIZE))))


def loss(params, u, solver=EXACT, gradient=IMPLICIT):
    z, _ = deq(cell, params, u, jnp.zeros_like(u), solver=solver, gradient=gradient)
    return jnp.sum(jnp.sin(z) * jnp.arange(1, SIZE + 1))


def gradient_of(gradient, solver=EXACT):
    return jax.jit(jax.grad(lambda params, u: loss(params, u, solver, gradient), argnums=(0, 1)))(*problem())


def relative_errors(got, expected):
    return [
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    ]


def test_implicit_agrees_with_finite_differences(x64):
    check_grads(loss, problem(), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


def test_implicit_agrees_with_backpropagation_through_many_steps(x64):
    unrolled = gradient_of(Unrolled(200), solver=None)
    assert max(relative_errors(gradient_of(IMPLICIT), unrolled)) < 1e-12


@pytest.mark.parametrize("gradient", [Phantom(300, 0.5), Phantom(200, 1.0), Neumann(300, 0.5), Unrolled(200)], ids=repr)
def test_truncations_tend_to_the_exact_gradient(x64, gradient):
    exact = gradient_of(IMPLICIT)
    assert max(relative_errors(gradient_of(gradient), exact)) < 1e-10


def test_longer_truncations_are_closer(x64):
    exact = gradient_of(IMPLICIT)
    for kind in (Phantom, Neumann):
        errors = [max(relative_errors(gradient_of(kind(k, 0.5)), exact)) for k in (2, 8, 32)]
        assert errors[0] > errors[1] > errors[2]


def test_linear_closed_form(x64):
    """For f(z) = A z + u the gradient with respect to u is (I - A)^-T g."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(SIZE, SIZE)) / (2 * SIZE)
    g = rng.normal(size=(1, SIZE))

    def value(u):
        z, _ = deq(lambda a, z, u: z @ a.T + u, a, u, jnp.zeros_like(u), solver=EXACT, gradient=IMPLICIT)
        return jnp.sum(z * g)

    np.testing.assert_allclose(jax.grad(value)(jnp.ones((1, SIZE))), g @ np.linalg.inv(np.eye(SIZE) - a), rtol=1e-10)


def test_neumann_is_the_sum_that_it_claims(x64):
    params, u = problem()
    z = solve(EXACT, cell, params, jnp.zeros_like(u), u).z
    cotangent = jnp.ones_like(z)
    vjp = jax.vjp(lambda z: cell(params, z, u), z)[1]
    term, total = cotangent, cotangent
    for _ in range(8):
        term = 0.5 * term + 0.5 * vjp(term)[0]
        total += term
    np.testing.assert_allclose(Neumann(8, 0.5).adjoint(vjp, cotangent), 0.5 * total, rtol=1e-12)


def test_simultaneous_adjoint_tends_to_the_exact_one(x64):
    """For f(z) = A z + u: u_n^T -> g (I - A)^-1, while z_n -> (I - A)^-1 u."""
    rng = np.random.default_rng(0)
    a, u, g = rng.normal(size=(SIZE, SIZE)), rng.normal(size=(BATCH, SIZE)), rng.normal(size=(BATCH, SIZE))
    a *= 0.8 / np.abs(np.linalg.eigvals(a)).max()
    inverse = np.linalg.inv(np.eye(SIZE) - a)
    run = partial(simultaneous_adjoint, cell=lambda a, z, u: z @ a.T + u, params=jnp.asarray(a), u=jnp.asarray(u))
    states, adjoints = run(Broyden(40, tolerance=0.0), z0=jnp.zeros((BATCH, SIZE)), cotangent=lambda z: jnp.asarray(g))
    errors = np.linalg.norm(adjoints - g @ inverse, axis=(1, 2)) / np.linalg.norm(g @ inverse)
    assert errors[4] > errors[9] > errors[14] > errors[19]
    assert errors[24:].max() < 1e-6
    np.testing.assert_allclose(states[-1], u @ inverse.T, atol=1e-10)


def test_simultaneous_adjoint_shares_the_matrices_of_the_solver(x64):
    """Its states are those of `solve`; ``(w^T B) g`` is ``w^T (B g)``, where -B g is the solver's next step."""
    params, u = problem()
    solver, start = Broyden(6), {"z": jnp.zeros_like(u)}

    def tree_cell(params, z, u):
        return {"z": cell(params, z["z"], u)}

    solution = solve(solver, tree_cell, params, start, u)
    states, adjoints = simultaneous_adjoint(
        solver, tree_cell, params, u, start, lambda z: jax.tree.map(jnp.ones_like, z)
    )
    np.testing.assert_allclose(states["z"], solution.states["z"], rtol=1e-12)
    np.testing.assert_allclose(adjoints["z"][0], 1)  # B_0 = -I
    memory, w = solution.memory, jnp.sin(jnp.arange(float(u.size))).reshape(u.shape)
    products = jnp.sum(solver.left_multiply(memory, w) * (memory.fz - memory.z), axis=1)
    np.testing.assert_allclose(products, -jnp.sum(w * memory.step, axis=1), rtol=1e-10)


@pytest.mark.parametrize("inner", [Phantom(3, 0.5), Implicit(EXACT)], ids=["phantom", "implicit"])
def test_at_state_has_the_value_of_the_state_and_the_gradient_of_the_estimator(x64, inner):
    params, u = problem()
    z = solve(Broyden(3), cell, params, jnp.zeros_like(u), u).z
    np.testing.assert_array_equal(AtState(inner)(cell, params, u, z), z)
    weights = jnp.arange(1.0, SIZE + 1)
    got, expected = (
        jax.grad(lambda params, u, g=g: jnp.sum(weights * g(cell, params, u, z)), argnums=(0, 1))(params, u)
        for g in (AtState(inner), inner)
    )
    assert max(relative_errors(got, expected)) < 1e-12


@pytest.mark.parametrize("steps, damping", [(0, 0.5), (2, 1.0), (4, 0.3)])
def test_phantom_up_to_is_phantom(x64, steps, damping):
    def gradient(estimator):
        return jax.grad(lambda params, u: jnp.sum(jnp.sin(estimator(cell, params, u, jnp.ones_like(u)))), (0, 1))

    traced = jax.jit(lambda steps, damping, *problem: gradient(PhantomUpTo(4, steps, damping))(*problem))
    expected = gradient(Phantom(steps, damping))(*problem())
    assert max(relative_errors(traced(steps, damping, *problem()), expected)) < 1e-12


def test_adjoint_residual_is_exposed(x64):
    params, u = problem()
    z = solve(EXACT, cell, params, jnp.zeros_like(u), u).z
    vjp = jax.vjp(lambda z: cell(params, z, u), z)[1]
    few, many = (Implicit(Broyden(steps)).solve_adjoint(vjp, jnp.ones_like(z)) for steps in (2, 30))
    assert few.residuals.min() > many.residuals.min()
    w = many.z
    expected = jnp.linalg.norm(vjp(w)[0] + 1 - w, axis=1) / jnp.linalg.norm(vjp(w)[0] + 1, axis=1)
    np.testing.assert_allclose(many.residuals.min(axis=0), expected, rtol=1e-6)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Neumann(), Unrolled(3)], ids=repr)
class TestContract:
    def test_jit_vmap_and_float32(self, gradient):
        params, u = problem(np.float32)
        grad = jax.grad(lambda params, u: loss(params, u, Broyden(8), gradient), argnums=(0, 1))
        eager, compiled = grad(params, u), jax.jit(grad)(params, u)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), eager, compiled)
        stacked = jax.vmap(grad, in_axes=(None, 0))(params, jnp.stack([u, 2 * u]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-3), stacked, eager)
        assert eager[1].dtype == jnp.float32

    def test_every_solver_goes_with_it(self, x64, gradient):
        reference = gradient_of(gradient, FixedPoint(200, tolerance=1e-13))
        for solver in (Anderson(60, tolerance=1e-13), EXACT):
            assert max(relative_errors(gradient_of(gradient, solver), reference)) < 1e-6

    def test_value(self, x64, gradient):
        params, u = problem()
        z, solution = deq(cell, params, u, jnp.zeros_like(u), solver=Broyden(3), gradient=gradient)
        expected = cell(params, solution.z, u)
        if isinstance(gradient, Phantom):
            for _ in range(gradient.steps):
                expected = 0.5 * expected + 0.5 * cell(params, expected, u)
        if isinstance(gradient, Unrolled):
            expected = cell(params, cell(params, expected, u), u)
        np.testing.assert_allclose(z, expected, rtol=1e-12)

    def test_nothing_leaks(self, gradient):
        params, u = problem(np.float32)
        with jax.checking_leaks():
            jax.jit(jax.grad(lambda params: loss(params, u, Broyden(3), gradient)))(params)

    def test_no_gradient_to_the_start(self, gradient):
        params, u = problem(np.float32)

        def value(z0):
            return jnp.sum(deq(cell, params, u, z0, solver=Broyden(3), gradient=gradient)[0])

        np.testing.assert_array_equal(jax.grad(value)(jnp.ones_like(u)), 0)


class TestReadouts:
    def solution(self):
        params, u = problem(np.float32)
        return solve(Broyden(6), cell, params, jnp.zeros_like(u), u)

    def test_final_intermediate_last_and_ensemble(self):
        solution = self.solution()
        np.testing.assert_array_equal(FinalState()(solution), solution.z)
        np.testing.assert_array_equal(IntermediateState(4)(solution), solution.states[3])
        np.testing.assert_array_equal(LastState()(solution), solution.states[5])
        np.testing.assert_allclose(EnsembleState()(solution), np.mean(solution.states, axis=0), rtol=1e-5, atol=1e-6)

    def test_intermediate_state_is_within_the_trajectory(self):
        with pytest.raises(InputError, match="at most the solver's 6 steps"):
            IntermediateState(7)(self.solution())
        with pytest.raises(InputError, match="counts from 1"):
            IntermediateState(0)

    def test_random_state_is_deterministic_without_keys(self):
        solution = self.solution()
        np.testing.assert_array_equal(RandomIntermediateState()(solution), solution.z)

    @pytest.mark.parametrize("best_so_far", [True, False])
    def test_random_state_draws_all_states_evenly(self, best_so_far):
        solution = self.solution()._replace(residuals=jnp.arange(6.0)[:, None] * jnp.ones(BATCH))
        readout = RandomIntermediateState(best_so_far=best_so_far)
        draws = jax.vmap(lambda key: readout(solution, Keys.of(key, BATCH)))(jax.random.split(jax.random.key(0), 600))
        match = (draws[:, None] == solution.states).all(axis=-1)  # [draw, state, sample]
        assert match.any(axis=1).all()
        counts = match.all(axis=-1).sum(axis=0)  # one t for the whole batch
        if best_so_far:  # the first state has the lowest residual
            np.testing.assert_array_equal(counts, [600, 0, 0, 0, 0, 0])
        else:
            assert counts.sum() == 600 and counts.min() > 60

    def test_per_sample_draws_differ_within_a_batch_and_follow_the_image(self):
        solution = self.solution()
        readout = RandomIntermediateState(per_sample=True, best_so_far=False)
        keys = Keys(jax.random.key(3), jnp.array([5, 6, 7]))
        whole = readout(solution, keys)
        last = jax.tree.map(lambda leaf: leaf[:, 2:], solution._replace(z=None, evaluations=None, memory=None))
        alone = readout(last, keys._replace(images=jnp.array([7])))
        np.testing.assert_array_equal(whole[2], alone[0])
        draws = jax.vmap(lambda key: readout(solution, Keys.of(key, BATCH)))(jax.random.split(jax.random.key(0), 50))
        match = (draws[:, None] == solution.states).all(axis=-1)
        assert not match.all(axis=-1).any(axis=1).all()
