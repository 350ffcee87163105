"""The training step: pure, from a state and a batch to the next state and its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import optax
from jax import lax

from deq_jax.core.errors import InputError, require
from deq_jax.core.keys import Keys, Purpose, prng_key
from deq_jax.core.types import AnyArray, Array, Optimizer, PyTree
from deq_jax.data.batches import to_unit
from deq_jax.data.datasets import Splits, class_names
from deq_jax.models.base import Classifier, Variables
from deq_jax.parallel.devices import AXIS
from deq_jax.training.config import TrainConfig
from deq_jax.training.objectives import Outcome
from deq_jax.training.optimizers import deployed_params
from deq_jax.training.schedules import with_radius


class TrainState(NamedTuple):
    """All the state there is: every step depends on it and on the config alone.

    Attributes:
      step: int32, number of steps that were done.
      params: parameters of the classifier.
      batch_stats: its running statistics.
      opt_state: state of the optimiser.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.training import TrainState
      >>> sorted(TrainState(np.int32(0), params={}, batch_stats={}, opt_state=()).variables)
      ['batch_stats', 'params']
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> Variables:
        """Parameters and batch statistics, from which the next step starts."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def to_deploy(self) -> TrainState:
        """The state with the variables to validate and deploy: see `WeightAverage`."""
        return self._replace(params=deployed_params(self.params, self.opt_state))


class Batch(NamedTuple):
    """Images of one step.

    Attributes:
      x: [B, H, W, C], uint8 or float32 in [0, 1].
      y: [B] int32.
      position: [B] int32, each image's place in the whole batch.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.training import Batch
      >>> batch = Batch(np.zeros((2, 8, 8, 1), np.float32), np.array([3, 4], np.int32), np.arange(2, dtype=np.int32))
      >>> batch.position.tolist()
      [0, 1]
    """

    x: AnyArray
    y: AnyArray
    position: AnyArray


def train_step(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    axis_name: str | None = None,
    steps: int | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of optimisation; pure.

    Args:
      config: objective, classifier, radius, augmentation and seed are used.
      optimizer: the optimiser of `state`.
      state: training state before the step.
      batch: this device's images.
      axis_name: mapped axis over which gradients, batch statistics and metrics are averaged.
      steps: number of steps of the whole run, which a radius that grows needs to know.

    Returns:
      The state after the step, and scalar metrics of the whole batch; `gradient_norm` is the length of the gradient of
      all parameters, as the optimiser gets it; `radius_share` is there where the radius grows.

    Raises:
      InputError: the optimiser's state does not keep its structure, shapes and dtypes; the radius grows, and the number
        of steps is not told.

    Examples:
      >>> import jax, numpy as np
      >>> from deq_jax import Standard, TrainConfig
      >>> from deq_jax.data import Digits
      >>> from deq_jax.models import small_cnn
      >>> from deq_jax.training import Batch, initial_state, optimizer_of, train_step
      >>> config, data = TrainConfig(small_cnn(10, 4), Standard(), Digits()), Digits().load()
      >>> optimizer = optimizer_of(config, steps=100)
      >>> state, batch = initial_state(config, optimizer, data), Batch(data.train.x[:2], data.train.y[:2], np.arange(2))
      >>> after, metrics = jax.eval_shape(lambda *args: train_step(config, optimizer, *args), state, batch)
      >>> sorted(metrics)
      ['accuracy', 'gradient_norm', 'loss']
    """

    schedule = {}
    if config.radius is not None:
        if steps is None:
            raise InputError("train_step: the radius grows over the run, expected its number of steps, got steps=None")
        share = schedule["radius_share"] = jnp.asarray(config.radius.over(steps)(state.step))
        config = replace(config, objective=with_radius(config.objective, share), radius=None)

    def add(carry: tuple[PyTree, PyTree], part: Batch) -> tuple[tuple[PyTree, PyTree], dict[str, Array]]:
        total, batch_stats = carry
        gradient, outcome = _gradient(config, state._replace(batch_stats=batch_stats), part, axis_name)
        return (jax.tree.map(jnp.add, total, gradient), outcome.batch_stats), outcome.metrics

    parts = jax.tree.map(lambda leaf: leaf.reshape(config.accumulate, -1, *leaf.shape[1:]), batch)
    start = jax.tree.map(jnp.zeros_like, state.params), state.batch_stats
    (gradient, batch_stats), metrics = lax.scan(add, start, parts)
    gradient = jax.tree.map(lambda leaf: leaf / config.accumulate, gradient)
    metrics = {name: (jnp.max if name.endswith("_max") else jnp.mean)(metric) for name, metric in metrics.items()}
    if axis_name is not None:
        gradient = lax.pmean(gradient, axis_name)
        metrics = {
            name: lax.pmax(metric, axis_name) if name.endswith("_max") else lax.pmean(metric, axis_name)
            for name, metric in metrics.items()
        }
    metrics |= schedule
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    after = TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)
    _check_same_shapes(config, state, after)
    return after, metrics


