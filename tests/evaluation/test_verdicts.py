"""What is said with a number, and where an evaluation is, against counts by hand."""

from math import comb

import numpy as np
import pytest

from deq_jax.evaluation import exact_interval
from deq_jax.evaluation.moments import Watch
from deq_jax.evaluation.verdicts import better_state


def at_least(count, of, chance):
    """P(X >= count) of a binomial."""
    return sum(comb(of, k) * chance**k * (1 - chance) ** (of - k) for k in range(count, of + 1))


@pytest.mark.parametrize(("right", "images"), [(0, 64), (64, 64), (1, 1), (0, 1), (7, 64), (308, 360)])
def test_the_interval_is_exact(right, images):
    """Of Clopper and Pearson: at each end so many right ones, or more extreme ones, have a chance of 2.5 %."""
    low, high = exact_interval(right / images, images)
    assert (low == 0) if right == 0 else at_least(right, images, low) == pytest.approx(0.025)
    assert (high == 1) if right == images else 1 - at_least(right + 1, images, high) == pytest.approx(0.025)
    assert low <= right / images <= high


def states(won, lost, of=200):
    """[N] each: a state that is right on `won` images alone, and what is deployed on `lost` images alone."""
    every = np.arange(of)
    return {"z_1": (every < won) | (every >= won + lost), "deployed": every >= won}


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (4, 0), (5, 0), (9, 2), (8, 2), (20, 30), (40, 20), (35, 20)])
def test_a_state_is_better_by_mcnemars_exact_test(won, lost):
    found = better_state(states(won, lost))
    assert (found is not None) == (won > lost and at_least(won, won + lost, 0.5) <= 0.05)


def test_the_best_of_the_better_states_is_told_and_many_states_need_more():
    ensemble = np.arange(200) >= 5
    text = better_state({"z_1": states(30, 0)["z_1"], "ensemble": ensemble, "deployed": states(30, 0)["deployed"]})
    assert text.startswith("z_1 classifies clean images better than the deployed predictor: 100.0 % against 85.0 %; ")
    one = states(5, 0)  # 2^-5 is 3 %, eight times that is not
    many = {f"z_{t}": one["z_1"] for t in range(1, 9)}
    assert better_state({**many, "deployed": one["deployed"]}) is None
    assert better_state({"deployed": one["deployed"]}) is None


def test_a_trial_tells_its_life():
    watch = Watch("apgd", 2, 4, images=40, accuracy=0.9, queries=101)
    begins = watch.begins()
    assert begins == ("apgd", 0.25, "[2/4] apgd: 0 of 40 images; compiling, and the first batch", True)
    first = watch.after(16, 0.7, 60.0).now()
    assert first.share == pytest.approx(0.25 + 0.1) and not first.milestone
    assert first.line == "[2/4] apgd: 16 of 40 images; at most 70.00 % correct, 1 min, about 1 min 30 s left"
    second = watch.after(16, 0.7, 60.0).after(16, 0.6, 4.0)
    assert second.now().line.endswith("at most 60.00 % correct, 1 min 4 s, about 2 s left")  # without compilation
    last = second.after(8, 0.55, 2.0).now()
    assert last.line == "[2/4] apgd: 40 of 40 images; 55.00 % correct, 1 min 6 s, at most 101 gradients per image"
    assert (last.share, last.milestone) == (0.5, True)


@pytest.mark.parametrize("queries", [0, None])
def test_queries_that_are_none_or_unknown_are_left_out(queries):
    assert (
        Watch("a", 1, 1, 4, 1.0, queries).after(4, 0.5, 1).now().line == "[1/1] a: 4 of 4 images; 50.00 % correct, 1 s"
    )


def test_a_trial_that_has_nothing_to_do_says_so():
    assert Watch("fab-t", 3, 4, 0, 0.0).now() == ("fab-t", 0.75, "[3/4] fab-t: nothing left to attack", True)
