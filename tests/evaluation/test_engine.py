"""The worst case over many trials: what it is, what it costs, and that nothing can interrupt or confuse it."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    Broyden,
    Dynamics,
    EnsembleState,
    Equilibrium,
    Explicit,
    Implicit,
    InputError,
    IntermediateState,
    Keys,
    Phantom,
)
from deq_jax.attacks import APGD, FAB, L2, PGD, SPSA, AutoAttack, Linf, Noise, Square, Targeted
from deq_jax.core import Injection, margin
from deq_jax.data import Images, evaluation_batches
from deq_jax.defences import deployed
from deq_jax.evaluate import at_radius
from deq_jax.evaluation import (
    Diagnostics,
    EarlyState,
    EvalConfig,
    Transfer,
    Trial,
    choose_early_state,
    correctness,
    diagnostics,
    evaluator,
    is_correct,
    measure,
    named,
    red_flags,
    with_surrogates,
    worst_case,
)
from deq_jax.evaluation.engine import Batches
from deq_jax.evaluation.measure import attack_batch, spectral_radii
from deq_jax.evaluation.plan import auto_attack_trials
from deq_jax.evaluation.results import Worst
from deq_jax.evaluation.rows import Row
from deq_jax.evaluation.transfers import is_within
from deq_jax.models import SmallCell, SmallDecoder, SmallEncoder
from deq_jax.storage import from_tree, read_json, to_tree, write_json
from deq_jax.surrogates import BPDA, Direct, EndToEnd, Intermediate, MeanOverStates, OnBase, WithGradient
from deq_jax.training import threat_of
from tests.helpers import dense, tiny
from tests.helpers.linear import DATA, Linear, trained

ROOT = Path(__file__).parents[2]
THREAT, HALF = Linf(0.05), L2(0.5)
ATTACK = PGD(Linf(0.05), steps=2, step_size=0.025)
FAR = PGD(Linf(0.3), steps=2, step_size=0.15)
TRIALS = (
    Trial("uniform", Noise(THREAT)),
    Trial("direct", ATTACK, suite="both"),
    Trial("more", replace(ATTACK, steps=5), suite="both"),
)
EXTRA = Diagnostics(
    *(Trial(name, Noise(THREAT)) for name in ("noise", "fgsm", "pgd", "half", "long")), Trial("far", FAR)
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
    rows = named(measured)
    assert list(rows) == ["z_1", "z_2", "z_3", "ensemble", "deployed"]
    assert measured.states.label.shape == (20, 3) and measured.ensemble.label.shape == (20,)
    predictors = [*(deployed(classifier, readout) for readout in (IntermediateState(2), EnsembleState())), classifier]
    for name, predictor in zip(("z_2", "ensemble", "deployed"), predictors, strict=True):
        logits = jax.jit(lambda x, p=predictor: p(variables, x).logits)(images.x)
        np.testing.assert_array_equal(rows[name].label, jnp.argmax(logits, axis=1))
        np.testing.assert_allclose(rows[name].margin, margin(logits, images.y), rtol=1e-4, atol=1e-5)


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
    np.testing.assert_allclose(found.radius, expected, rtol=1e-3)
    assert found.settled.all()
    assert len(set(np.round(expected, 3))) == 3
    assert np.isnan(spectral_radii(CLASSIFIER, trained(), x, Keys.of(jax.random.key(1), 3)).radius).all()


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
        both = [result.robust()[name].deployed for name in ("direct", "more")]
        np.testing.assert_array_equal(result.robust()["both"].deployed, both[0] & both[1])

    def test_worst_images_are_classified_as_the_union_says(self, own):
        result, images = own[0], IMAGES
        measured = jax.jit(lambda x: measure(CLASSIFIER, trained(), x, images.y))(result.x_adv)
        np.testing.assert_array_equal(measured.deployed.label, result.worst.deployed.label)
        np.testing.assert_array_equal(
            is_correct(measured, images.y).deployed & is_correct(result.clean, images.y).deployed,
            result.robust()["union"].deployed,
        )
        assert is_within(result.x_adv, images.x, THREAT).all()
        inside = [attempt for attempt in result.attempts.values() if attempt.inside.all()]
        margins = np.max([attempt.measured.deployed.margin for attempt in inside], axis=0)
        assert (result.worst.deployed.margin >= margins - 1e-5).all()

    def test_noise_goes_to_the_surface_of_the_ball(self, own):
        """But for a pixel that [0, 1] stops."""
        moved = own[0].attempts["uniform"].read() - IMAGES.x
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
        worst = Worst(IMAGES.x, result.clean)
        for attempt in before.values():
            worst = worst.updated(IMAGES.y, attempt.read(), attempt.measured, attempt.inside)
        np.testing.assert_allclose(result.attempts["still"].read(), worst.x_adv, atol=2e-7)
        union = np.logical_and.reduce([result.robust()[name].deployed for name in before])
        assert (result.robust()["on"].deployed <= union).all()
        higher = result.attempts["on"].measured.deployed.margin - worst.measured.deployed.margin
        assert higher.min() > -1e-4 and np.mean(higher) > 1e-2
        with pytest.raises(InputError, match="from_worst is for attacks that take a start, got Noise"):
            replace(TRIALS[0], from_worst=True)

    def test_no_trial_is_read_again_for_the_worst_case(self, tmp_path, monkeypatch):
        """Neither at first, nor when the evaluation is resumed."""
        trials = (*TRIALS, *(Trial(f"on-{i}", ATTACK, from_worst=True) for i in range(2)))
        config = EvalConfig(THREAT, trials, batch_size=16, max_images=16)
        first = evaluate(config, tmp_path)
        folders = []

        def read(path, x):
            folders.append(path.name)
            return x

        monkeypatch.setattr("deq_jax.evaluation.store.read_trial", read)
        again = evaluate(config, tmp_path)
        np.testing.assert_array_equal(again.x_adv, first.x_adv)
        assert folders == []
        assert again.attempts["on-0"].read() is not None and folders == ["on-0"]

    def test_cumulative_trials_attack_what_is_left_with_the_same_result(self, own, cumulative):
        (every, _), (left, _) = own, cumulative
        clean = is_correct(every.clean, every.y).deployed
        alive = clean
        for trial in TRIALS:
            attempt = left.attempts[trial.name]
            np.testing.assert_array_equal(attempt.attacked, alive)
            same = np.abs(attempt.read() - every.attempts[trial.name].read()) < 1e-6
            assert np.mean(same[alive]) > 0.99  # but for signs of gradients that are 0 to rounding
            np.testing.assert_array_equal(left.robust()[trial.name].deployed, alive & ~left.broken(trial.name))
            alive = alive & ~left.broken(trial.name)
        assert all(left.attempts[trial.name].attacked.all() for trial in OWN.extra_trials)
        assert left.accuracies()["union"]["deployed"] == every.accuracies()["union"]["deployed"]

    @pytest.mark.parametrize("batch_size", [8, 32])
    def test_neither_batch_size_nor_devices_matter(self, batch_size, own, tmp_path):
        config = replace(OWN, trials=TRIALS[1:2], diagnostics=None, batch_size=batch_size)
        found = evaluate(config, tmp_path).attempts["direct"]
        expected = own[0].attempts["direct"]
        assert np.mean(np.abs(found.read() - expected.read()) < 1e-6) > 0.99
        np.testing.assert_array_equal(found.measured.deployed.label, expected.measured.deployed.label)

    def test_one_device_finds_what_eight_do(self, own):
        assert jax.local_device_count() == 8
        batch = evaluation_batches(IMAGES, 60)[0]
        one = jax.jit(lambda b: attack_batch(CLASSIFIER, trained(), ATTACK, b, seed=0, surrogate=Direct()))
        x_adv, measured = one(batch)
        assert np.mean(np.abs(x_adv - own[0].attempts["direct"].read()) < 1e-6) > 0.99
        np.testing.assert_array_equal(measured.deployed.label, own[0].attempts["direct"].measured.deployed.label)

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

    def __call__(self, oracle, x, labels, key, start=None):
        return jnp.clip(x + 0.1, 0, 1)


@dataclass(frozen=True)
class Declared(Rogue):
    """Declares a threat model."""

    threat: Any


@dataclass(frozen=True)
class Fixed(Rogue):
    """Declares one that is no field."""

    threat = Linf(0.1)


@pytest.fixture(scope="module")
def in_l2(tmp_path_factory):
    trials = (
        Trial("apgd", APGD(HALF, 20), suite="all"),
        Trial("square", Square(HALF, 100), suite="all"),
        Trial("on", PGD(HALF, steps=10), from_worst=True),
    )
    config = EvalConfig(HALF, trials, diagnostics(HALF, steps=100), batch_size=64, skip_broken=False)
    return evaluate(config, tmp_path_factory.mktemp("l2"))


class TestL2:
    """Softmax regression: its boundaries are hyperplanes, so that distances to them are known."""

    @pytest.mark.slow
    def test_no_flag_is_raised_and_all_are_checked_but_transfers(self, in_l2):
        raised = {flag.name: flag.raised for flag in red_flags(in_l2)}
        assert raised.pop("transfer beats direct attacks") is None
        assert set(raised.values()) == {False}

    def test_what_is_broken_lies_nearer_to_a_boundary_than_the_radius(self, in_l2):
        x, y, every = IMAGES.x, IMAGES.y, np.arange(60)
        kernel, bias = (trained()["params"]["Dense_0"][name] for name in ("kernel", "bias"))
        logits, distances = x.reshape(60, -1) @ kernel + bias, []
        for other in (y + shift for shift in range(1, 10)):
            normal = (kernel[:, other % 10] - kernel[:, y]).T.reshape(x.shape)
            gap = logits[every, y] - logits[every, other % 10]
            delta = HALF.to_hyperplane(x, normal, gap)  # the shortest one within the box
            reached = np.abs(np.sum(normal * delta, axis=(1, 2, 3)) - gap) < 1e-3
            distances.append(np.where(reached, HALF.length(delta), np.inf))
        distance, correct = np.min(distances, axis=0), in_l2.robust()["clean"].deployed
        inside = [name for name, attempt in in_l2.attempts.items() if attempt.inside.all()]
        assert set(in_l2.attempts) - set(inside) == {"check.far-pgd-50"}
        for name in inside:
            assert not np.any(in_l2.broken(name) & (distance > 0.501)), name
        assert np.sum(correct & (distance < 0.45)) > 15
        for name in ("check.pgd-10", "check.long-pgd-100"):
            assert in_l2.broken(name)[correct & (distance < 0.45)].all(), name

    def test_a_trial_goes_on_from_the_worst_image(self, in_l2):
        before = in_l2.robust()["apgd"].deployed & in_l2.robust()["square"].deployed
        assert (in_l2.robust()["on"].deployed <= before).all()


TRACES: list[float] = []


@dataclass(frozen=True)
class Traced(PGD):
    """PGD that notes when it is traced."""

    def __call__(self, oracle, x, labels, key, start=None):
        TRACES.append(self.threat.epsilon)
        return super().__call__(oracle, x, labels, key, start)


@pytest.mark.slow
def test_surrogates_that_differ_in_numbers_are_compiled_once(deq, tmp_path):
    attack = Traced(Linf(0.05), steps=1, step_size=0.05, best_of=False)
    trials = with_surrogates("a", attack, [Intermediate(1, 1, 0.5), Intermediate(2, 9, 1), Intermediate(3, 5, 0.25)])
    config = EvalConfig(THREAT, trials, batch_size=16, max_images=16, skip_broken=False)
    TRACES.clear()
    result = worst_case(config, *deq, tmp_path)
    assert len(TRACES) == 1
    first, second, _ = result.attempts.values()
    assert not np.array_equal(first.read(), second.read())


def arrays(folder):
    """All arrays in the npz files below a folder, but seconds."""
    found: dict[str, np.ndarray] = {}
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
        again = evaluate(CUMULATIVE, out, report=lambda moment: shares.append(moment.share))
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

    def test_other_settings_of_jax_are_refused(self, tmp_path):
        """A manifest of an older version does not tell them, and is taken as it is."""
        config, out = EvalConfig(THREAT, (), batch_size=16), tmp_path
        evaluate(config, out)
        message = r"settings\.jax_default_matmul_precision was None, now 'highest'"
        with jax.default_matmul_precision("highest"), pytest.raises(InputError, match=message):
            evaluate(config, out)
        manifest = read_json(out / "manifest.json")
        del manifest["settings"]
        write_json(out / "manifest.json", manifest)
        assert len(evaluate(config, out).y) == len(IMAGES.y)

    def test_a_damaged_file_is_named(self, tmp_path):
        config = EvalConfig(THREAT, (), batch_size=16)
        evaluate(config, tmp_path)
        path = tmp_path / "trials" / "clean" / "batch-0001.npz"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(InputError, match=r"clean/batch-0001.npz: cannot be read as an npz file"):
            evaluate(config, tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda found: {"number": found["number"][::-1]},
            lambda found: {"margin": found["margin"][:, :-1]},
            lambda found: {"margin": found["margin"][:-1]},
            lambda found: {name: found[name][:-1] for name in Row._fields},
            lambda found: {name: found[name][..., None] for name in Row._fields},
            lambda found: {"margin": found["margin"].astype(str)},
            lambda found: {"x_adv": found["x_adv"][:, :-1]},
        ],
        ids=["numbers", "columns", "rows", "all-rows", "axes", "text", "images"],
    )
    def test_a_kept_batch_of_other_shapes_is_refused(self, change, tmp_path):
        config = EvalConfig(THREAT, (Trial("uniform", Noise(THREAT)),), batch_size=16)
        evaluate(config, tmp_path)
        path = tmp_path / "trials" / "uniform" / "batch-0001.npz"
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        np.savez(path, **(found | change(found)))
        with pytest.raises(InputError, match="trial uniform, batch 1: the kept file is of other images or incomplete"):
            evaluate(config, tmp_path)

    @pytest.mark.slow
    def test_killed_at_any_moment_it_ends_with_the_same_bits(self, tmp_path):
        command = "import sys; from tests.evaluation.test_engine import run; run(sys.argv[1])"

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


class TestSharing:
    @pytest.mark.slow
    def test_two_compute_each_batch_once_and_give_what_one_gives(self, cumulative, tmp_path, monkeypatch):
        """Two threads, each with locks of its own, as two processes have."""
        alone, out = cumulative
        compute, computed = Batches._run, []

        def counted(batches, stage, rows):
            computed.append((stage.name, *rows))
            return compute(batches, stage, rows)

        monkeypatch.setattr(Batches, "_run", counted)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: evaluate(CUMULATIVE, tmp_path, share=True), range(2)))
        assert len(computed) == len({*computed}) == len(list(tmp_path.rglob("batch-*.npz")))
        assert_same_files(out, tmp_path)
        assert not list(tmp_path.rglob("*lock*"))
        for one in found:
            np.testing.assert_array_equal(one.x_adv, alone.x_adv)
            assert one.accuracies() == alone.accuracies()

    @pytest.mark.slow
    def test_processes_compute_what_one_does_although_one_is_killed(self, tmp_path):
        command = "import sys; from tests.evaluation.test_engine import run; run(sys.argv[1], share=True)"

        def start():
            return subprocess.Popen(
                [sys.executable, "-c", command, tmp_path / "shared"], cwd=ROOT, env=dict(os.environ)
            )

        run(tmp_path / "alone")
        killed, other = start(), start()
        while killed.poll() is None and len(list((tmp_path / "shared").rglob("batch-*.npz"))) < 3:
            time.sleep(0.01)
        killed.kill()
        third = start()
        assert [process.wait(600) for process in (killed, other, third)] == [-signal.SIGKILL, 0, 0]
        assert_same_files(tmp_path / "alone", tmp_path / "shared")

    def test_who_does_not_share_is_refused(self, tmp_path):
        config, told = EvalConfig(THREAT, (), batch_size=16), []

        def start_again(moment):
            with pytest.raises(InputError, match=rf"in use: process {os.getpid()} on .* shares it with others"):
                evaluate(config, tmp_path)
            with pytest.raises(InputError, match=r"holds another evaluation: config\.seed was 0, now 1"):
                evaluate(replace(config, seed=1), tmp_path, share=True)
            told.append(moment)

        evaluate(config, tmp_path, share=True, report=start_again)
        assert told
        with pytest.raises(InputError, match="share: expected a folder"):
            evaluate(config, None, share=True)


def run(out, **options):
    """What the killed process runs."""
    evaluate(replace(CUMULATIVE, batch_size=8), Path(out), **options)


class TestTransfer:
    def test_images_come_back_from_a_file_and_from_a_folder(self, own, tmp_path):
        result, out = own
        np.savez(tmp_path / "images.npz", x_adv=result.attempts["direct"].read(), y=IMAGES.y)
        paths = {"file": tmp_path / "images.npz", "folder": out / "trials" / "direct"}
        trials = tuple(Trial(name, Transfer(str(path))) for name, path in paths.items())
        found = evaluate(EvalConfig(THREAT, trials, batch_size=16, skip_broken=False), tmp_path / "out")
        for attempt in found.attempts.values():
            np.testing.assert_array_equal(attempt.read(), result.attempts["direct"].read())
            expected = result.attempts["direct"].measured
            np.testing.assert_array_equal(attempt.measured.deployed.label, expected.deployed.label)

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
            (lambda x, y: {"x_adv": x, "y": y[::-1]}, "its labels y are not the labels of the 60 images"),
            (lambda x, y: {"x_adv": np.round(255 * x).astype(np.uint8)}, "x_adv: images must be floating"),
            (lambda x, y: {"x_adv": x + 1}, r"x_adv: images must lie in \[0, 1\], found \["),
            (lambda x, y: {"x_adv": np.full_like(x, np.nan)}, r"x_adv: images must lie in \[0, 1\], found \[nan"),
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

    def test_rounding_at_the_edges_of_the_box_is_clipped(self, tmp_path):
        x = np.clip(IMAGES.x, 0, 1)
        np.savez(tmp_path / "a.npz", x_adv=np.where(x == 0, -2.98e-8, x))
        np.testing.assert_array_equal(Transfer(str(tmp_path / "a.npz")).load(IMAGES, x, THREAT), x)


class TestEarlyState:
    @pytest.mark.slow
    def test_accuracies_are_those_of_each_state_attacked_on_its_own(self, deq):
        classifier, variables, images = deq
        found = choose_early_state(classifier, variables, images, ATTACK, batch_size=16)
        assert len(found) == 3
        predictor = deployed(classifier, IntermediateState(2))
        outcomes = evaluator(predictor, ATTACK, batch_size=16)(variables, images)
        _, robust = correctness(outcomes)
        assert found[1] == pytest.approx(robust.deployed.mean())

    @pytest.mark.slow
    def test_the_best_one_is_deployed_and_recorded(self, deq, tmp_path, monkeypatch):
        accuracies, (classifier, variables, images) = iter([[0.1, 0.3, 0.2]]), deq
        monkeypatch.setattr("deq_jax.evaluation.engine.choose_early_state", lambda *_, **__: next(accuracies))
        config = EvalConfig(THREAT, (), predictor=EarlyState(ATTACK), defence="early", batch_size=16)
        with pytest.raises(InputError, match="held-out training images"):
            worst_case(config, classifier, variables, images, tmp_path)
        for _ in range(2):  # it is chosen once
            result = worst_case(config, classifier, variables, images, tmp_path, validation=images)
            assert result.early_state == [0.1, 0.3, 0.2]
        states = named(result.clean)
        np.testing.assert_array_equal(states["deployed"].label, states["z_2"].label)
        assert not np.array_equal(states["deployed"].margin, states["z_3"].margin)


class TestConfig:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: EvalConfig(THREAT, (), batch_size=0), "batch_size must be a positive integer, got 0"),
            (lambda: EvalConfig(THREAT, (), seed=-1), "seed must be an integer >= 0, got -1"),
            (lambda: EvalConfig(THREAT, (), max_images=0), "max_images must be a positive integer or None, got 0"),
            (lambda: EvalConfig(THREAT, (TRIALS[0], TRIALS[0])), "found twice: uniform"),
            (lambda: EvalConfig(THREAT, (replace(TRIALS[0], suite="clean"),)), "found twice: clean"),
            (lambda: EvalConfig(THREAT, (), predictor=CLASSIFIER), "must be a name .* got 'none' for an Explicit"),
            (lambda: EvalConfig(THREAT, (), defence="x"), "'none' otherwise, got 'x' for None"),
            (
                lambda: EvalConfig(Linf(0.1), auto_attack_trials(THREAT)[1:2]),
                r"trial apgd-t attacks within Linf\(epsilon=0.05\), but",
            ),
            (lambda: Trial("a/b", ATTACK), "a name consists of .* got 'a/b'"),
            (lambda: Trial("union", ATTACK), "not one of clean, union, got 'union'"),
            (
                lambda: threat_of(tiny.get_config(validation_attack=Rogue())),
                "validation_attack, Rogue, declares no threat",
            ),
        ],
    )
    def test_mistakes(self, make, words):
        with pytest.raises(InputError, match=words):
            make()

    @pytest.mark.parametrize(
        "attack",
        [
            APGD(L2(0.05), 2),
            PGD(L2(0.05)),
            Noise(Linf(0.04)),
            Targeted(APGD(L2(0.05), 2)),
            Targeted(Targeted(FAB(Linf(0.1)))),
            AutoAttack.standard(L2(0.05)),
            AutoAttack((APGD(THREAT), Square(Linf(0.1)))),
            AutoAttack((Rogue(), Targeted(SPSA(L2(0.05))))),
            Declared(L2(0.05)),
        ],
        ids=lambda attack: type(attack).__name__,
    )
    def test_another_threat_model_is_refused_when_the_config_is_built(self, attack):
        words = r"trial one(: AutoAttack: expected attacks of one threat| attacks within (L2|Linf).* but the threat is)"
        with pytest.raises(InputError, match=words):
            EvalConfig(THREAT, (Trial("zero", ATTACK), Trial("one", attack)))
        with pytest.raises(InputError, match=words):
            EvalConfig(THREAT, (), replace(EXTRA, long=Trial("one", attack)))

    def test_the_same_threat_model_or_none_is_accepted(self):
        attacks = (Declared(THREAT), Rogue(), Targeted(Rogue()), AutoAttack((Rogue(),)), Declared(None))
        EvalConfig(THREAT, tuple(Trial(f"{i}", attack) for i, attack in enumerate(attacks)))
        with pytest.raises(InputError, match=r"diagnostics.far attacks within L2.*, expected the norm of Linf"):
            EvalConfig(THREAT, (), replace(EXTRA, far=Trial("far", PGD(L2(0.4)))))

    @pytest.mark.parametrize(("threat", "far"), [(L2(0.5), L2(4.0)), (Linf(0.1), Linf(0.8)), (Linf(0.3), Linf(1.0))])
    def test_diagnostics_are_in_the_norm_of_the_threat(self, threat, far):
        checks = diagnostics(threat, steps=20, surrogate=Intermediate(2))
        EvalConfig(threat, (), checks)
        assert checks.far.attack.threat == far
        roles = [trial for trial in vars(checks).values() if trial is not checks.far]
        assert {trial.attack.threat for trial in roles} == {threat}
        gradients = {trial.surrogate for trial in vars(checks).values() if trial.attack.uses_gradients}
        assert gradients == {Intermediate(2)}
        with pytest.raises(InputError, match="diagnostics: steps must be an integer >= 2, got 1"):
            diagnostics(threat, steps=1)

    @pytest.mark.parametrize("steps", [2, 3, 10, 20, 50, 100])
    def test_names_of_our_own_making_do_not_collide(self, steps):
        surrogates = [Direct(), Intermediate(1), Intermediate(1, 5, 1), *map(MeanOverStates, range(10))]
        surrogates += [MeanOverStates(9, 0.5000001), MeanOverStates(9, 0.50000011), BPDA(), BPDA(random=True)]
        surrogates += [OnBase(Direct()), OnBase(Intermediate(1)), EndToEnd(), EndToEnd(smooth=True)]
        surrogates += [
            WithGradient(Implicit(Broyden(steps))),
            WithGradient(Implicit(Broyden(30))),
            WithGradient(Phantom(5)),
        ]
        surrogates = list(dict.fromkeys(surrogates))
        names = ("pgd-10", "noise", "fgsm", "pgd", "half", "long", "far", f"pgd-{steps}", f"pgd-{steps // 2}")
        own = tuple(Trial(name, ATTACK) for name in dict.fromkeys(names))
        trials = (*own, *with_surrogates("pgd-10", ATTACK, surrogates), *auto_attack_trials(THREAT))
        EvalConfig(THREAT, trials, diagnostics(THREAT, steps=steps))

    def test_whose_a_name_is_that_occurs_twice(self):
        checks = diagnostics(THREAT, steps=100)
        mine = Trial(checks.half.name, ATTACK, suite="both")
        words = r"found twice: both \(trials\[0\] and a suite\), check.half-pgd-50 \(trials\[1\] and diagnostics.half\)"
        with pytest.raises(InputError, match=words):
            EvalConfig(THREAT, (Trial("both", ATTACK), mine), checks)

    @pytest.mark.parametrize(
        "attack",
        [
            ATTACK,
            PGD(L2(0.5)),
            APGD(L2(0.5), 3),
            Targeted(APGD(Linf(0.1))),
            AutoAttack.plus(L2(0.5)),
            Declared(L2(0.5)),
        ],
        ids=lambda attack: type(attack).__name__,
    )
    def test_another_radius_is_one_of_the_same_norm(self, attack):
        train = tiny.get_config(validation_attack=attack)
        threat = threat_of(train)
        assert threat == attack.threat
        changed = at_radius(train, 0.25)
        assert threat_of(changed) == replace(attack.threat, epsilon=0.25)
        assert at_radius(changed, threat.epsilon) == train

    def test_a_radius_that_cannot_be_changed(self):
        with pytest.raises(InputError, match="holds its threat as a field, got Fixed"):
            at_radius(tiny.get_config(validation_attack=Fixed()), 0.25)
        with pytest.raises(InputError, match="epsilon must be >= 0"):
            at_radius(tiny.get_config(), -1.0)

    def test_it_can_be_written_and_read_again(self):
        trials = (*TRIALS, *auto_attack_trials(THREAT), Trial("exact", ATTACK, WithGradient(Implicit(Broyden(3)))))
        config = EvalConfig(
            THREAT, trials, diagnostics(THREAT), predictor=tiny.classifier(EnsembleState()), defence="mean"
        )
        assert from_tree(to_tree(config)) == config

    def test_diagnostics_are_ordered_and_stay_within_the_ball_but_for_one(self):
        trials = diagnostics(Linf(0.1), steps=100)
        steps = [trial.attack.steps for trial in (trials.fgsm, trials.pgd, trials.half, trials.long)]
        assert steps == [1, 10, 50, 100]
        each = (trials.fgsm, trials.pgd, trials.half, trials.long, trials.far)
        assert [trial.attack.step_size for trial in each] == pytest.approx([0.1, 0.025, 0.01, 0.01, 0.08])
        assert [trial.attack.threat.epsilon for trial in each] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.8])

    def test_gradient_queries(self):
        ce, targeted, fab, square = (trial.attack for trial in auto_attack_trials(THREAT))
        assert [attack.gradient_queries for attack in (ce, targeted, fab, square)] == [101, 909, None, 0]
        assert replace(ATTACK, restarts=3).gradient_queries == 6
