"""PGD against the exact worst case of a linear model, and the contract of attacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError, Keys
from deq_jax.attacks import L2, PGD, Linf, Oracle, clean_start, gaussian_start, oracle_of, uniform_start
from deq_jax.core import losses
from tests.helpers import tiny

SHAPE = (6, 3, 3, 1)
EPSILON = 0.1


def linear(x, keys):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), x.dtype)
    return x.reshape(x.shape[0], 9) @ weights


def curved(x, keys):
    return jnp.sin(3 * linear(x, keys))


def images(dtype=np.float32):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.uniform(0.2, 0.8, size=SHAPE), dtype), jnp.arange(6) % 4


def test_exact_worst_case_of_a_linear_model():
    """For two classes the worst point of the ball (here inside the box) is known."""

    def two_classes(x, keys):
        return linear(x, keys)[:, :2]

    x, y = images()
    y = y % 2
    weights = linear(jnp.eye(9).reshape(9, 3, 3, 1), None)[:, :2]
    away = jnp.sign(weights[:, 1 - y] - weights[:, y]).T.reshape(SHAPE)
    attack = PGD(Linf(EPSILON), steps=10, step_size=0.05)
    np.testing.assert_allclose(attack(oracle_of(two_classes), x, y, jax.random.key(0)), x + EPSILON * away, atol=1e-6)


def test_first_step_is_the_signed_gradient():
    x, y = images()
    gradient = jax.grad(lambda x: losses.cross_entropy(curved(x, None), y).sum())(x)
    attack = PGD(Linf(EPSILON), steps=1, step_size=0.03, start=clean_start, best_of=False)
    np.testing.assert_allclose(
        attack(oracle_of(curved), x, y, jax.random.key(0)), x + 0.03 * jnp.sign(gradient), atol=1e-6
    )


@pytest.mark.parametrize(
    "attack",
    [
        PGD(Linf(EPSILON), steps=5, step_size=0.03),
        PGD(Linf(EPSILON), steps=5, step_size=0.03, restarts=3),
        PGD(Linf(EPSILON), steps=5, step_size=0.03, best_of=False),
        PGD(Linf(EPSILON), steps=5, step_size=0.03, loss=losses.margin, start=clean_start),
        PGD(Linf(EPSILON), steps=5, step_size=0.03, loss=losses.dlr, start=gaussian_start),
    ],
    ids=lambda a: f"{a.loss.__name__}-{a.start.__name__}-{a.restarts}-{a.best_of}",
)
class TestContract:
    def test_stays_in_the_ball_and_the_box(self, attack):
        x, y = images()
        x = x.at[0].set(0.0).at[1].set(1.0)
        x_adv = attack(oracle_of(curved), x, y, jax.random.key(0))
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
        assert float(jnp.abs(x_adv - x).max()) <= EPSILON + 1e-6
        assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1

    def test_same_key_same_result_and_jit_equals_eager(self, attack):
        x, y = images()
        run = jax.jit(lambda key: attack(oracle_of(curved), x, y, key))
        first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
        np.testing.assert_array_equal(first, again)
        if attack.start is not clean_start:
            assert not np.array_equal(first, other)
        with jax.disable_jit():
            np.testing.assert_allclose(attack(oracle_of(curved), x, y, jax.random.key(0)), first, atol=1e-6)

    def test_an_image_does_not_depend_on_its_batch(self, attack):
        x, y = images()
        key = jax.random.key(0)
        whole = attack(oracle_of(curved), x, y, Keys(key, jnp.arange(6)))
        order = jnp.array([4, 2])
        part = attack(oracle_of(curved), x[order], y[order], Keys(key, order))
        np.testing.assert_allclose(part, whole[order], atol=1e-6)

    def test_never_lowers_the_loss(self, attack):
        if not attack.best_of:
            return
        x, y = images()
        before = attack.loss(curved(x, None), y)
        start = PGD(Linf(EPSILON), steps=1, step_size=1e-9, loss=attack.loss, start=attack.start)
        x_adv, x_start = (a(oracle_of(curved), x, y, jax.random.key(0)) for a in (attack, start))
        assert (attack.loss(curved(x_adv, None), y) >= attack.loss(curved(x_start, None), y) - 1e-6).all()
        if attack.start is clean_start:
            assert (attack.loss(curved(x_adv, None), y) >= before - 1e-6).all()

    def test_empty_batch(self, attack):
        x, y = images()
        assert attack(oracle_of(curved), x[:0], y[:0], jax.random.key(0)).shape == (0, *SHAPE[1:])


def test_more_steps_and_restarts_never_lower_the_best_loss():
    x, y = images()

    def best(attack):
        return losses.cross_entropy(curved(attack(oracle_of(curved), x, y, jax.random.key(0)), None), y)

    few, many = (best(PGD(Linf(EPSILON), steps=steps, step_size=0.03, start=clean_start)) for steps in (2, 8))
    one, three = (best(PGD(Linf(EPSILON), steps=4, step_size=0.03, restarts=restarts)) for restarts in (1, 3))
    # A misclassified iterate is kept before one of higher loss; here no image is broken.
    assert (many >= few - 1e-6).all() and (three >= one - 1e-6).all()
    assert (three > one + 1e-6).any()


def test_a_misclassified_iterate_is_preferred_to_a_higher_loss():
    """The oracle's loss grows with x, yet only a middle value is misclassified."""

    def logits(x, keys):
        inside = (x[:, 0, 0, 0] > 0.53) & (x[:, 0, 0, 0] < 0.55)
        return jnp.stack([jnp.zeros(x.shape[0]), jnp.where(inside, 1.0, -1.0)], axis=1)

    def grad(loss, x, target, keys):
        return x[:, 0, 0, 0], logits(x, keys), jnp.ones_like(x)

    x = jnp.full((1, 1, 1, 1), 0.5)
    attack = PGD(Linf(EPSILON), steps=5, step_size=0.02, loss=lambda logits, y: jnp.ones(1), start=clean_start)
    x_adv = attack(Oracle(logits, grad), x, jnp.zeros(1, int), jax.random.key(0))
    np.testing.assert_allclose(x_adv, 0.54, atol=1e-6)


