"""Intervals over seeds and images, against values that were computed by hand, and in simulations."""

import numpy as np
import pytest
from scipy import stats

from deq_jax import InputError
from deq_jax.reporting import Estimate, paired_difference, paired_quotient
from deq_jax.reporting.statistics import accuracy_sides, difference_sides

Z = 1.959964


def outcomes(right, images, seeds=1):
    """Percent [S, N]: the first images are right with every seed."""
    return np.tile(np.where(np.arange(images) < right, 100.0, 0.0), (seeds, 1))


def exact(right, images):
    """Clopper and Pearson's interval in percent, by quantiles of the beta distribution."""
    low = stats.beta.ppf(0.025, right, images - right + 1)
    return 100 * low, 100 * stats.beta.ppf(0.975, right + 1, images - right)


class TestAccuracies:
    @pytest.mark.parametrize(("right", "images"), [(38, 60), (1, 60), (2, 3), (500, 1000)])
    def test_of_one_seed_is_the_exact_interval(self, right, images):
        found = Estimate.of_accuracies(outcomes(right, images))
        assert found.value == pytest.approx(100 * right / images)
        assert found.interval == pytest.approx(exact(right, images), abs=1e-3)
        assert (found.seeds, found.agree) == (1, False)

    @pytest.mark.parametrize("seeds", [1, 2, 5])
    @pytest.mark.parametrize("images", [1, 40, 10000])
    def test_at_0_and_100_percent_there_is_a_width(self, seeds, images):
        none, all = (Estimate.of_accuracies(outcomes(right, images, seeds)) for right in (0, images))
        assert none.interval == pytest.approx((0, 100 * (1 - 0.025 ** (1 / images))), rel=1e-5)
        assert all.interval == pytest.approx((100 - none.interval[1], 100))

    def test_equal_seeds_leave_the_images_part_and_are_said_to_agree(self):
        """Two seeds that break the same 22 of 60 images are one sample of 60 images, not two."""
        found = Estimate.of_accuracies(outcomes(38, 60, seeds=2))
        assert found == Estimate(pytest.approx(63.3333, abs=1e-3), pytest.approx(exact(38, 60), abs=1e-3), 2, True)

    def test_seeds_that_break_as_many_but_other_images_have_a_part(self):
        """8 of 40 images are right with one seed each: their residuals are 50, the mean square 2 * 8 * 50² / 39."""
        a, b = np.zeros(40), np.zeros(40)
        a[:20], b[4:24] = 100, 100
        found = Estimate.of_accuracies([a, b])
        seeds = stats.t.ppf(0.975, 39) * np.sqrt(2 * 8 * 50**2 / 39 / 80)
        p, variance = 0.5, np.var(np.mean([a, b], axis=0) / 100)
        images = exact(20 * 0.25 / variance, 40 * 0.25 / variance)
        assert found.agree
        assert found.interval == pytest.approx([100 * p + sign * np.hypot(images[1] - 50, seeds) for sign in (-1, 1)])

    def test_seeds_and_images_are_added_in_squares(self):
        """50 and 60 % with 12.7062 = t(1): half-width 63.53 over the seeds, so the interval ends at 0 and 100."""
        found = Estimate.of_accuracies(np.concatenate([outcomes(500, 1000), outcomes(600, 1000)]))
        assert found.interval == (0, 100)
        found = Estimate.of_accuracies(np.concatenate([outcomes(550, 1000), outcomes(560, 1000)]))
        low, high = (end - 55.5 for end in exact(555, 1000))
        expected = 55.5 - np.hypot(low, 6.3531), 55.5 + np.hypot(high, 6.3531)
        assert found.interval == pytest.approx(expected, abs=0.02)  # the variance of means is a little smaller

    @pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
    def test_shrinks_with_images_and_seeds(self, right):
        """Of the same outcomes many times over: the width is less, and about the root where it is no edge."""
        rng = np.random.default_rng(0)
        table = np.where(rng.random((3, 40)) < right, 100.0, 0.0)
        width = [
            np.ptp(Estimate.of_accuracies(np.tile(table, (seeds, images))).interval)
            for seeds, images in ((1, 1), (1, 4), (1, 16), (4, 16))
        ]
        assert width[0] > width[1] > width[2] >= width[3]
        assert (width[2] > width[3]) == (0 < right < 1)


