"""Red flags: each is raised by what it is for; masked gradients raise them, an honest model does not."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.attacks import APGD, PGD, Linf, Square
from deq_jax.classifiers import Explicit
from deq_jax.data import Images
from deq_jax.red_flags import (
    batch_dependence,
    no_collapse,
    no_plateau,
    not_finite,
    only_by,
    order_of_strength,
    randomness,
    red_flags,
    zero_gradients,
)
from deq_jax.reports import headline, report_of
from deq_jax.results import Probe
from deq_jax.transfers import Transfer
from deq_jax.trials import EvalConfig, Trial, diagnostics
from deq_jax.worst_case import worst_case
from tests.linear import DATA, Linear, trained

THREAT = Linf(0.1)
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
    report = report_of(honest)
    assert report["spectral_radius"] == {"mean": None, "largest": None}
    assert 0 < report["robust_accuracy"] < 0.8 < report["rows"]["deployed"]["clean"]["accuracy"]
    assert "no flags raised; not checked: transfer beats direct attacks" in headline(report)


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
    line = headline(report_of(masked))
    assert line.startswith("robust accuracy: NOT TRUSTWORTHY, an upper bound only: ")
    assert "zero gradients (1)" in line


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
        margin = honest.attempts[name].measured.margin.copy()
        margin[3, -1] = np.inf
        measured = honest.attempts[name].measured._replace(margin=margin)
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
        (zero_gradients(np.arange(200) < 3), True),
        (no_collapse(0.1, classes=10), False),
        (no_collapse(0.11, classes=10), True),
        (no_collapse(None, classes=10), None),
        (no_plateau(0.005), False),
        (no_plateau(0.006), True),
        (no_plateau(None), None),
        (order_of_strength(withstood(900, 800, 800, 700)), False),
        (order_of_strength(withstood(900, 800, 808, 700)), True),  # 0.008 - 2 sqrt(0.008 / 1000) = 0.0023
        (order_of_strength(withstood(900, 800, 806, 700)), False),  # 0.006 - 2 sqrt(0.006 / 1000) = 0.0011
        (order_of_strength(withstood(900, 800, 801)), False),
        (order_of_strength(withstood(5, 9, of=20)), False),  # four more: 0.2 - 2 sqrt(0.2 / 20) = 0
        (order_of_strength(withstood(5, 10, of=20)), True),
        (order_of_strength(None), None),
        (only_by("", [np.arange(1000) < 5], [np.arange(1000) < 3]), False),
        (only_by("", [np.arange(1000) < 5], [np.arange(1000) < 2]), True),
        (only_by("", [], [np.arange(3) < 1]), None),
        (only_by("", [np.arange(3) < 1], []), None),
    ],
)
def test_thresholds(flag, expected):
    assert flag.raised is expected


def test_the_excess_of_a_stronger_attack_is_beyond_two_standard_errors():
    """Of 100 images 10 withstood the weaker attack alone and 40 the stronger one alone: 0.3 - 2 sqrt(0.5 / 100)."""
    weaker, stronger = np.arange(100) < 10, np.arange(100) >= 60
    assert order_of_strength([weaker, stronger]).value == pytest.approx(0.1585786)
    assert order_of_strength([stronger, weaker]).value == 0


def test_the_order_of_strength_and_the_plateau_are_taken_from_the_diagnostics(honest):
    """Swapping trials that were run raises the flags."""
    extra = honest.config.diagnostics
    flags = raised(replace(honest, config=replace(honest.config, diagnostics=None)))
    assert flags["order of strength"] is flags["no plateau"] is flags["no collapse at 8 epsilon"] is None
    names = {"far": "noise", "half": "noise", "noise": "pgd-10", "pgd": "noise"}
    found = dict(honest.attempts)
    for role, name in names.items():
        found[getattr(extra, role).name] = honest.attempts[name]
    flags = raised(replace(honest, attempts=found))
    assert flags["order of strength"] and flags["no plateau"] and flags["no collapse at 8 epsilon"]
