"""Attacks of the AutoAttack family: one contract for all, closed forms, and the official numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError, Keys
from deq_jax.attacks import (
    APGD,
    FAB,
    L2,
    PGD,
    SPSA,
    Attack,
    AutoAttack,
    Linf,
    Oracle,
    Square,
    Targeted,
    auto_attack,
    average,
    expectation,
    gradient_from,
    is_fooled,
    oracle_of,
)
from deq_jax.attacks.apgd import checkpoints
from deq_jax.attacks.square import _bump
from deq_jax.core import cross_entropy, margin, targeted_dlr
from deq_jax.models.convolution import conv
from deq_jax.parallel import replicate_and_split
from tests.helpers.cases import mostly_slow

GOLDEN = Path(__file__).parents[1] / "golden" / "attacks"
SHAPE, CLASSES, BATCH = (6, 6, 2), 5, 6
KEY = jax.random.key(3)
KEYS = Keys.of(KEY, BATCH)


def mlp(x, keys=None):
    features = jnp.tanh(x.reshape(-1, np.prod(SHAPE)) @ _weights(0, np.prod(SHAPE), 16))
    return 3 * features @ _weights(1, 16, CLASSES)


def _weights(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


MLP = oracle_of(mlp)
X = jax.random.uniform(jax.random.key(0), (BATCH, *SHAPE))
Y = jnp.argmax(mlp(X), axis=-1)


def attacks_within(threat):
    return {
        "apgd": APGD(threat, steps=8, restarts=2),
        "apgd_t": Targeted(APGD(threat, steps=8, loss=targeted_dlr), classes=3),
        "fab": FAB(threat, steps=6, restarts=2),
        "fab_t": Targeted(FAB(threat, steps=6)),
        "square": Square(threat, queries=30),
        "spsa": SPSA(threat, steps=6, samples=8, step_size=threat.epsilon / 3),
        "auto": AutoAttack((APGD(threat, steps=5), Square(threat, queries=10)), batch_size=4),
    }


ATTACKS = {f"{name}_linf": attack for name, attack in attacks_within(Linf(0.1)).items()}
ATTACKS |= {f"{name}_l2": attacks_within(L2(0.6))[name] for name in ("apgd", "fab_t", "square", "spsa")}
ATTACKS["pgd"] = PGD(Linf(0.1), steps=6, step_size=0.03)
EVERY = pytest.mark.parametrize("name", ATTACKS)
FEW = pytest.mark.parametrize("name", mostly_slow(ATTACKS, *range(7)))  # ℓ2 and PGD differ in the ball alone


@cache
def jitted(name):
    return jax.jit(lambda x, y, keys: ATTACKS[name](MLP, x, y, keys))


def threat_of(attack):
    inner = attack.attacks[0] if isinstance(attack, AutoAttack) else getattr(attack, "attack", attack)
    return getattr(inner, "threat", Linf(0.1))


# --- the contract ----------------------------------------------------------------------------------------


@EVERY
def test_result_lies_in_ball_and_box_and_is_never_worse(name):
    x_adv = jitted(name)(X, Y, KEYS)
    threat = threat_of(ATTACKS[name])
    assert x_adv.shape == X.shape and x_adv.dtype == X.dtype
    assert jnp.all(threat.length(x_adv - X) <= threat.epsilon * (1 + 1e-5))
    assert jnp.all((x_adv >= 0) & (x_adv <= 1))
    loss = getattr(ATTACKS[name], "loss", margin)
    better = (loss(mlp(x_adv), Y) >= loss(mlp(X), Y) - 1e-6) | is_fooled(mlp(x_adv), Y)
    assert jnp.all(better)
    assert jnp.any(x_adv != X)


@EVERY
def test_same_keys_same_result_whatever_the_order_of_the_batch(name):
    order = jnp.array([4, 0, 5, 1, 3, 2])
    x_adv = jitted(name)(X, Y, KEYS)
    np.testing.assert_array_equal(x_adv, jitted(name)(X, Y, KEYS))
    permuted = jitted(name)(X[order], Y[order], Keys(KEY, KEYS.images[order]))
    np.testing.assert_allclose(permuted, x_adv[order], atol=1e-5)


@FEW
def test_single_image_without_jit_equals_its_row_of_the_jitted_batch(name):
    alone = ATTACKS[name](MLP, X[4:5], Y[4:5], Keys(KEY, KEYS.images[4:5]))
    np.testing.assert_allclose(alone, jitted(name)(X, Y, KEYS)[4:5], atol=1e-5)


@EVERY
def test_empty_batch(name):
    assert ATTACKS[name](MLP, X[:0], Y[:0], KEY).shape == (0, *SHAPE)


@EVERY
def test_misclassified_images_stay(name):
    wrong = (Y + 1) % CLASSES
    x_adv = jitted(name)(X, wrong, KEYS)
    assert jnp.all(is_fooled(mlp(x_adv), wrong))
    if name != "pgd":
        np.testing.assert_array_equal(x_adv, X)


@FEW
def test_shift_and_scale_of_logits_change_nothing(name):
    """Nor does their normalisation, so log-probabilities will do. Cross-entropy has a scale; DLR has none."""

    def fooled(scale, shift, normalised):
        def logits(x, keys):
            found = scale * mlp(x) + shift
            return found - normalised * jax.nn.logsumexp(found, axis=-1, keepdims=True)

        x_adv = ATTACKS[name](oracle_of(logits), X, Y, KEYS)
        return is_fooled(mlp(x_adv), Y), margin(mlp(x_adv), Y)

    run = jax.jit(fooled)
    expected, margins = run(1.0, 0.0, 0.0)
    is_scale_free = name.startswith(("apgd_t", "fab", "square", "spsa"))
    for other in [(1.0, 64.0, 0.0), (1.0, 0.0, 1.0)] + [(2.0**10, 0.0, 0.0), (2.0**-10, 0.0, 0.0)] * is_scale_free:
        found, other_margins = run(*other)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(other_margins, margins, atol=1e-2)  # rounding decides some steps


@FEW
def test_constant_and_nan_logits(name):
    def attack(x, y, value):
        return ATTACKS[name](oracle_of(lambda x, keys: 0 * mlp(x) + value), x, y, KEY)

    run, threat = jax.jit(attack), threat_of(ATTACKS[name])
    for value in (0.0, jnp.nan):
        x_adv = run(X, jnp.zeros_like(Y), value)
        assert jnp.all(threat.length(x_adv - X) <= threat.epsilon * (1 + 1e-5))
        if np.isnan(value):
            np.testing.assert_array_equal(x_adv, X)


@FEW
def test_logits_that_are_not_finite_fool_nobody(name):
    """NaN everywhere but at the images themselves: nothing is found, and NaN gradients move nothing out of the box."""

    def attack(x, y):
        def trap(x_adv, keys):
            moved = jnp.any(x_adv != x, axis=(1, 2, 3))
            return jnp.where(moved[:, None], jnp.nan, mlp(x_adv))

        return ATTACKS[name](oracle_of(trap), x, y, KEYS)

    np.testing.assert_array_equal(jax.jit(attack)(X, Y), X)


@EVERY
def test_clean_logits_that_are_not_finite_are_refused(name):
    def logits(x, keys):
        is_second = jnp.all(x == X[1], axis=(1, 2, 3))
        return jnp.where(is_second[:, None], -jnp.inf, mlp(x))

    with pytest.raises(InputError, match=r"logits of 1 images are not finite \(first: \[1\]\)"):
        ATTACKS[name](oracle_of(logits), X, Y, KEY)


@EVERY
def test_attacks_compare_by_value(name):
    assert ATTACKS[name] == attacks_within(threat_of(ATTACKS[name])).get(name.rsplit("_", 1)[0], ATTACKS[name])
    assert hash(ATTACKS[name]) == hash(ATTACKS[name])


@pytest.mark.parametrize("name", ["apgd_linf", "apgd_t_linf", "fab_t_linf", "square_l2", "auto_linf"])
def test_inputs_are_checked(name):
    with pytest.raises(InputError, match="expected float images"):
        ATTACKS[name](MLP, (255 * X).astype(jnp.uint8), Y, KEY)
    with pytest.raises(InputError, match="expected 6 integer labels"):
        ATTACKS[name](MLP, X, jax.nn.one_hot(Y, CLASSES), KEY)


def test_settings_are_checked():
    for build in (
        lambda: APGD(Linf(0.1), steps=0),
        lambda: FAB(Linf(0.1), beta=1.5),
        lambda: Square(Linf(0.1), p_init=0),
        lambda: SPSA(Linf(0.1), samples=0),
        lambda: PGD(Linf(0.1), steps=1, step_size=0.1, restarts=2, best_of=False),
        lambda: Targeted(APGD(Linf(0.1)), classes=0),
        lambda: AutoAttack(()),
        lambda: Linf(-1),
        lambda: expectation(MLP, 0),
        lambda: average([]),
    ):
        with pytest.raises(InputError):
            build()


# --- closed forms ----------------------------------------------------------------------------------------


def linear(num_classes, seed=5):
    w, b = _weights(seed, np.prod(SHAPE), num_classes), 0.3 * _weights(seed + 1, num_classes)
    return w, lambda x, keys=None: x.reshape(len(x), -1) @ w + b


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_apgd_reaches_the_worst_case_of_a_linear_model_in_linf(loss):
    w, logits = linear(2)
    y = jnp.argmax(logits(X), axis=-1)
    way = jnp.where(y[:, None] == 0, w[:, 1] - w[:, 0], w[:, 0] - w[:, 1]).reshape(X.shape)
    worst = jnp.clip(X + 0.02 * jnp.sign(way), 0, 1)
    x_adv = APGD(Linf(0.02), steps=100, loss=loss)(oracle_of(logits), X, y, KEY)
    np.testing.assert_allclose(margin(logits(x_adv), y), margin(logits(worst), y), rtol=1e-5)


def test_apgd_reaches_the_worst_case_of_a_linear_model_in_l2():
    w, logits = linear(2)
    x = 0.4 + 0.2 * X  # the box is out of reach
    y = jnp.argmax(logits(x), axis=-1)
    way = jnp.where(y[:, None] == 0, w[:, 1] - w[:, 0], w[:, 0] - w[:, 1]).reshape(X.shape)
    worst = x + 0.1 * L2(1.0).steepest(way)
    x_adv = APGD(L2(0.1), steps=100)(oracle_of(logits), x, y, KEY)
    np.testing.assert_allclose(margin(logits(x_adv), y), margin(logits(worst), y), rtol=1e-4)


def test_spsa_reaches_the_worst_case_of_a_linear_model_without_gradients():
    """Few pixels, so that the estimate has the gradient's signs; nothing is asked outside the box."""
    w = jnp.array([[1.0, -1.0], [-2.0, 1.0], [0.5, 2.0]])

    def logits(x, keys):
        inside = jnp.all((x >= 0) & (x <= 1), axis=(1, 2, 3))
        return jnp.where(inside[:, None], x.reshape(len(x), 3) @ w, jnp.nan)

    x, y = jnp.array([0.5, 0.0, 0.4, 0.3, 0.9, 1.0]).reshape(2, 1, 3, 1), jnp.array([0, 1])
    y = jnp.argmax(logits(x, None), axis=-1)
    sign = jnp.sign(w[:, 1] - w[:, 0]) * jnp.where(y == 0, 1, -1)[:, None]
    blind = Oracle(logits, None)  # a gradient would be an error
    x_adv = SPSA(Linf(0.02), steps=4, samples=200, step_size=0.01)(blind, x, y, KEY)
    np.testing.assert_allclose(x_adv, jnp.clip(x + 0.02 * sign.reshape(x.shape), 0, 1), atol=1e-6)


