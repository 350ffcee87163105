"""Measurements of a classifier on each image, clean and attacked, at every state of its dynamics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.attacks.oracles import Attack
from deq_jax.core.adjoints import adjoint_residual
from deq_jax.core.gradients import has_adjoint
from deq_jax.core.jacobian import SpectralRadius, gaussian_probes, spectral_radius
from deq_jax.core.keys import Keys, Purpose, prng_key
from deq_jax.core.losses import cross_entropy, entropy, margin
from deq_jax.core.readouts import EnsembleState
from deq_jax.core.types import Array, PyTree
from deq_jax.data.batches import EvaluationBatch, evaluation_batches, to_unit
from deq_jax.data.datasets import Images
from deq_jax.evaluation.rows import Measured, Outcomes, Row, Rows
from deq_jax.models.base import Classifier, Variables
from deq_jax.models.classifiers import Equilibrium
from deq_jax.parallel.devices import check_batch_size, replicate_and_split
from deq_jax.surrogates.base import Direct, Surrogate, judged

RADIUS_STEPS = 30


def measure(
    classifier: Classifier, variables: Variables, x: Array, labels: Array, keys: Keys | None = None
) -> Measured:
    """Measures a batch of images [B, H, W, C] in [0, 1] with labels [B]. Raw states are decoded without a further step.

    A classifier that returns a solution must have a method ``decode(variables, z) -> logits``; a random
    one draws from the keys, and is deterministic without them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.evaluation import measure
      >>> from deq_jax.models import small_cnn
      >>> model, x = small_cnn(10, 4), jnp.zeros((2, 8, 8, 1))
      >>> measured = measure(model, model.init(0, x), x, jnp.array([3, 4]))
      >>> measured.deployed.margin.shape, measured.states
      ((2,), None)
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
      variables: variables of the classifier.
      x: images [B, H, W, C] in [0, 1].
      labels: [B].

    Returns:
      Relative residuals; see `gradients.adjoint_residual`. None unless it is a DEQ with an estimator that has an
      adjoint state.
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
    """Attacks a batch of images, and measures the result.

    Random numbers of an image depend only on the seed and the image's number.

    Args:
      classifier: as deployed; success is measured on it.
      variables: variables of the classifier.
      attack: called with labels.
      batch: images of this device.
      seed: random seed of the attack.
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

    Random numbers of an image depend only on the seed and the image's number.

    Args:
      classifier: as deployed; success is measured on it.
      attack: None for clean images only.
      batch_size: images at a time, over all devices; the last batch is padded and masked.
      seed: random seed of the attack.

    Returns:
      ``(variables, images, report) -> Outcomes``, compiled at its first call. `report`, if given, is called
      with the number of images done and their total.

    Raises:
      InputError: the batch does not divide among the devices.

    Examples:
      >>> import jax, numpy as np
      >>> from deq_jax.data import Images
      >>> from deq_jax.evaluation import evaluator
      >>> from deq_jax.models import small_cnn
      >>> model, images = small_cnn(10, 4), Images(np.zeros((3, 8, 8, 1), np.float32), np.array([3, 4, 5]))
      >>> evaluate = evaluator(model, attack=None, batch_size=2 * jax.device_count())
      >>> evaluate(model.init(0, images.x), images).clean.deployed.label.shape
      (3,)
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
        whole: Outcomes = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        return whole

    return run_all
