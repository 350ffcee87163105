"""Which state an early-state predictor classifies, chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.attacks.oracles import Attack
from deq_jax.core.keys import Keys
from deq_jax.core.readouts import EnsembleState
from deq_jax.core.types import AnyArray, PyTree, Solution
from deq_jax.data.batches import EvaluationBatch, evaluation_batches, to_unit
from deq_jax.data.datasets import Images
from deq_jax.defences.states import deployed
from deq_jax.evaluation.measure import attack_batch, measure
from deq_jax.evaluation.rows import Outcomes, both, is_correct
from deq_jax.models.base import Classifier, Variables
from deq_jax.parallel.devices import check_batch_size, replicate_and_split


def choose_early_state(
    classifier: Classifier,
    variables: Variables,
    images: Images,
    attack: Attack,
    *,
    batch_size: int,
    seed: int = 0,
    report: Callable[[int, int, float | None], None] = lambda t, states, accuracy: None,
) -> list[float]:
    """Accuracy under attack of every raw state z_1 .. z_T as a predictor of its own; the early state is the best one.

    The images must be held out of the training data, not test images.

    Args:
      classifier: a DEQ with a solver, or one with input entropy reduction.
      variables: variables of the classifier.
      images: held-out images for the choice.
      attack: aimed at each of the predictors, with their own gradients; compiled once for all.
      batch_size, seed: as in `evaluator`.
      report: called with t, the number of states and the accuracy of z_t; before the first one, with None for it.

    References: Yang et al. 2022, section 5.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.data import Images
      >>> from deq_jax.evaluation import choose_early_state
      >>> from deq_jax.models import small_cnn
      >>> images = Images(np.zeros((2, 8, 8, 1), np.float32), np.array([3, 4]))
      >>> choose_early_state(small_cnn(10, 12), {}, images, PGD(Linf(0.1)), batch_size=64)
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: deployed: expected an Equilibrium with a solver, got an Explicit
    """
    check_batch_size(batch_size)

    def on_device(state: tuple[Variables, AnyArray], batch: EvaluationBatch) -> Outcomes:
        variables, t = state

        def readout(solution: Solution, keys: Keys | None = None) -> PyTree:
            return jax.tree.map(lambda states: states[t - 1], solution.states)

        predictor = deployed(classifier, readout)
        clean = measure(predictor, variables, to_unit(batch.x), batch.y)
        _, attacked = attack_batch(predictor, variables, attack, batch, seed=seed)
        return Outcomes(batch.y, clean, attacked, None)

    run = replicate_and_split(on_device, joint=False)

    def accuracy(t: int) -> float:
        robust = []
        for batch in evaluation_batches(images, batch_size):
            found = run((variables, np.int32(t)), batch)
            assert found.attacked is not None  # there is an attack
            correct = both(is_correct(found.clean, found.y), is_correct(found.attacked, found.y))
            robust.append(correct.deployed[~batch.is_padding])
        return float(np.mean(np.concatenate(robust)))

    first = to_unit(jnp.asarray(images.x[:1]))
    solution = jax.eval_shape(deployed(classifier, EnsembleState()), variables, first).solution
    found: list[float] = []
    states = len(solution.residuals)
    report(1, states, None)
    for t in range(1, 1 + states):
        found.append(accuracy(t))
        report(t, states, found[-1])
    return found
