"""The worst case over many trials: what it is, what it costs, and that nothing can interrupt or confuse it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.attacks import PGD, Linf
from deq_jax.classifiers import Dynamics, Equilibrium, Explicit
from deq_jax.config import from_tree, to_tree
from deq_jax.data import Images, evaluation_batches
from deq_jax.evaluation import (
    attack_batch,
    choose_early_state,
    correctness,
    evaluator,
    is_correct,
    measure,
    row_names,
    spectral_radii,
)
from deq_jax.gradients import Implicit, Phantom
from deq_jax.losses import margin
from deq_jax.models.small import SmallCell, SmallDecoder, SmallEncoder
from deq_jax.readouts import EnsembleState, IntermediateState
from deq_jax.results import worst_of
from deq_jax.solvers import Broyden
from deq_jax.surrogates import Direct, Intermediate, WithGradient, deployed
from deq_jax.transfers import Transfer, is_within
from deq_jax.trials import (
    Diagnostics,
    EarlyState,
    EvalConfig,
    Noise,
    Trial,
    auto_attack,
    diagnostics,
    gradient_queries,
    threat_of,
    with_surrogates,
)
from deq_jax.types import Injection, InputError, Keys
from deq_jax.worst_case import worst_case
from tests import dense, tiny
from tests.linear import DATA, Linear, trained

ROOT = Path(__file__).parents[1]
THREAT = Linf(0.05)
ATTACK = PGD(Linf(0.05), steps=2, step_size=0.025)
FAR = PGD(Linf(0.3), steps=2, step_size=0.15)
TRIALS = (
    Trial("uniform", Noise(THREAT)),
    Trial("direct", ATTACK, suite="both"),
    Trial("more", replace(ATTACK, steps=5), suite="both"),
)
EXTRA = Diagnostics(
    *(Trial(name, Noise(THREAT)) for name in ("noise", "fgsm", "pgd", "half", "long")), far=Trial("far", FAR)
)
OWN = EvalConfig(THREAT, TRIALS, EXTRA, batch_size=16, skip_broken=False)
CUMULATIVE = replace(OWN, skip_broken=True)


CLASSIFIER = Explicit(Linear())
IMAGES = Images(DATA.test.x[:60], DATA.test.y[:60])


def evaluate(config, out, **options):
    return worst_case(config, CLASSIFIER, trained(), IMAGES, out, **options)


@pytest.fixture(scope="module")
def deq():
    """A DEQ without training, and 20 images with labels that it gives them."""
    x, dynamics = DATA.test.x[:20], Dynamics(Broyden(3), gradient=Phantom(1, 0.5))
    parts = SmallEncoder(4, strides=4), SmallCell(4, expansion=1, groups=2), SmallDecoder(10)
    classifier = Equilibrium(*parts, dynamics)
    variables = classifier.init(jax.random.key(2), jnp.asarray(x))
    logits = jax.jit(lambda x: classifier(variables, x).logits)(x)
    return classifier, variables, Images(x, np.array(jnp.argmax(logits, axis=1), np.int32))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The evaluation whose trials attack every image, and its folder."""
    out = tmp_path_factory.mktemp("own")
    return evaluate(OWN, out), out


@pytest.fixture(scope="module")
def cumulative(tmp_path_factory):
    out = tmp_path_factory.mktemp("cumulative")
    return evaluate(CUMULATIVE, out), out


def test_measured_states_are_decoded_as_they_are(deq):
    classifier, variables, images = deq
    measured = jax.jit(lambda x: measure(classifier, variables, x, images.y))(images.x)
    assert row_names(measured) == ["z_1", "z_2", "z_3", "ensemble", "deployed"]
    predictors = [*(deployed(classifier, readout) for readout in (IntermediateState(2), EnsembleState())), classifier]
    for row, predictor in zip((1, 3, 4), predictors, strict=True):
        logits = jax.jit(lambda x, p=predictor: p(variables, x).logits)(images.x)
        np.testing.assert_array_equal(measured.label[:, row], jnp.argmax(logits, axis=1))
        np.testing.assert_allclose(measured.margin[:, row], margin(logits, images.y), rtol=1e-4, atol=1e-5)