def _check_same_shapes(config: TrainConfig, before: TrainState, after: TrainState) -> None:
    """Refuses an optimiser that changes the shape of its state: it would compile anew, and no checkpoint would fit."""
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    except AssertionError as error:
        reason = " ".join(str(error).partition("failed:")[2].split())
        message = "a step changes the shape of its state (0 is before, 1 after)"
        raise InputError(f"optimizer {type(config.optimizer).__name__}: {message}: {reason}") from None


def _gradient(config: TrainConfig, state: TrainState, batch: Batch, axis_name: str | None) -> tuple[PyTree, Outcome]:
    """Gradient of the loss on these images, and the other results of their passes."""
    keys = Keys(jax.random.fold_in(prng_key(config.seed), state.step), batch.position)
    x = to_unit(batch.x)
    if config.augmentation is not None:
        x = config.augmentation(x, keys.fold(Purpose.AUGMENTATION))
    classifier, objective = config.classifier, config.objective
    x_adv = lax.stop_gradient(objective.perturb(classifier, state.variables, x, batch.y, keys))

    def loss(params: PyTree) -> tuple[Array, Outcome]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        return objective.loss(classifier, variables, x, x_adv, batch.y, keys, axis_name)

    (value, outcome), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    return gradient, outcome._replace(metrics={"loss": value, **outcome.metrics})


