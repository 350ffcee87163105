"""What attacks refuse, in which precision they work, and how often they compile; the same for all of them."""

import dataclasses
import gc
import math
import re
import weakref
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, monitoring

from deq_jax import InputError, Keys
from deq_jax.attacks import (
    APGD,
    FAB,
    L2,
    PGD,
    SPSA,
    AutoAttack,
    Linf,
    Noise,
    Oracle,
    Square,
    Targeted,
    auto_attack,
    oracle_of,
)
from deq_jax.attacks.inputs import check_oracle
from deq_jax.core import losses, targeted_dlr
from deq_jax.evaluation import diagnostics
from tests.helpers.cases import mostly_slow
from tests.helpers.ranges import assert_range

KEY = jax.random.key(0)
SHAPE, CLASSES, BATCH = (4, 4, 1), 5, 6
X = jax.random.uniform(jax.random.key(1), (BATCH, *SHAPE))


def linear(num_classes=CLASSES, seed=0, dtype=jnp.float32):
    weights = jnp.asarray(np.random.default_rng(seed).normal(size=(16, num_classes)), dtype)
    return lambda x, keys=None: x.reshape(len(x), 16) @ weights


MODEL = linear()
Y = jnp.argmax(MODEL(X), axis=1)


def attacks_within(threat):
    return {
        "pgd": PGD(threat, steps=2),
        "pgd_last": PGD(threat, steps=2, best_of=False),
        "apgd": APGD(threat, steps=3),
        "apgd_t": Targeted(APGD(threat, steps=2, loss=targeted_dlr), classes=3),
        "fab": FAB(threat, steps=2),
        "square": Square(threat, queries=4),
        "spsa": SPSA(threat, steps=2, samples=2),
        "auto": AutoAttack((APGD(threat, steps=2), FAB(threat, steps=2)), batch_size=4),
        "noise": Noise(threat),
    }


ATTACKS = attacks_within(Linf(0.1))
EVERY = pytest.mark.parametrize("name", ATTACKS)
FEW = pytest.mark.parametrize("name", mostly_slow(ATTACKS, 0, 4))  # all share the entry that is tested
ASKING = pytest.mark.parametrize("name", [name for name in ATTACKS if name != "noise"])


def attack(name, logits=MODEL, x=X, y=Y, key=KEY):
    return ATTACKS[name](oracle_of(logits), x, y, key)


# --- what is refused --------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(
    ("x", "found"),
    [
        ((X - 0.45) / 0.2, r"images must lie in \[0, 1\], found \[-2\.\d+, 2\.\d+\]"),
        (255 * X, r"images must lie in \[0, 1\], found"),
        (X.at[2, 0, 0, 0].set(1.00001), r"found \[0\.\d+, 1\.00001\d*\]"),
        (X.at[2, 0, 0, 0].set(jnp.nan), r"found \[nan, nan\]"),
        ((255 * X).astype(jnp.uint8), "expected float images"),
        (X[0], "expected float images"),
        (jnp.ones((2, 3, 6, 12)), "looks like"),
    ],
    ids=["normalised", "bytes", "beyond", "nan", "integers", "one", "channels-first"],
)
def test_images_that_are_none(name, x, found):
    with pytest.raises(InputError, match=found):
        attack(name, x=x, y=Y[: len(x)])


@FEW
def test_within_jit_an_image_outside_the_box_comes_back_as_nan(name):
    """It cannot be refused there, and a classifier of normalised images would look robust."""
    x = X.at[1].add(1.0).at[2, 0, 0, 0].set(-3e-8).at[3].set(jnp.nan)
    y = jnp.argmax(MODEL(jnp.clip(x, 0, 1)), axis=1)
    x_adv = jax.jit(lambda x: attack(name, x=x, y=y))(x)
    np.testing.assert_array_equal(jnp.all(jnp.isnan(x_adv), axis=(1, 2, 3)), [False, True, False, True, False, False])
    assert jnp.all((x_adv >= 0) & (x_adv <= 1) | jnp.isnan(x_adv))


