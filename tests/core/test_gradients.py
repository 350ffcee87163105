"""The DEQ layer's gradients against finite differences and against each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from deq_jax import (
    Anderson,
    Backprop,
    Broyden,
    EnsembleState,
    FinalState,
    FixedPoint,
    Implicit,
    InputError,
    IntermediateState,
    Keys,
    LastState,
    Neumann,
    Phantom,
    RandomIntermediateState,
    Unrolled,
    deq,
    solve,
)
from deq_jax.core import AtState, PhantomUpTo, adjoint_residual
from deq_jax.surrogates import simultaneous_adjoint
from tests.helpers import tiny
from tests.helpers.cases import mostly_slow

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


@pytest.mark.slow
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


def test_backprop_is_the_derivative_of_what_is_computed(x64):
    """Three steps are far from the equilibrium: the exact gradient there is another one."""
    few = Broyden(3, tolerance=0)
    got = gradient_of(Backprop(), few)
    check_grads(lambda params, u: loss(params, u, few, Backprop()), problem(), order=1, modes=["rev"], rtol=1e-5)
    assert max(relative_errors(gradient_of(IMPLICIT, few), got)) > 0.01


@pytest.mark.parametrize("then", [Phantom(2, 0.5), Unrolled(2), Implicit(), Neumann(), AtState(Phantom(2))])
def test_backprop_has_the_value_of_the_estimator_it_wraps(x64, then):
    few = Broyden(3, tolerance=0)
    np.testing.assert_allclose(loss(*problem(), few, Backprop(then)), loss(*problem(), few, then), rtol=1e-12)


@pytest.mark.parametrize("then", [Phantom(2, 0.5), IMPLICIT, AtState(Phantom(2))])
def test_backprop_at_a_constant_state_is_the_estimator_it_wraps(x64, then):
    """As input entropy reduction calls it, which solves by itself."""
    params, u = problem()
    z = solve(EXACT, cell, params, jnp.zeros_like(u), u).z

    def derivative(gradient):
        return jax.grad(lambda params, u: jnp.sum(jnp.sin(gradient(cell, params, u, z))), (0, 1))(params, u)

    jax.tree.map(np.testing.assert_array_equal, derivative(Backprop(then)), derivative(then))


def test_backprop_needs_a_solver_and_no_second_backprop():
    with pytest.raises(InputError, match="got solver=None; expected Unrolled"):
        loss(*problem(np.float32), None, Backprop())
    with pytest.raises(InputError, match="then must be another estimator"):
        Backprop(Backprop())
    with pytest.raises(InputError, match=r"got Backprop; Backprop\(AtState\(...\)\) is"):
        AtState(Backprop())


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
    states, adjoints = run(
        Broyden(40, tolerance=1e-13), z0=jnp.zeros((BATCH, SIZE)), cotangent=lambda z: jnp.asarray(g)
    )
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
    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_nothing_leaks(self, gradient):
        params, u = problem(np.float32)
        with jax.checking_leaks():
            jax.jit(jax.grad(lambda params: loss(params, u, Broyden(3), gradient)))(params)

    def test_no_gradient_to_the_start(self, gradient):
        params, u = problem(np.float32)

        def value(z0):
            return jnp.sum(deq(cell, params, u, z0, solver=Broyden(3), gradient=gradient)[0])

        np.testing.assert_array_equal(jax.grad(value)(jnp.ones_like(u)), 0)


SMOOTH = [
    pytest.param(IMPLICIT, id="Broyden"),
    pytest.param(Implicit(FixedPoint(300, tolerance=0.0)), id="FixedPoint", marks=pytest.mark.slow),
    pytest.param(Implicit(Anderson(100, tolerance=0.0)), id="Anderson", marks=pytest.mark.slow),
    pytest.param(Neumann(300, 1.0), id="Neumann"),
    pytest.param(AtState(IMPLICIT), id="AtState", marks=pytest.mark.slow),
]


class TestHigherDerivatives:
    @pytest.mark.parametrize("gradient", SMOOTH)
    def test_closed_form(self, x64, gradient):
        """z = a tanh(z) + x: z' = 1 / (1 - a s), z'' = -2 a s t z'^3, with t = tanh z, s = 1 - t^2."""

        def z(x, gradient=gradient):
            start = jnp.zeros((1, 1))

            def scalar_cell(p, z, u):
                return 0.5 * jnp.tanh(z) + u

            solver = FixedPoint(200, tolerance=0.0)
            return deq(scalar_cell, None, jnp.full((1, 1), x), start, solver=solver, gradient=gradient)[0][0, 0]

        first, second, third = jax.grad(z), jax.grad(jax.grad(z)), jax.grad(jax.grad(jax.grad(z)))
        derivatives = jax.jit(lambda x: (z(x), first(x), second(x), third(x), jax.jacrev(jax.jacrev(z))(x)))(0.7)
        t = np.tanh(derivatives[0])
        slope = 1 / (1 - 0.5 * (1 - t**2))
        expected = -(1 - t**2) * t * slope**3
        assert expected == pytest.approx(-0.520393, abs=1e-6)
        np.testing.assert_allclose(derivatives[1], slope, rtol=1e-10)
        np.testing.assert_allclose([derivatives[2], derivatives[4]], expected, rtol=1e-10)
        unrolled = jax.jit(jax.grad(jax.grad(jax.grad(partial(z, gradient=Phantom(200, 1.0))))))(0.7)
        np.testing.assert_allclose(derivatives[3], unrolled, rtol=1e-9)

    @pytest.mark.parametrize("gradient", SMOOTH)
    def test_gradient_of_a_gradient_penalty(self, x64, gradient):
        """Penalised are the gradients for the input x of the injection, and for the parameters."""

        def penalised(params, x, gradient):
            def total(params, x):
                return loss(params, jnp.sin(2 * x), gradient=gradient)

            of_params, of_x = jax.grad(total, argnums=(0, 1))(params, x)
            return sum(jnp.sum(leaf**2) for leaf in (of_x, of_params["b"])) + jnp.sum(of_params["w"] ** 3)

        run = jax.jit(jax.grad(penalised, argnums=(0, 1)), static_argnums=2)
        got, expected = run(*problem(), gradient), run(*problem(), Unrolled(200))
        assert max(relative_errors(got, expected)) < 1e-8

    @pytest.mark.parametrize("gradient", [Implicit(), Neumann(), AtState(Implicit()), Phantom(200, 1.0)], ids=repr)
    def test_forward_mode_is_refused_or_right(self, x64, gradient):
        """A hessian of 0 would be worse than none; `Phantom` has forward mode."""

        def z(x):
            scalar_cell, start = lambda p, z, u: 0.5 * jnp.tanh(z) + u, jnp.zeros((1, 1))
            solver = FixedPoint(200, tolerance=0.0)
            return deq(scalar_cell, None, jnp.full((1, 1), x), start, solver=solver, gradient=gradient)[0][0, 0]

        if isinstance(gradient, Phantom):
            for second in (jax.hessian(z), jax.jacrev(jax.jacrev(z))):
                assert float(second(0.7)) == pytest.approx(-0.520393)
            return
        for derivative in (jax.jacfwd(z), jax.hessian(z), jax.jit(jax.hessian(z))):
            with pytest.raises(TypeError, match=r"forward-mode .* custom_vjp"):
                derivative(0.7)

    def test_finite_differences(self, x64):
        def penalty(params, u):
            return jnp.sum(jax.grad(loss, argnums=1)(params, u) ** 2)

        check_grads(penalty, problem(), order=1, modes=("rev",), atol=1e-4, rtol=1e-4)

    @pytest.mark.slow
    def test_of_a_convolutional_cell(self, x64):
        """Its convolution has a derivative rule of its own."""
        classifier = tiny.classifier(dropout=0.0)
        x = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 4, 4, 1)))
        variables = jax.tree.map(lambda leaf: 0.5 * leaf.astype(float), classifier.init(jax.random.key(0), x))
        u, params = classifier.encode(variables, x), variables["params"]["cell"]

        def penalty(params, u, gradient):
            def total(u):
                start = jnp.zeros_like(u.features)
                z, _ = deq(classifier.apply_cell, params, u, start, solver=EXACT, gradient=gradient)
                return jnp.sum(jnp.sin(z) * jnp.arange(z.size).reshape(z.shape))

            return jnp.sum(jax.grad(total)(u).features ** 2)

        run = jax.jit(jax.grad(penalty, argnums=(0, 1)), static_argnums=2)
        got, expected = run(params, u, IMPLICIT), run(params, u, Unrolled(400))
        assert max(relative_errors(got, expected)) < 1e-6

    def test_first_derivatives_cost_what_they_did(self):
        """One loop for the state and one for its adjoint; the cell three times beside them, and in no other loop."""
        gradient = Implicit(FixedPoint(20))
        run = jax.jit(jax.grad(lambda params, u: loss(params, u, FixedPoint(20), gradient), argnums=(0, 1)))
        text = run.lower(*problem(np.float32)).compile().as_text()
        assert text.count(" while(") == 2


SCALE_FREE = [
    *(Implicit(solver) for solver in (FixedPoint(60), Anderson(30), Broyden(30), Broyden(30, history_size=4))),
    Implicit(),
    Neumann(20, 0.7),
    Phantom(),
    Unrolled(5),
    AtState(Implicit(Anderson(20))),
    AtState(Phantom()),
]


@pytest.mark.parametrize("gradient", mostly_slow(SCALE_FREE, 1, 2, 5, 6), ids=repr)
def test_the_gradient_of_a_scaled_loss_is_the_scaled_gradient(gradient):
    """Also of each sample of a batch by its own scale."""
    params, u = problem(np.float32)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=u.shape), jnp.float32)

    @jax.jit
    def of_scaled(scale):
        def total(params, u):
            z, _ = deq(cell, params, u, jnp.zeros_like(u), solver=Broyden(20), gradient=gradient)
            return jnp.sum(scale * weights * z)

        return jax.grad(total, argnums=(0, 1))(params, u)

    expected = of_scaled(jnp.ones((BATCH, 1)))
    for scale in (1e-30, 1e-20, 1e-12, 1e-3, 1e3, 1e20, 1e30):
        got = jax.tree.map(lambda leaf, scale=scale: leaf / np.float32(scale), of_scaled(jnp.full((BATCH, 1), scale)))
        assert max(relative_errors(got, expected)) < 1e-5
    mixed = jnp.array([[1e-30], [1.0], [1e30]])
    assert max(relative_errors(of_scaled(mixed)[1] / mixed, expected[1])) < 1e-5


def test_simultaneous_adjoint_of_a_scaled_loss():
    params, u = problem(np.float32)
    run = jax.jit(
        lambda scale: simultaneous_adjoint(
            Broyden(20), cell, params, u, jnp.zeros_like(u), lambda z: scale * jnp.ones_like(z)
        )[1]
    )
    expected = run(1.0)
    for scale in (1e-30, 1e30):
        np.testing.assert_allclose(run(scale) / np.float32(scale), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gradient", [IMPLICIT, Implicit(Anderson(20)), Neumann()], ids=repr)
def test_cotangents_that_are_zero_or_not_finite_stay_so(gradient):
    params, u = problem(np.float32)

    def of_factor(factor):
        weights = jnp.array([[1.0], [factor], [1.0]])

        def total(u):
            return jnp.sum(weights * gradient(cell, params, u, jnp.ones_like(u)))

        return jax.grad(total)(u)

    ordinary = of_factor(1.0)
    np.testing.assert_array_equal(of_factor(0.0)[1], 0)
    for factor in (np.nan, np.inf):
        got = of_factor(factor)
        assert not np.isfinite(got[1]).any()
        np.testing.assert_array_equal(got[0::2], ordinary[0::2])


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_adjoint_residual(scale):
    params, u = problem(np.float32)
    z = solve(Broyden(30), cell, params, jnp.zeros_like(u), u).z
    cotangent = scale * jnp.ones_like(z).at[2].set(0)
    run = partial(adjoint_residual, cell=cell, params=params, u=u, z=z, cotangent=cotangent)
    vjp = jax.vjp(lambda z: cell(params, z, u), z)[1]
    for gradient in (Implicit(Broyden(2)), Implicit(Broyden(20)), Neumann(4), Neumann(60, 1.0)):
        w = np.asarray(gradient.adjoint(vjp, cotangent / scale)[:2], np.float64)
        following = np.asarray(vjp(gradient.adjoint(vjp, cotangent / scale))[0][:2], np.float64) + 1
        expected = np.linalg.norm(following - w, axis=1) / np.linalg.norm(w, axis=1)
        found = run(gradient)
        np.testing.assert_allclose(found[:2], expected, rtol=1e-2, atol=1e-6)
        assert found[2] == 0
        np.testing.assert_array_equal(run(AtState(gradient)), found)
    assert run(Implicit(Broyden(2)))[:2].min() > 1e-2 > 1e-3 > run(Implicit(Broyden(20))).max()
    with pytest.raises(InputError, match="expected Implicit or Neumann"):
        run(AtState(Phantom()))


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

    def test_one_state_is_enough(self):
        params, u = problem(np.float32)
        solution = solve(Broyden(1), cell, params, jnp.zeros_like(u), u)
        for readout in (IntermediateState(1), LastState(), EnsembleState()):
            np.testing.assert_array_equal(readout(solution), solution.states[0])

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
