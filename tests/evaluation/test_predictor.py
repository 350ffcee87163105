"""A predictor as one value, and its assessment in memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as dj
from deq_jax import InputError, Keys, Predictor
from deq_jax.attacks import APGD, PGD, Linf, Noise, Square, Targeted
from deq_jax.core import logit_difference
from deq_jax.evaluation import (
    Diagnostics,
    EvalConfig,
    Trial,
    default_trials,
    is_correct,
    measure,
    white_box_trials,
    worst_case,
)
from deq_jax.surrogates import Intermediate, judged
from tests.helpers import dense, linear

BALL = Linf(0.1)
LINEAR = Predictor(dj.Explicit(linear.Linear()), linear.trained())
X, Y = linear.DATA.test.x[:24], linear.DATA.test.y[:24]
TRIALS = (Trial("pgd", PGD(BALL, steps=3)), Trial("apgd", APGD(BALL, steps=5)), Trial("square", Square(BALL, 20)))


def deq():
    classifier = dense.defence_of().base
    return Predictor(classifier, classifier.init(0, jnp.zeros((2, 4, 4, 1))))


@pytest.mark.slow
def test_it_answers_as_its_parts_do():
    x, y = jax.random.uniform(jax.random.key(0), (3, 4, 4, 1)), jnp.array([0, 1, 2])
    predictor = deq()
    np.testing.assert_allclose(
        predictor.logits(x), predictor.classifier(predictor.variables, x).logits, rtol=1e-5, atol=1e-6
    )
    whole, parts = predictor.measure(x, y), measure(predictor.classifier, predictor.variables, x, y)
    for mine, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    assert predictor.accuracy(x, y) == pytest.approx(np.mean(is_correct(whole, y).deployed))
    oracle = judged(Intermediate(2), predictor.classifier, predictor.variables)
    keys = Keys.of(0, 3)
    ask = predictor.oracle(Intermediate(2)).grad(dj.core.cross_entropy, x, y, keys)
    for mine, other in zip(ask, oracle.grad(dj.core.cross_entropy, x, y, keys), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_it_is_a_pytree_of_its_variables():
    assert jax.tree.leaves(LINEAR) == jax.tree.leaves(LINEAR.variables)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, LINEAR)
    assert doubled.classifier == LINEAR.classifier
    np.testing.assert_allclose(doubled.logits(X), 2 * LINEAR.logits(X), rtol=1e-5)


def test_accuracy_of_any_number_of_images_and_of_bytes():
    right = np.argmax(LINEAR.logits(X), axis=1) == Y
    assert LINEAR.accuracy(X, Y) == np.mean(right) == LINEAR.accuracy(X, Y, batch_size=7)
    assert np.isnan(LINEAR.accuracy(X[:0], Y[:0]))
    rounded = np.round(255 * X).astype(np.uint8)
    assert LINEAR.accuracy(rounded, Y) == LINEAR.accuracy(rounded / np.float32(255), Y)


class TestAssess:
    @pytest.mark.slow
    def test_memory_and_a_folder_give_the_same(self, tmp_path):
        memory, disk = (dj.assess(LINEAR, (X, Y), TRIALS, out=out) for out in (None, tmp_path / "e"))
        assert list(memory.attempts) == ["pgd", "apgd", "square"]
        assert memory.red_flags == disk.red_flags and len(memory.red_flags) == 9
        for name, attempt in memory.attempts.items():
            np.testing.assert_array_equal(attempt.read(), disk.attempts[name].read())
        np.testing.assert_array_equal(memory.x_adv, disk.x_adv)
        assert 0 <= memory.robust_accuracy < memory.clean_accuracy == LINEAR.accuracy(X, Y)
        config = EvalConfig(BALL, TRIALS, batch_size=24)
        again = worst_case(config, LINEAR.classifier, LINEAR.variables, dj.data.Images(X, Y), tmp_path / "e")
        assert again.robust_accuracy == memory.robust_accuracy == memory.accuracies()["union"]["deployed"]

    def test_no_file_is_written(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        dj.assess(LINEAR, (X, Y), TRIALS[:1])
        assert not list(tmp_path.iterdir())

    def test_red_flags_are_raised(self):
        """Rounded images have no gradient: only noise and Square move."""
        still = Predictor(dj.Explicit(linear.Linear(levels=4)), LINEAR.variables)
        result = dj.assess(still, (X, Y), (TRIALS[0], replace(TRIALS[2], suite="black")), skip_broken=False)
        raised = {flag.name for flag in result.red_flags if flag.raised}
        assert "zero gradients" in raised
        robust = f"robust at most {100 * result.robust_accuracy:.2f} %"
        assert f"{robust}; red flags raised: " in repr(result) and "zero gradients" in repr(result)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "attack",
        [APGD(BALL, steps=2), Square(BALL, 5), Targeted(PGD(BALL, steps=1, loss=logit_difference), 2)],
        ids=lambda attack: type(attack).__name__,
    )
    def test_any_attack_starts_from_the_worst_image_so_far(self, attack):
        again = Trial("again", attack, from_worst=True)
        result = dj.assess(LINEAR, (X, Y), (TRIALS[0], again), skip_broken=False)
        first, second = (result.attempts[name].measured.deployed.margin for name in ("pgd", "again"))
        fooled = first > 0
        assert (second[fooled] > 0).all() and fooled.any()
        if not isinstance(attack, APGD):  # whose loss is another one
            assert (second[~fooled] >= first[~fooled] - 1e-5).all()

    def test_an_attack_without_a_start_cannot(self):
        for attack in (Noise(BALL), lambda oracle, x, labels, key: x):
            with pytest.raises(InputError, match="from_worst is for attacks that take a start, got"):
                Trial("again", attack, from_worst=True)

    @pytest.mark.slow
    def test_diagnostics_of_the_same_run(self):
        pgd = [Trial(f"check.{steps}", PGD(BALL, steps=steps)) for steps in (1, 2, 4, 8)]
        far = Trial("check.far", PGD(Linf(0.8), steps=8))
        checks = Diagnostics(Trial("check.noise", Noise(BALL)), *pgd, far)
        result = dj.assess(LINEAR, (X, Y), (), threat=BALL, diagnostics=checks)
        assert all(flag.raised is not None for flag in result.red_flags if flag.name == "no plateau")
        assert result.robust_accuracy <= result.clean_accuracy

    def test_a_threat_is_needed(self):
        with pytest.raises(InputError, match="assess: expected a threat, such as"):
            dj.assess(LINEAR, (X, Y), ())

    def test_without_trials_there_is_no_robust_accuracy(self):
        result = dj.assess(LINEAR, (X, Y), (), threat=BALL)
        assert result.robust_accuracy is None and result.red_flags == ()
        assert repr(result).endswith("%, not attacked)")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: default_trials(LINEAR, BALL), "default_trials: predictor: .* predictor.classifier, got a Predictor"),
        (lambda: white_box_trials(LINEAR, BALL), "white_box_trials: expected an Equilibrium .* got a Predictor"),
        (lambda: Predictor(LINEAR.variables, LINEAR.classifier), "Predictor: classifier: .* got a dict with keys"),
        (lambda: LINEAR.oracle(Intermediate), "surrogate: .* got the class Intermediate"),
        (lambda: LINEAR.oracle(dj.Implicit()), r"surrogate: .* or WithGradient\(Implicit\(\)\) .* got an Implicit"),
        (lambda: LINEAR.accuracy(255 * X, Y), r"Predictor.accuracy: images must lie in \[0, 1\]"),
        (lambda: LINEAR.accuracy(X, Y[:3]), "Predictor.accuracy: expected one label per image, got 24 images"),
        (lambda: Trial("a", PGD), "Trial: attack: .* got the class PGD"),
        (lambda: Trial("a", PGD(BALL), Intermediate), "Trial: surrogate: .* got the class Intermediate"),
        (lambda: EvalConfig(0.1, ()), "EvalConfig: threat: expected a threat model, .* got 0.1"),
        (
            lambda: EvalConfig(BALL, (PGD(BALL),)),
            "EvalConfig: trials: expected a tuple of Trial, .* got a tuple of a PGD",
        ),
        (
            lambda: dj.assess(LINEAR.classifier, (X, Y), TRIALS),
            "assess: predictor: expected a Predictor, .* an Explicit",
        ),
        (lambda: dj.assess(LINEAR, X, TRIALS), "assess: images: expected a pair of images and labels, .* got float32"),
        (lambda: dj.assess(LINEAR, linear.DATA, TRIALS), "assess: images: .* got a Splits of"),
        (lambda: dj.assess(LINEAR, (X, Y), TRIALS[0]), "assess: trials: .* got a Trial"),
        (lambda: dj.assess(LINEAR, (X, Y), [PGD(BALL)]), "assess: trials: .* got a list of a PGD"),
        (lambda: dj.assess(LINEAR, (X, Y), threat=0.1), "APGD: threat: .* got 0.1"),
        (lambda: dj.assess(LINEAR, (X, Y[:3]), TRIALS), "worst_case: expected one label per image"),
        (lambda: dj.assess(LINEAR, (255 * X, Y), TRIALS), r"worst_case: images must lie in \[0, 1\]"),
        (
            lambda: worst_case(EvalConfig(BALL, ()), LINEAR, {}, linear.DATA.test),
            "worst_case: classifier: .* a Predictor",
        ),
    ],
)
def test_parts_that_are_none(make, found):
    with pytest.raises(InputError, match=found) as error:
        make()
    assert "\n" not in str(error.value)
