"""The device programs of an evaluation, batch by batch: clean images, attacks, transferred images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.attacks.oracles import Attack
from deq_jax.core.keys import Keys, Purpose, prng_key
from deq_jax.core.losses import cross_entropy
from deq_jax.core.types import Array
from deq_jax.data.batches import EvaluationBatch, evaluation_batches, to_unit
from deq_jax.data.datasets import Images
from deq_jax.evaluation.measure import adjoint_residuals, attack_batch, measure, spectral_radii
from deq_jax.evaluation.plan import EvalConfig, Trial
from deq_jax.evaluation.rows import to_columns
from deq_jax.evaluation.store import Arrays
from deq_jax.evaluation.transfers import Transfer
from deq_jax.models.base import Classifier, Variables
from deq_jax.parallel.devices import replicate_and_split
from deq_jax.surrogates.base import Direct, Surrogate, judged

CLEAN = "clean"


@dataclass(frozen=True)
class Stage:
    """A part of an evaluation.

    Attributes:
      name: name of the trial, or "clean".
      run: batch -> arrays [B, ...]; they include the ones of `to_columns`, unless only gradients are asked for.
      queries: gradients per image, at most; None if that is not known.
      also: names of arrays that are there beside the ones of `to_columns`.
    """

    name: str
    run: Callable[[EvaluationBatch], Arrays]
    queries: int | None = None
    also: tuple[str, ...] = ("x_adv",)


@dataclass(frozen=True)
class Stages:
    """All parts of an evaluation.

    Attributes:
      config: the evaluation.
      trained: the classifier as trained.
      predictor: the deployed predictor.
      variables: variables of both.
      images: images that are evaluated.
      x: the same [N, H, W, C], float32 in [0, 1].
    """

    config: EvalConfig
    trained: Classifier
    predictor: Classifier
    variables: Variables
    images: Images
    x: np.ndarray
    _compiled: dict[tuple[Attack, bool], Callable[..., dict[str, Any]]] = field(default_factory=dict, repr=False)

    def clean(self) -> Stage:
        """Measures clean images, with gradient, spectral radius and adjoint residual at them."""

        def on_device(variables: Variables, batch: EvaluationBatch) -> dict[str, Any]:
            x, keys = to_unit(batch.x), Keys(prng_key(self.config.seed), batch.number)
            measured = measure(self.predictor, variables, x, batch.y, self._draw_from(keys))
            radius, settled = spectral_radii(self.trained, variables, x, keys)
            adjoint = adjoint_residuals(self.trained, variables, x, batch.y)
            still = self._is_still(variables, Direct(), batch)
            found = {"zero_gradient": still, "spectral_radius": radius, "radius_settled": settled}
            return {"measured": measured, **found, **({} if adjoint is None else {"adjoint_residual": adjoint})}

        run = partial(replicate_and_split(on_device, joint=False), self.variables)
        return Stage(CLEAN, lambda batch: _as_arrays(run(batch)), also=("zero_gradient", "spectral_radius"))

    def of(self, trial: Trial, start: np.ndarray | None) -> Stage:
        """Attacks images, or measures transferred ones.

        Args:
          trial: a trial of the evaluation.
          start: images [N, H, W, C] from which the attack starts; None to start as it does.
        """
        run = self._transferred(trial.attack) if isinstance(trial.attack, Transfer) else self._attacked(trial, start)
        return Stage(trial.name, run, getattr(trial.attack, "gradient_queries", None))

    def still(self, surrogate: Surrogate) -> Stage:
        """Where the gradient of a surrogate vanishes."""

        def on_device(state: tuple[Variables, Surrogate], batch: EvaluationBatch) -> dict[str, Any]:
            return {"zero_gradient": self._is_still(*state, batch)}

        run = replicate_and_split(on_device, joint=False)
        state = self.variables, jax.tree.map(np.asarray, surrogate)
        return Stage("gradients", lambda batch: _as_arrays(run(state, batch)))

    def _is_still(self, variables: Variables, surrogate: Surrogate, batch: EvaluationBatch) -> Array:
        """[B] bool, whether the surrogate's gradient at the images is 0 or NaN, so that attacks stand still."""
        x, keys = to_unit(batch.x), Keys(prng_key(self.config.seed), batch.number)
        oracle = judged(surrogate, self.predictor, variables, self.config.draws)
        gradient = oracle.grad(cross_entropy, x, batch.y, keys.fold(Purpose.QUERY))[2]
        return jnp.all((gradient == 0) | jnp.isnan(gradient), axis=(1, 2, 3))

    def classified(self, x: np.ndarray, number: np.ndarray, size: int) -> np.ndarray:
        """Labels [n] that the deployed predictor gives to versions x [n, H, W, C] of images, so many at a time."""
        run, labels = self._measured(), []
        for batch in evaluation_batches(Images(x, self.images.y[number]), size):
            found = run(batch._replace(number=number[batch.number].astype(np.int32)))
            labels.append(found["label"][~batch.is_padding, -1])
        return np.concatenate(labels)

    def _measured(self) -> Callable[[EvaluationBatch], Arrays]:
        def on_device(variables: Variables, batch: EvaluationBatch) -> dict[str, Any]:
            keys = self._draw_from(Keys(prng_key(self.config.seed), batch.number))
            return {"x_adv": batch.x, "measured": measure(self.predictor, variables, batch.x, batch.y, keys)}

        run = partial(replicate_and_split(on_device, joint=False), self.variables)
        return lambda batch: _as_arrays(run(batch))

    def _transferred(self, transfer: Transfer) -> Callable[[EvaluationBatch], Arrays]:
        run, images = self._measured(), cache(partial(transfer.load, self.images, self.x, self.config.threat))
        return lambda batch: run(batch._replace(x=images()[batch.number]))

    def _attacked(self, trial: Trial, start: np.ndarray | None) -> Callable[[EvaluationBatch], Arrays]:
        attack = cast(Attack, trial.attack)
        kind = attack, trial.from_worst  # trials of one kind are compiled once

        def on_device(
            state: tuple[Variables, Surrogate], parts: tuple[EvaluationBatch, Array | None]
        ) -> dict[str, Any]:
            (variables, surrogate), (batch, start) = state, parts
            attacked = partial(attack_batch, seed=self.config.seed, surrogate=surrogate, draws=self.config.draws)
            begun = attack if start is None else partial(attack, start=start)
            x_adv, measured = attacked(self.predictor, variables, begun, batch)
            return {"x_adv": x_adv, "measured": measured}

        if kind not in self._compiled:
            self._compiled[kind] = replicate_and_split(on_device, joint=False)
        run, state = self._compiled[kind], (self.variables, jax.tree.map(np.asarray, trial.surrogate))
        return lambda batch: _as_arrays(run(state, (batch, None if start is None else start[batch.number])))

    def _draw_from(self, keys: Keys) -> Keys | None:
        """Keys of the deployed predictor; None unless it is random."""
        return None if self.config.draws is None else keys


def _as_arrays(found: dict[str, Any]) -> Arrays:
    """As files hold it."""
    columns = to_columns(jax.tree.map(np.asarray, found["measured"])) if "measured" in found else {}
    return columns | {name: np.asarray(values) for name, values in found.items() if name != "measured"}
