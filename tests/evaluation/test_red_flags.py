"""Red flags: each is raised by what it is for; masked gradients raise them, an honest model does not."""

import io
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from deq_jax import Explicit
from deq_jax.attacks import APGD, PGD, AutoAttack, Linf, Noise, Square, Targeted, clean_start
from deq_jax.data import Images
from deq_jax.evaluation import (
    EvalConfig,
    EvaluationRecord,
    Flag,
    Probe,
    Row,
    Rows,
    Transfer,
    Trial,
    diagnostics,
    headline,
    red_flags,
    worst_case,
)
from deq_jax.evaluation.red_flags import (
    batch_dependence,
    no_collapse,
    no_plateau,
    not_finite,
    only_by,
    order_of_strength,
    randomness,
    zero_gradients,
)
from deq_jax.evaluation.rows import Spread
from deq_jax.evaluation.terminal import accuracy_table
from deq_jax.surrogates import BPDA
from tests.helpers.linear import DATA, Linear, trained

ROOT = Path(__file__).parents[2]
THREAT = Linf(0.1)
ATTACK = PGD(THREAT, steps=10, step_size=0.025)
TEST = Images(DATA.test.x[:64], DATA.test.y[:64])
DIAGNOSTICS = diagnostics(THREAT, steps=40)


@dataclass(frozen=True)
class Joint:
    """A classifier whose logits depend on the mean of the batch."""

    base: Explicit

    def __call__(self, variables, x, **options):
        prediction = self.base(variables, x)
        return prediction._replace(logits=prediction.logits + 3 * jnp.mean(x, axis=(0, 2, 3))[:1])


@dataclass(frozen=True)
class Spoiled:
    """A classifier with the logits of another one, whose gradient is NaN."""

    base: Explicit

    def __call__(self, variables, x, **options):
        prediction = self.base(variables, x)
        nan = jnp.sqrt(jnp.sum(x - x))  # 0, with derivative 0 times infinity
        return prediction._replace(logits=prediction.logits + nan)