def test_spectral_radii_are_those_of_dense_jacobians():
    """A symmetric weight, scaled by the slope of tanh, has real eigenvalues, on which power iteration settles."""
    base = dense.defence_of(Broyden(20)).base
    x = jnp.asarray(DATA.test.x[:3])
    variables = base.init(jax.random.key(0), x)
    weight = variables["params"]["cell"]["Dense_0"]["kernel"]
    variables["params"]["cell"]["Dense_0"]["kernel"] = weight @ weight.T
    z, u = base(variables, x).solution.z, base.encode(variables, x)

    def cell(z, u):
        return base.apply_cell(variables["params"]["cell"], z[None], Injection(u[None]))[0]

    jacobians = jax.vmap(jax.jacobian(cell))(z, u.features)
    expected = np.abs(np.linalg.eigvals(jacobians)).max(axis=1)
    found = spectral_radii(base, variables, x, Keys.of(jax.random.key(1), 3))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert len(set(np.round(expected, 3))) == 3
    assert np.isnan(spectral_radii(CLASSIFIER, trained(), x, Keys.of(jax.random.key(1), 3))).all()


class TestWorstCase:
    def test_union_is_never_above_a_row_that_counts(self, own):
        result, _ = own
        accuracies = result.accuracies()
        counted = ["clean", "uniform", "direct", "more", "both", "noise", "fgsm", "pgd", "half", "long"]
        assert list(accuracies) == [*counted, "far", "union"]
        for name in counted:
            for predictor, accuracy in accuracies[name].items():
                assert accuracies["union"][predictor] <= accuracy
        assert 0.1 < accuracies["union"]["deployed"] < accuracies["clean"]["deployed"] - 0.1
        both = [result.robust()[name] for name in ("direct", "more")]
        np.testing.assert_array_equal(result.robust()["both"], both[0] & both[1])

    def test_worst_images_are_classified_as_the_union_says(self, own):
        result, images = own[0], IMAGES
        measured = jax.jit(lambda x: measure(CLASSIFIER, trained(), x, images.y))(result.x_adv)
        np.testing.assert_array_equal(measured.label, result.worst.label)
        np.testing.assert_array_equal(
            is_correct(measured, images.y)[:, -1] & is_correct(result.clean, images.y)[:, -1],
            result.robust()["union"][:, -1],
        )
        assert is_within(result.x_adv, images.x, THREAT).all()
        inside = [attempt for attempt in result.attempts.values() if attempt.inside.all()]
        margins = np.max([attempt.measured.margin[:, -1] for attempt in inside], axis=0)
        assert (result.worst.margin[:, -1] >= margins - 1e-5).all()

    def test_noise_goes_to_the_surface_of_the_ball(self, own):
        """But for a pixel that [0, 1] stops."""
        moved = own[0].attempts["uniform"].x_adv - IMAGES.x
        np.testing.assert_allclose(THREAT.length(moved), THREAT.epsilon, rtol=0.1)
        assert 0.2 < np.mean(moved > 0) < 0.8

    def test_what_lies_outside_the_ball_does_not_count(self, own):
        result, _ = own
        far = result.attempts["far"]
        assert not far.inside.any()
        assert result.accuracies()["far"]["deployed"] < result.accuracies()["union"]["deployed"]

    def test_a_trial_outside_the_ball_is_refused(self, tmp_path):
        config = EvalConfig(THREAT, (Trial("far", Rogue()),), batch_size=16, max_images=4)
        with pytest.raises(InputError, match=r"trial far: . adversarial images .* more than Linf\(epsilon=0.05\)"):
            evaluate(config, tmp_path)

    def test_trials_can_start_from_the_worst_image_so_far(self, tmp_path):
        """From where a step that is too small to matter leads nowhere; a large one finds more."""
        still = Trial("still", PGD(THREAT, steps=1, step_size=1e-7), from_worst=True)
        on = Trial("on", replace(ATTACK, steps=10), from_worst=True)
        config = EvalConfig(THREAT, (TRIALS[0], TRIALS[1], still, on), batch_size=16, skip_broken=False)
        result = evaluate(config, tmp_path)
        before = {trial.name: result.attempts[trial.name] for trial in TRIALS[:2]}
        x_adv, worst = worst_of(IMAGES.x, IMAGES.y, result.clean, before)
        np.testing.assert_allclose(result.attempts["still"].x_adv, x_adv, atol=2e-7)
        union = np.logical_and.reduce([result.robust()[name] for name in before])
        assert (result.robust()["on"] <= union).all()
        higher = result.attempts["on"].measured.margin[:, -1] - worst.margin[:, -1]
        assert higher.min() > -1e-4 and np.mean(higher) > 1e-2
        with pytest.raises(InputError, match="from_worst is for PGD, got Noise"):
            replace(TRIALS[0], from_worst=True)

    def test_cumulative_trials_attack_what_is_left_with_the_same_result(self, own, cumulative):
        (every, _), (left, _) = own, cumulative
        clean = is_correct(every.clean, every.y)[:, -1]
        alive = clean
        for trial in TRIALS:
            attempt = left.attempts[trial.name]
            np.testing.assert_array_equal(attempt.attacked, alive)
            same = np.abs(attempt.x_adv - every.attempts[trial.name].x_adv) < 1e-6
            assert np.mean(same[alive]) > 0.99  # but for signs of gradients that are 0 to rounding
            np.testing.assert_array_equal(left.robust()[trial.name][:, -1], alive & ~left.broken(trial.name))
            alive = alive & ~left.broken(trial.name)
        assert all(left.attempts[trial.name].attacked.all() for trial in OWN.extra_trials)
        assert left.accuracies()["union"]["deployed"] == every.accuracies()["union"]["deployed"]

    @pytest.mark.parametrize("batch_size", [8, 32])
    def test_neither_batch_size_nor_devices_matter(self, batch_size, own, tmp_path):
        config = replace(OWN, trials=TRIALS[1:2], diagnostics=None, batch_size=batch_size)
        found = evaluate(config, tmp_path).attempts["direct"]
        expected = own[0].attempts["direct"]
        assert np.mean(np.abs(found.x_adv - expected.x_adv) < 1e-6) > 0.99
        np.testing.assert_array_equal(found.measured.label[:, -1], expected.measured.label[:, -1])

    def test_one_device_finds_what_eight_do(self, own):
        assert jax.local_device_count() == 8
        batch = evaluation_batches(IMAGES, 60)[0]
        one = jax.jit(lambda b: attack_batch(CLASSIFIER, trained(), ATTACK, b, seed=0, surrogate=Direct()))
        x_adv, measured = one(batch)
        assert np.mean(np.abs(x_adv - own[0].attempts["direct"].x_adv) < 1e-6) > 0.99
        np.testing.assert_array_equal(measured.label[:, -1], own[0].attempts["direct"].measured.label[:, -1])

    def test_logits_that_are_not_finite_are_an_error(self, tmp_path):
        broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), trained())
        with pytest.raises(InputError, match="logits of 60 clean images are not finite"):
            worst_case(replace(OWN, trials=(), diagnostics=None), CLASSIFIER, broken, IMAGES, tmp_path)

    def test_surrogates_that_do_not_fit_are_named(self, deq, tmp_path):
        config = replace(OWN, trials=(Trial("late", ATTACK, Intermediate(5)),), diagnostics=None)
        with pytest.raises(InputError, match="trial late: Intermediate: state must be an integer from 1 to 3, got 5"):
            worst_case(config, *deq, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Rogue:
    """Leaves the ball."""

    def __call__(self, oracle, x, target, key):
        return jnp.clip(x + 0.1, 0, 1)


TRACES: list[float] = []


@dataclass(frozen=True)
class Traced(PGD):
    """PGD that notes when it is traced."""

    def __call__(self, oracle, x, target, key):
        TRACES.append(self.threat.epsilon)
        return super().__call__(oracle, x, target, key)


def test_surrogates_that_differ_in_numbers_are_compiled_once(deq, tmp_path):
    attack = Traced(Linf(0.05), steps=1, step_size=0.05, best_of=False)
    trials = with_surrogates("a", attack, [Intermediate(1, 1, 0.5), Intermediate(2, 9, 1), Intermediate(3, 5, 0.25)])
    config = EvalConfig(THREAT, trials, batch_size=16, max_images=16, skip_broken=False)
    TRACES.clear()
    result = worst_case(config, *deq, tmp_path)
    assert len(TRACES) == 1
    first, second, _ = result.attempts.values()
    assert not np.array_equal(first.x_adv, second.x_adv)


def arrays(folder):
    """All arrays in the npz files below a folder, but seconds."""
    found = {}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as file:
            found |= {f"{path.relative_to(folder)}/{name}": file[name] for name in file.files if name != "seconds"}
    return found


def assert_same_files(a, b):
    first, second = arrays(a), arrays(b)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


class TestResuming:
    def test_what_is_there_is_not_computed_again_and_what_is_missing_comes_back(self, cumulative, tmp_path):
        result, out = cumulative
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
        missing = out / "trials" / "direct" / "batch-0000.npz"
        missing.rename(tmp_path / "expected.npz")
        shares = []
        again = evaluate(CUMULATIVE, out, report=lambda name, share: shares.append(share))
        assert shares == sorted(shares) and shares[-1] == 1
        changed = [path for path in times if path.stat().st_mtime_ns != times[path]]
        assert changed == [missing]
        with np.load(missing) as found, np.load(tmp_path / "expected.npz") as expected:
            for name in set(found.files) - {"seconds"}:
                np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(again.x_adv, result.x_adv)
        assert again.accuracies() == result.accuracies()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda c, m, v, i: (replace(c, seed=1), m, v, i), "config.seed was 0, now 1"),
            (lambda c, m, v, i: (replace(c, batch_size=24), m, v, i), "config.batch_size was 16, now 24"),
            (
                lambda c, m, v, i: (replace(c, trials=(*c.trials[:2], Trial("more", ATTACK, suite="both"))), m, v, i),
                r"config.trials\[2\].attack.steps was 5, now 2",
            ),
            (lambda c, m, v, i: (c, m, jax.tree.map(lambda leaf: leaf + 1, v), i), "variables was '"),
            (lambda c, m, v, i: (c, m, v, Images(i.x, i.y[::-1])), "images was '"),
        ],
        ids=["seed", "batch-size", "trial", "variables", "images"],
    )
    def test_another_evaluation_in_the_same_folder_is_refused(self, change, words, cumulative):
        out = cumulative[1]
        before = arrays(out)
        with pytest.raises(InputError, match=f"holds another evaluation: {words}"):
            worst_case(*change(CUMULATIVE, CLASSIFIER, trained(), IMAGES), out)
        assert arrays(out).keys() == before.keys()

    def test_a_damaged_file_is_named(self, tmp_path):
        config = EvalConfig(THREAT, (), batch_size=16)
        evaluate(config, tmp_path)
        path = tmp_path / "trials" / "clean" / "batch-0001.npz"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(InputError, match=r"clean/batch-0001.npz: cannot be read as an npz file"):
            evaluate(config, tmp_path)

    @pytest.mark.slow
    def test_killed_at_any_moment_it_ends_with_the_same_bits(self, tmp_path):
        command = "import sys; from tests.test_worst_case import run; run(sys.argv[1])"

        def start(out):
            return subprocess.Popen([sys.executable, "-c", command, str(out)], cwd=ROOT, env=dict(os.environ))

        assert start(tmp_path / "whole").wait(600) == 0
        for moment in (1, 3, 4, 6, 9):
            process = start(tmp_path / "killed")
            while process.poll() is None and len(list((tmp_path / "killed").rglob("batch-*.npz"))) < moment:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("batch-*.npz")}
        assert start(tmp_path / "killed").wait(600) == 0
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
        assert_same_files(tmp_path / "whole", tmp_path / "killed")


