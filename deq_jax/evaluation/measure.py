"""What a classifier does with each image, clean and attacked, at every state of its dynamics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.attacks.oracles import Attack
from deq_jax.core.gradients import adjoint_residual, has_adjoint
from deq_jax.core.jacobian import SpectralRadius, gaussian_probes, spectral_radius
from deq_jax.core.losses import cross_entropy, entropy, margin
from deq_jax.core.readouts import EnsembleState
from deq_jax.core.types import AnyArray, Array, Keys, Purpose, PyTree, prng_key
from deq_jax.data.batches import EvaluationBatch, evaluation_batches, to_unit
from deq_jax.data.datasets import Images
from deq_jax.models.base import Classifier, Variables
from deq_jax.models.classifiers import Equilibrium
from deq_jax.parallel.devices import check_batch_size, replicate_and_split
from deq_jax.surrogates.base import Direct, Surrogate, judged

RADIUS_STEPS = 30

T = TypeVar("T")


class Row(NamedTuple):
    """What is seen of each image by one predictor, [N]; or by each of T states, [N, T].

    Attributes:
      label: int, the predicted one.
      margin: best wrong logit minus the true one; not finite where a logit is not.
      entropy: of the predicted distribution, in nats.
      residual: relative; for what is deployed the lowest of the trajectory, which is that of the equilibrium. NaN for
        the mean of the states and for an explicit network.
    """

    label: AnyArray
    margin: AnyArray
    entropy: AnyArray
    residual: AnyArray


class Rows(NamedTuple, Generic[T]):
    """The same of every predictor that a DEQ has. See `named`.

    Attributes:
      states: of the raw states z_1 .. z_T, in an axis after that of the images; None for an explicit network.
      ensemble: of the mean of these states; None for an explicit network.
      deployed: of what is deployed.
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
      clean: on the images as they are.
      attacked: on the adversarial images; None without attack.
      x_adv: [N, H, W, C]; None without attack.
      adjoint_residual: [N], of the images as they are, see `adjoint_residuals`; None where there is no adjoint state.
    """

    y: AnyArray
    clean: Measured
    attacked: Measured | None
    x_adv: AnyArray
    adjoint_residual: AnyArray = None


def measure(
    classifier: Classifier, variables: Variables, x: Array, labels: Array, keys: Keys | None = None
) -> Measured:
    """Measures a batch of images [B, H, W, C] in [0, 1] with labels [B]. Raw states are decoded as they are.

    A classifier whose predictions have a solution must have a method ``decode(variables, z) -> logits``; a random
    one draws from the keys, and is deterministic without them.
    """
    prediction = classifier(variables, x, keys=None if keys is None else keys.fold(Purpose.DEPLOYED))
    unknown, solution = jnp.full(x.shape[0], jnp.nan), prediction.solution

    def row(logits: Array, residual: Array) -> Row:
        return Row(jnp.argmax(logits, axis=-1), margin(logits, labels), entropy(logits), residual)

    if solution is None or not len(solution.residuals):  # without a solver there are no states
        return Rows(None, None, row(prediction.logits, unknown))
    decode: Callable[[PyTree], Array] = partial(cast(Any, classifier).decode, variables)
    states = jax.vmap(row)(lax.map(decode, solution.states), solution.residuals)
    return Rows(
        jax.tree.map(jnp.transpose, states),
        row(decode(EnsembleState()(solution)), unknown),
        row(prediction.logits, jnp.min(solution.residuals, axis=0)),
    )


def spectral_radii(classifier: Classifier, variables: Variables, x: Array, keys: Keys) -> SpectralRadius:
    """The spectral radius of the cell's Jacobian at the equilibrium of each image [B, H, W, C].

    Near the equilibrium plain iteration of the cell converges if it is below 1. The radius is NaN for an explicit
    network, and without a solver.
    """
    solution = classifier(variables, x).solution if isinstance(classifier, Equilibrium) else None
    if solution is None or not len(solution.residuals) or not isinstance(classifier, Equilibrium):
        return SpectralRadius(jnp.full(len(x), jnp.nan), jnp.zeros(len(x), bool))
    params, u, z = variables["params"]["cell"], classifier.encode(variables, x), solution.z
    start = jax.tree.map(lambda leaf: leaf[0], gaussian_probes(keys.fold(Purpose.PROBES), z, 1))
    return spectral_radius(classifier.apply_cell, params, u, z, start, RADIUS_STEPS)


def adjoint_residuals(classifier: Classifier, variables: Variables, x: Array, labels: Array) -> Array | None:
    """How well the classifier's own gradient estimator solves the adjoint equation of its cross-entropy, [B].

    Args:
      classifier: as trained.
      variables: of the classifier.
      x: images [B, H, W, C] in [0, 1].
      labels: [B].

    Returns:
      Relative residuals; see `gradients.adjoint_residual`. None unless it is a DEQ whose estimator has an adjoint
      state.
    """
    if not isinstance(classifier, Equilibrium) or not has_adjoint(classifier.dynamics.gradient):
        return None
    solution: Any = classifier(variables, x).solution
    z, params, u = classifier.dynamics.readout(solution), variables["params"]["cell"], classifier.encode(variables, x)
    fz = classifier.apply_cell(params, z, u)
    g = jax.grad(lambda z: jnp.sum(cross_entropy(classifier.decode(variables, z), labels)))(fz)
    return adjoint_residual(classifier.dynamics.gradient, classifier.apply_cell, params, u, z, g)


def attack_batch(
    classifier: Classifier,
    variables: Variables,
    attack: Attack,
    batch: EvaluationBatch,
    *,
    seed: int,
    surrogate: Surrogate | None = None,
    draws: int | None = None,
) -> tuple[Array, Measured]:
    """Attacks a batch of images, and measures what comes of it.

    What is drawn for an image depends on the seed and its number alone.

    Args:
      classifier: as deployed; success is judged on it.
      variables: of the classifier.
      attack: called with labels.
      batch: images of this device.
      seed: of the attack's randomness.
      surrogate: gives the gradients; None for the classifier's own.
      draws: see `surrogates.judged`.

    Returns:
      Adversarial images [B, H, W, C], and how they are classified.
    """
    keys = Keys(prng_key(seed), batch.number)
    oracle = judged(Direct() if surrogate is None else surrogate, classifier, variables, draws)
    x_adv = attack(oracle, to_unit(batch.x), batch.y, keys)
    return x_adv, measure(classifier, variables, x_adv, batch.y, None if draws is None else keys)


def evaluator(
    classifier: Classifier, attack: Attack | None, *, batch_size: int, seed: int = 0
) -> Callable[..., Outcomes]:
    """Prepares to attack and measure every image of a split once, on all local devices.

    What is drawn for an image depends on the seed and its number alone.

    Args:
      classifier: as deployed; the attack is judged on it.
      attack: None for clean images only.
      batch_size: images at a time, over all devices; the last batch is padded and masked.
      seed: of the attack's randomness.

    Returns:
      ``(variables, images, report) -> Outcomes``, compiled at its first call. `report`, if given, is called
      with the number of images done and their total.

    Raises:
      InputError: the batch does not divide among the devices.
    """
    check_batch_size(batch_size)

    def on_device(variables: Variables, batch: EvaluationBatch) -> Outcomes:
        clean = measure(classifier, variables, to_unit(batch.x), batch.y)
        found = Outcomes(
            batch.y, clean, None, None, adjoint_residuals(classifier, variables, to_unit(batch.x), batch.y)
        )
        if attack is None:
            return found
        x_adv, attacked = attack_batch(classifier, variables, attack, batch, seed=seed)
        return found._replace(attacked=attacked, x_adv=x_adv)

    run = replicate_and_split(on_device, joint=False)

    def run_all(
        variables: Variables, images: Images, report: Callable[[int, int], None] = lambda done, total: None
    ) -> Outcomes:
        parts = []
        for batch in evaluation_batches(images, batch_size):
            parts.append(jax.tree.map(lambda leaf, keep=~batch.is_padding: leaf[keep], run(variables, batch)))
            report(sum(len(part.y) for part in parts), len(images.y))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    return run_all


def is_correct(measured: Measured, labels: AnyArray) -> Correct:
    """Whether each image is classified correctly, bool. Logits that are not finite never count as fooled."""

    def of(row: Row) -> AnyArray:
        true = labels if row.label.ndim == 1 else labels[:, None]
        return (row.label == true) | ~np.isfinite(row.margin)

    states, ensemble, deployed = measured
    return Rows(None if states is None else of(states), None if ensemble is None else of(ensemble), of(deployed))


def both(a: Correct, b: Correct) -> Correct:
    """Where both hold."""
    return jax.tree.map(np.logical_and, a, b)


def correctness(outcomes: Outcomes) -> tuple[Correct, Correct | None]:
    """Whether each image is correct when clean, and under attack (None without attack).

    An image counts as correct under attack only if it is also correct without it.
    """
    clean = is_correct(outcomes.clean, outcomes.y)
    if outcomes.attacked is None:
        return clean, None
    return clean, both(clean, is_correct(outcomes.attacked, outcomes.y))


def named(rows: Rows[T]) -> dict[str, T]:
    """The rows by their names, each without an axis of states: z_1 .. z_T, ensemble, deployed.

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
    """What was measured, with that of the chosen images (their numbers, or [N] bool) exchanged."""

    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        whole = np.array(old)
        whole[chosen] = new
        return whole

    return jax.tree.map(put, measured, by)


