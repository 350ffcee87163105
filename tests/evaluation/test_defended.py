"""The engine of evaluations on a defended predictor: adaptive attacks, transfers, random predictors, cost."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from configs import digits_cnn_pgd_at, digits_pgd_at
from deq_jax import EntropyReduced, InputError, Keys
from deq_jax.attacks import APGD, PGD, SPSA, Linf, Noise, Square, Targeted
from deq_jax.core import LowEntropy, Purpose
from deq_jax.data import Images
from deq_jax.defences import RandomDirection, reduce_entropy
from deq_jax.evaluation import (
    Diagnostics,
    EvalConfig,
    EvaluationRecord,
    Trial,
    default_trials,
    named,
    red_flags,
    with_transfers,
    worst_case,
    write_evaluation,
)
from deq_jax.storage import from_tree, load_config, set_fields, to_tree
from deq_jax.surrogates import (
    BPDAHead,
    BPDAIdentity,
    BPDASolver,
    Direct,
    EndToEnd,
    Intermediate,
    OnBase,
    PathAverage,
    ThroughSolver,
)
from tests.helpers.dense import defence_of

THREAT = Linf(0.1)
ATTACK = PGD(Linf(0.1), steps=2, step_size=0.05)
DEFENCE = defence_of()
X = np.asarray(jax.random.uniform(jax.random.key(0), (10, 3, 3, 1)))
VARIABLES = jax.device_get(DEFENCE.init(jax.random.key(0), X))
IMAGES = Images(X, np.asarray(np.argmax(jax.jit(DEFENCE)(VARIABLES, X).logits, axis=1), np.int32))
SURROGATES = {
    "direct": Direct(),
    "identity": BPDAIdentity(),
    "head": BPDAHead(),
    "path": PathAverage(),
    "end": EndToEnd(),
    "base": OnBase(Direct()),
    "base-z": OnBase(Intermediate(2)),
}
TRIALS = tuple(Trial(name, ATTACK, surrogate, suite="adaptive") for name, surrogate in SURROGATES.items())
CONFIG = EvalConfig(
    THREAT,
    (*TRIALS, Trial("low", replace(ATTACK, loss=LowEntropy()), BPDAIdentity())),
    predictor=DEFENCE,
    defence="entropy reduction",
    batch_size=8,
    skip_broken=False,
)
FAR = Diagnostics(
    *(Trial(name, Noise(THREAT)) for name in ("noise", "fgsm", "pgd", "half", "long")),
    Trial("far", PGD(Linf(0.8), steps=2, step_size=0.4)),
)


def evaluate(config, out, classifier=DEFENCE.base):
    return worst_case(config, classifier, VARIABLES, IMAGES, out)


@pytest.fixture(scope="module")
def undefended(tmp_path_factory):
    """A finished evaluation of the base."""
    out = tmp_path_factory.mktemp("undefended")
    result = evaluate(EvalConfig(THREAT, (Trial("direct", ATTACK),), FAR, batch_size=8), out)
    write_evaluation(out, EvaluationRecord.of(result), result, X)
    return result, out


@pytest.fixture(scope="module")
def defended(undefended, tmp_path_factory):
    config = with_transfers(CONFIG, [("reference", undefended[1])])
    return evaluate(config, tmp_path_factory.mktemp("defended"))


@pytest.mark.slow
def test_the_defended_predictor_is_judged(defended):
    assert defended.accuracies()["clean"]["deployed"] == 1.0
    logits = jax.jit(DEFENCE)(VARIABLES, defended.attempts["base"].read()).logits
    np.testing.assert_array_equal(defended.attempts["base"].measured.deployed.label, np.argmax(logits, axis=1))
    lowest = min(defended.accuracies()[name]["deployed"] for name in defended.attempts)
    assert defended.accuracies()["union"]["deployed"] <= lowest


@pytest.mark.slow
def test_the_states_are_those_of_the_regulated_dynamics(defended):
    states = reduce_entropy(DEFENCE, VARIABLES, X).solution.states
    for t in range(4):
        logits = DEFENCE.decode(VARIABLES, states[t])
        np.testing.assert_array_equal(named(defended.clean)[f"z_{t + 1}"].label, np.argmax(logits, axis=1))


@pytest.mark.slow
def test_transferred_images_are_the_final_ones_of_the_other_evaluation(undefended, defended):
    result, _ = undefended
    np.testing.assert_array_equal(defended.attempts["reference.direct"].read(), result.attempts["direct"].read())
    assert {"reference.noise", "reference.long"} <= set(defended.attempts)
    assert "reference.far" not in defended.attempts  # beyond the radius
    assert "reference" in defended.accuracies()


def test_trials_from_the_worst_image_come_after_transfers(undefended):
    last = Trial("last", ATTACK, from_worst=True)
    both = with_transfers(replace(CONFIG, trials=(last, *TRIALS[:1])), [("reference", undefended[1])])
    assert [trial.name for trial in (both.trials[0], both.trials[1], both.trials[-1])] == [
        TRIALS[0].name,
        "reference.direct",
        "last",
    ]


def test_transfers_need_a_finished_evaluation(tmp_path):
    with pytest.raises(InputError, match="expected the folder of a finished evaluation"):
        with_transfers(CONFIG, [("reference", tmp_path)])


@pytest.mark.slow
def test_reference_images_are_made_against_the_undefended_predictor_of_the_training(undefended, tmp_path):
    """Not against a defended one, nor one of other variables."""
    _, folder = undefended
    config = with_transfers(replace(CONFIG, trials=()), [("reference", folder)])
    other = jax.tree.map(lambda leaf: leaf + 1, VARIABLES)
    with pytest.raises(InputError, match=r"reference\.direct: expected images made against the undefended predictor"):
        worst_case(config, DEFENCE.base, other, IMAGES, tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["predictor"] = to_tree(DEFENCE)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    config = with_transfers(replace(CONFIG, trials=()), [("reference", copy)])
    with pytest.raises(InputError, match="but its evaluation attacked another one"):
        evaluate(config, tmp_path / "defended")
    evaluate(with_transfers(replace(CONFIG, trials=()), [("other", copy)]), tmp_path / "defended")


def test_transfers_need_the_same_threat_model(undefended):
    other = EvalConfig(Linf(0.2), ())
    with pytest.raises(InputError, match=r"another threat model: epsilon was 0\.1, now 0\.2"):
        with_transfers(other, [("reference", undefended[1])])


def test_transfers_need_the_same_images(undefended, tmp_path):
    """The other evaluation must not have left out any, or these would count as robust."""
    images = Images(np.concatenate([X, X]), np.concatenate([IMAGES.y, IMAGES.y]))
    config = with_transfers(EvalConfig(THREAT, (), batch_size=8), [("reference", undefended[1])])
    with pytest.raises(InputError, match="its evaluation is of 10 images, expected the 20 of this one"):
        worst_case(config, DEFENCE.base, VARIABLES, images, tmp_path)


@pytest.mark.slow
def test_a_suite_of_transfers_counts_what_it_breaks_itself(undefended, tmp_path):
    """Not what trials before it broke; and a trial that found nothing left to attack has no images to transfer."""
    config = EvalConfig(THREAT, (Trial("direct", ATTACK),), batch_size=8)
    both = with_transfers(config, [("reference", undefended[1])])
    assert config.skip_broken and not both.skip_broken
    with pytest.raises(InputError, match="suite reference of transferred images: expected skip_broken=False"):
        replace(both, skip_broken=True)
    wrong = Images(X, 1 - np.minimum(IMAGES.y, 1))
    result = worst_case(config, DEFENCE.base, VARIABLES, wrong, tmp_path)
    write_evaluation(tmp_path, EvaluationRecord.of(result), result, X)
    assert not (tmp_path / "trials" / "direct").exists()
    assert with_transfers(config, [("reference", tmp_path)]).trials == config.trials


def test_cost_counts_applications_of_the_cell(defended, undefended):
    expected = reduce_entropy(DEFENCE, VARIABLES, X).solution.evaluations
    np.testing.assert_array_equal(defended.cost.evaluations, expected[:8])
    record = EvaluationRecord.of(defended)
    assert record.defence == "entropy reduction"
    assert record.cost.evaluations == 1 + 4 + 2 * (3 * 2 + 1)  # two blocks, three updates and one correction each
    assert record.cost.seconds > 0
    assert EvaluationRecord.of(undefended[0]).cost.evaluations == 1 + 4 + 3  # and the estimator's


def test_attacks_on_the_base_are_transfers(defended):
    """What they alone break raises the flag, as it does where the images come from another evaluation."""

    def with_broken(names):
        right, deployed = defended.clean, defended.clean.deployed
        wrong = right._replace(deployed=deployed._replace(label=(deployed.label + 1) % 10))
        found = {
            name: attempt._replace(measured=wrong if name in names else right)
            for name, attempt in defended.attempts.items()
        }
        flags = {flag.name: flag.raised for flag in red_flags(replace(defended, attempts=found))}
        return flags["transfer beats direct attacks"]

    assert with_broken({"base-z"}) and with_broken({"reference.direct"})
    assert not with_broken({"base-z", "head"}) and not with_broken({"head"})


RANDOM = replace(DEFENCE, direction=RandomDirection())
RANDOM_CONFIG = replace(CONFIG, trials=TRIALS[:1], predictor=RANDOM, defence="random direction")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The evaluation of a random predictor, whose attacks average over two draws."""
    return evaluate(replace(RANDOM_CONFIG, draws=2), tmp_path_factory.mktemp("few"))