def evaluate(classifier, out):
    trials = (Trial("apgd", APGD(THREAT, steps=20), suite="all"), Trial("square", Square(THREAT, 300), suite="all"))
    return worst_case(EvalConfig(THREAT, trials, DIAGNOSTICS, batch_size=64), classifier, trained(), TEST, out)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return evaluate(Explicit(Linear()), tmp_path_factory.mktemp("honest"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return evaluate(Explicit(Linear(levels=8)), tmp_path_factory.mktemp("masked"))


def raised(result):
    return {flag.name: flag.raised for flag in red_flags(result)}


def test_gradients_that_are_nan_are_flagged(tmp_path):
    config = EvalConfig(THREAT, (Trial("apgd", APGD(THREAT, steps=2)),), batch_size=64)
    assert raised(worst_case(config, Spoiled(Explicit(Linear())), trained(), TEST, tmp_path))["zero gradients"]


def test_an_honest_model_raises_no_flag(honest):
    assert set(raised(honest).values()) == {False, None}
    assert raised(honest)["transfer beats direct attacks"] is None
    record = EvaluationRecord.of(honest)
    assert (record.spectral_radius, record.unsettled) == (Spread(None, None), None)
    assert 0 < record.robust_accuracy < 0.8 < record.rows["deployed"].clean.accuracy
    assert "no flags raised; not checked: transfer beats direct attacks" in headline(record)


def test_going_on_from_the_worst_image_does_not_hide_masked_gradients(masked, tmp_path):
    """It breaks what Square has broken, without any gradient of its own."""
    on = Trial("on", PGD(THREAT, steps=2, step_size=0.01), from_worst=True)
    trials = (*masked.config.trials, on)
    config = EvalConfig(THREAT, trials, batch_size=64, skip_broken=False)
    result = worst_case(config, Explicit(Linear(levels=8)), trained(), TEST, tmp_path)
    assert result.broken("on").sum() >= result.broken("square").sum() > result.broken("apgd").sum()
    assert raised(result)["black box beats white box"]


def test_masked_gradients_are_flagged(masked):
    flags = raised(masked)
    assert flags["zero gradients"] and flags["black box beats white box"] and flags["no collapse at 8 epsilon"]
    assert not flags["batch dependence"] and not flags["randomness"]
    line = headline(EvaluationRecord.of(masked))
    assert line.startswith("robust accuracy: NOT TRUSTWORTHY, an upper bound only: ")
    assert "zero gradients (64 of 64)" in line


def alone(row):
    """What is measured of an explicit network."""
    return Rows(None, None, row)


@dataclass(frozen=True)
class Own:
    """A user's attack, which may declare whether it uses gradients."""

    uses_gradients: bool | None = None

    def __call__(self, oracle, x, labels, key, start=None):
        return x


APGD_20, SQUARE, NOTHING = APGD(THREAT, steps=20), Square(THREAT, 300), Noise(THREAT)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(APGD_20, 3), (Own(False), 10)], True),
        ([(APGD_20, 3), (Targeted(SQUARE), 10)], True),
        ([(APGD_20, 3), (AutoAttack((SQUARE,)), 10)], True),
        ([(Own(True), 3), (SQUARE, 10)], True),
        ([(Targeted(APGD_20), 10), (SQUARE, 10)], False),
        ([(AutoAttack((APGD_20, Targeted(APGD_20))), 10), (SQUARE, 10)], False),
        # what is not declared neither silences the flag nor raises it
        ([(APGD_20, 3), (SQUARE, 10), (Own(), 10)], True),
        ([(APGD_20, 3), (NOTHING, 0), (Own(), 10)], None),
        ([(APGD_20, 10), (NOTHING, 0), (Own(), 10)], False),
        ([(APGD_20, 10), (Own(), 10)], None),
        ([(Own(), 10), (SQUARE, 3)], None),
        # images made against another predictor have a flag of their own
        ([(APGD_20, 3), (Transfer("a.npz"), 10)], None),
        ([(APGD_20, 3), (SQUARE, 3), (Transfer("a.npz"), 10)], False),
        # nor does what is both
        ([(APGD_20, 3), (SQUARE, 10), (AutoAttack((APGD_20, SQUARE)), 10)], True),
        ([(APGD_20, 3), (NOTHING, 0), (AutoAttack((APGD_20, SQUARE)), 10)], None),
        ([(APGD_20, 3), (NOTHING, 0), (AutoAttack((APGD_20, Own())), 10)], None),
    ],
)
def test_attacks_say_whether_they_use_gradients(found, expected, honest):
    """Each attack breaks the first images."""
    right = honest.clean.deployed._replace(label=TEST.y)
    trials = tuple(Trial(f"{i}", attack) for i, (attack, _) in enumerate(found))
    attempts = {}
    for trial, (_, broken) in zip(trials, found, strict=True):
        label = (right.label + (np.arange(len(TEST.y)) < broken)) % 10
        attempts[trial.name] = honest.attempts["apgd"]._replace(measured=alone(right._replace(label=label)))
    config = EvalConfig(THREAT, trials, skip_broken=False)
    flags = raised(replace(honest, config=config, clean=alone(right), attempts=attempts))
    assert flags["black box beats white box"] is expected


@dataclass(frozen=True)
class Quantised:
    """Rounds what it gives the classifier."""

    base: Explicit

    def __call__(self, variables, x, **options):
        return self.base(variables, jnp.round(8 * x) / 8, **options)


@pytest.mark.slow
def test_bpda_finds_what_rounding_hides_and_the_flags_go_down(masked, honest, tmp_path):
    predictor, still = Quantised(Explicit(Linear())), replace(ATTACK, start=clean_start)
    trials = (
        Trial("pgd", still),
        Trial("pgd.bpda", still, BPDA()),
        Trial("apgd.bpda", APGD_20, BPDA(), suite="all"),
        Trial("square", SQUARE, suite="all"),
    )
    checks = diagnostics(THREAT, steps=40, surrogate=BPDA())
    config = EvalConfig(
        THREAT, trials, checks, predictor=predictor, defence="eight levels", batch_size=64, skip_broken=False
    )
    result = worst_case(config, Explicit(Linear()), trained(), TEST, tmp_path / "defended")
    plain = EvalConfig(THREAT, (Trial("pgd", still),), batch_size=64, skip_broken=False)
    undefended = worst_case(plain, Explicit(Linear()), trained(), TEST, tmp_path / "undefended")
    assert result.broken("pgd").sum() == 0
    assert result.broken("pgd.bpda").sum() >= undefended.broken("pgd").sum() > 20
    assert set(raised(result).values()) == {False, None}
    explanations = {flag.name: flag.explanation for flag in red_flags(masked) if flag.raised}
    assert "BPDA" in explanations["zero gradients"]
    assert explanations["zero gradients"] in headline(EvaluationRecord.of(masked))