@FEW
def test_rounding_at_the_edges_of_the_box_is_clipped(name):
    x = np.array(X)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = -2.98e-8, np.float32(1.0000001)
    x_adv = attack(name, x=x)
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@ASKING
@pytest.mark.parametrize(
    ("logits", "found"),
    [
        (lambda x, keys: MODEL(x)[:, :1], r"K >= 2, got float32 \(6, 1\); .*jnp.concatenate\(\[0 \* s, s\], axis=1\)"),
        (lambda x, keys: (MODEL(x), x), r"expected logits \[.*, K\], got a tuple of float32 \(6, 5\), float32 \(6, 4"),
        (lambda x, keys: {"logits": MODEL(x)}, r"expected logits \[.*, K\], got a dict with keys logits"),
        (lambda x, keys: MODEL(x)[:, 0], r"expected logits \[.*, K\], got float32 \(6,\)"),
        (lambda x, keys: MODEL(x)[:, None], r"expected logits \[.*, K\], got float32 \(6, 1, 5\)"),
        (lambda x, keys: None, r"expected logits \[.*, K\], got None"),
    ],
    ids=["one-output", "tuple", "dict", "flat", "extra-axis", "none"],
)
def test_logits_that_are_none(name, logits, found):
    eager = ATTACKS[name] if name != "auto" else AutoAttack(ATTACKS[name].attacks)
    with pytest.raises(InputError, match=found):
        eager(oracle_of(logits), X, Y, KEY)
    with pytest.raises(InputError, match=found):
        jax.jit(lambda x: attack(name, logits, x))(X)


@ASKING
@pytest.mark.parametrize(
    ("y", "found"),
    [
        (Y.at[3].set(9), r"labels must lie in 0\.\.4, found 9"),
        (Y.at[3].set(5), r"labels must lie in 0\.\.4, found 5"),
        (Y.at[3].set(-1), r"labels must lie in 0\.\.4, found -1"),
        (np.full(BATCH, 2**40), r"labels must lie in 0\.\.4, found 1099511627776"),
    ],
    ids=["nine", "five", "negative", "huge"],
)
def test_labels_that_are_no_classes(name, y, found):
    with pytest.raises(InputError, match=found):
        attack(name, y=y)