def test_spsa_breaks_what_has_no_gradient():
    quantised = oracle_of(lambda x, keys: mlp(jnp.round(8 * x) / 8))
    blind = PGD(Linf(0.1), steps=6, step_size=0.03)(quantised, X, Y, KEY)
    seeing = jax.jit(lambda x, y: SPSA(Linf(0.1), 10, samples=64, step_size=0.03, probe=0.08)(quantised, x, y, KEY))(
        X, Y
    )
    fooled = [int(jnp.sum(is_fooled(quantised.logits(x_adv, None), Y))) for x_adv in (blind, seeing)]
    assert fooled[1] > fooled[0]


@pytest.mark.parametrize("threat", [Linf(1.0), L2(10.0)], ids=["linf", "l2"])
@pytest.mark.parametrize("is_targeted", [True, False])
def test_fab_finds_the_minimal_perturbation_of_a_linear_model(threat, is_targeted):
    w, logits = linear(CLASSES)
    x = 0.3 + 0.4 * X
    y = jnp.argmax(logits(x), axis=-1)
    gaps = jnp.take_along_axis(logits(x), y[:, None], 1) - logits(x)
    normals = (w[:, y, None] - w[:, None, :]).reshape(len(w), -1).T.reshape(-1, *SHAPE)
    distances = gaps / jnp.maximum(threat.dual_length(normals).reshape(gaps.shape), 1e-9)
    minimal = jnp.min(jnp.where(jax.nn.one_hot(y, CLASSES, dtype=bool), jnp.inf, distances), axis=1)
    # A targeted attack returns the first class that lies within the radius: aim at each in turn.
    aims = [jnp.stack([y, (y + i) % CLASSES], 1) for i in range(1, CLASSES)] if is_targeted else [y]
    run = jax.jit(lambda aim: FAB(threat)(oracle_of(logits), x, aim, KEY))
    found = [run(aim) for aim in aims]
    assert all(jnp.all(is_fooled(logits(x_adv), y)) for x_adv in found)
    reached = jnp.min(jnp.stack([threat.length(x_adv - x) for x_adv in found]), axis=0)
    assert jnp.all(reached >= minimal * (1 - 1e-4))
    np.testing.assert_allclose(reached, minimal, rtol=0.015)