def run(out):
    """What the killed process runs."""
    evaluate(replace(CUMULATIVE, batch_size=8), Path(out))


class TestTransfer:
    def test_images_come_back_from_a_file_and_from_a_folder(self, own, tmp_path):
        result, out = own
        np.savez(tmp_path / "images.npz", x_adv=result.attempts["direct"].x_adv, y=IMAGES.y)
        paths = {"file": tmp_path / "images.npz", "folder": out / "trials" / "direct"}
        trials = tuple(Trial(name, Transfer(str(path))) for name, path in paths.items())
        found = evaluate(EvalConfig(THREAT, trials, batch_size=16, skip_broken=False), tmp_path / "out")
        for attempt in found.attempts.values():
            np.testing.assert_array_equal(attempt.x_adv, result.attempts["direct"].x_adv)
            np.testing.assert_array_equal(attempt.measured.label, result.attempts["direct"].measured.label)

    def test_images_that_have_changed_are_not_mixed_with_what_is_there(self, tmp_path):
        path, config = tmp_path / "a.npz", EvalConfig(THREAT, (), batch_size=16)
        config = replace(config, trials=(Trial("before", Transfer(str(path))),))
        np.savez(path, x_adv=IMAGES.x)
        evaluate(config, tmp_path / "out")
        np.savez(path, x_adv=np.clip(IMAGES.x + 0.01, 0, 1))
        with pytest.raises(InputError, match=r"holds another evaluation: transfers\.before was '"):
            evaluate(config, tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda x, y: {"x": x}, "expected an array x_adv, found x"),
            (lambda x, y: {"x_adv": x[1:]}, r"expected x_adv of shape \(60, 8, 8, 1\), got \(59, 8, 8, 1\)"),
            (lambda x, y: {"x_adv": x, "y": y[::-1]}, "its labels y are not those of the 60 images"),
            (lambda x, y: {"x_adv": np.round(255 * x).astype(np.uint8)}, "x_adv must be floating and within"),
            (lambda x, y: {"x_adv": x + 1}, "x_adv must be floating and within"),
            (lambda x, y: {"x_adv": np.full_like(x, np.nan)}, "x_adv must be floating and within"),
            (lambda x, y: {"x_adv": np.clip(x + 0.4, 0, 1)}, r"60 adversarial images .* 0.4 away .* more than Linf"),
            (lambda x, y: None, "cannot be read as an npz file"),
        ],
        ids=["missing", "count", "labels", "uint8", "outside", "nan", "radius", "text"],
    )
    def test_other_images_are_refused(self, change, words, tmp_path):
        path, images = tmp_path / "a.npz", IMAGES
        given = change(images.x, images.y)
        path.write_text("no") if given is None else np.savez(path, **given)
        with pytest.raises(InputError, match=f"a.npz: {words}"):
            Transfer(str(path)).load(images, images.x, THREAT)
        with pytest.raises(InputError, match="cannot be read"):
            Transfer(str(tmp_path / "none.npz")).load(images, images.x, THREAT)
        with pytest.raises(InputError, match="expected a trial's files"):
            Transfer(str(tmp_path)).load(images, images.x, THREAT)