BALL = Linf(0.1)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: PGD(0.1), r"PGD: threat: expected a threat model, such as Linf\(8 / 255\), got 0.1"),
        (lambda: APGD(Linf), "APGD: threat: .* got the class Linf"),
        (lambda: FAB(0.1), "FAB: threat: "),
        (lambda: SPSA(0.1), "SPSA: threat: "),
        (lambda: Noise(0.1), "Noise: threat: "),
        (lambda: diagnostics(0.1), "diagnostics: threat: "),
        (lambda: PGD(BALL, loss="ce"), "PGD: loss: expected a function of logits and labels, .* got 'ce'"),
        (lambda: AutoAttack(BALL), "AutoAttack: attacks: expected a tuple of attacks, .* got a Linf"),
        (lambda: AutoAttack((PGD,)), "AutoAttack: attacks: .* got the class PGD"),
        (lambda: Targeted(BALL), "Targeted: attack: expected an attack on pairs, .* got a Linf"),
        (lambda: PGD(BALL)(MODEL, X, Y, KEY), r"attack: oracle: expected an Oracle, such as oracle_of.* got a "),
        (lambda: AutoAttack((PGD(BALL),))(MODEL, X, Y, KEY), "attack: oracle: "),
        (lambda: oracle_of(oracle_of(MODEL)), "oracle_of: expected a function of images .* got an Oracle"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_parts_that_are_none(make, found):
    with pytest.raises(InputError, match=found) as error:
        make()
    assert "\n" not in str(error.value)


@EVERY
@pytest.mark.parametrize(
    "y", [jax.nn.one_hot(Y, CLASSES, dtype=int), Y[:, None], Y.astype(bool), Y[:4]], ids=["rows", "2d", "bool", "few"]
)
def test_labels_that_are_none(name, y):
    with pytest.raises(InputError, match="expected 6 integer labels"):
        attack(name, y=y)


@pytest.mark.parametrize("name", ["apgd", "fab", "square", "spsa", "pgd"])
def test_pairs_that_are_none(name):
    with pytest.raises(InputError, match=r"the two must differ, found \(3, 3\) for image 4"):
        attack(name, y=jnp.stack([Y, (Y + 1) % CLASSES], 1).at[4].set(3))
    with pytest.raises(InputError, match=r"labels must lie in 0\.\.4, found 7"):
        attack(name, y=jnp.stack([Y, jnp.full_like(Y, 7)], 1))
    rows = jax.nn.one_hot(Y % 2, 2, dtype=int)
    with pytest.raises(InputError, match=r"with 2 classes expected labels \[B\], got .*rows.argmax"):
        attack(name, linear(2), y=rows)


def test_losses_of_labels_are_not_aimed():
    with pytest.raises(InputError, match="a loss of pairs is logit_difference"):
        Targeted(APGD(Linf(0.1), 2))(oracle_of(MODEL), X, Y, KEY)


def test_reference_logits_of_another_predictor():
    with pytest.raises(InputError, match=r"reference logits of 5 classes.* got float32 \(6, 3\)"):
        PGD(Linf(0.1), 2, loss=losses.kl)(oracle_of(MODEL), X, MODEL(X)[:, :3], KEY)


@pytest.mark.parametrize(
    ("grad", "found"),
    [
        (lambda loss, x, target, keys: jnp.ones_like(x), r"expected Oracle.grad to give .* got float32 \(6, 4, 4, 1\)"),
        (
            lambda loss, x, target, keys: (loss(MODEL(x), target).sum(), MODEL(x), x),
            r"of images \(6, 4, 4, 1\), got float32 \(\), float32 \(6, 5\), float32 \(6, 4, 4, 1\)",
        ),
        (
            lambda loss, x, target, keys: (loss(MODEL(x), target), MODEL(x), x[0]),
            r"of images \(6, 4, 4, 1\), got float32 \(6,\), float32 \(6, 5\), float32 \(4, 4, 1\)",
        ),
    ],
    ids=["one", "sum", "gradient"],
)
def test_an_oracle_of_other_shapes(grad, found):
    for name in ("pgd", "pgd_last", "apgd", "fab"):
        with pytest.raises(InputError, match=found):
            ATTACKS[name](Oracle(MODEL, grad), X, Y, KEY)


def test_a_loss_that_is_no_vector():
    with pytest.raises(InputError, match=r"expected a loss of shape \[6\], one per image, got float32 \(\)"):
        PGD(Linf(0.1), 2, loss=lambda logits, y: jnp.mean(logits), best_of=False)(oracle_of(MODEL), X, Y, KEY)


def test_only_the_logits_have_to_be_finite():
    """The loss of a predictor whose logits are finite may be anything."""
    x_adv = APGD(Linf(0.1), 2, loss=lambda logits, y: jnp.full(len(y), jnp.nan))(oracle_of(MODEL), X, Y, KEY)
    assert x_adv.shape == X.shape
    with pytest.raises(InputError, match="logits of 6 images are not finite"):
        APGD(Linf(0.1), 2)(oracle_of(lambda x, keys: jnp.inf * MODEL(x)), X, Y, KEY)


def test_an_oracle_is_checked_without_being_asked():
    def logits(x, keys):
        assert isinstance(x, jax.core.Tracer)
        return MODEL(x)

    check_oracle(oracle_of(logits), X[:1], Y)
    with pytest.raises(InputError, match=r"labels must lie in 0\.\.4, found 7"):
        check_oracle(oracle_of(logits), X[:1], Y.at[5].set(7))


@pytest.mark.parametrize(
    ("make", "setting", "allowed", "refused"),
    [
        (Linf, "epsilon", [0, 1], [-1e-9, 1.001, math.inf]),
        (L2, "epsilon", [0, 100], [-1e-9, math.inf]),
        (partial(PGD, BALL), "step_size", [1e-9, None], [0]),
        (partial(PGD, BALL), "steps", [1], [0]),
        (partial(PGD, BALL), "restarts", [1], [0]),
        (partial(APGD, BALL), "steps", [1], [0]),
        (partial(APGD, BALL), "restarts", [1], [0]),
        (partial(FAB, BALL), "steps", [1], [0]),
        (partial(FAB, BALL), "restarts", [1], [0]),
        (partial(FAB, BALL), "alpha_max", [0, 1], [-1e-9, 1.001]),
        (partial(FAB, BALL), "eta", [1], [0.999]),
        (partial(FAB, BALL), "beta", [1e-9, 0.999], [0, 1]),
        (partial(Square, BALL), "queries", [1], [0]),
        (partial(Square, BALL), "p_init", [1e-9, 1], [0, 1.001]),
        (partial(SPSA, BALL), "steps", [1], [0]),
        (partial(SPSA, BALL), "samples", [1], [0]),
        (partial(SPSA, BALL), "step_size", [1e-9], [0]),
        (partial(SPSA, BALL), "probe", [1e-9], [0]),
        (partial(Targeted, PGD(BALL)), "classes", [1], [0]),
        (partial(AutoAttack, (PGD(BALL),)), "batch_size", [1], [0]),
        (partial(AutoAttack, (PGD(BALL),)), "draws", [1], [0]),
    ],
)
def test_the_ends_of_a_range_are_allowed_and_nothing_beyond(make, setting, allowed, refused):
    assert_range(make, setting, allowed, refused)


def test_radii_in_another_unit():
    with pytest.raises(InputError, match=r"unit of x, \[0, 1\], got 8; did you mean 8/255\?"):
        Linf(8)
    with pytest.raises(InputError, match=r"did you mean 255/255\?"):
        Linf(255)
    with pytest.raises(InputError, match=r"unit of x.*1 is the whole range"):
        Linf(255.5)
    with pytest.raises(InputError, match="epsilon must be >= 0"):
        Linf(float("nan"))
    for threat in (Linf, L2):
        for epsilon in ("0.1", None, True, (0.1,)):
            with pytest.raises(InputError, match=rf"{threat.__name__}: epsilon must be >= 0 and finite, got "):
                threat(epsilon)
        assert threat(np.float32(0.5)).epsilon == threat(jnp.float32(0.5)).epsilon == 0.5
    assert diagnostics(Linf(0.3)).far.attack.threat == Linf(1.0)


@FEW
def test_a_seed_is_a_key(name):
    np.testing.assert_array_equal(attack(name, key=7), attack(name, key=jax.random.key(7)))
    np.testing.assert_array_equal(attack(name, key=np.int64(7)), attack(name, key=Keys.of(7, BATCH)))


@EVERY
def test_keys_of_other_images_are_refused(name):
    with pytest.raises(InputError, match="keys: expected Keys of 6 images, got images of shape"):
        attack(name, key=Keys.of(0, 4))


# --- labels, classes and precision ------------------------------------------------------------------------------


@FEW
def test_labels_of_any_integer_type_mean_the_same(name):
    """With 300 classes a label of 200 and the class aimed at do not fit into uint8."""
    logits = linear(300)
    y = np.array([100, 3, 90, 120, 7, 64])
    expected = attack(name, logits, y=y.astype(np.int32))
    for dtype in (np.int8, np.uint8, np.uint16, np.int64):
        np.testing.assert_array_equal(attack(name, logits, y=y.astype(dtype)), expected)
        np.testing.assert_array_equal(attack(name, logits, y=jnp.asarray(y.astype(dtype))), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "num_classes"),
    [
        (AutoAttack.standard, 2),
        pytest.param(AutoAttack.standard, 3, marks=pytest.mark.slow),
        pytest.param(AutoAttack.plus, 2, marks=pytest.mark.slow),
        pytest.param(AutoAttack.rand, 2, marks=pytest.mark.slow),
    ],
    ids=["standard-2", "standard-3", "plus-2", "rand-2"],
)
def test_auto_attack_of_few_classes(version, num_classes):
    """It breaks exactly the images whose worst corner of the ball, known for a linear model, is misclassified."""
    logits, epsilon = linear(num_classes, seed=5), 0.15
    y = jnp.argmax(logits(X), axis=1)
    x_adv = AutoAttack(_shortened(version(Linf(epsilon)).attacks), 8)(oracle_of(logits), X, y, KEY)
    weights = logits(jnp.eye(16).reshape(16, *SHAPE))
    breakable = np.zeros(BATCH, bool)
    for aim in range(num_classes):
        way = jnp.sign(weights[:, [aim]] - weights[:, y]).T.reshape(X.shape)
        breakable |= np.asarray(jnp.argmax(logits(jnp.clip(X + epsilon * way, 0, 1)), axis=1) != y)
    assert 0 < breakable.sum() < BATCH
    np.testing.assert_array_equal(jnp.argmax(logits(x_adv), axis=1) != y, breakable)