def optimizer_of(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optax optimiser of a run of `steps` steps.

    Raises:
      InputError: the optimiser's schedule does not suit so many steps.

    Examples:
      >>> from deq_jax import Standard, TrainConfig
      >>> from deq_jax.data import Digits
      >>> from deq_jax.models import small_cnn
      >>> from deq_jax.training import optimizer_of
      >>> type(optimizer_of(TrainConfig(small_cnn(10, 12), Standard(), Digits()), steps=100)).__name__
      'GradientTransformationExtraArgs'
    """
    try:
        return config.optimizer.transformation(steps)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0]
        name = type(config.optimizer).__name__
        raise InputError(f"optimizer {name} does not suit a run of {steps} steps: {reason}") from None


def initial_state(config: TrainConfig, optimizer: optax.GradientTransformation, data: Splits) -> TrainState:
    """The state before the first step; the classifier's training mode is also checked.

    Raises:
      InputError: see `initial_variables`; also if the dataset names another number of classes, or the classifier cannot
        be run in training mode, or does not synchronise its batch statistics where there are several devices.

    Examples:
      >>> from deq_jax import Standard, TrainConfig
      >>> from deq_jax.data import Digits
      >>> from deq_jax.models import small_cnn
      >>> from deq_jax.training import initial_state, optimizer_of
      >>> config = TrainConfig(small_cnn(10, 4), Standard(), Digits())
      >>> int(initial_state(config, optimizer_of(config, steps=100), Digits().load()).step)
      0
    """
    variables = initial_variables(config, data)
    classes, names = _count_classes(config.classifier, variables, _example(data)), class_names(config.dataset)
    fits = len(names) in (0, classes)
    require(fits, f"the classifier has {classes} classes, {config.dataset} has {len(names)}; they must be as many")
    _check_training_mode(config.classifier, variables, _example(data))
    params = variables["params"]
    opt_state = jax.jit(optimizer.init)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], opt_state)


def initial_variables(config: TrainConfig, data: Splits) -> Variables:
    """The classifier's variables before the first step.

    Raises:
      InputError: if the classifier does not accept the dataset's images or has too few classes.

    Examples:
      >>> from deq_jax import Standard, TrainConfig
      >>> from deq_jax.data import Digits
      >>> from deq_jax.models import small_cnn
      >>> from deq_jax.training import initial_variables
      >>> sorted(initial_variables(TrainConfig(small_cnn(10, 4), Standard(), Digits()), Digits().load()))
      ['batch_stats', 'params']
    """
    classifier, x = config.classifier, _example(data)
    with _fitting(f"classifier does not fit images of shape {x.shape[1:]}"):
        variables = classifier.init(prng_key(config.seed), x)
        classes = _count_classes(classifier, variables, x)
    for split, part in data._asdict().items():
        highest = int(part.y.max())
        expected = f"labels must be below the classifier's {classes} classes"
        require(highest < classes, f"{expected}, found {highest} in the {split} split of {config.dataset}")
    return {"params": variables["params"], "batch_stats": variables["batch_stats"]}


def _count_classes(classifier: Classifier, variables: Variables, x: Array) -> int:
    return int(jax.eval_shape(lambda v, x: classifier(v, x).logits, variables, x).shape[-1])


def _example(data: Splits) -> Array:
    return jnp.zeros((2, *data.train.x.shape[1:]))


def _check_training_mode(classifier: Classifier, variables: Variables, x: Array) -> None:
    """Traces a pass in training mode, as on the devices of a step."""
    devices = jax.device_count()

    def statistics(x: Array) -> PyTree:
        keys = Keys(prng_key(0), jnp.arange(len(x), dtype=jnp.int32))
        return classifier(variables, x, train=True, keys=keys, axis_name=AXIS).batch_stats

    def on_devices(out_axes: int | None) -> PyTree:
        return jax.eval_shape(jax.vmap(statistics, axis_name=AXIS, out_axes=out_axes), jnp.stack([x] * devices))

    with _fitting("classifier in training mode"):
        on_devices(0)
    if devices > 1:
        try:
            on_devices(None)
        except ValueError:  # of vmap, because they are not the same everywhere
            raise InputError(
                f"classifier in training mode: its batch statistics are each of the {devices} devices' own; average "
                "them over axis_name, as models.layers.BatchNorm does, or hand it to nn.BatchNorm"
            ) from None


@contextmanager
def _fitting(what: str) -> Iterator[None]:
    """One line in place of the errors that JAX and Flax raise about a classifier."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, NameError, ZeroDivisionError, flax.errors.FlaxError) as error:
        raise InputError(f"{what}: {str(error).strip().splitlines()[0]}") from None


def learning_rate(optimizer: Optimizer, steps: int, state: TrainState) -> float | None:
    """The learning rate of the last step of a run of `steps` steps; None where nothing tells it.

    It is told by the optimiser's method `schedule`, or by its state if that has one (`optax.inject_hyperparams`).

    Examples:
      >>> import numpy as np
      >>> from deq_jax.training import AdamCosine, TrainState, learning_rate
      >>> after_one_step = TrainState(np.int32(1), params={}, batch_stats={}, opt_state=())
      >>> round(learning_rate(AdamCosine(3e-3), steps=100, state=after_one_step), 6)
      0.003
    """
    schedule = getattr(optimizer, "schedule", None)
    if schedule is not None:
        return float(schedule(steps)(int(state.step) - 1))
    found = optax.tree.get_all_with_path(
        state.opt_state, "learning_rate", filtering=lambda path, value: isinstance(value, jax.Array)
    )
    return float(found[0][1]) if len(found) == 1 else None