def test_a_robust_accuracy_is_said_with_what_speaks_against_the_model(honest):
    record = EvaluationRecord.of(honest)
    assert record.warnings == () and "\n" not in headline(record)
    low, high = record.intervals["union"]
    assert f" of 64 images (95 %: {100 * low:.1f} to {100 * high:.1f}); no flags" in headline(record)
    good, label = honest.clean.deployed, honest.clean.deployed.label.copy()
    label[6:] = (TEST.y[6:] + 1) % 10
    wrong = good._replace(label=label, residual=np.full(good.residual.shape, 0.058))
    clean = Rows(Row(*(np.stack([part, part], axis=1) for part in good)), good, wrong)
    bad = replace(honest, clean=clean, attempts={}, config=replace(honest.config, trials=(), diagnostics=None))
    first, *lines = headline(EvaluationRecord.of(bad)).splitlines()
    assert first.startswith("clean accuracy: ") and first.endswith("; nothing has attacked them")
    chance, solver, state = lines
    assert chance.startswith("warning: clean accuracy is at chance: ")
    assert solver.startswith("warning: the solver has not converged: mean residual 0.058")
    assert state.startswith("warning: z_1 classifies clean images better than the deployed predictor: ")


def test_a_trial_with_nothing_left_to_attack_says_so_in_the_table(honest):
    record = EvaluationRecord.of(honest)
    trials = record.trials | {"square": replace(record.trials["square"], attacked=0)}
    file = io.StringIO()
    Console(width=200, file=file).print(accuracy_table(replace(record, trials=trials)))
    (row,) = [line for line in file.getvalue().splitlines() if " square " in line]
    assert row.replace("│", " ").split() == ["square", "0", "nothing", "left", "to", "attack"]


def test_transfer_that_beats_direct_attacks_is_flagged(honest, tmp_path):
    np.savez(tmp_path / "a.npz", x_adv=honest.x_adv, y=TEST.y)
    trials = (Trial("apgd", APGD(THREAT, steps=5)), Trial("transfer", Transfer(str(tmp_path / "a.npz"))))
    config = EvalConfig(THREAT, trials, batch_size=64, skip_broken=False)
    for levels, expected in ((8, True), (0, False)):
        result = worst_case(config, Explicit(Linear(levels)), trained(), TEST, tmp_path / str(levels))
        assert raised(result)["transfer beats direct attacks"] is expected


def test_batch_dependence_is_flagged(tmp_path):
    result = worst_case(EvalConfig(THREAT, (), batch_size=64), Joint(Explicit(Linear())), trained(), TEST, tmp_path)
    assert raised(result)["batch dependence"]


def test_logits_that_are_not_finite_under_attack_are_flagged(honest):
    """They count as correct, whatever they are; beyond the ball they do not matter."""
    assert not_finite(honest).raised is False
    extra = honest.config.diagnostics
    for name, expected in (("apgd", True), (extra.far.name, False)):
        row = honest.attempts[name].measured.deployed
        margin = row.margin.copy()
        margin[3] = np.inf
        measured = alone(row._replace(margin=margin))
        changed = replace(honest, attempts=honest.attempts | {name: honest.attempts[name]._replace(measured=measured)})
        assert raised(changed)["logits not finite"] is expected
        assert not expected or not_finite(changed).value == 1 / 64


def probe(**changes):
    logits = np.linspace(-1, 2, 12).reshape(4, 3)
    return Probe(**{name: logits + changes.get(name, 0.0) for name in Probe._fields})


