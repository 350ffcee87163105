"""Means and paired differences over the seeds of trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
        return cls(float(np.mean(values)), _standard_error(values), len(values))


@dataclass(frozen=True)
class Difference:
    """A mean difference between two conditions that share their seeds.

    Attributes:
      value: the mean over the seeds.
      interval: lower and upper end of its 95 % confidence interval by Student's t distribution with seeds - 1 degrees
        of freedom; None for a single seed.
      seeds: how many there are.
    """

    value: float
    interval: tuple[float, float] | None
    seeds: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Difference:
        """The mean of one difference per seed.

        Raises:
          InputError: there is none.
        """
        mean = Mean.of(differences)
        if mean.standard_error is None:
            return cls(mean.value, None, mean.seeds)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, mean.seeds - 1)) * mean.standard_error
        return cls(mean.value, (mean.value - half, mean.value + half), mean.seeds)

    @property
    def sign(self) -> int | None:
        """1 or -1 if the interval lies above or below 0, 0 if it contains 0; None without interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return int(low > 0) - int(high < 0)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """The mean of a - b over the seeds that both have; None if they share none.

    Args:
      a, b: seed -> value.
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


def _standard_error(values: Sequence[float]) -> float | None:
    return None if len(values) < 2 else float(np.std(values, ddof=1)) / math.sqrt(len(values))