def _shortened(attacks):
    """The same ones with few steps."""

    def short(attack):
        if isinstance(attack, Targeted):
            return dataclasses.replace(attack, attack=short(attack.attack))
        name = "queries" if isinstance(attack, Square) else "steps"
        return dataclasses.replace(attack, **{name: 10})

    return tuple(map(short, attacks))


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.3)], ids=["linf", "l2"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_images_stay_in_the_ball(name, threat, dtype):
    attack, x = attacks_within(threat)[name], X.astype(dtype).at[0, 0, 0].set(0).at[0, 0, 1].set(1)
    x_adv = attack(oracle_of(MODEL), x, jnp.argmax(MODEL(x), axis=1), KEY)
    assert x_adv.dtype == dtype
    wide, clean = (np.asarray(images).astype(np.float64).reshape(BATCH, -1) for images in (x_adv, x))
    length = np.abs(wide - clean).max(1) if isinstance(threat, Linf) else np.linalg.norm(wide - clean, axis=1)
    assert length.max() <= threat.epsilon * (1 + 1e-6) and length.max() > 0.005
    assert wide.min() >= 0 and wide.max() <= 1


@pytest.mark.slow
def test_half_precision_images_that_are_returned_were_judged():
    """What an attack calls misclassified is so after rounding, too."""
    x = X.astype(jnp.bfloat16)
    y = jnp.argmax(MODEL(x), axis=1)
    for name in ("apgd", "square", "auto", "fab"):
        before, after = (losses.margin(MODEL(images), y) for images in (x, attack(name, x=x, y=y)))
        assert jnp.all(after >= before) and jnp.any(after > before)


@FEW
def test_half_precision_logits_and_parameters(name):
    half = linear(dtype=jnp.bfloat16)
    x_adv = attack(name, lambda x, keys: half(x.astype(jnp.bfloat16)))
    assert x_adv.dtype == X.dtype and jnp.all(jnp.abs(x_adv - X) <= 0.1 + 1e-6)


@pytest.mark.slow
@FEW
def test_mixed_single_and_double_precision(name, x64):
    for x, logits in ((X, linear(dtype=jnp.float64)), (jnp.asarray(X, jnp.float64), linear(dtype=jnp.float32))):
        x_adv = attack(name, logits, x, Y.astype(jnp.int64))
        assert x_adv.dtype == x.dtype
        assert jnp.all(jnp.abs(x_adv - x) <= 0.1 + 1e-6)
    np.testing.assert_allclose(attack(name, linear(dtype=jnp.float64)), attack(name), atol=1e-5)


def test_numpy_images_in_double_precision():
    x = np.random.default_rng(0).uniform(size=(BATCH, *SHAPE))
    for name in ("pgd", "auto"):
        assert attack(name, x=x).dtype == jnp.float32


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.3)], ids=["linf", "l2"])
def test_fab_finds_the_same_at_any_scale_of_the_logits(threat):
    """Squares of the gradients are 0 or infinite in float32; boundaries are where they were."""
    fab, found = FAB(threat, steps=5), []
    for exponent in (0, -80, -40, 40, 90):
        scale = jnp.float32(2.0**exponent)
        found.append(fab(oracle_of(lambda x, keys, scale=scale: scale * MODEL(x)), X, Y, KEY))
    assert jnp.any(jnp.argmax(MODEL(found[0]), axis=1) != Y)
    for x_adv in found[1:]:
        np.testing.assert_array_equal(x_adv, found[0])