def withstood(*counts, of=1000):
    """For each attack so many images that withstood it, the first ones."""
    return [np.arange(of) < count for count in counts]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (batch_dependence(probe(other_key=1.0)), False),
        (batch_dependence(probe(reverse=0.1)), True),
        (batch_dependence(probe(alone=0.1)), True),
        (batch_dependence(probe(alone=1e-4)), False),
        (randomness(probe(alone=0.1), None), False),
        (randomness(probe(other_key=0.1), None), True),
        (randomness(probe(other_key=0.1), 19), True),
        (randomness(probe(other_key=0.1), 20), False),
        (zero_gradients(np.arange(200) < 2), False),
        (zero_gradients(np.arange(200) < 5), None),  # as many or more of 200 have chance 5.2 % at 1 %
        (zero_gradients(np.arange(200) < 6), True),  # 1.6 %
        (no_collapse(np.arange(100) < 10, classes=10), False),
        (no_collapse(np.arange(100) < 15, classes=10), None),  # 7.3 %
        (no_collapse(np.arange(100) < 16, classes=10), True),  # 4.0 %
        (no_collapse(None, classes=10), None),
        (no_plateau(tuple(withstood(805, 800))), False),
        (no_plateau(tuple(withstood(808, 800))), None),  # 13 %
        (no_plateau(tuple(withstood(810, 800))), True),  # 3.1 %
        (no_plateau(tuple(withstood(800, 810))), False),
        (no_plateau(None), None),
        (order_of_strength(withstood(900, 800, 800, 700)), False),
        (order_of_strength(withstood(900, 800, 805, 700)), True),  # chance 1 / 32
        (order_of_strength(withstood(900, 800, 804, 700)), False),  # 1 / 16
        (order_of_strength(withstood(5, 9, of=20)), False),
        (order_of_strength(withstood(5, 10, of=20)), True),
        (order_of_strength(withstood(9000, 8000, 8005, of=10_000)), False),  # 0.05 points
        (order_of_strength(None), None),
        (only_by("", [np.arange(1000) < 5], [np.arange(1000) < 3]), False),
        (only_by("", [np.arange(1000) < 8], [np.arange(1000) < 3]), None),  # five: chance 5.3 %
        (only_by("", [np.arange(1000) < 9], [np.arange(1000) < 3]), True),  # six: 1.7 %
        (only_by("", [np.arange(60) < 1], [np.arange(60) < 0]), None),  # one: 11 %
        (only_by("", [np.arange(60) < 2], [np.arange(60) < 0]), True),  # two: 0.7 %
        (only_by("", [], [np.arange(3) < 1]), None),
        (only_by("", [np.arange(3) < 1], []), None),
    ],
)
def test_thresholds(flag, expected):
    assert flag.raised is expected


@pytest.mark.parametrize(
    ("epsilon", "name"), [(0.1, "at 8 epsilon"), (8 / 255, "at 8 epsilon"), (0.3, "at 3.33 epsilon")]
)
def test_the_radius_of_the_collapse_is_named(epsilon, name, honest):
    """It is at most 1 in the norm of the largest pixel."""
    checks = diagnostics(Linf(epsilon), steps=40)
    config = replace(honest.config, threat=Linf(epsilon), trials=(), diagnostics=checks)
    assert f"no collapse {name}" in raised(replace(honest, config=config))


def test_the_order_of_strength_is_tested_on_the_images_that_differ():
    """40 images withstood the stronger attack alone, 10 the weaker one alone; then 30 and 20, which chance can do."""
    weaker, stronger = np.arange(100) < 10, np.arange(100) >= 60
    flag = order_of_strength([weaker, stronger])
    assert (flag.raised, flag.value, flag.count, flag.images) == (True, 0.3, 30, 100)
    assert order_of_strength([stronger, weaker]).value == 0
    assert order_of_strength([np.arange(100) < 20, np.arange(100) >= 70]).value == 0


def test_counts_that_chance_explains_are_said_as_such(honest):
    record = EvaluationRecord.of(honest)
    unsure = Flag.of_count("no plateau", 1, 64, 0.005, "more steps")
    flags = tuple(unsure if flag.name == "no plateau" else flag for flag in record.red_flags)
    line = headline(replace(record, red_flags=flags))
    assert "no flags raised; too few images to say: no plateau (1 of 64); not checked: transfer" in line
    assert EvaluationRecord.from_json(replace(record, red_flags=flags).to_json()).red_flags == flags


def test_the_order_of_strength_and_the_plateau_are_taken_from_the_diagnostics(honest):
    """Swapping trials that were run raises the flags."""
    extra = honest.config.diagnostics
    flags = raised(replace(honest, config=replace(honest.config, diagnostics=None)))
    assert flags["order of strength"] is flags["no plateau"] is flags["no collapse at 8 epsilon"] is None
    found = dict(honest.attempts)
    for role, other in {"far": "noise", "half": "noise", "noise": "pgd", "pgd": "noise"}.items():
        found[getattr(extra, role).name] = honest.attempts[getattr(extra, other).name]
    flags = raised(replace(honest, attempts=found))
    assert flags["order of strength"] and flags["no plateau"] and flags["no collapse at 8 epsilon"]


WRITTEN = {0.0: "none allowed", 0.002: "0.2 points", 0.005: "0.5 points", 0.01: "1 % of"}


def test_the_page_on_honest_evaluation_has_every_flag_with_its_threshold(masked):
    page = (ROOT / "docs/concepts/honest-evaluation.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|.*\|.*\|$", page.partition("## Warnings")[0], re.MULTILINE)
    listed, flags = dict(rows[1:]), red_flags(masked)  # without the head
    assert list(listed) == [flag.name for flag in flags]
    for flag in flags:
        written = WRITTEN.get(flag.threshold, "guessing, 1 / classes")
        assert listed[flag.name].startswith(written), flag