class TestRandomPredictor:
    @pytest.mark.slow
    def test_it_is_judged_by_a_draw_that_attacks_have_not_seen(self, few):
        keys = Keys.of(jax.random.key(0), len(X)).fold(Purpose.DEPLOYED)
        logits = RANDOM(VARIABLES, few.attempts["direct"].read(), keys=keys).logits
        np.testing.assert_array_equal(few.attempts["direct"].measured.deployed.label, np.argmax(logits, axis=1))

    @pytest.mark.parametrize(("draws", "raised"), [(2, True), (20, False)])
    def test_too_few_draws_raise_a_flag(self, draws, raised, few):
        config = replace(few.config, draws=draws)
        flags = {flag.name: flag.raised for flag in red_flags(replace(few, config=config))}
        assert flags["randomness"] is raised

    @pytest.mark.slow
    def test_attacks_average_over_the_draws(self, few, tmp_path):
        other = evaluate(replace(RANDOM_CONFIG, draws=3), tmp_path)
        assert not np.array_equal(other.attempts["direct"].read(), few.attempts["direct"].read())

    def test_without_draws_it_cannot_be_asked(self, tmp_path):
        with pytest.raises(InputError, match="RandomDirection: the defence is random, expected keys"):
            evaluate(RANDOM_CONFIG, tmp_path)