class TestDifferences:
    @pytest.mark.parametrize("images", [1, 60, 360])
    @pytest.mark.parametrize("seeds", [1, 2])
    def test_where_no_image_differs_there_is_a_width(self, seeds, images):
        """One image gained and one lost are added: the variance is 2 / (N + 2)."""
        found = Estimate.of_differences(np.zeros((seeds, images)))
        half = 100 * Z * np.sqrt(2) / (images + 2)
        assert found == Estimate(0.0, pytest.approx((-min(half, 100), min(half, 100)), rel=1e-6), seeds, seeds > 1)
        assert found.sign == 0

    def test_of_one_seed_is_the_adjusted_wald_interval(self):
        """Of 60 images 10 gained and 3 lost: (11 - 4) / 62 ± z sqrt((15 / 62 - (7 / 62)²) / 62)."""
        row = np.concatenate([np.full(10, 100.0), np.full(3, -100.0), np.zeros(47)])
        found = Estimate.of_differences([row])
        middle, half = 700 / 62, 100 * Z * np.sqrt((15 / 62 - (7 / 62) ** 2) / 62)
        assert found.value == pytest.approx(700 / 60)
        assert found.interval == pytest.approx((middle - half, middle + half))
        assert found.sign == (1 if half < middle else 0)

    def test_all_gained(self):
        found = Estimate.of_differences(np.full((1, 40), 100.0))
        assert found.interval[0] < 100 == found.interval[1]

    def test_seeds_that_agree_on_few_images_show_nothing(self):
        """Two of 60 images more for each of three seeds: other images might have given none."""
        found = Estimate.of_differences(outcomes(2, 60, seeds=3))
        assert found.value == pytest.approx(10 / 3)
        assert (found.sign, found.agree) == (0, True)

    @pytest.mark.parametrize(("images", "sign"), [(8, 0), (300, 1)])
    def test_sign_is_that_of_an_interval_without_zero(self, images, sign):
        """One image in four is gained, for each of three seeds another one; never more than chance of 8 images."""
        table = np.zeros((3, images))
        for seed, row in enumerate(table):
            row[seed::4] = 100
        assert Estimate.of_differences(table).sign == sign
        assert Estimate.of_differences(-table).sign == -sign

    def test_are_paired_by_seed(self):
        """Seeds 0 and 2 are common; a difference of the means would count 5 and 1, too."""
        a, b = ({seed: outcomes(right, 40)[0] for seed, right in part.items()} for part in (A, B))
        found = paired_difference(a, b)
        assert found == Estimate.of_differences([a[0] - b[0], a[2] - b[2]])
        assert (found.value, found.seeds) == (100 * (20 + 10) / 2 / 40, 2)
        assert paired_difference(a, {7: b[0]}) is None

    def test_booleans_count_as_percent(self):
        """The arrays of an evaluation, `clean` and `robust`, are booleans."""
        a, b = ({seed: outcomes(right, 40)[0] for seed, right in part.items()} for part in (A, B))
        assert paired_difference(*({s: row == 100 for s, row in part.items()} for part in (a, b))) == (
            paired_difference(a, b)
        )
        assert Estimate.of_accuracies([a[0] == 100]) == Estimate.of_accuracies([a[0]])

    def test_pairing_takes_away_what_seeds_and_images_have_in_common(self):
        """The first 20 images more, whatever the others are and whatever the seed."""
        a = {seed: outcomes(150 + 10 * seed, 400)[0] for seed in range(4)}
        b = {seed: np.where(np.arange(400) < 20, 0, row) for seed, row in a.items()}
        assert paired_difference(a, b).sign == 1
        assert paired_difference(b, a).sign == -1
        assert Estimate.of_accuracies(list(a.values())).interval[0] < np.mean(list(b.values()))


A, B = {2: 30, 0: 38, 5: 1}, {0: 18, 2: 20, 1: 40}


class TestMeasurements:
    def test_seeds_and_images_are_added_in_squares(self):
        """Both standard errors are 1, the seeds' t(1) = 12.706205, and so is the images'; in the end 0 is the least."""
        half = 12.706205 * 2**0.5
        found = Estimate.of_images([[50.0, 50.0], [50.0, 54.0]])
        assert found == Estimate(51.0, pytest.approx((51 - half, 51 + half)), 2, False)
        assert Estimate.of_images([[0.0, 0.0], [0.0, 4.0]]).interval == pytest.approx((0, 1 + half))

    @pytest.mark.parametrize(
        ("table", "half"),
        [
            ([[1.0, 1.0], [3.0, 3.0]], 12.706205),
            ([[2.0, 2.0], [4.0, 4.0], [9.0, 9.0]], 4.302653 * 2.0816660),  # sqrt(26 / 2 / 3)
            ([[2.0, 4.0, 9.0]] * 2, 4.302653 * 2.0816660),  # images differ, seeds do not
            ([[2.0, 4.0, 9.0]], 4.302653 * 2.0816660),
            ([[2.0], [4.0], [9.0]], 4.302653 * 2.0816660),
        ],
    )
    def test_student(self, table, half):
        found, value = Estimate.of_images(table), np.mean(table)
        assert found.value == pytest.approx(value)
        assert found.interval == pytest.approx((max(value - half, 0), value + half), rel=1e-6)

    @pytest.mark.parametrize("table", [[[0.1]], [[0.1, 0.1], [0.1, 0.1], [0.1, 0.1]], [[np.inf, 1.0]]])
    def test_nothing_tells_a_width(self, table):
        assert Estimate.of_images(table).interval is None

    def test_quantities_without_images_vary_with_the_seeds_alone(self):
        found = Estimate.of_seeds([2.0, 4.0, 9.0])
        half = 4.302653 * 2.0816660
        assert found == Estimate(5.0, pytest.approx((0, 5 + half), rel=1e-6), 3, False)
        assert Estimate.of_seeds([2.0]) == Estimate(2.0, None, 1, False)
        assert Estimate.of_seeds([0.1, 0.1, 0.1]) == Estimate(pytest.approx(0.1), None, 3, True)
        assert Estimate.of_seeds([2.0]).sign is None

    def test_quotients_are_paired_by_seed(self):
        assert paired_quotient({0: 6.0, 1: 8.0, 2: 1.0}, {0: 2.0, 1: 2.0, 2: 0.0}) == Estimate.of_seeds([3.0, 4.0])
        assert paired_quotient({0: 6.0}, {1: 2.0}) is None


