"""Confidence intervals and warnings that belong to the numbers of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from deq_jax.evaluation.results import WorstCase
from deq_jax.evaluation.rows import is_correct, named
from deq_jax.evaluation.sanity import SIGNIFICANT, plain_warnings

TINY = np.finfo(float).tiny


def exact_interval(accuracy: ArrayLike, images: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
    """The confidence interval of an accuracy on other images of the same kind; arrays give arrays.

    Args:
      accuracy: accuracy, from 0 to 1.
      images: number of images that it was measured on; not an integer where the mean of several outcomes varies less
        than one.
      level: confidence level.

    References: Clopper & Pearson 1934; Korn & Graubard 1998 for numbers that are not integers.

    Examples:
      >>> from deq_jax.evaluation import exact_interval
      >>> [round(float(end), 3) for end in exact_interval(accuracy=0.5, images=100)]
      [0.398, 0.602]
    """
    accuracy, images, tail = np.asarray(accuracy, float), np.asarray(images, float), (1 - level) / 2
    right, wrong = accuracy * images, (1 - accuracy) * images
    low = np.where(right > 0, special.betaincinv(np.maximum(right, TINY), wrong + 1, tail), 0.0)
    high = np.where(wrong > 0, special.betaincinv(right + 1, np.maximum(wrong, TINY), 1 - tail), 1.0)
    return low[()], high[()]


def warnings_of(result: WorstCase) -> list[str]:
    """A sentence for each sign that the model itself is at fault, not the attacks. Usually none."""
    correct = named(is_correct(result.clean, result.y))
    residual = float(np.mean(result.clean.deployed.residual))
    known, accuracy = None if np.isnan(residual) else residual, float(np.mean(correct["deployed"]))
    plain = plain_warnings(accuracy, len(result.y), result.probe.whole.shape[1], known)
    better = better_state(correct)
    return [*plain, *([better] if better else [])]


def better_state(correct: Mapping[str, np.ndarray]) -> str | None:
    """A sentence on the best state that classifies images better than the deployed predictor; None if none does.

    A state counts as better if an exact test of the images on which the two differ (McNemar's) says so at 5 %, over all
    states together (Bonferroni).

    Args:
      correct: name of the state, or "deployed" -> [N] bool.
    """
    deployed, found = correct["deployed"], []
    for name, state in correct.items():
        won, lost = int(np.sum(state & ~deployed)), int(np.sum(deployed & ~state))
        if won > lost and special.bdtrc(won - 1, won + lost, 0.5) * (len(correct) - 1) <= SIGNIFICANT:
            found.append((float(np.mean(state)), name))
    if not found:
        return None
    accuracy, name = max(found, key=lambda state: state[0])
    numbers = f"{100 * accuracy:.1f} % against {100 * np.mean(deployed):.1f} %"
    advice = "see --readout, and whether the solver converges"
    return f"{name} classifies clean images better than the deployed predictor: {numbers}; {advice}"
