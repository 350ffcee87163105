"""Statistics over seeds, against values that were computed by hand."""

import pytest

from deq_jax.comparisons import Difference, Mean, paired_difference, paired_quotient
from deq_jax.types import InputError


def test_mean_and_standard_error():
    """2, 4, 9: deviations -3, -1, 4, so the variance is 26 / 2 and the standard error sqrt(13 / 3)."""
    assert Mean.of([2.0, 4.0, 9.0]) == Mean(5.0, pytest.approx(2.0816660), 3)


def test_one_seed_has_no_spread():
    assert Mean.of([2.0]) == Mean(2.0, None, 1)
    assert Difference.of([2.0]) == Difference(2.0, None, 1)
    assert Difference.of([2.0]).sign is None


def test_no_seed_is_refused():
    with pytest.raises(InputError, match="at least one value, got none"):
        Mean.of([])


@pytest.mark.parametrize(
    ("differences", "value", "half"),
    [
        ([1.0, 3.0], 2.0, 12.706205),  # t(1) = 12.706205, standard error 1
        ([2.0, 4.0, 9.0], 5.0, 4.302653 * 2.0816660),  # t(2) = 4.302653
        ([1.0, 1.0, 1.0, 3.0, 4.0], 2.0, 2.776445 * 0.6324555),  # t(4) = 2.776445, sqrt(8 / 4 / 5)
        ([2.0, 2.0], 2.0, 0.0),
    ],
)
def test_confidence_intervals(differences, value, half):
    difference = Difference.of(differences)
    assert difference.value == pytest.approx(value)
    assert difference.interval == pytest.approx((value - half, value + half), abs=1e-5)
    assert difference.seeds == len(differences)


@pytest.mark.parametrize(
    ("differences", "sign"),
    [
        ([0.6, 0.7], 1),  # the half-width is 12.706 times 0.05
        ([0.55, 0.65], 0),
        ([-0.55, -0.65], 0),
        ([-0.6, -0.7], -1),
        ([0.0, 0.0], 0),
    ],
)
def test_sign_is_that_of_an_interval_without_zero(differences, sign):
    assert Difference.of(differences).sign == sign


def test_differences_are_paired_by_seed():
    """Seeds 0 and 2 are common: 3 - 1 and 9 - 4; a difference of the means would be 6.5 - 14.17."""
    a, b = {2: 9.0, 0: 3.0, 5: 7.5}, {0: 1.0, 2: 4.0, 1: 37.5}
    assert paired_difference(a, b) == Difference.of([2.0, 5.0])
    assert paired_difference(a, b).value == 3.5
    assert paired_difference(a, {7: 1.0}) is None


def test_pairing_takes_away_what_seeds_have_in_common():
    a = {seed: 10.0 * seed + 1 + 0.1 * (-1) ** seed for seed in range(4)}
    b = {seed: 10.0 * seed for seed in range(4)}
    assert paired_difference(a, b).sign == 1
    assert paired_difference(b, a).sign == -1


def test_quotients_are_paired_by_seed():
    assert paired_quotient({0: 6.0, 1: 8.0, 2: 1.0}, {0: 2.0, 1: 2.0, 2: 0.0}) == Mean.of([3.0, 4.0])
    assert paired_quotient({0: 6.0}, {1: 2.0}) is None
