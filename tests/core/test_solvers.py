"""Solvers against closed forms, against jaxopt, and one contract for all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Broyden, FixedPoint, InputError, solve
from deq_jax.core.solvers import jaxopt

BATCH, SIZE = 4, 12
SOLVERS = [
    FixedPoint(40),
    FixedPoint(40, damping=0.7),
    Anderson(30),
    Broyden(20),
    Broyden(20, history_size=5),
]


def linear_cell(params, z, u):
    return z @ params.T + u


def tanh_cell(params, z, u):
    return jnp.tanh(z @ params.T + u)


def problem(radius=0.5, dtype=np.float64):
    """A matrix of the given spectral radius, injections, and the fixed points of the linear cell."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(SIZE, SIZE))
    matrix *= radius / np.abs(np.linalg.eigvals(matrix)).max()
    u = rng.normal(size=(BATCH, SIZE)) * np.array([[0.1], [1], [3], [10]])
    fixed_points = np.linalg.solve(np.eye(SIZE) - matrix, u.T).T
    return jnp.asarray(matrix, dtype), jnp.asarray(u, dtype), fixed_points


@partial(jax.jit, static_argnums=(0, 1))
def solve_from_zero(solver, cell, matrix, u):
    return solve(solver, cell, matrix, jnp.zeros_like(u), u)


def run(solver, cell=tanh_cell, radius=0.5, dtype=np.float32):
    matrix, u, _ = problem(radius, dtype)
    return solve_from_zero(solver, cell, matrix, u)


@pytest.mark.parametrize(
    "solver",
    [FixedPoint(100), FixedPoint(100, damping=0.7), Anderson(200), Broyden(40)],
    ids=lambda s: type(s).__name__,
)
def test_closed_form(x64, solver):
    matrix, u, fixed_points = problem()
    exact = type(solver)(**{**vars(solver), "tolerance": 1e-13})
    solution = solve(exact, linear_cell, matrix, jnp.zeros_like(u), u)
    np.testing.assert_allclose(solution.z, fixed_points, rtol=1e-6, atol=1e-6)
    assert np.isfinite(solution.states).all()


def test_broyden_iterates_are_those_of_jaxopt(x64):
    matrix, u, _ = problem(0.9)

    def reference(u):
        solver = jaxopt.Broyden(lambda z: tanh_cell(matrix, z, u) - z, gamma=-1.0, stepsize=1.0, history_size=8)
        z, states = jnp.zeros(SIZE), []
        state = solver.init_state(z)
        for _ in range(8):
            z, state = solver.update(z, state)
            states.append(z)
        return jnp.stack(states)

    solution = solve(Broyden(8, tolerance=0.0), tanh_cell, matrix, jnp.zeros_like(u), u)
    np.testing.assert_allclose(solution.states, jax.vmap(reference, out_axes=1)(u), atol=1e-13)


def test_broyden_with_a_short_memory(x64):
    """As long as no pair has left, the iterates are the same; later ones still converge."""
    matrix, u, fixed_points = problem()
    whole, short = (
        solve(Broyden(60, history_size=size, tolerance=1e-12), linear_cell, matrix, jnp.zeros_like(u), u)
        for size in (None, 4)
    )
    assert short.memory.steps.shape[0] == 5
    np.testing.assert_allclose(short.states[:5], whole.states[:5], rtol=1e-12)
    assert not np.allclose(short.states[6], whole.states[6])
    np.testing.assert_allclose(short.z, fixed_points, rtol=1e-6, atol=1e-6)


def test_broyden_pairs_in_half_precision():
    matrix, u, fixed_points = problem(dtype=np.float32)
    solver = Broyden(30, history_dtype=jnp.bfloat16, tolerance=1e-5)
    solution = solve_from_zero(solver, linear_cell, matrix, u)
    assert solution.memory.steps.dtype == jnp.bfloat16 and solution.z.dtype == jnp.float32
    np.testing.assert_allclose(solution.z, fixed_points, rtol=1e-2, atol=1e-3)