def to_columns(measured: Measured) -> dict[str, np.ndarray]:
    """As files hold it: label, margin, entropy and residual [N, R], with a column for each name of `named`."""
    rows = named(measured).values()
    return {name: np.stack([getattr(row, name) for row in rows], axis=1) for name in Row._fields}


def from_columns(arrays: Mapping[str, np.ndarray], prefix: str = "") -> Measured:
    """What `to_columns` wrote, from arrays whose names begin with the prefix."""
    columns = Row(*(arrays[prefix + name] for name in Row._fields))
    deployed = Row(*(array[:, -1] for array in columns))
    if columns.label.shape[1] == 1:
        return Rows(None, None, deployed)
    return Rows(Row(*(array[:, :-2] for array in columns)), Row(*(array[:, -2] for array in columns)), deployed)


@dataclass(frozen=True)
class Means:
    """Means over images of what was measured in one row.

    Attributes:
      accuracy: from 0 to 1.
      entropy: in nats.
      residual: relative; None where there is none.
    """

    accuracy: float
    entropy: float
    residual: float | None


@dataclass(frozen=True)
class RowMeans:
    """Means of one row on clean and on adversarial images; None without attack."""

    clean: Means
    attacked: Means | None


@dataclass(frozen=True)
class Spread:
    """Mean and largest of the finite numbers among those of the images; None where there is none."""

    mean: float | None
    largest: float | None


def summary(outcomes: Outcomes) -> dict[str, RowMeans]:
    """Means over the images of what was measured, for each row of `named`."""
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
