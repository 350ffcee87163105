"""What must be said with the numbers of an evaluation: how exact they are, and what speaks against the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from deq_jax.evaluation.measure import is_correct, row_names
from deq_jax.evaluation.results import WorstCase
from deq_jax.evaluation.sanity import SIGNIFICANT, plain_warnings

TINY = np.finfo(float).tiny


def exact_interval(accuracy: ArrayLike, images: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
    """The confidence interval of an accuracy on other images of the same kind; arrays give arrays.

    Args:
      accuracy: from 0 to 1.
      images: on how many it was measured; not an integer where the mean of several outcomes varies less than one.
      level: of confidence.

    References: Clopper & Pearson 1934; Korn & Graubard 1998 for numbers that are not integers.
    """
    accuracy, images, tail = np.asarray(accuracy, float), np.asarray(images, float), (1 - level) / 2
    right, wrong = accuracy * images, (1 - accuracy) * images
    low = np.where(right > 0, special.betaincinv(np.maximum(right, TINY), wrong + 1, tail), 0.0)
    high = np.where(wrong > 0, special.betaincinv(right + 1, np.maximum(wrong, TINY), 1 - tail), 1.0)
    return low[()], high[()]


def warnings_of(result: WorstCase) -> list[str]:
    """A sentence for each sign that the model itself is at fault, whatever the attacks did. Usually none."""
    names, correct = row_names(result.clean), is_correct(result.clean, result.y)
    residual = float(np.mean(result.clean.residual[:, -1]))
    known = None if np.isnan(residual) else residual
    plain = plain_warnings(float(np.mean(correct[:, -1])), len(correct), result.probe.whole.shape[1], known)
    better = better_state(names, correct)
    return [*plain, *([better] if better else [])]


def better_state(names: list[str], correct: np.ndarray) -> str | None:
    """A sentence on the best of the other states that classify images better than what is deployed; None if none does.

    A state counts as better if an exact test of the images on which the two differ (McNemar's) says so at 5 %, over all
    states together (Bonferroni).

    Args:
      names: of the R rows, what is deployed last.
      correct: [N, R] bool.
    """
    deployed, found = correct[:, -1], []
    for name, state in zip(names[:-1], correct[:, :-1].T, strict=True):
        won, lost = int(np.sum(state & ~deployed)), int(np.sum(deployed & ~state))
        if won > lost and special.bdtrc(won - 1, won + lost, 0.5) * (len(names) - 1) <= SIGNIFICANT:
            found.append((float(np.mean(state)), name))
    if not found:
        return None
    accuracy, name = max(found, key=lambda state: state[0])
    numbers = f"{100 * accuracy:.1f} % against {100 * np.mean(deployed):.1f} %"
    advice = "see --readout, and whether the solver converges"
    return f"{name} classifies clean images better than what is deployed: {numbers}; {advice}"
