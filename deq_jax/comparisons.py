"""Means and paired differences over the seeds of trainings, and over images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deq_jax.types import require

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
      value: the mean.
      standard_error: sample standard deviation over sqrt(seeds); None for a single seed.
      seeds: how many there are.
    """

    value: float
    standard_error: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of one value per seed.

        Raises:
          InputError: there is none.
        """
        require(len(values) > 0, "Mean: expected at least one value, got none")
        error = None if len(values) < 2 else _standard_error(values)
        return cls(float(np.mean(values)), error, len(values))


@dataclass(frozen=True)
class Difference:
    """A mean difference between two conditions that share their seeds and their images.

    Attributes:
      value: the mean over seeds and images.
      interval: lower and upper end of its 95 % confidence interval; None for a single seed or image.
      seeds: how many there are.
    """

    value: float
    interval: tuple[float, float] | None
    seeds: int

    @classmethod
    def of(cls, differences: ArrayLike) -> Difference:
        """The mean difference, for what other seeds and other images would give.

        The half-width is the root of the sum of two squares: the half-widths of Student's intervals for the mean over
        the seeds and for the mean over the images. So it is narrower than neither; what varies with both is counted
        twice (as in Owen 2007, "The pigeonhole bootstrap").

        Args:
          differences: [S, N], of N images with each of S seeds.

        Raises:
          InputError: there are none, or they are not of that shape.
        """
        table = np.asarray(differences, float)
        expected = "expected differences [seeds, images], at least one"
        require(table.ndim == 2 and table.size > 0, f"Difference: {expected}, got shape {table.shape}")
        value, seeds = float(np.mean(table)), len(table)
        if min(table.shape) < 2:
            return cls(value, None, seeds)
        half = math.hypot(_half_width(table.mean(axis=1)), _half_width(table.mean(axis=0)))
        return cls(value, (value - half, value + half), seeds)

    @property
    def sign(self) -> int | None:
        """1 or -1 if the interval lies above or below 0, 0 if it contains 0; None without interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return int(low > 0) - int(high < 0)


def paired_difference(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]) -> Difference | None:
    """The mean of a - b over the seeds that both have; None if they share none.

    Args:
      a, b: seed -> values [N] of the same images.
    """
    common = sorted(set(a) & set(b))
    return Difference.of([a[seed] - b[seed] for seed in common]) if common else None


def paired_quotient(a: Mapping[int, float], b: Mapping[int, float]) -> Mean | None:
    """The mean of a / b over the seeds that both have and for which b is positive; None if there are none.

    Args:
      a, b: seed -> value.
    """
    common = [seed for seed in sorted(set(a) & set(b)) if b[seed] > 0]
    return Mean.of([a[seed] / b[seed] for seed in common]) if common else None


def _standard_error(values: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _half_width(values: np.ndarray) -> float:
    """Of Student's confidence interval for the mean."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * _standard_error(values)
