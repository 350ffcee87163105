"""Optimisers and learning rate schedules: optax's, as settings that are written into a run's config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import optax

from deq_jax.core.errors import require
from deq_jax.core.types import Array, Optimizer, PyTree


@dataclass(frozen=True)
class AdamCosine:
    """Adam with a learning rate that falls along a cosine, step by step.

    Attributes:
      learning_rate: learning rate at the first step.
      final_learning_rate: learning rate at the last step.

    Examples:
      >>> from deq_jax.training import AdamCosine
      >>> schedule = AdamCosine(learning_rate=3e-3).schedule(steps=100)
      >>> [round(float(schedule(step)), 6) for step in (0, 100)]
      [0.003, 1e-06]
    """

    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6

    def __post_init__(self) -> None:
        rates = 0 <= self.final_learning_rate <= self.learning_rate and self.learning_rate > 0
        message = "AdamCosine: expected 0 <= final_learning_rate <= learning_rate and learning_rate > 0, got "
        require(rates, f"{message}{self.final_learning_rate!r} and {self.learning_rate!r}")

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each step, from 0, of a run of `steps` steps."""
        alpha = self.final_learning_rate / self.learning_rate
        return optax.cosine_decay_schedule(self.learning_rate, steps, alpha)

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optax optimiser of a run of `steps` steps."""
        return optax.adam(self.schedule(steps))


class Schedule(Protocol):
    """How the learning rate changes over a run.

    Examples:
      >>> import optax
      >>> class Constant:
      ...     def over(self, steps, peak):
      ...         return optax.constant_schedule(peak)
      >>> Constant().over(steps=100, peak=0.5)(3)
      0.5
    """

    def over(self, steps: int, peak: float) -> optax.Schedule:
        """The learning rate at each step, from 0, of a run of `steps` steps with `peak` as the highest."""
        ...


@dataclass(frozen=True)
class Cosine:
    """A linear rise from 0, then a cosine down to a share of the peak.

    Attributes:
      warmup: share of the steps in which the rate rises.
      final: the last rate, as a share of the peak.

    References: Loshchilov & Hutter 2017, eq. 5, without restarts.

    Examples:
      >>> from deq_jax.training import Cosine
      >>> rate = Cosine(warmup=0.1).over(steps=100, peak=0.5)
      >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 55, 100)]
      [0.0, 0.25, 0.5, 0.25, 0.0]
    """

    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, f"Cosine: warmup must be a share in [0, 1), got {self.warmup!r}")
        require(0 <= self.final <= 1, f"Cosine: final must be a share in [0, 1], got {self.final!r}")

    def over(self, steps: int, peak: float) -> optax.Schedule:
        rise = round(self.warmup * steps)
        first = 0.0 if rise else peak
        return optax.warmup_cosine_decay_schedule(first, peak, rise, max(steps, rise + 1), self.final * peak)


@dataclass(frozen=True)
class OneCycle:
    """A linear rise from 0 to the peak, then a linear fall to 0.

    Attributes:
      rise: share of the steps in which the rate rises.

    References: Smith & Topin 2019; as in Wong et al. 2020 for fast adversarial training.

    Examples:
      >>> from deq_jax.training import OneCycle
      >>> rate = OneCycle(rise=0.4).over(steps=100, peak=0.2)
      >>> [round(float(rate(step)), 3) for step in (0, 20, 40, 70, 100)]
      [0.0, 0.1, 0.2, 0.1, 0.0]
    """

    rise: float = 0.4

    def __post_init__(self) -> None:
        require(0 < self.rise < 1, f"OneCycle: rise must be a share in (0, 1), got {self.rise!r}")

    def over(self, steps: int, peak: float) -> optax.Schedule:
        top = max(1, round(self.rise * steps))
        parts = [optax.linear_schedule(0.0, peak, top), optax.linear_schedule(peak, 0.0, max(1, steps - top))]
        return optax.join_schedules(parts, [top])


@dataclass(frozen=True)
class Piecewise:
    """A constant rate that is multiplied at some points of the run.

    Attributes:
      milestones: shares of the steps after which the rate changes.
      factor: factor of the rate at each of them.

    Examples:
      >>> from deq_jax.training import Piecewise
      >>> rate = Piecewise(milestones=(0.5, 0.75), factor=0.1).over(steps=100, peak=1.0)
      >>> [round(float(rate(step)), 3) for step in (0, 49, 50, 75, 99)]
      [1.0, 1.0, 0.1, 0.01, 0.01]
    """

    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        shares = all(0 < share < 1 for share in self.milestones)
        require(shares, f"Piecewise: milestones must be shares in (0, 1), got {self.milestones!r}")
        require(self.factor > 0, f"Piecewise: factor must be positive, got {self.factor!r}")

    def over(self, steps: int, peak: float) -> optax.Schedule:
        return optax.piecewise_constant_schedule(peak, {round(m * steps): self.factor for m in self.milestones})


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum and weight decay, which is added to the gradient as in PyTorch.

    Attributes:
      learning_rate: highest learning rate.
      momentum: share of the last step that goes into the next.
      nesterov: whether the momentum looks ahead.
      weight_decay: weight decay of all parameters.
      clip: largest length of the gradient of all parameters; None for no limit.
      rates: schedule of the learning rate.

    References: Sutskever et al. 2013.

    Examples:
      >>> from deq_jax.training import OneCycle, Sgd
      >>> float(Sgd(learning_rate=0.5, rates=OneCycle(rise=0.4)).schedule(steps=100)(40))
      0.5
    """

    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    clip: float | None = None
    rates: Schedule = Cosine()

    def __post_init__(self) -> None:
        _check_sizes(self)
        require(0 <= self.momentum < 1, f"Sgd: momentum must be in [0, 1), got {self.momentum!r}")

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each step, from 0, of a run of `steps` steps."""
        return self.rates.over(steps, self.learning_rate)

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optax optimiser of a run of `steps` steps."""
        descent = optax.sgd(self.schedule(steps), self.momentum, nesterov=self.nesterov)
        return optax.chain(*_clipped(self.clip), optax.add_decayed_weights(self.weight_decay), descent)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

    Attributes:
      learning_rate: highest learning rate.
      weight_decay: weight decay of all parameters, times the learning rate.
      clip: largest length of the gradient of all parameters; None for no limit.
      rates: schedule of the learning rate.

    References: Loshchilov & Hutter 2019, algorithm 2.

    Examples:
      >>> from deq_jax.training import AdamW
      >>> float(AdamW(learning_rate=0.25).schedule(steps=100)(0))
      0.25
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    clip: float | None = None
    rates: Schedule = Cosine()

    def __post_init__(self) -> None:
        _check_sizes(self)

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each step, from 0, of a run of `steps` steps."""
        return self.rates.over(steps, self.learning_rate)

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optax optimiser of a run of `steps` steps."""
        return optax.chain(*_clipped(self.clip), optax.adamw(self.schedule(steps), weight_decay=self.weight_decay))


