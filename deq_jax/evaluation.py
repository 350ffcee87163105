"""What a classifier does with each image, clean and attacked, at every state of its dynamics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.attacks.oracle import classifier_oracle
from deq_jax.classifiers import Equilibrium
from deq_jax.data import EvaluationBatch, Images, evaluation_batches, to_unit
from deq_jax.losses import entropy
from deq_jax.parallel import check_batch_size, replicate_and_split
from deq_jax.types import AnyArray, Array, Attack, Classifier, Keys, Variables


class Measured(NamedTuple):
    """What is seen of each image. Per state: the raw states z_1 .. z_T, then the deployed readout.

    Attributes:
      label: [N, T + 1] int, the predicted one.
      entropy: [N, T + 1], of the predicted distribution, in nats.
      residual: [N, T + 1], relative; for the deployed readout the lowest of the trajectory, which is
        that of the equilibrium. NaN for an explicit network.
    """

    label: AnyArray
    entropy: AnyArray
    residual: AnyArray


class Outcomes(NamedTuple):
    """Per image, in the order of the split.

    Attributes:
      y: [N], the true labels.
      clean: on the images as they are.
      attacked: on the adversarial images; None without attack.
      x_adv: [N, H, W, C]; None without attack.
    """

    y: AnyArray
    clean: Measured
    attacked: Measured | None
    x_adv: AnyArray


def measure(classifier: Classifier, variables: Variables, x: Array) -> Measured:
    """Measures a batch of images [B, H, W, C] in [0, 1]. Raw states are decoded as they are."""
    prediction = classifier(variables, x)
    logits = prediction.logits[None]
    residual = jnp.full((1, x.shape[0]), jnp.nan)
    if isinstance(classifier, Equilibrium) and prediction.solution is not None:
        solution = prediction.solution
        states = lax.map(lambda state: classifier.decode(variables, state), solution.states)
        logits = jnp.concatenate([states, logits])
        residual = jnp.concatenate([solution.residuals, jnp.min(solution.residuals, axis=0, keepdims=True)])
    return Measured(jnp.argmax(logits, axis=-1).T, jax.vmap(entropy)(logits).T, residual.T)


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
        x = to_unit(batch.x)
        clean = measure(classifier, variables, x)
        if attack is None:
            return Outcomes(batch.y, clean, None, None)
        keys = Keys(jax.random.key(seed), batch.number)
        x_adv = attack(classifier_oracle(classifier, variables), x, batch.y, keys)
        return Outcomes(batch.y, clean, measure(classifier, variables, x_adv), x_adv)

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


def correctness(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray | None]:
    """[N, T + 1] bool: correct as it is, and correct under attack (None without attack).

    An image counts as correct under attack only if it is correct as it is, too.
    """
    clean = outcomes.clean.label == outcomes.y[:, None]
    if outcomes.attacked is None:
        return clean, None
    return clean, clean & (outcomes.attacked.label == outcomes.y[:, None])


def row_names(outcomes: Outcomes) -> list[str]:
    """Names of the T + 1 rows: z_1 .. z_T, deployed."""
    return [*(f"z_{t}" for t in range(1, outcomes.clean.label.shape[1])), "deployed"]


def summary(outcomes: Outcomes) -> dict[str, Any]:
    """Means over the images, as JSON data: for each row z_1 .. z_T and "deployed", what was measured."""
    clean, robust = correctness(outcomes)
    rows = {}
    for row, name in enumerate(row_names(outcomes)):
        rows[name] = {"clean": _means(clean, outcomes.clean, row)}
        if robust is not None and outcomes.attacked is not None:
            rows[name]["attacked"] = _means(robust, outcomes.attacked, row)
    return {"images": len(outcomes.y), "rows": rows}


def _means(correct: np.ndarray, measured: Measured, row: int) -> dict[str, float | None]:
    residual = float(np.mean(measured.residual[:, row]))
    return {
        "accuracy": float(np.mean(correct[:, row])),
        "entropy": float(np.mean(measured.entropy[:, row])),
        "residual": None if np.isnan(residual) else residual,
    }
