"""Statistics over seeds and images, against values that were computed by hand, and in simulations."""

import numpy as np
import pytest

from deq_jax.comparisons import Difference, Mean, paired_difference, paired_quotient
from deq_jax.types import InputError


def alike(*seeds):
    """Two images for which each seed gives the same."""
    return [[value, value] for value in seeds]


def test_mean_and_standard_error():
    """2, 4, 9: deviations -3, -1, 4, so the variance is 26 / 2 and the standard error sqrt(13 / 3)."""
    assert Mean.of([2.0, 4.0, 9.0]) == Mean(5.0, pytest.approx(2.0816660), 3)


def test_one_seed_or_image_has_no_spread():
    assert Mean.of([2.0]) == Mean(2.0, None, 1)
    assert Difference.of([[1.0, 3.0]]) == Difference(2.0, None, 1)
    assert Difference.of([[1.0], [3.0]]) == Difference(2.0, None, 2)
    assert Difference.of([[1.0, 3.0]]).sign is None


def test_nothing_is_refused():
    with pytest.raises(InputError, match="at least one value, got none"):
        Mean.of([])
    with pytest.raises(InputError, match=r"differences \[seeds, images\], at least one, got shape \(0,\)"):
        Difference.of([])


@pytest.mark.parametrize(
    ("differences", "value", "half"),
    [
        (alike(1.0, 3.0), 2.0, 12.706205),  # t(1) = 12.706205, standard error 1
        (alike(2.0, 4.0, 9.0), 5.0, 4.302653 * 2.0816660),  # t(2) = 4.302653
        (alike(1.0, 1.0, 1.0, 3.0, 4.0), 2.0, 2.776445 * 0.6324555),  # t(4) = 2.776445, sqrt(8 / 4 / 5)
        ([[2.0, 4.0, 9.0], [2.0, 4.0, 9.0]], 5.0, 4.302653 * 2.0816660),  # images differ, seeds do not
        ([[0.0, 0.0], [0.0, 4.0]], 1.0, 12.706205 * 2**0.5),  # both standard errors 1
        (alike(2.0, 2.0), 2.0, 0.0),
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
        (alike(0.6, 0.7), 1),  # the half-width is 12.706 times 0.05
        (alike(0.55, 0.65), 0),
        (alike(-0.55, -0.65), 0),
        (alike(-0.6, -0.7), -1),
        (alike(0.0, 0.0), 0),
    ],
)
def test_sign_is_that_of_an_interval_without_zero(differences, sign):
    assert Difference.of(differences).sign == sign


def test_seeds_that_happen_to_agree_on_few_images_show_nothing():
    """Two of 60 images more for each of three seeds: other images might have given none."""
    gained = np.where(np.arange(60) < 2, 100.0, 0.0)
    difference = Difference.of([gained] * 3)
    assert difference.value == pytest.approx(10 / 3)
    assert difference.sign == 0


@pytest.mark.parametrize(
    ("seed", "image", "rest"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 5.0, 3.0), (0.0, 0.0, 1.0)]
)
def test_intervals_cover_the_truth(seed, image, rest):
    """Of 2000 studies of 3 seeds and 60 images at least 94 % contain the true difference, 0."""
    rng = np.random.default_rng(0)
    studies = seed * rng.normal(size=(2000, 3, 1)) + image * rng.normal(size=(2000, 1, 60))
    studies = studies + rest * rng.normal(size=(2000, 3, 60))
    assert np.mean([Difference.of(study).sign == 0 for study in studies]) >= 0.94


def test_differences_are_paired_by_seed():
    """Seeds 0 and 2 are common: 3 - 1 and 9 - 4; a difference of the means would be 6.5 - 14.17."""
    a = {2: np.array([9.0, 8.0]), 0: np.array([3.0, 2.0]), 5: np.array([7.5, 0.0])}
    b = {0: np.array([1.0, 0.0]), 2: np.array([4.0, 3.0]), 1: np.array([37.5, 0.0])}
    assert paired_difference(a, b) == Difference.of(alike(2.0, 5.0))
    assert paired_difference(a, b).value == 3.5
    assert paired_difference(a, {7: np.array([1.0, 1.0])}) is None


def test_pairing_takes_away_what_seeds_and_images_have_in_common():
    common = 10.0 * np.arange(4)[:, None] + np.arange(5) ** 2
    a = dict(enumerate(common + 1 + 0.1 * (-1) ** np.arange(5)))
    b = dict(enumerate(common))
    assert paired_difference(a, b).sign == 1
    assert paired_difference(b, a).sign == -1


def test_quotients_are_paired_by_seed():
    assert paired_quotient({0: 6.0, 1: 8.0, 2: 1.0}, {0: 2.0, 1: 2.0, 2: 0.0}) == Mean.of([3.0, 4.0])
    assert paired_quotient({0: 6.0}, {1: 2.0}) is None