def test_reference_logits_are_a_target_too():
    x, _ = images()
    attack = PGD(Linf(EPSILON), steps=5, step_size=0.03, loss=losses.kl, start=gaussian_start)
    x_adv = attack(oracle_of(curved), x, curved(x, None), jax.random.key(0))
    assert (losses.kl(curved(x_adv, None), curved(x, None)) > 0.01).all()


def test_nan_gradients_do_not_move_the_images():
    x, y = images()
    attack = PGD(Linf(EPSILON), steps=3, step_size=0.03, start=clean_start, best_of=False)
    np.testing.assert_array_equal(
        attack(oracle_of(lambda x, keys: jnp.nan * curved(x, keys)), x, y, jax.random.key(0)), x
    )


def test_last_iterate_costs_no_further_query():
    """Adversarial training pays for one gradient a step, and for nothing else."""
    x, y = images()

    def logits(x, keys):
        raise AssertionError("a query of the logits")

    oracle = Oracle(logits, oracle_of(curved).grad)
    PGD(Linf(EPSILON), steps=3, step_size=0.03, best_of=False)(oracle, x, y, jax.random.key(0))


def test_best_iterate_is_never_worse_than_the_image_itself():
    """The loss of a linear model is convex: small steps against its gradient lower it."""
    x, _ = images()
    y = jnp.argmax(linear(x, None), axis=-1)

    def downhill(loss, x, target, keys):
        losses, logits, gradient = oracle_of(linear).grad(loss, x, target, keys)
        return losses, logits, -gradient

    x_adv = PGD(Linf(EPSILON), steps=5, step_size=1e-3)(Oracle(linear, downhill), x, y, jax.random.key(0))
    assert (losses.cross_entropy(linear(x_adv, None), y) >= losses.cross_entropy(linear(x, None), y) - 1e-6).all()
    x_adv = PGD(Linf(EPSILON), steps=5, step_size=1e-3, start=clean_start)(
        Oracle(linear, downhill), x, y, jax.random.key(0)
    )
    np.testing.assert_allclose(x_adv, x, atol=1e-6)


