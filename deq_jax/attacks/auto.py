"""AutoAttack [Croce & Hein 2020a]: several attacks in a row, the worst case for each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.attacks.apgd import APGD
from deq_jax.attacks.best import Best, check_inputs, refuse_not_finite
from deq_jax.attacks.combine import expectation
from deq_jax.attacks.fab import FAB
from deq_jax.attacks.oracle import oracle_of
from deq_jax.attacks.square import Square
from deq_jax.attacks.targeted import Targeted, targeted_dlr
from deq_jax.attacks.threat import Linf, Threat
from deq_jax.losses import dlr, margin
from deq_jax.types import Array, Attack, Keys, Oracle, require


def auto_attack(
    logits_fn: Callable[[Array], Array], x: Array, y: Array, key: Array | Keys, epsilon: float = 8 / 255
) -> Array:
    """The standard AutoAttack in ℓ∞, on any JAX classifier.

    It compiles anew at every call, since `logits_fn` may have changed; to attack one predictor often, see
    `AutoAttack.bind`.

    Args:
      logits_fn: ``x [B, H, W, C] -> logits [B, K]``, differentiable, K >= 4, deterministic, each image on
        its own.
      x: images [B, H, W, C] in [0, 1], float.
      y: labels [B], int.
      key: PRNG key.
      epsilon: radius, in the unit of x.

    Returns:
      [B, H, W, C] adversarial images, within epsilon of x and within [0, 1].

    Raises:
      InputError: inputs of another shape, kind or range; logits that are not finite.
    """
    return AutoAttack.standard(Linf(epsilon))(oracle_of(lambda x, keys: logits_fn(x)), x, y, key)


class Stage(NamedTuple):
    """What is known after one of the attacks.

    Attributes:
      attack: the one that has run; None before the first.
      x_adv: [B, H, W, C] the worst image so far.
      robust: [B] bool, whether it is classified correctly.
    """

    attack: Attack | None
    x_adv: np.ndarray
    robust: np.ndarray


@dataclass(frozen=True)
class AutoAttack:
    """Attacks in a row; each only attacks the images that are still classified correctly.

    The images that remain are gathered into batches of one size between attacks, the last one padded, so
    that each attack is compiled once. Within `jax.jit` or `jax.pmap` all images go through all attacks,
    with the same result.

    Attributes:
      attacks: called as ``attack(oracle, x, labels, keys)``.
      batch_size: images at a time.
      draws: of a random predictor, averaged in every query (EOT).
    """

    attacks: tuple[Attack, ...]
    batch_size: int = 128
    draws: int = 1

    def __post_init__(self):
        require(len(self.attacks) > 0, "AutoAttack: expected at least one attack, got none")
        require(self.batch_size >= 1, f"AutoAttack: batch_size must be >= 1, got {self.batch_size!r}")
        require(self.draws >= 1, f"AutoAttack: draws must be >= 1, got {self.draws!r}")

    @classmethod
    def standard(cls, threat: Threat, batch_size: int = 128) -> AutoAttack:
        """APGD-CE, APGD-DLR and FAB targeted at 9 classes, Square: for deterministic predictors."""
        apgd_t = Targeted(APGD(threat, loss=targeted_dlr), classes=9)
        fab_t = Targeted(FAB(threat), classes=9)
        return cls((APGD(threat), apgd_t, fab_t, Square(threat)), batch_size)

    @classmethod
    def plus(cls, threat: Threat, batch_size: int = 128) -> AutoAttack:
        """Untargeted APGD-CE, APGD-DLR and FAB with 5 restarts, Square, and the two targeted attacks."""
        apgd_ce, apgd_dlr = APGD(threat, restarts=5), APGD(threat, restarts=5, loss=dlr)
        _, apgd_t, fab_t, square = cls.standard(threat).attacks
        return cls((apgd_ce, apgd_dlr, FAB(threat, restarts=5), square, apgd_t, fab_t), batch_size)

    @classmethod
    def rand(cls, threat: Threat, batch_size: int = 128, draws: int = 20) -> AutoAttack:
        """APGD-CE and APGD-DLR on the mean over draws: for random predictors."""
        return cls((APGD(threat), APGD(threat, loss=dlr)), batch_size, draws)

    def __call__(self, oracle: Oracle, x: Array, target: Array, key: Array | Keys) -> Array:
        """Adversarial images, the worst case for each; see `APGD.__call__`. The target is labels [B].

        Raises:
          InputError: inputs of another shape, kind or range; clean logits that are not finite.
        """
        if isinstance(x, jax.core.Tracer):
            return self._traced(oracle, x, target, key)
        for stage in self.stages(oracle, x, target, key):
            x_adv = stage.x_adv
        return jnp.asarray(x_adv)

    def stages(self, oracle: Oracle, x: Array, target: Array, key: Array | Keys) -> Iterator[Stage]:
        """Yields what is known before the first attack and after each; see `__call__`."""
        return self.bind(oracle)(x, target, key)

    def bind(self, oracle: Oracle) -> Callable[[Array, Array, Array | Keys], Iterator[Stage]]:
        """`stages` of one predictor, compiled once per attack and batch shape while this is kept."""
        oracle = self._averaged(oracle)
        judge = jax.jit(partial(Best.clean, oracle, margin))
        attempts = [jax.jit(partial(_attempt, attack, oracle)) for attack in self.attacks]
        return partial(self._stages, judge, attempts)

    def _stages(self, judge, attempts, x, target, key):
        x, labels = np.asarray(x), np.asarray(target)
        _check(x, labels)
        keys, size = Keys.of(key, len(x)), min(self.batch_size, len(x))
        images, every = np.asarray(keys.images), np.arange(len(x))
        best = Best(x.copy(), np.zeros(len(x), bool), np.zeros(len(x), x.dtype))

        for rows, padded in _batches(every, size):
            _write(best, rows, judge(x[padded], labels[padded], keys.fold(0)._replace(images=images[padded])))
        refuse_not_finite(np.isfinite(best.loss))
        yield Stage(None, best.x.copy(), ~best.fooled)

        for number, (attack, attempt) in enumerate(zip(self.attacks, attempts, strict=True)):
            for rows, padded in _batches(every[~best.fooled], size):
                own = keys.fold(1 + number)._replace(images=images[padded])
                so_far = Best(*(part[padded] for part in best))
                _write(best, rows, attempt(so_far, x[padded], labels[padded], own))
            yield Stage(attack, best.x.copy(), ~best.fooled)

    def _traced(self, oracle, x, target, key):
        check_inputs(x, target)
        if x.shape[0] == 0:
            return x
        oracle, keys = self._averaged(oracle), Keys.of(key, x.shape[0])
        best = Best.clean(oracle, margin, x, target, keys.fold(0))
        for number, attack in enumerate(self.attacks):
            tried = _attempt(attack, oracle, best, x, target, keys.fold(1 + number))
            best = best.where(best.fooled, tried)
        return best.x

    def _averaged(self, oracle):
        return expectation(oracle, self.draws) if self.draws > 1 else oracle


def _attempt(attack: Attack, oracle: Oracle, best: Best, x: Array, labels: Array, keys: Keys) -> Best:
    x_adv = attack(oracle, x, labels, keys.fold(0))
    logits = oracle.logits(x_adv, keys.fold(1))
    return best.update(x_adv, margin(logits, labels), logits, labels)


def _batches(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows in groups of at most `size`, each also padded to that size by repeating itself."""
    for start in range(0, len(rows), max(size, 1)):
        group = rows[start : start + size]
        yield group, np.resize(group, size)


def _write(best: Best, rows: np.ndarray, found: Best) -> None:
    for array, values in zip(best, found, strict=True):
        array[rows] = np.asarray(values)[: len(rows)]


def _check(x: np.ndarray, labels: np.ndarray) -> None:
    check_inputs(x, labels)
    require(labels.ndim == 1, f"AutoAttack: expected labels [B], got shape {labels.shape}")
    inside = x.size == 0 or (np.min(x) >= 0 and np.max(x) <= 1)
    require(bool(inside), "AutoAttack: images must lie within [0, 1]")
