"""Accuracies of single classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deq_jax.evaluation.rows import Outcomes, correctness


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of the deployed predictor on the images of one class, from 0 to 1.

    Attributes:
      name: name of the class, or its number where the dataset names none.
      images: how many were evaluated.
      clean: share of correct images.
      attacked: share of images that are correct under all attacks; None without attack.

    Examples:
      >>> from deq_jax.evaluation import ClassAccuracy
      >>> ClassAccuracy("cat", images=100, clean=0.75, attacked=0.25).attacked
      0.25
    """

    name: str
    images: int
    clean: float
    attacked: float | None = None


def class_accuracies(outcomes: Outcomes, names: Sequence[str] = ()) -> tuple[ClassAccuracy, ...]:
    """The accuracies of all classes that have images, in the order of their labels.

    Args:
      outcomes: results of N images.
      names: names of the classes in the order of their labels; the others are called by their numbers.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Outcomes, Row, Rows, class_accuracies
      >>> row = Row(np.array([0, 0]), np.array([-1.0, 0.5]), np.array([0.25, 0.5]), np.array([np.nan, np.nan]))
      >>> found = class_accuracies(Outcomes(np.array([0, 1]), Rows(None, None, row), None, None), ["cat", "dog"])
      >>> [(one.name, one.clean) for one in found]
      [('cat', 1.0), ('dog', 0.0)]
    """
    clean, attacked = correctness(outcomes)
    found = []
    for label in np.unique(outcomes.y):
        own = outcomes.y == label
        name = names[label] if label < len(names) else str(label)
        robust = None if attacked is None else float(np.mean(attacked.deployed[own]))
        found.append(ClassAccuracy(name, int(np.sum(own)), float(np.mean(clean.deployed[own])), robust))
    return tuple(found)