# --- compilation ------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations():
    """A list that grows by one at every compilation."""
    found = []

    def listen(name, seconds, **kwargs):
        if name.endswith("backend_compile_duration"):
            found.append(name)

    monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


@FEW
def test_eager_calls_compile_once(name, compilations):
    """Also of a new lambda; and what it closes over is read at every call."""
    trained = [jnp.asarray(np.random.default_rng(seed).normal(size=(16, CLASSES)), jnp.float32) for seed in (0, 1)]
    weights = trained[0]
    oracle = oracle_of(lambda x, keys: x.reshape(len(x), 16) @ weights)
    first = ATTACKS[name](oracle, X, Y, KEY)
    fresh = ATTACKS[name](oracle_of(lambda x, keys: x.reshape(len(x), 16) @ trained[1]), X, Y, KEY)
    compilations.clear()
    for _ in range(3):
        np.testing.assert_array_equal(ATTACKS[name](oracle, X, Y, KEY), first)
    np.testing.assert_array_equal(
        ATTACKS[name](oracle_of(lambda x, keys: x.reshape(len(x), 16) @ weights), X, Y, KEY), first
    )
    weights = trained[1]
    np.testing.assert_array_equal(ATTACKS[name](oracle, X, Y, KEY), fresh)
    assert not compilations


