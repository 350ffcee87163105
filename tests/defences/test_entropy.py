"""Input entropy reduction: the plain dynamics without updates, its limits, controls, and the authors' numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    Anderson,
    Broyden,
    EnsembleState,
    EntropyReduced,
    FixedPoint,
    InputError,
    IntermediateState,
    Keys,
    LastState,
    Phantom,
)
from deq_jax.core import entropy, solve, straight_through
from deq_jax.defences import EntropyGradient, RandomDirection, ReferenceCarry, reduce_entropy, sign
from deq_jax.models import SmallCNN
from deq_jax.parallel import replicate_and_split
from tests.golden.case import Case
from tests.helpers import tiny
from tests.helpers.ranges import assert_range

X = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 8, 8, 1)), jnp.float32)
KEYS = Keys.of(jax.random.key(1), 3)
EPSILON, STEP_SIZE = 0.05, 0.02
# At this tolerance some of the images converge on the way, and leave it again when their input is updated.
SOLVERS = [Broyden(4), Broyden(4, tolerance=0.35), Anderson(4, tolerance=0.35), FixedPoint(4, tolerance=0.35)]


def base_of(solver=SOLVERS[0]):
    base = tiny.classifier()
    return replace(base, dynamics=replace(base.dynamics, solver=solver))


VARIABLES = base_of().init(jax.random.key(0), X)


@jax.jit
def f(z, x):
    """f(z; x), whatever the solver."""
    return base_of().apply_cell(VARIABLES["params"]["cell"], z, base_of().encode(VARIABLES, x))


@jax.jit
def decode(z):
    return base_of().decode(VARIABLES, z)


def defence_of(solver=SOLVERS[0], **changes):
    fields = {"steps": 3, "step_size": STEP_SIZE, "epsilon": EPSILON, **changes}
    return EntropyReduced(base_of(solver), **fields)


@cache
def runner(defence):
    return jax.jit(lambda variables, x, keys: reduce_entropy(defence, variables, x, keys))


def run(defence, x=X, keys=None):
    return runner(defence)(VARIABLES, x, keys)


def cell_residuals(z, x):
    """Relative residuals [B] of states z for inputs x."""
    fz = f(z, x)
    difference, fz = (a.reshape(len(x), -1) for a in (fz - z, fz))
    return np.linalg.norm(difference, axis=1) / np.linalg.norm(fz, axis=1)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_without_updates_the_dynamics_are_the_plain_ones_bitwise(solver):
    found = run(defence_of(solver, steps=0))
    plain = jax.jit(lambda variables, x: base_of(solver)(variables, x).solution)(VARIABLES, X)
    for name in ("z", "states", "residuals"):
        np.testing.assert_array_equal(getattr(found.solution, name), getattr(plain, name))
    np.testing.assert_array_equal(found.x, X)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_states_residuals_and_entropies_belong_to_the_inputs_of_their_blocks(solver):
    defence = defence_of(solver)
    found = run(defence)
    np.testing.assert_array_equal(found.inputs[0], X)
    for t, (z, residual) in enumerate(zip(found.solution.states, found.solution.residuals, strict=True)):
        np.testing.assert_allclose(residual, cell_residuals(z, found.inputs[t // 2]), rtol=1e-4)
    before = [found.inputs[0], found.inputs[1]]
    after = [found.inputs[1], found.x]
    for block, z in enumerate((found.solution.states[1], found.solution.states[3])):
        for values, x in ((found.entropies[block, 0], before[block]), (found.entropies[block, -1], after[block])):
            fz = f(z, x)
            np.testing.assert_allclose(values, entropy(decode(fz)), rtol=1e-4)
    assert (np.diff(found.entropies, axis=1) < 0).mean() > 0.9
    np.testing.assert_array_less(np.abs(found.x - X), EPSILON + 1e-6)
    assert np.abs(found.x - X).max() > EPSILON - 1e-6 and found.x.min() >= 0 and found.x.max() <= 1


@pytest.mark.parametrize(
    "solver",
    [Broyden(2, tolerance=0), Anderson(2, tolerance=0), FixedPoint(2, tolerance=0)],
    ids=lambda solver: type(solver).__name__,
)
def test_the_solver_goes_on_from_the_residual_of_the_new_input(solver):
    """Its memory holds f(z; purified); Broyden's next step solves the corrected secant equation."""
    defence = defence_of(solver)
    found = run(defence)
    memory, z = found.solution.memory, found.solution.states[-1]
    fz = f(z, found.x)
    np.testing.assert_allclose(memory.z, z.reshape(3, -1), rtol=1e-6)
    np.testing.assert_array_equal(found.solution.evaluations, 1 + 2 + (3 * 2 + 1))  # start, steps, updates, new input
    np.testing.assert_allclose(memory.fz, fz.reshape(3, -1), rtol=1e-4, atol=1e-5)
    if isinstance(solver, Broyden):
        first = found.solution.states[0]
        old = f(first, X) - first
        g, dz = memory.fz - memory.z, (z - first).reshape(3, -1)
        np.testing.assert_allclose(solver.multiply(memory, g - old.reshape(3, -1)), dz, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(memory.step, -solver.multiply(memory, g), rtol=1e-3, atol=1e-4)


def test_an_update_follows_the_sign_of_the_entropy_gradient():
    defence = defence_of(steps=1)
    found = run(defence)
    z = found.solution.states[1]

    def total(x):
        fz = f(z, x)
        return entropy(decode(fz)).sum()

    gradient = np.asarray(jax.jit(jax.grad(total))(X))
    clear = np.abs(gradient) > 1e-6
    expected = np.clip(X - STEP_SIZE * np.sign(gradient), 0, 1)
    assert clear.mean() > 0.9
    np.testing.assert_allclose(found.inputs[1][clear], expected[clear], atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda solver: type(solver).__name__)
def test_images_do_not_depend_on_their_batch(solver):
    defence = defence_of(solver)
    whole = run(defence)
    for i in range(3):
        alone = run(defence, X[i : i + 1])
        np.testing.assert_allclose(alone.x[0], whole.x[i], atol=1e-6)
        np.testing.assert_allclose(alone.solution.states[:, 0], whole.solution.states[:, i], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_controls():
    """Raising the entropy raises it; random updates are each image's own, and need keys."""
    raised = run(defence_of(direction=EntropyGradient(ascent=1)))
    assert (np.diff(raised.entropies, axis=1) > 0).mean() > 0.9
    random = defence_of(direction=RandomDirection())
    drawn, again, other = run(random, keys=KEYS), run(random, keys=KEYS), run(random, keys=KEYS.fold(1))
    np.testing.assert_array_equal(drawn.x, again.x)
    assert np.any(drawn.x != other.x)
    steps = np.abs(np.asarray(drawn.inputs[1] - X))
    inside = (X > 3 * STEP_SIZE) & (X < 1 - 3 * STEP_SIZE)
    distance = np.min(np.abs(steps[inside][:, None] - np.array([STEP_SIZE, EPSILON])), axis=1)
    np.testing.assert_allclose(distance, 0, atol=1e-6)
    second = run(random, X[1:], Keys(KEYS.shared, KEYS.images[1:]))
    np.testing.assert_allclose(second.x, drawn.x[1:], atol=1e-6)
    with pytest.raises(InputError, match="the defence is random, expected keys"):
        random(VARIABLES, X)


@pytest.mark.slow
def test_the_prediction_is_that_of_the_raw_regulated_state():
    defence = defence_of()
    prediction = jax.jit(lambda x: defence(VARIABLES, x))(X)
    states = run(defence).solution.states
    np.testing.assert_allclose(prediction.solution.states, states, rtol=1e-5, atol=1e-5)
    readouts = {LastState(): states[-1], IntermediateState(2): states[1], EnsembleState(): states.mean(axis=0)}
    for readout, z in readouts.items():
        found = jax.jit(lambda x, readout=readout: replace(defence, readout=readout)(VARIABLES, x).logits)(X)
        np.testing.assert_allclose(found, decode(z), rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_estimator_at_the_state_and_the_purified_input():
    defence = defence_of()
    base, found = defence.base, run(defence)

    def estimate(x):
        u, params = base.encode(VARIABLES, x), VARIABLES["params"]["cell"]
        return base.decode(VARIABLES, straight_through(z, Phantom(2, 0.5)(base.apply_cell, params, u, z)))[:, 3].sum()

    z = found.solution.states[-1]
    gradient = jax.jit(jax.grad(lambda x: defence(VARIABLES, x).logits[:, 3].sum()))(X)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(estimate))(found.x), rtol=1e-3, atol=1e-6)
    assert np.abs(gradient).max() > 1e-4


def test_devices_share_the_work():
    defence = defence_of(direction=RandomDirection())
    x, images = jnp.tile(X, (8, 1, 1, 1))[:8], jnp.arange(8)

    def on_device(variables, batch):
        x, images = batch
        return defence(variables, x, keys=Keys(jax.random.key(1), images)).logits

    split = replicate_and_split(on_device, joint=False)(VARIABLES, (x, images))
    np.testing.assert_allclose(split, jax.jit(on_device)(VARIABLES, (x, images)), rtol=1e-3, atol=1e-4)


def test_straight_through_and_sign():
    value, gradient = jax.value_and_grad(lambda x: straight_through(jnp.floor(x), x**2))(1.5)
    assert (value, gradient) == (1.0, 3.0)
    np.testing.assert_array_equal(sign(jnp.array([-2.0, 0.0, 3.0, jnp.nan])), [-1, 0, 1, 0])


def test_mistakes_are_named():
    base = base_of()
    mistakes: dict[str, dict[str, Any]] = {
        "every must divide the solver's 4 steps, got 3": {"every": 3},
        "base must be an Equilibrium with a solver": {"base": SmallCNN(10, 4)},
        "ReferenceCarry: the solver must be Broyden": {"base": base_of(Anderson(4)), "carry": ReferenceCarry()},
    }
    for message, changes in mistakes.items():
        with pytest.raises(InputError, match=message):
            EntropyReduced(**{"base": base, **changes})
    make = partial(EntropyReduced, base)
    assert_range(make, "steps", [0], [-1])
    assert_range(make, "step_size", [1e-9], [0])
    assert_range(make, "epsilon", [0], [-1e-9])
    assert_range(make, "every", [1, 2, 4], [0, 3, 5, 8])
    with pytest.raises(InputError, match="ascent must be -1 or 1, got 0"):
        EntropyGradient(0)
    with pytest.raises(InputError, match="train its base"):
        EntropyReduced(base)(VARIABLES, X, train=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_reference_carry_reproduces_the_authors_numbers(dtype):
    """In float32 rounding flips the signs of some pixels' gradients, as it did in the authors' run on attacked images.

    The distance between that run and their float64 one is the noise that is allowed there, for both kinds of images.
    """
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        case = Case(dtype)
        defence = EntropyReduced(case.classifier, carry=ReferenceCarry())
        reduce = case.compiled(partial(reduce_entropy, defence))
        for kind in ("clean", "adv"):
            golden_close(case, f"ier/{kind}", reduce)
    finally:
        jax.config.update("jax_enable_x64", False)


def golden_close(case, key, reduce):
    x = case.x if key.endswith("clean") else case.image(case.golden[f"{key}/x_in"])
    found = reduce(case.variables, x)
    solution = found.solution
    means = np.asarray(found.entropies).mean(axis=-1)
    case.close(f"{key}/entropy_before", means[:, :-1].ravel(), floor="ier/adv/entropy_before")
    case.close(f"{key}/entropy_after", means[:, 1:].ravel(), floor="ier/adv/entropy_after")
    case.state_close(f"{key}/z1", solution.states, floor="ier/adv/z1_sub")
    residuals = np.asarray(solution.residuals)[:, 0].reshape(4, 2)
    trace = np.column_stack([residuals, residuals.min(axis=1)])
    case.close(f"{key}/block_rel_trace", trace, floor="ier/adv/block_rel_trace")
    logits = np.stack([case.decode(jax.tree.map(lambda leaf, t=t: leaf[t], solution.states)) for t in range(8)])
    case.close(f"{key}/logits_list", logits, case.golden[f"{key}/logits_list"][:8], floor="ier/adv/logits_list")
    inputs = jnp.concatenate([found.inputs[1:], found.x[None]])
    if key.endswith("adv"):
        case.image_close(f"{key}/x_blocks", inputs)
    else:  # recorded as multiples of 1/255, where they all lie
        steps = np.moveaxis(np.rint(255 * np.asarray(inputs)), -1, -3)
        moved = steps != case.golden[f"{key}/x_blocks"]
        assert not moved[:2].any() and moved.mean() <= (0.01 if case.dtype == "float32" else 0)


def test_the_carry_of_the_reference_passes_over_a_step_that_tells_nothing():
    """Where the residual has not changed, Broyden's update divides 0 by 0: it is left out."""
    u = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    solver = ReferenceCarry().adapt(Broyden(4, tolerance=0.0))
    found = solve(solver, lambda params, z, u: z + u, {}, jnp.zeros((2, 2)), u)
    np.testing.assert_allclose(found.states, [k * u for k in range(1, 5)], rtol=1e-6)


def test_the_carry_of_the_reference_runs_broydens_method_between_its_restarts():
    rng = np.random.default_rng(0)
    weights, u = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 6), (3, 6)))

    def cell(weights, z, u):
        return jnp.tanh(0.4 * z @ weights + u)

    solver = Broyden(5, tolerance=0.0)
    expected, found = (
        solve(one, cell, weights, jnp.zeros((3, 6)), u) for one in (solver, ReferenceCarry().adapt(solver))
    )
    np.testing.assert_allclose(found.states, expected.states, atol=1e-4)
    assert float(expected.residuals[-1].max()) < 0.1 * float(expected.residuals[0].max())
