"""Measurements of each image by every predictor that a DEQ has, and their means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from deq_jax.core.types import AnyArray

T = TypeVar("T")


class Row(NamedTuple):
    """Measurements of each image by one predictor, [N]; or by each of T states, [N, T].

    Attributes:
      label: int, the predicted class.
      margin: best wrong logit minus the true one; not finite where a logit is not.
      entropy: entropy of the predicted distribution, in nats.
      residual: relative residual; for the deployed predictor the lowest of the trajectory, which belongs to the
        equilibrium. NaN for the mean of the states and for an explicit network.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Row
      >>> row = Row(np.array([3, 5]), np.array([-1.0, 0.5]), np.array([0.25, 0.5]), np.array([0.001, 0.002]))
      >>> (row.margin < 0).tolist()  # correct
      [True, False]
    """

    label: AnyArray
    margin: AnyArray
    entropy: AnyArray
    residual: AnyArray


class Rows(NamedTuple, Generic[T]):
    """A value for every predictor that a DEQ has; see `named`.

    Attributes:
      states: values of the raw states z_1 .. z_T, in an axis after the images'; None for an explicit network.
      ensemble: value of the mean of these states; None for an explicit network.
      deployed: value of the deployed predictor.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Rows
      >>> correct = Rows(states=np.array([[False, True, True]]), ensemble=np.array([True]), deployed=np.array([True]))
      >>> correct.states.mean(axis=0).tolist()  # of z_1, z_2 and z_3
      [0.0, 1.0, 1.0]
    """

    states: T | None
    ensemble: T | None
    deployed: T


Measured: TypeAlias = Rows[Row]

Correct: TypeAlias = Rows[AnyArray]


class Outcomes(NamedTuple):
    """Per image, in the order of the split.

    Attributes:
      y: [N], the true labels.
      clean: measurements of the clean images.
      attacked: measurements of the adversarial images; None without attack.
      x_adv: [N, H, W, C]; None without attack.
      adjoint_residual: [N], at the clean images, see `adjoint_residuals`; None without an adjoint state.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Outcomes, Row, Rows
      >>> row = Row(np.array([3, 5]), np.array([-1.0, 0.5]), np.array([0.25, 0.5]), np.array([np.nan, np.nan]))
      >>> Outcomes(np.array([3, 4]), Rows(None, None, row), attacked=None, x_adv=None).clean.deployed.label.tolist()
      [3, 5]
    """

    y: AnyArray
    clean: Measured
    attacked: Measured | None
    x_adv: AnyArray
    adjoint_residual: AnyArray = None


def is_correct(measured: Measured, labels: AnyArray) -> Correct:
    """Whether each image is classified correctly, bool. Logits that are not finite never count as fooled.

    Args:
      measured: measurements of N images.
      labels: [N].

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Row, Rows, is_correct
      >>> row = Row(np.array([3, 5]), np.array([-1.0, 0.5]), np.array([0.25, 0.5]), np.array([np.nan, np.nan]))
      >>> is_correct(Rows(None, None, row), np.array([3, 4])).deployed.tolist()
      [True, False]
    """

    def of(row: Row) -> AnyArray:
        true = labels if row.label.ndim == 1 else labels[:, None]
        return (row.label == true) | ~np.isfinite(row.margin)

    states, ensemble, deployed = measured
    return Rows(None if states is None else of(states), None if ensemble is None else of(ensemble), of(deployed))


def both(a: Correct, b: Correct) -> Correct:
    """Where both hold."""
    found: Correct = jax.tree.map(np.logical_and, a, b)
    return found


def correctness(outcomes: Outcomes) -> tuple[Correct, Correct | None]:
    """Whether each image is correct when clean, and under attack (None without attack).

    An image counts as correct under attack only if it is also correct without it.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Outcomes, Row, Rows, correctness
      >>> row = Row(np.array([3, 5]), np.array([-1.0, 0.5]), np.array([0.25, 0.5]), np.array([np.nan, np.nan]))
      >>> clean, robust = correctness(Outcomes(np.array([3, 4]), Rows(None, None, row), attacked=None, x_adv=None))
      >>> clean.deployed.tolist(), robust
      ([True, False], None)
    """
    clean = is_correct(outcomes.clean, outcomes.y)
    if outcomes.attacked is None:
        return clean, None
    return clean, both(clean, is_correct(outcomes.attacked, outcomes.y))


def named(rows: Rows[T]) -> dict[str, T]:
    """The rows by their names, each without an axis of states: z_1 .. z_T, ensemble, deployed.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Rows, named
      >>> list(named(Rows(np.ones((4, 3)), np.ones(4), np.ones(4))))
      ['z_1', 'z_2', 'z_3', 'ensemble', 'deployed']
    """
    found: dict[str, T] = {}
    if rows.states is not None:
        count = jax.tree.leaves(rows.states)[0].shape[1]
        found = {f"z_{t}": jax.tree.map(lambda leaf, t=t: leaf[:, t - 1], rows.states) for t in range(1, 1 + count)}
    if rows.ensemble is not None:
        found["ensemble"] = rows.ensemble
    return found | {"deployed": rows.deployed}


def replaced(measured: Measured, chosen: np.ndarray, by: Measured) -> Measured:
    """Measurements, exchanged for the chosen images (their numbers, or [N] bool)."""

    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        whole = np.array(old)
        whole[chosen] = new
        return whole

    found: Measured = jax.tree.map(put, measured, by)
    return found


def to_columns(measured: Measured) -> dict[str, np.ndarray]:
    """As files hold it: label, margin, entropy and residual [N, R], with a column for each name of `named`."""
    rows = named(measured).values()
    return {name: np.stack([getattr(row, name) for row in rows], axis=1) for name in Row._fields}


def from_columns(arrays: Mapping[str, np.ndarray], prefix: str = "") -> Measured:
    """The measurements that `to_columns` wrote, from arrays with this prefix in their names."""
    columns = Row(*(arrays[prefix + name] for name in Row._fields))
    deployed = Row(*(array[:, -1] for array in columns))
    if columns.label.shape[1] == 1:
        return Rows(None, None, deployed)
    return Rows(Row(*(array[:, :-2] for array in columns)), Row(*(array[:, -2] for array in columns)), deployed)


@dataclass(frozen=True)
class Means:
    """Means over images of the measurements in one row.

    Attributes:
      accuracy: share of correct images, from 0 to 1.
      entropy: mean entropy of the predicted distributions, in nats.
      residual: mean relative residual; None where there is none.

    Examples:
      >>> from deq_jax.evaluation import Means
      >>> Means(accuracy=0.9, entropy=0.25, residual=None).accuracy
      0.9
    """

    accuracy: float
    entropy: float
    residual: float | None


@dataclass(frozen=True)
class RowMeans:
    """Means of one row on clean and on adversarial images.

    Attributes:
      clean: means on clean images.
      attacked: means on adversarial images; None without attack.

    Examples:
      >>> from deq_jax.evaluation import Means, RowMeans
      >>> RowMeans(clean=Means(0.9, 0.25, None), attacked=Means(0.4, 0.5, None)).attacked.accuracy
      0.4
    """

    clean: Means
    attacked: Means | None


@dataclass(frozen=True)
class Spread:
    """Mean and largest of the images' finite numbers.

    Attributes:
      mean: None where no number is finite.
      largest: None where no number is finite.

    Examples:
      >>> from deq_jax.evaluation import Spread
      >>> Spread(mean=0.75, largest=0.875).largest
      0.875
    """

    mean: float | None
    largest: float | None


def summary(outcomes: Outcomes) -> dict[str, RowMeans]:
    """Means over the images for each row of `named`, such as "z_1" or "deployed".

    Args:
      outcomes: results of N images.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Outcomes, Row, Rows, summary
      >>> row = Row(np.array([3, 5]), np.array([-1.0, 0.5]), np.array([0.25, 0.5]), np.array([0.25, 0.5]))
      >>> summary(Outcomes(np.array([3, 4]), Rows(None, None, row), attacked=None, x_adv=None))["deployed"].clean
      Means(accuracy=0.5, entropy=0.375, residual=0.375)
    """
    clean, robust = correctness(outcomes)
    right = {"clean": named(clean), "attacked": {} if robust is None else named(robust)}
    seen = {"clean": named(outcomes.clean), "attacked": {} if outcomes.attacked is None else named(outcomes.attacked)}
    means = {
        condition: {name: _means(right[condition][name], row) for name, row in rows.items()}
        for condition, rows in seen.items()
    }
    return {name: RowMeans(mean, means["attacked"].get(name)) for name, mean in means["clean"].items()}


def spread(values: np.ndarray | None) -> Spread:
    """Mean and largest of the finite numbers, one per image."""
    finite = np.array([]) if values is None else values[np.isfinite(values)]
    return Spread(float(np.mean(finite)), float(np.max(finite))) if len(finite) else Spread(None, None)


def _means(correct: AnyArray, row: Row) -> Means:
    residual = float(np.mean(row.residual))
    return Means(float(np.mean(correct)), float(np.mean(row.entropy)), None if np.isnan(residual) else residual)
