"""Means and paired differences over the seeds of training runs and over images, with 95 % confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deq_jax.core.errors import require
from deq_jax.evaluation.verdicts import exact_interval

CONFIDENCE = 0.95

NORMAL = float(stats.norm.ppf((1 + CONFIDENCE) / 2))

Sides = tuple[Any, Any]  # how far an interval reaches below and above the value, [...] each


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval, for other training seeds and other images.

    The images and the seeds each have an interval of their own around the mean. On either side their lengths are added
    in squares (Zou & Donner 2008). So the whole is narrower than neither; what varies with both is counted twice (as in
    Owen 2007, "The pigeonhole bootstrap").

    The seeds' part is Student's interval. It is at least as wide as chance alone makes it where seeds do not matter
    but for which images they err on. Seeds that give the same for every image have no part: `agree` tells so.

    Attributes:
      value: the mean over seeds and images.
      interval: lower and upper end of its interval; None where the width is not known.
      seeds: number of seeds. With a single one the interval is for other images alone.
      agree: whether several seeds have the same mean, so that their spread is not known.

    Examples:
      >>> from deq_jax.reporting import Estimate
      >>> estimate = Estimate.of_accuracies([[100, 0, 100, 100], [100, 0, 0, 100]])  # two seeds, four images
      >>> estimate.value, estimate.seeds
      (62.5, 2)
    """

    value: float
    interval: tuple[float, float] | None
    seeds: int
    agree: bool = False

    @classmethod
    def of_accuracies(cls, correct: ArrayLike) -> Estimate:
        """The mean accuracy in percent.

        The images' part is the exact interval of Clopper & Pearson (1934), which has a width at 0 and 100 %.

        Args:
          correct: [S, N], True and False, or 100 and 0, for each of N images with each of S seeds.
        """
        table = _checked(in_percent(correct), 0, 100)
        return cls._around(table, *accuracy_sides(table), 0, 100)

    @classmethod
    def of_differences(cls, differences: ArrayLike) -> Estimate:
        """The mean difference of two accuracies in points.

        The images' part is the adjusted Wald interval of Bonett & Price (2012): two images are added, one gained and
        one lost. So it has a width where no image differs.

        Args:
          differences: [S, N], 100, 0 or -100 for each of N images with each of S seeds.
        """
        table = _checked(differences, -100, 100)
        return cls._around(table, *difference_sides(table), -100, 100)

    @classmethod
    def of_images(cls, values: ArrayLike) -> Estimate:
        """The mean of anything that is measured of each image. The images' part is Student's interval.

        Args:
          values: [S, N], of N images with each of S seeds; never negative.
        """
        table = _checked(values, 0)
        if not np.isfinite(table).all():
            return cls(float(table.mean()), None, len(table))
        half = np.hypot(_seeds_half(table), _student_half(table.mean(axis=0)))
        return cls._around(table, half, half, 0, np.inf)

    @classmethod
    def of_seeds(cls, values: Sequence[float]) -> Estimate:
        """The mean of a quantity without images. The interval is Student's, for other seeds alone.

        Args:
          values: [S]; never negative.
        """
        table = _checked([[value] for value in values], 0)
        half = _student_half(table[:, 0])
        return cls._around(table, half, half, 0, np.inf)

    @classmethod
    def _around(cls, table: np.ndarray, below: float, above: float, lowest: float, highest: float) -> Estimate:
        value, means = float(table.mean()), table.mean(axis=1)
        interval = max(value - float(below), lowest), min(value + float(above), highest)
        agree = len(table) > 1 and bool(np.ptp(means) == 0)
        return cls(value, interval if below + above > 0 else None, len(table), agree)

    @property
    def sign(self) -> int | None:
        """1 or -1 if the interval lies above or below 0, 0 if it contains 0; None without interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return int(low > 0) - int(high < 0)


def in_percent(values: ArrayLike) -> np.ndarray:
    """The values as numbers: True and False, whether images are classified correctly, become 100 and 0."""
    found = np.asarray(values)
    return 100.0 * found if found.dtype == bool else found


def paired_difference(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]) -> Estimate | None:
    """The mean of a - b over the seeds that both have; None if they share none.

    Args:
      a, b: seed -> accuracies [N] of the same images: True and False, or 100 and 0.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.reporting import paired_difference
      >>> a, b = {0: np.array([100.0, 100.0])}, {0: np.array([100.0, 0.0]), 1: np.array([0.0, 0.0])}
      >>> paired_difference(a, b).value  # seed 0 alone has both
      50.0
    """
    common = sorted(set(a) & set(b))
    return Estimate.of_differences([in_percent(a[seed]) - in_percent(b[seed]) for seed in common]) if common else None


def paired_quotient(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate | None:
    """The mean of a / b over the seeds that both have and for which b is positive; None if there are none.

    Args:
      a, b: seed -> value.

    Examples:
      >>> from deq_jax.reporting import paired_quotient
      >>> paired_quotient({0: 3.0, 1: 5.0}, {0: 2.0, 1: 2.0}).value
      2.0
    """
    common = [seed for seed in sorted(set(a) & set(b)) if b[seed] > 0]
    return Estimate.of_seeds([a[seed] / b[seed] for seed in common]) if common else None


def accuracy_sides(correct: np.ndarray) -> Sides:
    """How far the interval of `Estimate.of_accuracies` reaches; of many tables [..., S, N] at once.

    Averages over seeds vary less between images than a single outcome does. The exact interval is given the number of
    images at which single outcomes would have the same variance: N to S N (Korn & Graubard 1998).
    """
    seeds, images = correct.shape[-2:]
    per_image = correct.mean(axis=-2) / 100
    p, variance = per_image.mean(axis=-1), per_image.var(axis=-1)
    single = p * (1 - p)
    n = images * np.divide(single, np.maximum(variance, single / seeds), out=np.ones_like(p), where=single > 0)
    low, high = exact_interval(p, n, CONFIDENCE)
    return _joined(correct, p, low, high)


def difference_sides(differences: np.ndarray) -> Sides:
    """How far the interval of `Estimate.of_differences` reaches; of many tables [..., S, N] at once."""
    n = differences.shape[-1] + 2
    per_image = differences.mean(axis=-2) / 100
    middle = per_image.sum(axis=-1) / n
    variance = ((per_image**2).sum(axis=-1) + 2) / n - middle**2
    half = NORMAL * np.sqrt(variance / n)
    return _joined(differences, per_image.mean(axis=-1), middle - half, middle + half)


def _joined(table: np.ndarray, value: Any, low: Any, high: Any) -> Sides:
    """The images' interval around the value, as fractions, and the seeds' part; in percent as the table is."""
    seeds = _seeds_half(table)
    return np.hypot(100 * (value - low), seeds), np.hypot(100 * (high - value), seeds)


def _seeds_half(table: np.ndarray) -> Any:
    """Half the length of the seeds' part, [...] of [..., S, N]; 0 for a single seed.

    Its square is Student's t² MS / (S N). MS is the larger one of two mean squares, each with its degrees of freedom:
    of seeds, and of the remainder after seeds and images. The former exceeds the latter on average, and by less where
    seeds happen to agree.
    """
    seeds, images = table.shape[-2:]
    table = table - table[..., :1, :1]  # no rounding where all are equal
    own = _student_half(table.mean(axis=-1))
    freedom = (seeds - 1) * (images - 1)
    if freedom < 1:
        return own
    left = table - table.mean(axis=-1, keepdims=True) - table.mean(axis=-2, keepdims=True)
    left = left + table.mean(axis=(-1, -2), keepdims=True)
    mean_square = np.square(left).sum(axis=(-1, -2)) / freedom
    return np.maximum(own, _quantile(freedom) * np.sqrt(mean_square / (seeds * images)))


def _student_half(values: np.ndarray) -> Any:
    """Half the length of Student's interval for the mean, [...] of [..., n]; 0 for a single value."""
    n = values.shape[-1]
    if n < 2:
        return np.zeros(values.shape[:-1])
    values = values - values[..., :1]  # no rounding where all are equal
    return _quantile(n - 1) * values.std(axis=-1, ddof=1) / np.sqrt(n)


def _quantile(freedom: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def _checked(values: ArrayLike, low: float, high: float = np.inf) -> np.ndarray:
    table = np.asarray(values, float)
    expected = "expected values [seeds, images], at least one"
    require(table.ndim == 2 and table.size > 0, f"Estimate: {expected}, got shape {table.shape}")
    inside = not np.any((table < low) | (table > high))
    require(inside, f"Estimate: expected values from {low:g} to {high:g}, got {table.min():g} to {table.max():g}")
    return table