@pytest.mark.parametrize("threat", [Linf(1.0), L2(1.0)], ids=["linf", "l2"])
def test_way_to_a_hyperplane_is_the_shortest_in_the_box(threat):
    """Against bisection over the radius of a ball, within which the reachable level is known."""
    normal = jax.random.normal(jax.random.key(1), X.shape)
    level = jnp.array([3.0, -3.0, 8.0, -0.1, 0.0, 1e4])
    delta = threat.to_hyperplane(X, normal, level)
    assert jnp.all((X + delta >= -1e-6) & (X + delta <= 1 + 1e-6))
    np.testing.assert_allclose(jnp.sum(normal * delta, (1, 2, 3))[:5], level[:5], atol=1e-4)
    up = jnp.sign(normal) * jnp.sign(level)[:, None, None, None]
    room = jnp.where(up > 0, 1 - X, X)
    np.testing.assert_allclose(jnp.abs(delta[5]), room[5], atol=1e-5)  # out of reach: the corner
    rate = jnp.ones_like(normal) if isinstance(threat, Linf) else jnp.abs(normal)
    low, high = jnp.zeros(BATCH), jnp.full(BATCH, 1e3)
    for _ in range(60):
        middle = (low + high) / 2
        moved = jnp.minimum(middle[:, None, None, None] * rate, room)
        enough = jnp.sum(jnp.abs(normal) * moved, (1, 2, 3)) >= jnp.abs(level)
        low, high = jnp.where(enough, low, middle), jnp.where(enough, middle, high)
    shortest = threat.length(jnp.minimum(high[:, None, None, None] * rate, room))
    np.testing.assert_allclose(threat.length(delta)[:5], shortest[:5], atol=1e-5)