@pytest.mark.parametrize("name", ["reduced", "quick", "raised", "random", "half_radius"])
def test_configs_of_the_defence(name):
    config = load_config(f"configs/eval_entropy_{name}.py", EvalConfig, digits_pgd_at.get_config())
    assert from_tree(json.loads(json.dumps(to_tree(config)))) == config
    assert isinstance(config.predictor, EntropyReduced) and config.predictor.step_size == 0.1 / 4
    assert (config.draws, config.predictor.epsilon) == (
        20 if name == "random" else None,
        0.05 if "half" in name else 0.1,
    )
    assert config.defence != "none"


def test_the_adaptive_evaluation_has_every_kind_of_attack():
    config = load_config("configs/eval_entropy_reduced.py", EvalConfig, digits_pgd_at.get_config())
    kinds = {type(trial.surrogate) for trial in config.trials}
    assert {Direct, BPDAIdentity, BPDAHead, BPDASolver, EndToEnd, PathAverage, OnBase} == kinds
    bases = {type(trial.surrogate.surrogate) for trial in config.trials if isinstance(trial.surrogate, OnBase)}
    assert {Direct, ThroughSolver, Intermediate} == bases
    assert {Square, SPSA} <= {type(trial.attack) for trial in config.trials}
    assert any(isinstance(getattr(trial.attack.attack, "loss", None), LowEntropy) for trial in targeted(config))
    aimed = {type(trial.surrogate) for trial in targeted(config) if isinstance(trial.attack.attack, APGD)}
    assert aimed == {BPDASolver, EndToEnd, PathAverage}
    last = {type(trial.surrogate) for trial in config.trials if trial.from_worst}
    assert last == {Direct, BPDAHead, BPDASolver, EndToEnd, PathAverage}
    assert isinstance(config.diagnostics, Diagnostics)


@pytest.mark.parametrize("budget", ["quick", "standard"])
def test_a_budget_of_the_defence_is_the_default_one_of_a_defended_predictor(budget):
    config = load_config(f"configs/eval_entropy_{budget}.py", EvalConfig, digits_pgd_at.get_config())
    assert config.trials == default_trials(config.predictor, config.threat, budget) and config.budget == budget
    assert {"apgd-ce.end-to-end", "apgd-t.base-through-solver", "square"} <= {trial.name for trial in config.trials}


def targeted(config):
    return [trial for trial in config.trials if isinstance(trial.attack, Targeted)]


@pytest.mark.parametrize("epsilon", [0.02, 0.3])
def test_attacks_of_the_adaptive_evaluation_can_cross_the_ball(epsilon):
    train = set_fields(digits_pgd_at.get_config(), [f"validation_attack.threat.epsilon={epsilon}"])
    config = load_config("configs/eval_entropy_reduced.py", EvalConfig, train)
    attacks = [trial.attack for trial in config.trials if isinstance(trial.attack, PGD | SPSA)]
    assert len(attacks) > 1
    for attack in attacks:
        assert attack.steps * attack.step_size >= 0.999 * epsilon


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [1e-3, 0.5])
def test_control_of_more_steps_costs_what_the_defence_does(tolerance):
    """Also where images converge on the way."""
    train = set_fields(digits_pgd_at.get_config(), [f"classifier.dynamics.solver.tolerance={tolerance}"])
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
    configs = [load_config(f"configs/eval_{name}.py", EvalConfig, train) for name in ("more_steps", "entropy_reduced")]
    variables = configs[0].predictor.init(jax.random.key(1), x)
    counts = [jax.jit(config.predictor)(variables, x).solution.evaluations for config in configs]
    np.testing.assert_array_equal(counts[0], 93)
    assert np.all(counts[1] <= 93)


def test_the_defence_is_for_deqs():
    with pytest.raises(InputError, match="input entropy reduction is for a DEQ"):
        load_config("configs/eval_entropy_reduced.py", EvalConfig, digits_cnn_pgd_at.get_config())