def test_broyden_memory_is_the_inverse_jacobian_and_satisfies_the_secant_equation(x64):
    matrix, u, _ = problem()
    solver = Broyden(3, history_size=8, tolerance=0.0)
    before = solve(solver, linear_cell, matrix, jnp.zeros_like(u), u).memory
    after = solve(Broyden(1, history_size=8, tolerance=0.0), linear_cell, matrix, u, u, memory=before).memory
    dz, g, dg = after.z - before.z, after.fz - after.z, (after.fz - after.z) - (before.fz - before.z)
    np.testing.assert_allclose(solver.multiply(after, dg), dz, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(after.step, -solver.multiply(after, g), atol=1e-12)
    left = jnp.sum(solver.left_multiply(after, u) * g, axis=1)
    np.testing.assert_allclose(left, jnp.sum(u * solver.multiply(after, g), axis=1), rtol=1e-10)


def test_anderson_is_the_bordered_least_squares_combination(x64):
    matrix, u, _ = problem(0.9)
    solver = Anderson(6, history_size=3, ridge=1e-4, tolerance=0.0, absolute_ridge=True)
    states = solve(solver, tanh_cell, matrix, jnp.zeros_like(u), u).states
    expected = [np.zeros_like(u)]
    for k in range(1, 7):
        pairs = expected[-min(k, 3) :]
        images = [np.asarray(tanh_cell(matrix, z, u)) for z in pairs]
        residuals = np.stack([f - z for f, z in zip(images, pairs, strict=True)], axis=1)
        n = len(pairs)
        system = np.zeros((BATCH, n + 1, n + 1))
        system[:, 0, 1:] = system[:, 1:, 0] = 1
        system[:, 1:, 1:] = residuals @ residuals.swapaxes(1, 2) + 1e-4 * np.eye(n)
        right = np.zeros((BATCH, n + 1, 1))
        right[:, 0] = 1
        alpha = np.linalg.solve(system, right)[:, 1:]
        expected.append(np.sum(alpha * np.stack(images, axis=1), axis=1))
    np.testing.assert_allclose(states, np.stack(expected[1:]), rtol=1e-8, atol=1e-10)


def test_damped_iteration():
    solution = run(FixedPoint(3, damping=0.7), linear_cell)
    matrix, u, _ = problem(0.5, np.float32)
    z = jnp.zeros_like(u)
    for state in solution.states:
        z = 0.3 * z + 0.7 * linear_cell(matrix, z, u)
        np.testing.assert_allclose(state, z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
class TestContract:
    def test_what_is_reported_is_true(self, solver):
        solution = run(solver)
        matrix, u, _ = problem(0.5, np.float32)
        for state, reported in zip(solution.states, solution.residuals, strict=True):
            f = tanh_cell(matrix, state, u)
            residual = jnp.linalg.norm(f - state, axis=1) / jnp.linalg.norm(f, axis=1)
            np.testing.assert_allclose(reported, residual, rtol=1e-2, atol=1e-6)
        lowest = np.argmin(solution.residuals, axis=0)
        np.testing.assert_array_equal(solution.z, np.asarray(solution.states)[lowest, np.arange(BATCH)])

    def test_a_converged_sample_stays_and_costs_nothing(self, solver):
        solution = run(solver)
        converged = np.asarray(solution.residuals) < solver.tolerance
        assert converged[-1].all()
        first = converged.argmax(axis=0)
        np.testing.assert_array_equal(solution.evaluations, first + 2)  # one at the start, one per step
        for sample, step in enumerate(first):
            tail = np.asarray(solution.states)[step:, sample]
            np.testing.assert_array_equal(tail, np.broadcast_to(tail[0], tail.shape))

    def test_samples_are_independent(self, x64, solver):
        matrix, u, _ = problem(0.7)  # a harder one amplifies rounding before it converges
        whole = solve_from_zero(solver, tanh_cell, matrix, u)
        for i in range(BATCH):
            single = solve_from_zero(solver, tanh_cell, matrix, u[i : i + 1])
            # Anderson's small systems, of condition 1 / ridge, amplify the rounding of sums in another order.
            atol = 1e-11 if isinstance(solver, Anderson) else 1e-13
            np.testing.assert_allclose(whole.states[:, i], single.states[:, 0], rtol=1e-11, atol=atol)
            np.testing.assert_array_equal(whole.evaluations[i], single.evaluations[0])

    def test_samples_are_independent_in_float32(self, solver):
        matrix, u, _ = problem(0.5, np.float32)
        whole = solve_from_zero(solver, tanh_cell, matrix, u).z
        for i in range(BATCH):
            single = solve_from_zero(solver, tanh_cell, matrix, u[i : i + 1]).z
            np.testing.assert_allclose(whole[i], single[0], rtol=1e-5, atol=1e-5)

    def test_keeps_single_precision_where_double_is_enabled(self, x64, solver):
        matrix, u, _ = problem(0.5, np.float32)
        solution = solve_from_zero(solver, tanh_cell, matrix, u)
        assert solution.z.dtype == solution.residuals.dtype == jnp.float32
        assert (solution.residuals[-1] < solver.tolerance).all()

    def test_resumes_where_it_stopped(self, solver):
        matrix, u, _ = problem(0.9, np.float32)
        z0 = jnp.zeros_like(u)
        size = {"history_size": solver.history_size or solver.steps} if isinstance(solver, Broyden) else {}
        part = type(solver)(**{**vars(solver), **size, "steps": 3})
        whole = solve(type(solver)(**{**vars(solver), **size, "steps": 6}), tanh_cell, matrix, z0, u)
        first = solve(part, tanh_cell, matrix, z0, u)
        second = solve(part, tanh_cell, matrix, z0, u, memory=first.memory)
        resumed = np.concatenate([first.states, second.states])
        np.testing.assert_array_equal(whole.states, resumed)
        np.testing.assert_array_equal(whole.evaluations, first.evaluations + second.evaluations)

    def test_finite_past_exact_convergence(self, solver):
        exact = type(solver)(**{**vars(solver), "tolerance": 0.0, "steps": 60})
        solution = run(exact, linear_cell, radius=0.1)
        assert np.isfinite(solution.states).all() and np.isfinite(solution.residuals).all()
        assert np.max(solution.residuals[-1]) < 1e-5

    def test_starting_at_the_fixed_point(self, solver):
        matrix, u, fixed_points = problem(0.5, np.float32)
        start = jnp.asarray(fixed_points, jnp.float32)
        solution = solve(solver, linear_cell, matrix, start, u)
        np.testing.assert_allclose(solution.z, start, rtol=1e-5)
        np.testing.assert_array_equal(solution.evaluations, 1)

    def test_pytree_states_and_vmap_and_jit(self, solver):
        matrix, u, _ = problem(0.5, np.float32)

        def split(z):
            return {"a": z[:, :5].reshape(-1, 5, 1), "b": z[:, 5:]}

        def joined(z):
            return jnp.concatenate([z["a"].reshape(-1, 5), z["b"]], axis=1)

        def cell(params, z, u):
            return split(tanh_cell(params, joined(z), joined(u)))

        plain = solve_from_zero(solver, tanh_cell, matrix, u)
        nested = jax.jit(lambda u: solve(solver, cell, matrix, split(jnp.zeros_like(u)), split(u)))(u)
        np.testing.assert_allclose(joined(nested.z), plain.z, rtol=1e-4, atol=1e-5)
        assert nested.states["a"].shape == (solver.steps, BATCH, 5, 1)
        over_params = jax.vmap(lambda matrix: solve(solver, tanh_cell, matrix, jnp.zeros_like(u), u).z)
        both = over_params(jnp.stack([matrix, matrix / 2]))
        np.testing.assert_allclose(both[0], plain.z, rtol=1e-4, atol=1e-5)


def test_batch_joint_judges_by_the_norm_of_the_batch():
    solution = run(Broyden(8, batch_joint=True))
    matrix, u, _ = problem(0.5, np.float32)
    f = tanh_cell(matrix, solution.states[3], u)
    joint = jnp.linalg.norm(f - solution.states[3]) / jnp.linalg.norm(f)
    np.testing.assert_allclose(solution.residuals[3], joint, rtol=1e-4)
    assert len(np.unique(solution.residuals[0])) == 1
    step = int(np.argmin(solution.residuals[:, 0]))
    np.testing.assert_array_equal(solution.z, solution.states[step])


def test_divergence_is_data_and_leaves_other_samples_alone():
    matrix, u, _ = problem(0.5, np.float32)

    def cell(params, z, u):
        return linear_cell(params, z, u) + jnp.where(u[:, :1] > 1e5, jnp.inf, 0)

    bad = u.at[2].set(1e6)
    solution = solve(Broyden(20), cell, matrix, jnp.zeros_like(u), bad)
    assert np.isnan(solution.residuals[:, 2]).all()
    np.testing.assert_array_equal(solution.z[2], 0)
    good = solve(Broyden(20), cell, matrix, jnp.zeros_like(u), u)
    np.testing.assert_allclose(solution.z[3], good.z[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("growth", [1.5, 2.0, -1.9, 10.0])
@pytest.mark.parametrize("joint", [False, True])
def test_divergence_is_never_called_convergence(growth, joint):
    """The square of a state that has grown 2e19 times leaves float32 before the square of its last change does."""
    u = jnp.array([[1.0], [1e-3]])
    solver = FixedPoint(250, batch_joint=joint)
    solution = solve(solver, lambda p, z, u: growth * z + u, None, jnp.zeros_like(u), u)
    changes = growth ** np.arange(251.0)  # f(z_t) - z_t = growth^t u
    values = np.cumsum(changes)[1:]  # f(z_t) / u
    expected, known = np.abs(changes[1:] / values), np.abs(values) < 1e37
    assert 30 < known.sum() < 250
    np.testing.assert_allclose(solution.residuals[known], np.stack([expected, expected], 1)[known], rtol=1e-4)
    assert not (solution.residuals < 0.05).any()
    np.testing.assert_array_equal(solution.evaluations, 251)


def test_an_equilibrium_far_larger_than_the_first_state_is_found():
    """tanh(3 z) + u leaves 0, and u tells how slowly; it ends near 0.995."""
    u = jnp.array([[1e-25], [1e-10], [1e-3]])
    solution = solve(FixedPoint(200), lambda p, z, u: jnp.tanh(3 * z) + u, None, jnp.zeros_like(u), u)
    np.testing.assert_allclose(solution.z, 0.995, atol=1e-3)
    assert np.isfinite(solution.residuals).all() and (solution.residuals[-1] < 1e-3).all()


def test_no_solver_is_the_start():
    u = jnp.ones((2, 3))
    solution = solve(None, tanh_cell, jnp.eye(3), u, u)
    assert solution.residuals.shape == (0, 2)
    np.testing.assert_array_equal(solution.z, u)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedPoint(0),
        lambda: FixedPoint(2.0),
        lambda: FixedPoint(2, damping=0.0),
        lambda: Broyden(-1),
        lambda: Broyden(2, tolerance=-1),
        lambda: Broyden(2, history_size=0),
        lambda: Anderson(3, history_size=1),
        lambda: Anderson(3, ridge=0.0),
        lambda: Anderson(3, beta=2.0),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(InputError, match="must be"):
        make()


def test_solvers_are_values():
    assert Broyden(8) == Broyden(8) != Broyden(9)
    assert hash(Anderson(3)) == hash(Anderson(3))
    assert eval(repr(Broyden(8))) == Broyden(8)


@pytest.mark.slow
def test_an_anderson_step_is_that_of_jaxopt(x64):
    matrix, u, _ = problem(0.9)
    solver = Anderson(4, history_size=3, ridge=1e-4, beta=0.8, tolerance=0.0, absolute_ridge=True)
    memory = solve(solver, tanh_cell, matrix, jnp.zeros_like(u), u).memory
    following = solver.update(lambda z, u: tanh_cell(matrix, z, u), memory, u, jnp.ones(BATCH, bool))

    def reference(targets, residuals, gram, z, u):
        acceleration = jaxopt.AndersonAcceleration(
            lambda z: tanh_cell(matrix, z, u), history_size=3, ridge=1e-4, beta=0.8
        )
        state = acceleration.init_state(z)._replace(
            iter_num=3, params_history=targets - 0.8 * residuals, residuals_history=residuals, residual_gram=gram
        )
        return acceleration.update(z, state)[0]

    axes = (1, 1, 0, 0, 0)
    residuals, gram = memory.residuals * memory.unit, memory.gram * memory.unit[:, :, None] ** 2
    expected = jax.vmap(reference, axes)(memory.targets, residuals, gram, memory.z, u)
    np.testing.assert_allclose(following.fz, expected, rtol=1e-10, atol=1e-12)


SCALED = [
    FixedPoint(60, tolerance=1e-4),
    FixedPoint(90, damping=0.7, tolerance=1e-4),
    Anderson(30, tolerance=1e-4),
    Broyden(20, tolerance=1e-4),
    Broyden(40, history_size=5, tolerance=1e-4),
    Broyden(40, history_dtype=jnp.bfloat16, tolerance=1e-4),
]


@pytest.mark.parametrize("solver", SCALED, ids=repr)
def test_a_scaled_linear_problem_has_scaled_iterates(solver):
    """By powers of two bit by bit, each sample by its own; by others up to rounding."""
    matrix, u, _ = problem(0.5, np.float32)
    plain = solve_from_zero(solver, linear_cell, matrix, u)
    assert (plain.residuals[-1] < solver.tolerance).all()
    exponents = np.array([[-100], [-40], [40], [90]])
    scaled = solve_from_zero(solver, linear_cell, matrix, jnp.ldexp(u, exponents))
    np.testing.assert_array_equal(scaled.states, jnp.ldexp(plain.states, exponents))
    np.testing.assert_array_equal(scaled.residuals, plain.residuals)
    np.testing.assert_array_equal(scaled.evaluations, plain.evaluations)
    scale = np.array([[1e-30], [1e-13], [1e20], [1e30]], np.float32)
    scaled = solve_from_zero(solver, linear_cell, matrix, u * scale)
    np.testing.assert_allclose(scaled.z / scale, plain.z, rtol=1e-2, atol=2e-4 * np.abs(plain.z).max())
    assert (scaled.residuals[-1] < solver.tolerance).all()


@pytest.mark.parametrize("solver", SCALED, ids=repr)
def test_an_equilibrium_at_zero_is_found(solver):
    """A rotating contraction; residuals relative to the state alone would stay what they are."""
    matrix = 0.5 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    start = jnp.array([[1.0, 1.0], [1e-20, 1e-20]])
    solution = solve(solver, linear_cell, matrix, start, jnp.zeros_like(start))
    np.testing.assert_allclose(solution.z / start, 0, atol=1e-10)
    assert (solution.residuals[-1] < solver.tolerance).all()


@pytest.mark.parametrize("ridge", [1e-4, 1e-5, 1e-12])
@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_anderson_is_as_accurate_on_small_problems_and_past_convergence(size, ridge):
    """0.9 z + u = z at 10 u: residuals all along one direction, whose Gram matrix is singular."""
    u = jnp.array([[1.0], [1e-3], [1e-6], [1e6]]) * jnp.linspace(1, 2, size)
    solver = Anderson(60, ridge=ridge, tolerance=0.0)
    solution = jax.jit(lambda u: solve(solver, lambda p, z, u: 0.9 * z + u, None, 0 * u, u))(u)
    np.testing.assert_allclose(solution.z, 10 * u, rtol=3e-6)
    assert np.isfinite(solution.states).all() and np.isfinite(solution.residuals).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_anderson_accelerates_slow_problems(x64, dtype):
    matrix, u, fixed_points = problem(0.99, dtype)
    for steps in (60, 300):
        solution = solve_from_zero(Anderson(steps, tolerance=0.0), linear_cell, matrix, u)
        plain = solve_from_zero(FixedPoint(steps, tolerance=0.0), linear_cell, matrix, u)
        assert np.isfinite(solution.states).all()
        errors = [np.linalg.norm(s.z - fixed_points, axis=1) for s in (solution, plain)]
        assert (errors[0] < 0.1 * errors[1]).all()


NARROW = [FixedPoint(20), FixedPoint(30, damping=0.7), Anderson(8), Broyden(8), Broyden(8, history_size=3)]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("solver", NARROW, ids=repr)
class TestNarrowStates:
    @pytest.mark.slow
    def test_large_states(self, solver, dtype):
        """Sums of squares leave float16 at 65,504."""
        size, eps = 138_240, float(jnp.finfo(dtype).eps)
        u = jax.random.normal(jax.random.key(0), (2, size)) * jnp.array([[1.0], [100.0]])
        run = jax.jit(lambda u: solve(solver, lambda p, z, u: z / 2 + u, None, jnp.zeros_like(u), u))
        solution, exact = run(u.astype(dtype)), 2 * u
        assert solution.z.dtype == solution.states.dtype == dtype and solution.residuals.dtype == jnp.float32
        error = jnp.linalg.norm(solution.z.astype(jnp.float32) - exact, axis=1) / jnp.linalg.norm(exact, axis=1)
        assert error.max() < 4 * max(eps, solver.tolerance)
        assert (solution.residuals[-1] < max(eps, solver.tolerance)).all()
        assert np.isfinite(solution.residuals).all()

    @pytest.mark.slow
    def test_small_and_coupled_states(self, solver, dtype):
        matrix, u, fixed_points = problem(0.5, np.float32)
        scale = np.array([[1.0], [1e-2], [1e-3], [1.0]])
        solution = solve_from_zero(solver, linear_cell, matrix.astype(dtype), (u * scale).astype(dtype))
        error = np.linalg.norm(np.float32(solution.z) / scale - fixed_points, axis=1)
        assert (error < 0.05 * np.linalg.norm(fixed_points, axis=1)).all()