def test_checkpoints_of_a_hundred_steps():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1)[-1] == 1


def test_square_sides_follow_the_rescaled_schedule():
    sides = Square(Linf(0.1), queries=10_000)._sides((1, 28, 28, 1))
    np.testing.assert_array_equal(sides[9::10], Square(Linf(0.1), 1000, rescaled=True)._sides((1, 28, 28, 1)))
    for query, halvings in [(1, 0), (10, 0), (11, 1), (51, 2), (201, 3), (501, 4), (8001, 9)]:
        assert sides[query - 1] == max(round(np.sqrt(0.8 * 784 / 2**halvings)), 1)
    assert sorted(set(Square(L2(0.1), rescaled=True)._sides((1, 28, 28, 1)).tolist())) == [3, 5, 7, 9, 13, 19, 25]


@pytest.mark.parametrize("side", range(1, 10))
def test_a_bump_of_square_falls_off_from_two_centres(side):
    """Andriushchenko et al. 2020, section 3.4, pixel by pixel."""
    half, expected = side // 2, np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            sign, centre = (1, half // 2) if row < half else (-1, half + (side - half) // 2)
            distance = max(abs(row - centre), abs(column - side // 2))
            expected[row, column] = sign * sum(1 / j**2 for j in range(distance + 1, half + 2))
    for size in (side, side + 4):
        np.testing.assert_allclose(_bump(jnp.arange(side), jnp.arange(side), side, size), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "largest"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (8, 7)])
def test_squares_in_l2_have_odd_sides_that_fit_into_the_image(size, largest):
    for shape in ((1, size, size, 1), (1, size, size + 3, 1), (1, size + 3, size, 1)):
        sides = Square(L2(0.1), queries=20, p_init=1.0)._sides(shape)
        assert np.max(sides) == largest and np.all(sides % 2 == 1)


# --- AutoAttack and oracles ------------------------------------------------------------------------------


def test_auto_attack_on_a_plain_function():
    x_adv = auto_attack(lambda x: 0.1 * mlp(x)[:, :, None].sum(-1), X[:2], (Y[:2] + 1) % CLASSES, KEY)
    np.testing.assert_array_equal(x_adv, X[:2])  # misclassified from the start: nothing to be done


def test_stages_compile_once_and_attack_only_what_is_left():
    traces, asked = [], []

    def counting(x, keys):
        traces.append(x.shape[0])
        jax.debug.callback(lambda images: asked.append(np.asarray(images)), keys.images)
        return mlp(x)

    x, y = jnp.tile(X, (3, 1, 1, 1)), jnp.tile(Y, 3)
    auto = AutoAttack((PGD(Linf(0.1), steps=1, step_size=0.02), PGD(Linf(0.1), steps=1, step_size=0.08)), batch_size=4)
    run = auto.bind(oracle_of(counting))
    stages = list(run(x, y, KEY))
    once = len(traces)
    assert set(traces) == {4}
    robust = [stage.robust for stage in stages]
    assert all(np.all(after <= before) for before, after in pairwise(robust))
    assert 0 < robust[1].sum() < len(x)
    list(run(x[:9], y[:9], jax.random.key(9)))
    assert len(traces) == once, "another number of images was compiled again"
    jax.effects_barrier()
    asked.clear()
    list(run(x, y, KEY))
    jax.effects_barrier()
    last = {int(image) for images in asked[-2 * -(-int(robust[1].sum()) // 4) :] for image in images}
    assert last <= set(np.flatnonzero(robust[1]).tolist())


@dataclass(frozen=True)
class Opaque:
    """An attack that declares nothing."""

    attack: Attack

    def __call__(self, *args, **start):
        return self.attack(*args, **start)


@pytest.mark.parametrize(
    "attack",
    [
        Targeted(PGD(Linf(0.1), steps=1, step_size=0.1, loss=targeted_dlr), classes=4),
        Square(Linf(0.155), queries=65),
        Square(L2(1.4), queries=65),
    ],
    ids=["targeted", "square-linf", "square-l2"],
)
@pytest.mark.parametrize("start", [None, jnp.clip(X + 0.005, 0, 1)], ids=["no start", "start"])
def test_fooled_images_leave_between_the_parts_of_an_attack(monkeypatch, attack, start):
    monkeypatch.setattr("deq_jax.attacks.square.PART", 20)
    asked = []

    def counting(x, keys):
        jax.debug.callback(lambda: asked.append(0))
        return mlp(x)

    def run(attack, labels=Y):
        asked.clear()
        found = AutoAttack((attack,), batch_size=2)(oracle_of(counting), X, labels, KEY, start)
        jax.effects_barrier()
        return found, len(asked)

    (x_adv, few), (expected, many) = run(attack), run(Opaque(attack))
    assert 0 < jnp.sum(is_fooled(mlp(x_adv), Y)) < BATCH and few < many
    np.testing.assert_allclose(x_adv, expected, atol=1e-6)  # another program, which rounds differently in ℓ2
    assert run(attack, (Y + 1) % CLASSES)[1] == BATCH / 2, "more than the clean images were asked about"


def test_parts_of_square_on_half_precision_give_what_the_whole_gives(monkeypatch):
    monkeypatch.setattr("deq_jax.attacks.square.PART", 3)
    attack, images = Square(Linf(0.3), queries=11), X.astype(jnp.bfloat16)
    found, whole = (AutoAttack((one,), batch_size=4)(MLP, images, Y, KEY) for one in (attack, Opaque(attack)))
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize(("size", "expected"), [(None, 32 if jax.default_backend() == "cpu" else 36), (5, 5)])
def test_a_batch_has_as_many_images_as_it_is_told_or_as_suit_the_processor(size, expected):
    sizes = set()

    def counting(x):
        sizes.add(len(x))
        return mlp(x)

    x, labels = jnp.tile(X, (6, 1, 1, 1)), jnp.tile(Y, 6)
    AutoAttack((PGD(Linf(0.1), steps=1),), size)(oracle_of(counting), x, labels, KEY)
    assert sizes == {expected}


@pytest.mark.parametrize("preset", [AutoAttack.standard, AutoAttack.plus, AutoAttack.rand])
def test_presets(preset):
    for threat in (Linf(8 / 255), L2(0.5)):
        assert preset(threat) == preset(threat)
        assert all(hasattr(attack, "threat") or hasattr(attack, "attack") for attack in preset(threat).attacks)


def test_images_outside_the_box_are_refused():
    with pytest.raises(InputError, match=r"must lie in \[0, 1\], found"):
        ATTACKS["auto_linf"](MLP, 255 * X, Y, KEY)


def noisy(x, keys):
    return mlp(x) + keys.draw(lambda key: jax.random.normal(key, (CLASSES,)))


def test_expectation_is_the_mean_over_draws():
    keys = Keys.of(KEY, BATCH)
    mean = expectation(oracle_of(noisy), 4)
    by_hand = sum(noisy(X, keys.fold(i)) for i in range(4)) / 4
    np.testing.assert_allclose(mean.logits(X, keys), by_hand, atol=1e-5)
    losses, logits, gradient = mean.grad(margin, X, Y, keys)
    np.testing.assert_allclose(logits, by_hand, atol=1e-5)
    grads = [oracle_of(noisy).grad(margin, X, Y, keys.fold(i)) for i in range(4)]
    np.testing.assert_allclose(losses, sum(g[0] for g in grads) / 4, atol=1e-5)
    np.testing.assert_allclose(gradient, sum(g[2] for g in grads) / 4, atol=1e-5)


def test_average_and_surrogate():
    keys = Keys.of(KEY, BATCH)
    other = oracle_of(lambda x, keys: -2 * mlp(x))
    np.testing.assert_allclose(average([MLP, other]).logits(X, keys), -0.5 * mlp(X), atol=1e-5)
    pair = gradient_from(other, MLP)
    losses, logits, gradient = pair.grad(margin, X, Y, keys)
    np.testing.assert_allclose(logits, mlp(X), atol=1e-6)
    np.testing.assert_allclose(losses, margin(mlp(X), Y), atol=1e-6)
    np.testing.assert_allclose(gradient, other.grad(margin, X, Y, keys)[2], atol=1e-6)


def test_surrogate_is_judged_on_the_deployed_predictor():
    blind = Oracle(MLP.logits, lambda loss, x, target, keys: oracle_of(lambda x, keys: mlp(x) + 99).grad(
        loss, x, target, keys
    ))  # fmt: skip
    x_adv = APGD(Linf(0.1), steps=8)(gradient_from(blind, MLP), X, Y, KEY)
    assert jnp.all((cross_entropy(mlp(x_adv), Y) >= cross_entropy(mlp(X), Y)) | is_fooled(mlp(x_adv), Y))


@pytest.mark.parametrize("names", [["auto_linf"], pytest.param(list(ATTACKS), marks=pytest.mark.slow)], ids=len)
def test_many_devices_equal_one(names):
    numbers = np.resize(np.arange(BATCH, dtype=np.int32), jax.local_device_count())

    def attack(_, batch):
        x, y, images = batch
        return {name: ATTACKS[name](MLP, x, y, Keys(KEY, images)) for name in names}

    found = replicate_and_split(attack, joint=False)(0, (np.asarray(X)[numbers], np.asarray(Y)[numbers], numbers))
    for name, x_adv in found.items():
        np.testing.assert_allclose(x_adv, jitted(name)(X, Y, KEYS)[numbers], atol=1e-5, err_msg=name)


# --- the official implementation -------------------------------------------------------------------------


def golden_network():
    arrays = dict(np.load(GOLDEN / "mnist_cnn.npz"))

    def logits(x, keys=None):
        for layer in ("1", "2"):
            x = conv(x, arrays["w" + layer], (2, 2), ((1, 2), (1, 2)))  # "SAME" of 28 and 14 pixels
            x = jax.nn.relu(x + arrays["b" + layer])
        x = jax.nn.relu(x.reshape(len(x), -1) @ arrays["w3"] + arrays["b3"])
        return x @ arrays["w4"] + arrays["b4"]

    return oracle_of(logits), jnp.asarray(arrays["x"] / 255, jnp.float32), jnp.asarray(arrays["y"])


@pytest.mark.slow
def test_official_autoattack():
    """The first two attacks and the whole; all four alone over 5 seeds: `benchmarks/auto_attack.py`."""
    oracle, x, y = golden_network()
    official = json.loads((GOLDEN / "official_autoattack.json").read_text())
    threat = Linf(official["epsilon"])
    *_, last = AutoAttack.standard(threat, batch_size=64).stages(oracle, x, y, KEY)
    robust = np.all([official[name]["robust"] for name in ("apgd-ce", "apgd-t", "fab-t", "square")], axis=0)
    assert abs(last.robust.mean() - official["autoattack"]["robust_accuracy"]) <= 0.01
    assert np.mean(last.robust == robust) >= 0.97
    x_adv = jax.jit(lambda x, y: APGD(threat)(oracle, x, y, KEY))(x, y)
    assert abs(np.mean(~is_fooled(oracle.logits(x_adv, None), y)) - official["apgd-ce"]["robust_accuracy"]) <= 0.01