@pytest.mark.parametrize("make", [Estimate.of_accuracies, Estimate.of_differences, Estimate.of_images])
@pytest.mark.parametrize("values", [[], [1.0, 2.0], np.zeros((2, 0)), np.zeros((0, 2))], ids=str)
def test_other_shapes_are_refused(make, values):
    with pytest.raises(InputError, match=r"expected values \[seeds, images\], at least one, got shape \("):
        make(values)


def test_no_seed_is_refused():
    with pytest.raises(InputError, match="at least one"):
        Estimate.of_seeds([])


def test_other_units_are_refused():
    with pytest.raises(InputError, match="expected values from 0 to 100, got 0 to 101"):
        Estimate.of_accuracies([[0.0, 101.0]])
    with pytest.raises(InputError, match="expected values from -100 to 100, got -101 to 0"):
        Estimate.of_differences([[0.0, -101.0]])
    with pytest.raises(InputError, match="expected values from 0 to inf, got -1 to -1"):
        Estimate.of_seeds([-1.0])


STUDIES, SIZES = 1000, [(2, 20), (2, 60), (3, 60), (5, 60), (3, 300)]


def probits(rng, mean, spread, size, common):
    """Outcomes in percent [studies, S, N], and their true mean: normal effects of seed, image and both, above 0."""
    seeds, _ = size
    effects = mean + common + spread * rng.normal(size=(STUDIES, seeds, 1)) + rng.normal(size=(STUDIES, *size))
    return np.where(effects > 0, 100.0, 0.0)


def covered(table, truth, sides):
    value = table.mean(axis=(1, 2))
    below, above = sides(table)
    return np.mean((value - below <= truth) & (truth <= value + above))


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("image", [0.0, 2.0])
@pytest.mark.parametrize("mean", [0.0, 1.0, -2.0])
def test_intervals_of_accuracies_cover_the_truth(mean, image, spread):
    """Of 1000 studies of each size: 95 %, but for what that varies by (0.7 %), and for seeds of skewed accuracies."""
    rng = np.random.default_rng(0)
    sizes = SIZES if spread else [(1, 20), (1, 60), *SIZES]
    truth = 100 * stats.norm.cdf(mean / np.sqrt(1 + spread**2 + image**2))
    for size in sizes:
        common = image * rng.normal(size=(STUDIES, 1, size[1]))
        assert covered(probits(rng, mean, spread, size, common), truth, accuracy_sides) >= 0.93, size


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize(("mean", "gain"), [(0.0, 0.0), (2.0, 0.0), (1.0, 0.3)])
def test_intervals_of_differences_cover_the_truth(mean, gain, spread):
    rng = np.random.default_rng(0)
    sizes = SIZES if spread else [(1, 20), (1, 60), *SIZES]
    scale = np.sqrt(1 + spread**2 + 4)
    truth = 100 * (stats.norm.cdf((mean + gain) / scale) - stats.norm.cdf(mean / scale))
    for size in sizes:
        common = 2 * rng.normal(size=(STUDIES, 1, size[1]))
        before, after = (probits(rng, level, spread, size, common) for level in (mean, mean + gain))
        assert covered(after - before, truth, difference_sides) >= 0.94, size


def test_many_tables_at_once_are_as_each_alone():
    tables = np.where(np.random.default_rng(0).random((5, 3, 20)) < 0.8, 100.0, 0.0)
    for sides, make in ((accuracy_sides, Estimate.of_accuracies), (difference_sides, Estimate.of_differences)):
        for table, below, above in zip(tables, *sides(tables), strict=True):
            lowest = table.min() if make == Estimate.of_accuracies else -100
            expected = max(table.mean() - below, lowest), min(table.mean() + above, 100)
            assert make(table).interval == pytest.approx(expected)
