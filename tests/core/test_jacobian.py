"""Jacobian norm and spectral radius in closed form, and the penalty as training applies it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    Explicit,
    InputError,
    IntermediateState,
    Keys,
    PGDAdversarialTraining,
    RandomIntermediateState,
    Standard,
    Trades,
)
from deq_jax.core import Purpose, gaussian_probes, jacobian_norm, spectral_radius
from deq_jax.models import JacobianRegularization, SmallCNN
from deq_jax.training import PenaltySchedule, Phase, fit
from tests.helpers import tiny

MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)) / 3, jnp.float32)
Z = jnp.ones((4, 5))
KEYS = Keys.of(jax.random.key(0), 4)
PENALTY = JacobianRegularization(weight=2.0)
SCHEDULE = PenaltySchedule(probability=0.25, epochs=3)
DRAWN = [0, 3, 5, 9, 10, 15, 18, 19, 21, 24, 29, 30, 31, 32]


def linear(matrix, z, u):
    return z @ matrix.T + u


def test_the_estimate_has_the_squared_frobenius_norm_as_its_mean():
    probes = gaussian_probes(KEYS, Z, 4000)
    estimate = jacobian_norm(linear, MATRIX, Z, Z, probes)
    np.testing.assert_allclose(estimate, np.full(4, np.sum(np.square(MATRIX)) / 5), rtol=0.1)


def test_probes_belong_to_images():
    probes = gaussian_probes(KEYS, Z, 2)
    some = gaussian_probes(Keys(KEYS.shared, jnp.array([2, 0])), Z[:2], 2)
    assert probes.shape == (2, 4, 5) and some.shape == (2, 2, 5)
    np.testing.assert_array_equal(some, probes[:, jnp.array([2, 0])])


def rotation(radius, angle):
    return radius * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def block_diagonal(*blocks):
    size = sum(len(block) for block in blocks)
    matrix, start = np.zeros((size, size)), 0
    for block in blocks:
        matrix[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return matrix


KNOWN = {
    "symmetric": (np.asarray(MATRIX @ MATRIX.T), float(np.linalg.eigvalsh(MATRIX @ MATRIX.T).max())),
    "not symmetric": (np.triu(np.full((4, 4), 5.0), 1) + np.diag([0.3, -0.9, 0.5, 0.1]), 0.9),
    "quarter turn": (rotation(0.8, np.pi / 2), 0.8),
    "turn": (block_diagonal(rotation(1.3, 1.0), np.array([[1.1]])), 1.3),
    "plus and minus": (np.diag([1.5, -1.5]), 1.5),
    "many plus and minus": (np.diag([0.9, -0.9, 0.9, -0.9, 0.1]), 0.9),
    "blocks": (block_diagonal(rotation(0.7, 2.0), rotation(0.95, 0.3), np.diag([0.9, -0.8])), 0.95),
    "nilpotent": (np.triu(np.full((4, 4), 3.0), 1), 0.0),
    "zero": (np.zeros((3, 3)), 0.0),
    "one": (np.full((1, 1), -0.4), 0.4),
    "tiny": (np.diag([1e-25, 3e-26, 0]), 1e-25),
    "huge": (np.diag([1e25, -3e24]), 1e25),
}


def radius_of(matrices, steps=30, dtype=jnp.float32):
    """Of matrices [B, n, n], each the Jacobian of one sample."""
    matrices = jnp.asarray(matrices, dtype)
    z = jnp.zeros(matrices.shape[:2], dtype)
    start = gaussian_probes(Keys.of(jax.random.key(0), len(z)), z, 1)[0]

    def cell(matrices, z, u):
        return jnp.einsum("bij,bj->bi", matrices, z)

    return jax.jit(lambda matrices: spectral_radius(cell, matrices, None, z, start, steps))(matrices)


@pytest.mark.parametrize("name", KNOWN)
def test_spectral_radius_of_known_matrices(name):
    matrix, expected = KNOWN[name]
    found = radius_of(np.stack([matrix, matrix, matrix.T]))
    np.testing.assert_allclose(found.radius, expected, rtol=1e-4)
    assert found.settled.all()


def test_spectral_radius_of_random_matrices():
    """A Rayleigh quotient is below 1 for 71 of them."""
    matrices = np.random.default_rng(1).normal(size=(100, 64, 64))
    matrices *= (1.2 / np.abs(np.linalg.eigvals(matrices)).max(axis=1))[:, None, None]
    few, found, many = (radius_of(matrices, steps) for steps in (10, 30, 50))
    error = np.abs(np.asarray(found.radius) / 1.2 - 1)
    assert np.median(error) < 1e-3 and error.max() < 0.1
    assert error[np.asarray(found.settled)].max() < 0.05
    assert few.settled.mean() < 0.3 < 0.8 < found.settled.mean()
    np.testing.assert_allclose(many.radius, 1.2, rtol=1e-3)


def test_spectral_radius_of_a_cell_whose_jacobian_vanishes_or_is_not_finite():
    def cell(params, z, u):
        return {"a": jax.nn.relu(z["a"] + u), "b": jnp.tanh(u) + 0 * z["b"]}

    u = jnp.array([[-1.0, -2.0], [1.0, jnp.nan], [1.0, 1.0]])
    z = {"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 2))}
    start = jax.tree.map(jnp.ones_like, z)
    found = spectral_radius(cell, None, u, jax.tree.map(lambda z: z.at[1].set(jnp.nan), z), start, 6)
    np.testing.assert_allclose(found.radius[0::2], [0, 1], atol=1e-5)
    np.testing.assert_array_equal(found.settled[0::2], True)


def test_spectral_radius_needs_steps():
    with pytest.raises(InputError, match="steps must be >= 2, got 1"):
        radius_of(np.eye(2)[None], steps=1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_narrow_states(dtype):
    """Sums of squares leave float16 at 65,504."""
    z = jnp.ones((2, 70_000), dtype)

    def half(p, z, u):
        return z * jnp.asarray([[0.5], [2.0]], dtype)

    probes = gaussian_probes(Keys.of(jax.random.key(0), 2), z, 2)
    norm = jacobian_norm(half, None, None, z, probes)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, [0.25, 4], rtol=0.02)
    np.testing.assert_allclose(spectral_radius(half, None, None, z, probes[0], 6).radius, [0.5, 2], rtol=0.01)


@pytest.mark.slow
def test_the_penalty_of_a_training_pass():
    """A penalised pass reads out a state of z_{T-2} .. z_{T+1}, and its penalty is that of this state."""
    classifier = replace(tiny.classifier(dropout=0.0), jacobian=PENALTY)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 1)), jnp.float32)
    variables = classifier.init(jax.random.key(0), x)
    prediction = classifier(variables, x, train=True, keys=KEYS)
    assert prediction.solution.residuals.shape == (5, 4)
    states = RandomIntermediateState(first=2)(prediction.solution, KEYS.fold(Purpose.READOUT))
    params, u = variables["params"]["cell"], classifier._encode(variables, x, True, KEYS, None)[0]
    expected = PENALTY.penalty(classifier.apply_cell, params, u, states, KEYS)
    np.testing.assert_allclose(prediction.penalty, expected, rtol=1e-4)
    assert float(prediction.penalty.min()) > 0
    assert classifier(variables, x, keys=KEYS).penalty == 0
    with pytest.raises(InputError, match="needs keys"):
        classifier(variables, x, train=True)


def test_only_final_states_are_jittered():
    classifier = replace(tiny.classifier(IntermediateState(2)), jacobian=PENALTY)
    x = jnp.zeros((2, 8, 8, 1))
    variables = classifier.init(jax.random.key(0), x)
    prediction = jax.eval_shape(lambda: classifier(variables, x, train=True, keys=Keys.of(jax.random.key(0), 2)))
    assert prediction.solution.residuals.shape == (4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "purposes"),
    [
        (PGDAdversarialTraining(tiny.ATTACK), [Purpose.ADVERSARIAL]),
        pytest.param(Trades(tiny.TRADES_ATTACK), [Purpose.NATURAL, Purpose.ADVERSARIAL], marks=pytest.mark.slow),
    ],
    ids=["pgd_at", "trades"],
)
def test_objectives_add_the_penalties_of_their_passes(objective, purposes):
    plain = tiny.classifier(RandomIntermediateState())
    penalised = replace(plain, jacobian=PENALTY)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 1)), jnp.float32)
    x_adv, y = jnp.clip(x + 0.1, 0, 1), jnp.arange(4)
    variables = plain.init(jax.random.key(0), x)
    without, with_penalty = (
        jax.jit(lambda classifier=c: objective.loss(classifier, variables, x, x_adv, y, KEYS, None)[0])()
        for c in (plain, penalised)
    )
    images = {Purpose.NATURAL: x, Purpose.ADVERSARIAL: x_adv}
    penalties = [penalised(variables, images[p], train=True, keys=KEYS.fold(p)).penalty.mean() for p in purposes]
    np.testing.assert_allclose(with_penalty - without, sum(penalties), rtol=1e-2)


def test_steps_are_drawn_with_the_given_probability_until_the_last_epoch():
    drawn = [SCHEDULE.is_drawn(0, step, epoch=0) for step in range(2000)]
    assert abs(np.mean(drawn) - 0.25) < 0.03
    assert drawn != [SCHEDULE.is_drawn(1, step, epoch=0) for step in range(2000)]
    assert not any(SCHEDULE.is_drawn(0, step, epoch=3) for step in range(2000))
    assert [step for step in range(40) if drawn[step]] == DRAWN  # as in version 0.1


def explicit_config():
    return tiny.get_config(classifier=Explicit(SmallCNN(10, 4)), pretrain_steps=0)


def test_a_config_penalises_the_drawn_steps_only():
    config = tiny.get_config(classifier=replace(tiny.classifier(), jacobian=PENALTY), penalty_schedule=SCHEDULE)
    assert [config.phase(step, 17) for step in range(2)] == [Phase.PRETRAINING] * 2
    for step in range(2, 60):
        expected = Phase.PENALISED if SCHEDULE.is_drawn(0, step, step // 17) else Phase.PLAIN
        assert config.phase(step, 17) is expected
    without = replace(config.classifier, jacobian=None)
    assert config.during(Phase.PLAIN) == replace(config, classifier=without)
    assert config.during(Phase.PENALISED) is config
    shallow = config.during(Phase.PRETRAINING)
    assert shallow.objective == Standard() and shallow.classifier.jacobian is None
    for plain in (tiny.get_config(pretrain_steps=0), explicit_config()):
        assert {plain.phase(step, 17) for step in range(60)} == {Phase.PLAIN} and plain.during(Phase.PLAIN) is plain
    for wrong in (Phase.PENALISED, Phase.PRETRAINING):
        with pytest.raises(InputError, match="an Equilibrium with"):
            explicit_config().during(wrong)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (JacobianRegularization, {"weight": -1.0}),
        (JacobianRegularization, {"probes": 0}),
        (JacobianRegularization, {"fewer": -1}),
        (PenaltySchedule, {"probability": 1.5}),
        (PenaltySchedule, {"epochs": -1}),
    ],
    ids=str,
)
def test_bad_settings(kind, field):
    with pytest.raises(InputError, match=f"{kind.__name__}: .*{next(iter(field))}"):
        kind(**field)


def test_tied_passes_draw_the_same_state():
    classifier = tiny.classifier(RandomIntermediateState(best_so_far=False))
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 1)), jnp.float32)
    variables = classifier.init(jax.random.key(0), x)

    @jax.jit
    def divergences(number):
        losses = [
            Trades(tiny.TRADES_ATTACK, tied=tied).loss(
                classifier, variables, x, x, jnp.arange(4), KEYS.fold(number), None
            )
            for tied in (True, False)
        ]
        return [outcome.metrics["divergence"] for _, outcome in losses]

    tied, independent = zip(*(divergences(number) for number in range(4)), strict=True)
    np.testing.assert_allclose(tied, 0, atol=1e-6)
    assert max(independent) > 1e-4


@pytest.mark.slow
def test_a_training_with_penalised_steps(tmp_path):
    """Penalised are the drawn steps alone: their loss tells."""
    penalty, schedule = replace(PENALTY, weight=1e4), PenaltySchedule(probability=0.3)
    config = tiny.get_config(classifier=replace(tiny.classifier(), jacobian=penalty), penalty_schedule=schedule)
    lines: list[dict[str, Any]] = []
    fit(config, tmp_path / "a", report=lines.append)
    losses = {line["step"] - 1: line["loss"] for line in lines if line["split"] == "train"}
    drawn = {step for step in range(2, 17) if schedule.is_drawn(0, step, 0)}
    assert drawn and {step for step, loss in losses.items() if loss > 50} == drawn
