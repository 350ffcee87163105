"""Oracles: the questions that an attacker may ask of a predictor. Attacks see oracles, never models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.core.errors import require, require_count, require_role
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array, Loss

Answer = TypeVar("Answer")


def aimed_at(oracle: Oracle, target: int) -> Oracle:
    """One class against all others, for targeted attacks: any attack on labels 0 then seeks the answer `target`.

    The logits [B, 2] are the highest one of another class, and the target's. An image that already is the target
    counts as fooled. For targets that differ from image to image, attack the images of each target on their own.

    Args:
      oracle: its logits are [B, K].
      target: class aimed at, from 0 to K - 1.

    Raises:
      InputError: the target is not an integer >= 0; or, at the first query, not below K.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.attacks import PGD, Linf, aimed_at, oracle_of
      >>> x, others = jnp.full((1, 1, 1, 3), 0.5), jnp.zeros(1, int)
      >>> oracle = aimed_at(oracle_of(lambda x: x.reshape(len(x), -1)), target=2)
      >>> print(PGD(Linf(0.1))(oracle, x, others, 0).round(1))
      [[[[0.4 0.4 0.6]]]]
    """
    require_oracle("aimed_at: oracle", oracle)
    require_count("aimed_at: target", target, least=0)

    def against(scores: Array) -> Array:
        classes = scores.shape[-1]
        require(target < classes, f"aimed_at: target must lie in 0..{classes - 1}, got {target}")
        wanted = jnp.arange(classes) == target
        return jnp.stack([jnp.max(jnp.where(wanted, -jnp.inf, scores), axis=-1), scores[:, target]], axis=-1)

    def logits(x: Array, keys: Keys) -> Array:
        return against(oracle.logits(x, keys))

    def grad(loss: Loss, x: Array, labels: Array, keys: Keys) -> tuple[Array, Array, Array]:
        losses, scores, gradient = oracle.grad(lambda scores, own: loss(against(scores), own), x, labels, keys)
        return losses, against(scores), gradient

    return Oracle(logits, grad)


def average(oracles: Sequence[Oracle]) -> Oracle:
    """The mean of several oracles: of their logits, and of their losses and gradients.

    The gradient belongs to the mean loss, not to the loss of the mean logits.

    Args:
      oracles: at least one; the i-th draws from keys folded with i.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Keys
      >>> from deq_jax.attacks import average, oracle_of
      >>> once, thrice = oracle_of(lambda x: x.reshape(len(x), -1)), oracle_of(lambda x: 3 * x.reshape(len(x), -1))
      >>> average([once, thrice]).logits(jnp.ones((1, 1, 1, 2)), Keys.of(0, 1)).tolist()
      [[2.0, 2.0]]
    """
    oracles = tuple(oracles)
    require(len(oracles) > 0, "average: expected at least one oracle, got none")
    for i, one in enumerate(oracles):
        require_oracle(f"average: oracle {i}", one)

    def logits(x: Array, keys: Keys) -> Array:
        return jnp.mean(jnp.stack([oracle.logits(x, keys.fold(i)) for i, oracle in enumerate(oracles)]), axis=0)

    def grad(loss: Loss, x: Array, labels: Array, keys: Keys) -> tuple[Array, Array, Array]:
        answers = [oracle.grad(loss, x, labels, keys.fold(i)) for i, oracle in enumerate(oracles)]
        mean: tuple[Array, Array, Array] = jax.tree.map(lambda *parts: sum(parts) / len(oracles), *answers)
        return mean

    return Oracle(logits, grad)


def expectation(oracle: Oracle, draws: int) -> Oracle:
    """Expectation over transformation (EOT): the mean of a random oracle over several draws.

    Logits are also averaged, so that an attack does not select images that one lucky draw misclassified.

    Args:
      oracle: random in its keys.
      draws: number per query; the i-th uses keys folded with i.

    References: Athalye et al. 2018, section 3.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Keys
      >>> from deq_jax.attacks import expectation, oracle_of
      >>> oracle = expectation(oracle_of(lambda x, keys: x.reshape(len(x), -1)), draws=20)
      >>> oracle.logits(jnp.ones((1, 1, 1, 2)), Keys.of(0, 1)).shape
      (1, 2)
    """
    require_oracle("expectation: oracle", oracle)
    require_count("expectation: draws", draws)

    def mean(query: Callable[[int | Array], Answer]) -> Answer:
        def add(total: Answer, number: Array) -> tuple[Answer, None]:
            return jax.tree.map(jnp.add, total, query(number)), None

        total, _ = lax.scan(add, query(0), jnp.arange(1, draws))
        averaged: Answer = jax.tree.map(lambda part: part / draws, total)
        return averaged

    def logits(x: Array, keys: Keys) -> Array:
        return mean(lambda number: oracle.logits(x, keys.fold(number)))

    def grad(loss: Loss, x: Array, labels: Array, keys: Keys) -> tuple[Array, Array, Array]:
        return mean(lambda number: oracle.grad(loss, x, labels, keys.fold(number)))

    return Oracle(logits, grad)


def gradient_from(source: Oracle, judge: Oracle) -> Oracle:
    """Gradients of one predictor, success and loss of another.

    Args:
      source: gives the gradients.
      judge: the deployed predictor; it is asked once more with every gradient.

    Examples:
      >>> from deq_jax.attacks import gradient_from, oracle_of
      >>> smooth, deployed = oracle_of(lambda x: x.mean((1, 2))), oracle_of(lambda x: x.max((1, 2)))
      >>> gradient_from(smooth, judge=deployed).logits is deployed.logits
      True
    """
    require_oracle("gradient_from: source", source)
    require_oracle("gradient_from: judge", judge)

    def grad(loss: Loss, x: Array, labels: Array, keys: Keys) -> tuple[Array, Array, Array]:
        gradient = source.grad(loss, x, labels, keys)[2]
        logits = judge.logits(x, keys)
        return loss(logits, labels), logits, gradient

    return Oracle(judge.logits, grad)


def oracle_of(logits: Callable[..., Array]) -> Oracle:
    """Oracle of a differentiable predictor; equal for the same one.

    Args:
      logits: ``x [B, H, W, C] -> logits [B, K]``; or, of a random predictor, ``(x, keys)``: a function is called with
        `Keys` if it has a parameter of the name `keys`, or two that must be given. For a Flax module:
        ``lambda x: module.apply(variables, x)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Keys
      >>> from deq_jax.attacks import oracle_of
      >>> oracle = oracle_of(lambda x: x.reshape(len(x), -1))
      >>> oracle.logits(jnp.ones((2, 1, 1, 3)), Keys.of(0, 2)).shape
      (2, 3)
    """
    expected = "a function of images that gives logits; a Predictor has an oracle of its own, predictor.oracle()"
    require_role("oracle_of", logits, ("__call__",), expected)
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    further = [p for p in inspect.signature(logits).parameters.values() if p.kind in kinds][1:]
    takes_keys = any(p.name == "keys" or p.default is p.empty for p in further)
    answer = logits if takes_keys else _WithoutKeys(logits)
    return Oracle(answer, _Gradient(answer))


def require_oracle(what: str, value: Oracle) -> None:
    """Refuses anything but an oracle, such as a bare function; `what` begins the message."""
    expected = "an Oracle, such as oracle_of(logits) or predictor.oracle() of a Predictor"
    require_role(what, value, ("logits", "grad"), expected)


@dataclass(frozen=True)
class _WithoutKeys:
    logits: Callable[[Array], Array]

    def __call__(self, x: Array, keys: Keys) -> Array:
        return self.logits(x)


@dataclass(frozen=True)
class _Gradient:
    logits: Callable[[Array, Keys], Array]

    def __call__(self, loss: Loss, x: Array, labels: Array, keys: Keys) -> tuple[Array, Array, Array]:
        def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
            scores = self.logits(x, keys)
            losses = loss(scores, labels)
            return jnp.sum(losses), (losses, scores)

        gradient, (losses, scores) = jax.grad(total, has_aux=True)(x)
        return losses, scores, gradient


class Oracle(NamedTuple):
    """Logits, and a gradient that need not belong to them.

    An attack asks in the dtype of its images; answers in another dtype are cast. Shapes are checked at every query,
    also within `jax.jit`.

    Attributes:
      logits: ``(x, keys) -> [B, K]``, of the predictor on which success is measured.
      grad: ``(loss, x, labels, keys) -> (loss [B], logits [B, K], gradient [B, H, W, C])``, the
        gradient of the summed loss with respect to x.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.attacks import Oracle
      >>> def no_gradient(loss, x, labels, keys):
      ...     raise NotImplementedError("only Square and SPSA attack this predictor")
      >>> oracle = Oracle(lambda x, keys: x.reshape(len(x), -1), no_gradient)
      >>> oracle.logits(np.ones((2, 1, 1, 3)), keys=None).shape
      (2, 3)
    """

    logits: Callable[[Array, Keys], Array]
    grad: Callable[[Loss, Array, Array, Keys], tuple[Array, Array, Array]]


class Attack(Protocol):
    """``(oracle, x, labels, key, start=None) -> x_adv``, within the threat model's ball and [0, 1].

    The images x are [B, H, W, C], floating, in [0, 1]; half-precision images are attacked in float32 and come back in
    their own dtype. The labels are [B] of any integer type, from 0 to K - 1, or for some attacks pairs (label, class
    aimed at) [B, 2] or reference logits [B, K]. The key is a PRNG key, a seed, or `Keys`.

    The start is images [B, H, W, C] within the ball, from which the attack begins in place of its own (random) start.
    An attack of several restarts uses it for the first; attacks made of attacks hand it to each. The result is
    never worse than the start: misclassified if that was, else of no lower loss. (Exceptions: `PGD` without `best_of`
    returns its last iterate, and `Noise` takes no start.)

    The attacks of `deq_jax.attacks` refuse everything else (`InputError`), before anything is computed: images outside
    [0, 1] by more than 1e-6, a start outside the ball by more than that, labels that are not classes, logits that are
    not [B, K] with K >= 2 or, on the images themselves, not finite. Values are not known within `jax.jit`: there an
    image outside [0, 1] comes back as NaN, and one without a class or without finite logits unchanged; a start is
    projected. Outside of it an attack is compiled as a whole, at the first of all calls with the same program and
    shapes.

    An attack may declare more: `threat`, its threat model, which evaluations compare with theirs; `uses_gradients`,
    which tells white-box attacks from black-box ones; `gradient_queries`, the number of gradients per image, at most.
    Nothing is concluded from an undeclared trait, or from None.
    """

    def __call__(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Array: ...
