"""The trials that are run when none are asked for suit what is deployed."""

import pytest

from deq_jax import EntropyReduced, Explicit, InputError, assess
from deq_jax.attacks import L2, Linf
from deq_jax.evaluation import BUDGETS, Predictor, default_trials, white_box_trials
from deq_jax.surrogates import BPDAHead, Direct, EndToEnd, OnBase, PathAverage, ThroughSolver
from tests.helpers import tiny
from tests.helpers.linear import DATA, Linear, trained

DEQ = tiny.classifier()
SOURCES = [
    (DEQ, {ThroughSolver()}),
    (DEQ.with_dynamics(solver=None), {Direct()}),
    (Explicit(Linear()), {Direct()}),
    (EntropyReduced(DEQ), {PathAverage(BPDAHead()), EndToEnd(), OnBase(ThroughSolver())}),
]


@pytest.mark.parametrize("budget", BUDGETS[:2])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
@pytest.mark.parametrize(("predictor", "sources"), SOURCES, ids=["deq", "shallow", "explicit", "defended"])
def test_gradients_are_those_of_what_is_computed(predictor, sources, threat, budget):
    trials = default_trials(predictor, threat, budget)
    white = [trial for trial in trials if trial.attack.uses_gradients]
    assert {trial.surrogate for trial in white} == sources
    assert len(white) == 3 * len(sources) and len({trial.name for trial in trials}) == len(trials)
    assert {trial.attack.threat for trial in trials} == {threat}
    assert [trial.name for trial in trials if not trial.attack.uses_gradients] == ["square"]
    last = [trial.from_worst for trial in trials]
    assert sum(last) == len(sources) and last == sorted(last)  # after all others


def test_standard_costs_more_than_quick():
    quick, standard = (default_trials(DEQ, Linf(0.1), budget) for budget in BUDGETS[:2])
    assert [trial.surrogate for trial in quick] == [trial.surrogate for trial in standard]
    for small, large in zip(quick, standard, strict=True):
        assert small.attack.gradient_queries <= large.attack.gradient_queries
    queries: list[int] = [trial.attack.gradient_queries for trial in quick]
    assert sum(queries) == 31 + 3 * 21 + 20


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
@pytest.mark.parametrize("predictor", [case[0] for case in SOURCES], ids=["deq", "shallow", "explicit", "defended"])
def test_full_has_all_that_standard_has_and_more(predictor, threat):
    standard, full = (default_trials(predictor, threat, budget) for budget in BUDGETS[1:])
    known, kinds = ([(type(t.attack), t.surrogate, t.from_worst) for t in trials] for trials in (standard, full))
    assert set(known) <= set(kinds) and "fab-t" in {trial.name for trial in full}
    assert len({trial.name for trial in full}) == len(full)
    assert {trial.attack.threat for trial in full} == {threat}
    from_worst = [trial.from_worst for trial in full]
    assert from_worst == sorted(from_worst)  # after all others
    dynamics = [trial for trial in full if trial.name.startswith("pgd-10.")]
    assert bool(dynamics) == (predictor is DEQ)


def test_white_box_trials_need_a_solver():
    with pytest.raises(InputError, match="white_box_trials: expected an Equilibrium with a solver"):
        white_box_trials(DEQ.with_dynamics(solver=None), Linf(0.1))


def test_an_unknown_budget_is_refused():
    with pytest.raises(InputError, match="budget: expected quick, standard or full, got 'huge'"):
        default_trials(DEQ, Linf(0.1), "huge")


@pytest.mark.slow
def test_assess_chooses_the_trials():
    classifier = Explicit(Linear())
    predictor = Predictor(classifier, trained())
    result = assess(predictor, (DATA.test.x[:4], DATA.test.y[:4]), threat=Linf(0.1))
    assert list(result.attempts) == [trial.name for trial in default_trials(classifier, Linf(0.1))]
    assert result.config.budget == "quick"
    with pytest.raises(InputError, match="expected a threat"):
        assess(predictor, (DATA.test.x[:4], DATA.test.y[:4]))