def test_inputs_are_checked():
    x, y = images()
    with pytest.raises(InputError, match="expected float images"):
        PGD(Linf(EPSILON), steps=1, step_size=0.03)(oracle_of(curved), x[0], y, jax.random.key(0))
    with pytest.raises(InputError, match="expected 6 integer labels"):
        PGD(Linf(EPSILON), steps=1, step_size=0.03)(oracle_of(curved), x, y[:3], jax.random.key(0))


@pytest.mark.filterwarnings("ignore")  # foolbox's own
def test_classifiers_in_foolbox():
    foolbox = pytest.importorskip("foolbox")
    classifier = tiny.classifier()
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    variables = classifier.init(jax.random.key(1), x)

    def logits_fn(x):
        return classifier(variables, x).logits

    y, model = jnp.argmax(logits_fn(x), axis=-1), foolbox.JAXModel(logits_fn, bounds=(0, 1))
    assert foolbox.accuracy(model, x, y) == 1
    _, x_adv, is_adversarial = foolbox.attacks.LinfPGD(steps=5)(model, x, y, epsilons=EPSILON)
    np.testing.assert_array_equal(is_adversarial, jnp.argmax(logits_fn(x_adv), axis=-1) != y)
    assert float(jnp.abs(x_adv - x).max()) <= EPSILON + 1e-6


def test_starts():
    x = jnp.full((500, 2, 2, 1), 0.5)
    keys = Keys.of(jax.random.key(0), 500)
    uniform = np.asarray(uniform_start(keys, x, Linf(EPSILON)) - x)
    assert abs(uniform).max() <= EPSILON + 1e-6 and abs(uniform.std() - EPSILON / np.sqrt(3)) < 0.005
    gaussian = np.asarray(gaussian_start(keys, x, Linf(EPSILON)) - x)
    assert abs(gaussian.std() - 1e-3) < 1e-4


@pytest.mark.parametrize("settings", [{"step_size": 0.0}, {"steps": 0}, {"restarts": 0}], ids=lambda s: next(iter(s)))
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match=f"PGD: {next(iter(settings))} must be"):
        PGD(Linf(0.1), **settings)


def test_default_step_size():
    """2.5 radii are shared among the steps: 2/255 for ten steps at 8/255."""
    x, y = images()
    named, default = PGD(Linf(8 / 255), steps=10, step_size=2 / 255), PGD(Linf(8 / 255), steps=10)
    key = jax.random.key(0)
    np.testing.assert_array_equal(named(oracle_of(curved), x, y, key), default(oracle_of(curved), x, y, key))


def test_in_l2():
    """Of a linear classifier the worst image in the ball is known: a step of length epsilon along the normal."""
    normal = jnp.array([3.0, -4.0]) / 5
    x, y = jnp.full((4, 1, 2, 1), 0.5), jnp.zeros(4, jnp.int32)

    def linear(x, keys):
        score = x.reshape(4, 2) @ normal
        return jnp.stack([-score, score], axis=1)

    x_adv = PGD(L2(0.25), steps=20, step_size=0.5)(oracle_of(linear), x, y, jax.random.key(0))
    np.testing.assert_allclose((x_adv - x).reshape(4, 2), jnp.tile(0.25 * normal, (4, 1)), atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 12])
def test_uniform_start_fills_the_l2_ball_evenly(size):
    x = jnp.full((4000, size, 1, 1), 0.5)
    noise = L2(0.2).random(Keys.of(jax.random.key(0), 4000), x)
    length = np.asarray(L2(0.2).length(noise))
    assert length.max() <= 0.2 + 1e-6
    np.testing.assert_allclose(np.mean((length / 0.2) ** size), 0.5, atol=0.02)  # a share r^size has a length below r