def test_programs_that_call_python_are_not_taken_for_each_other():
    def through_python(sign):
        def logits(x):
            shape = jax.ShapeDtypeStruct((len(x), 2), jnp.float32)
            return jax.pure_callback(lambda x: sign * np.asarray(x)[:, 0, :2, 0], shape, x)

        return oracle_of(lambda x: lax.cond(x[0, 0, 0, 0] > 2, jnp.zeros_like, lambda found: found, logits(x)))

    x, labels = jnp.array([0.5, 0.4]).reshape(1, 1, 2, 1), jnp.array([0])
    attack = Square(Linf(0.01), queries=2)
    outcomes = [attack(through_python(sign), x, labels, 0) for sign in (1, -1)]
    assert jnp.any(outcomes[0] != x)
    np.testing.assert_array_equal(outcomes[1], x)  # is fooled already


def test_auto_attack_compiles_once(compilations):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)

    def logits(x):
        return x.reshape(len(x), 16) @ weights

    attack = AutoAttack((PGD(Linf(0.02), 1), FAB(Linf(0.02), 1)), batch_size=4)
    x, y = np.asarray(X), np.asarray(Y) % 4
    attack(oracle_of(lambda x, keys: logits(x)), x, y, KEY)
    attack(oracle_of(lambda x, keys: logits(x)), x[:5], y[:5], KEY)  # draws for five images
    compilations.clear()
    attack(oracle_of(lambda x, keys: logits(x)), x, y, KEY)
    attack(oracle_of(lambda x, keys: logits(x)), x[:5], y[:5], KEY)
    assert not compilations


def test_no_model_is_kept():
    weights = jnp.ones((16, CLASSES)) * jnp.arange(CLASSES)
    ATTACKS["pgd"](oracle_of(lambda x, keys, w=weights: x.reshape(len(x), 16) @ w), X, Y, KEY)
    kept = weakref.ref(weights)
    del weights
    gc.collect()
    assert kept() is None


