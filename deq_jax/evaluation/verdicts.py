"""What must be said with the numbers of an evaluation: how exact they are, and what speaks against the model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import special

from deq_jax.evaluation.results import WorstCase
from deq_jax.evaluation.rows import is_correct, named
from deq_jax.evaluation.sanity import SIGNIFICANT, plain_warnings


def exact_interval(accuracy: float, images: int, level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of an accuracy on other images of the same kind.

    Args:
      accuracy: from 0 to 1.
      images: on which it was measured.
      level: of confidence.

    References: Clopper & Pearson 1934.
    """
    right, tail = round(accuracy * images), (1 - level) / 2
    wrong = images - right
    low = special.betaincinv(right, wrong + 1, tail) if right > 0 else 0.0
    high = special.betaincinv(right + 1, wrong, 1 - tail) if wrong > 0 else 1.0
    return float(low), float(high)


def warnings_of(result: WorstCase) -> list[str]:
    """A sentence for each sign that the model itself is at fault, whatever the attacks did. Usually none."""
    correct = named(is_correct(result.clean, result.y))
    residual = float(np.mean(result.clean.deployed.residual))
    known, accuracy = None if np.isnan(residual) else residual, float(np.mean(correct["deployed"]))
    plain = plain_warnings(accuracy, len(result.y), result.probe.whole.shape[1], known)
    better = better_state(correct)
    return [*plain, *([better] if better else [])]


def better_state(correct: Mapping[str, np.ndarray]) -> str | None:
    """A sentence on the best of the other states that classify images better than what is deployed; None if none does.

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
    return f"{name} classifies clean images better than what is deployed: {numbers}; {advice}"