@dataclass(frozen=True)
class WeightAverage:
    """An optimiser with an exponential moving average of the parameters: the average is validated and deployed.

    After step t (from 1) the average has moved to the parameters by ``max(1 - decay, 9 / (t + 9))``, so that the first
    steps are soon forgotten. Training continues from the parameters themselves, which ``checkpoints/latest`` has; the
    average is in ``checkpoints/best``. Batch statistics are not averaged.

    Attributes:
      optimizer: the optimiser; the parameters after its steps are averaged.
      decay: share of the average that each step keeps.

    References: Polyak & Juditsky 1992; for robust training Gowal et al. 2020, section 4.3.

    Examples:
      >>> from deq_jax.training import Sgd, WeightAverage
      >>> WeightAverage(Sgd(learning_rate=0.1), decay=0.99).optimizer.learning_rate
      0.1
    """

    optimizer: Optimizer
    decay: float = 0.999

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"WeightAverage: decay must be in [0, 1), got {self.decay!r}")

    @property
    def schedule(self) -> Any:
        """The learning rate of the optimiser, where that tells it."""
        return self.optimizer.schedule  # type: ignore[attr-defined]  # optional in the role

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `steps` steps; its state has the average."""
        inner = self.optimizer.transformation(steps)

        def init(params: PyTree) -> Averaged:
            return Averaged(inner.init(params), params, jnp.zeros((), jnp.int32))

        def update(gradient: PyTree, state: Averaged, params: PyTree) -> tuple[PyTree, Averaged]:
            updates, inner_state = inner.update(gradient, state.optimizer, params)
            steps_done = state.steps + 1
            share = jnp.maximum(1 - self.decay, 9 / (steps_done + 9.0))
            average = optax.incremental_update(optax.apply_updates(params, updates), state.average, share)
            return updates, Averaged(inner_state, average, steps_done)

        return optax.GradientTransformation(init, update)


class Averaged(NamedTuple):
    """The state of a `WeightAverage`.

    Attributes:
      optimizer: the state of the optimiser.
      average: average of the parameters.
      steps: number of steps that were done.
    """

    optimizer: PyTree
    average: PyTree
    steps: Array


@dataclass(frozen=True)
class _Slower:
    """An optimiser whose steps are multiplied by a factor, as with a smaller learning rate; its state is the same."""

    optimizer: Optimizer
    factor: float

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `steps` steps."""
        inner = self.optimizer.transformation(steps)

        def update(gradient: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
            updates, after = inner.update(gradient, state, params)
            return optax.tree.scale(self.factor, updates), after

        return optax.GradientTransformation(inner.init, update)


def slowed(optimizer: Optimizer, factor: float) -> Optimizer:
    """The optimiser with its learning rate multiplied by a factor at every step."""
    if isinstance(optimizer, WeightAverage):  # it averages the parameters after the smaller steps
        return replace(optimizer, optimizer=slowed(optimizer.optimizer, factor))
    return _Slower(optimizer, factor)


def deployed_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """The average of the parameters, where the optimiser keeps one; the parameters otherwise."""
    return opt_state.average if isinstance(opt_state, Averaged) else params


def _clipped(length: float | None) -> list[optax.GradientTransformation]:
    return [] if length is None else [optax.clip_by_global_norm(length)]


def _check_sizes(optimizer: Sgd | AdamW) -> None:
    name = type(optimizer).__name__
    require(optimizer.learning_rate > 0, f"{name}: learning_rate must be positive, got {optimizer.learning_rate!r}")
    require(optimizer.weight_decay >= 0, f"{name}: weight_decay must be >= 0, got {optimizer.weight_decay!r}")
    limited = optimizer.clip is None or optimizer.clip > 0
    require(limited, f"{name}: clip must be positive or None, got {optimizer.clip!r}")