class TestEarlyState:
    def test_accuracies_are_those_of_each_state_attacked_on_its_own(self, deq):
        classifier, variables, images = deq
        found = choose_early_state(classifier, variables, images, ATTACK, batch_size=16)
        assert len(found) == 3
        predictor = deployed(classifier, IntermediateState(2))
        outcomes = evaluator(predictor, ATTACK, batch_size=16)(variables, images)
        _, robust = correctness(outcomes)
        assert found[1] == pytest.approx(robust[:, -1].mean())

    def test_the_best_one_is_deployed_and_recorded(self, deq, tmp_path, monkeypatch):
        accuracies = iter([[0.1, 0.3, 0.2]])
        monkeypatch.setattr("deq_jax.worst_case.choose_early_state", lambda *_, **__: next(accuracies))
        config = EvalConfig(THREAT, (), predictor=EarlyState(ATTACK), defence="early", batch_size=16)
        with pytest.raises(InputError, match="held-out training images"):
            worst_case(config, *deq, tmp_path)
        for _ in range(2):  # it is chosen once
            result = worst_case(config, *deq, tmp_path, validation=deq[2])
            assert result.early_state == [0.1, 0.3, 0.2]
        np.testing.assert_array_equal(result.clean.label[:, -1], result.clean.label[:, 1])
        assert not np.array_equal(result.clean.margin[:, -1], result.clean.margin[:, 2])


