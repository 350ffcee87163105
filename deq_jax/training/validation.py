"""The line of a validation."""

from __future__ import annotations

from typing import Any

from deq_jax.evaluation.rows import Outcomes, spread, summary
from deq_jax.evaluation.sanity import plain_warnings


def validation_line(outcomes: Outcomes, classes: int, best: float) -> dict[str, Any]:
    """The metrics of a validation, with warnings if there are any.

    Args:
      outcomes: measurements of the held-out images, clean and under the validation attack.
      classes: number of classes.
      best: highest accuracy under attack of the validations before, -1 if there was none.
    """
    row = summary(outcomes)["deployed"]
    assert row.attacked is not None  # there is a validation attack
    accuracy, residual = row.attacked.accuracy, row.clean.residual
    line: dict[str, Any] = {"accuracy": row.clean.accuracy, "adversarial_accuracy": accuracy}
    if residual is not None:
        line["residual"] = residual
    adjoint = spread(outcomes.adjoint_residual).mean
    if adjoint is not None:
        line["adjoint_residual"] = adjoint
    warnings = plain_warnings(line["accuracy"], len(outcomes.y), classes, residual) + collapse(best, accuracy)
    return line | ({"warnings": warnings} if warnings else {})


def collapse(best: float, accuracy: float) -> list[str]:
    """A sentence if the accuracy under attack is less than half of the best one so far.

    References: Wong et al. 2020 and Andriushchenko & Flammarion 2020, on single-step adversarial training.
    """
    if 2 * accuracy >= best:
        return []
    fell = f"accuracy under attack fell from {100 * best:.1f} % to {100 * accuracy:.1f} %"
    return [f"{fell}: catastrophic overfitting to the attack, or too high a learning rate; the best checkpoint is kept"]