def test_oracles_of_one_function_are_equal():
    assert oracle_of(MODEL) == oracle_of(MODEL) and hash(oracle_of(MODEL)) == hash(oracle_of(MODEL))
    assert oracle_of(MODEL) != oracle_of(linear())


def test_the_gradient_through_a_traced_model():
    """The images are known and the parameters are not: the attack belongs to the compilation around it."""

    def adversarial_loss(scale):
        x_adv = ATTACKS["pgd"](oracle_of(lambda x, keys: scale * MODEL(x)), X, Y, KEY)
        return jnp.mean(losses.cross_entropy(scale * MODEL(x_adv), Y))

    eager, jitted = jax.grad(adversarial_loss)(1.0), jax.jit(jax.grad(adversarial_loss))(1.0)
    np.testing.assert_allclose(eager, jitted, rtol=1e-5)


def test_the_gradients_of_any_network_are_fast_in_the_loops_of_an_attack():
    """Their axes are in the order of XLA's fast kernel; see `core.convolutions`."""
    layer = nn.Conv(CLASSES, (3, 3), (2, 2))
    params = layer.init(KEY, X)
    oracle = oracle_of(lambda x, keys: jnp.mean(jnp.tanh(layer.apply(params, x)), axis=(1, 2)))
    text = jax.jit(lambda x: ATTACKS["pgd"](oracle, x, Y, KEY)).lower(X).as_text()
    orders = set(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text))
    assert orders == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


# --- auto_attack ------------------------------------------------------------------------------------------------


def test_auto_attack_in_l2():
    short = AutoAttack(_shortened(AutoAttack.standard(L2(0.2)).attacks))
    assert short.threat == L2(0.2)
    x_adv = auto_attack(lambda x: MODEL(x), X[:2], Y[:2], 0, threat=L2(0.2), batch_size=2)
    assert jnp.all(L2(1.0).length(x_adv - X[:2]) <= 0.2 + 1e-6)


def test_a_predictor_with_or_without_keys():
    """A parameter of another name that has a default is none for keys."""

    def noisy(x, keys):
        return MODEL(x) + keys.draw(lambda key: jax.random.normal(key, (CLASSES,)))

    def cooled(x, temperature=2.0):
        return MODEL(x) / temperature

    keys = Keys.of(0, BATCH)
    np.testing.assert_array_equal(oracle_of(lambda x: MODEL(x)).logits(X, keys), MODEL(X))
    np.testing.assert_array_equal(oracle_of(cooled).logits(X, keys), MODEL(X) / 2)
    np.testing.assert_array_equal(oracle_of(noisy).logits(X, keys), noisy(X, keys))
    np.testing.assert_array_equal(oracle_of(lambda x, keys=None: noisy(x, keys)).logits(X, keys), noisy(X, keys))
    assert oracle_of(cooled) == oracle_of(cooled)


def test_auto_attack_arguments():
    with pytest.raises(InputError, match=r"expected epsilon or threat, got both: 0.1 and L2\(epsilon=0.5\)"):
        auto_attack(MODEL, X, Y, 0, 0.1, threat=L2(0.5))
    with pytest.raises(InputError, match="version must be one of standard, plus, rand, got 'custom'"):
        auto_attack(MODEL, X, Y, 0, version="custom")


def test_a_line_per_attack(capsys):
    attack("auto")
    assert not capsys.readouterr().out
    ATTACKS["auto"](oracle_of(MODEL), X, Y, KEY, verbose=True)
    clean, first, second = capsys.readouterr().out.splitlines()
    assert clean.startswith("clean: 6 images, accuracy 100.00 %, ")
    assert first.startswith("APGD (cross_entropy): 6 images, robust accuracy ") and first.endswith(" s")
    assert second.startswith("FAB: ")