class TestConfig:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: EvalConfig(THREAT, (), batch_size=0), "batch_size must be positive, got 0"),
            (lambda: EvalConfig(THREAT, (), seed=-1), "seed must be >= 0, got -1"),
            (lambda: EvalConfig(THREAT, (), max_images=0), "max_images must be positive or None, got 0"),
            (lambda: EvalConfig(THREAT, (TRIALS[0], TRIALS[0])), "found twice: uniform"),
            (lambda: EvalConfig(THREAT, (replace(TRIALS[0], suite="clean"),)), "found twice: clean"),
            (lambda: EvalConfig(THREAT, (), predictor=CLASSIFIER), "defence must be a name .* got 'none' for Explicit"),
            (lambda: EvalConfig(THREAT, (), defence="x"), "'none' otherwise, got 'x' for None"),
            (lambda: EvalConfig(Linf(0.1), auto_attack(THREAT)[1:2]), "trial apgd-t attacks with radius 0.05, but"),
            (lambda: Trial("a/b", ATTACK), "a name consists of .* got 'a/b'"),
            (lambda: Trial("union", ATTACK), "not one of clean, union, got 'union'"),
            (lambda: threat_of(tiny.get_config(validation_attack=Noise(THREAT))), "is no PGD"),
        ],
    )
    def test_mistakes(self, make, words):
        with pytest.raises(InputError, match=words):
            make()

    def test_it_can_be_written_and_read_again(self):
        trials = (*TRIALS, *auto_attack(THREAT), Trial("exact", ATTACK, WithGradient(Implicit(Broyden(3)))))
        config = EvalConfig(
            THREAT, trials, diagnostics(THREAT), predictor=tiny.classifier(EnsembleState()), defence="mean"
        )
        assert from_tree(to_tree(config)) == config

    def test_diagnostics_are_ordered_and_stay_within_the_ball_but_for_one(self):
        trials = diagnostics(Linf(0.1), steps=100)
        steps = [trial.attack.steps for trial in (trials.fgsm, trials.pgd, trials.half, trials.long)]
        assert steps == [1, 10, 50, 100]
        assert trials.half.attack.step_size == trials.long.attack.step_size
        assert [trials.pgd.attack.threat.epsilon, trials.far.attack.threat.epsilon] == [0.1, pytest.approx(0.8)]

    def test_gradient_queries(self):
        ce, targeted, fab, square = (trial.attack for trial in auto_attack(THREAT))
        assert [gradient_queries(attack) for attack in (ce, targeted, fab, square)] == [101, 909, None, 0]
        assert gradient_queries(replace(ATTACK, restarts=3)) == 6
