"""AutoAttack [Croce & Hein 2020a]: several attacks one after another, the worst case for each image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.attacks.apgd import APGD
from deq_jax.attacks.best import Best, InParts
from deq_jax.attacks.fab import FAB
from deq_jax.attacks.inputs import (
    Guard,
    all_finite,
    carry_out,
    check_classes,
    check_inputs,
    check_start,
    project_start,
    refuse_not_finite,
    working_type,
)
from deq_jax.attacks.oracles import Attack, Oracle, expectation, oracle_of
from deq_jax.attacks.programs import Compiled
from deq_jax.attacks.square import Square
from deq_jax.attacks.targeted import Targeted
from deq_jax.attacks.threats import Linf, Threat, is_traced
from deq_jax.core.errors import described, require, require_count, require_role
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import dlr, margin, targeted_dlr
from deq_jax.core.types import AnyArray, Array


def auto_attack(
    logits_fn: Callable[..., Array],
    x: Array,
    labels: Array,
    key: int | Array | Keys,
    epsilon: float | None = None,
    *,
    threat: Threat | None = None,
    version: str = "standard",
    batch_size: int | None = None,
    verbose: bool = False,
) -> Array:
    """AutoAttack on any JAX classifier.

    A second call with batches of the same shape compiles nothing, even if the arrays that `logits_fn` closes over have
    changed. A classifier of normalised images is attacked as ``lambda x: classifier((x - mean) / deviation)``.

    Args:
      logits_fn: ``x [B, H, W, C] -> logits [B, K]``, differentiable, K >= 2, deterministic, each image on
        its own. A random one is ``(x, keys) -> logits``, see `oracle_of`, and attacked by version "rand".
      x: images [B, H, W, C] in [0, 1], float.
      labels: [B], int.
      key: PRNG key, or a seed.
      epsilon: radius in ℓ∞, in the unit of x; default, without a threat: 8/255.
      threat: norm and radius, such as ``L2(0.5)``, in place of epsilon.
      version: "standard", "plus" or "rand": the class method of `AutoAttack`.
      batch_size: images at a time; see `AutoAttack`.
      verbose: print a line after each attack.

    Returns:
      [B, H, W, C] adversarial images, within the ball around x and within [0, 1].

    Raises:
      InputError: see `Attack`; or both epsilon and threat are given; or the version is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.attacks import L2, auto_attack
      >>> def logits(x):
      ...     return x.reshape(len(x), -1)
      >>> x, labels = jnp.full((4, 1, 1, 3), 0.5), jnp.zeros(4, int)
      >>> auto_attack(logits, x, labels, key=0, threat=L2(0.5), version="fast")
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: auto_attack: version must be one of standard, plus, rand, got 'fast'
    """
    one = epsilon is None or threat is None
    require(one, f"auto_attack: expected epsilon or threat, got both: {epsilon!r} and {threat!r}")
    threat = threat or Linf(8 / 255 if epsilon is None else epsilon)
    versions = {"standard": AutoAttack.standard, "plus": AutoAttack.plus, "rand": AutoAttack.rand}
    require(version in versions, f"auto_attack: version must be one of {', '.join(versions)}, got {version!r}")
    attack = versions[version](threat, batch_size)
    return attack(oracle_of(logits_fn), x, labels, key, verbose=verbose)


class Stage(NamedTuple):
    """The state after one of the attacks.

    Attributes:
      attack: the attack that has run; None before the first.
      x_adv: [B, H, W, C] the worst image so far.
      robust: [B] bool, whether it is classified correctly.
      attacked: number of images that were attacked; before the first attack, number of all images.
      seconds: time that it took, with compilation.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.attacks import Stage
      >>> stage = Stage(None, np.zeros((2, 8, 8, 1)), robust=np.array([True, False]), attacked=2, seconds=0.5)
      >>> stage.described()
      'clean: 2 images, accuracy 50.00 %, 0.5 s'
    """

    attack: Attack | None
    x_adv: np.ndarray
    robust: np.ndarray
    attacked: int
    seconds: float

    def described(self) -> str:
        """One line: the attack, the accuracy after it, the images that it attacked, and the time that it took."""
        name = "clean" if self.attack is None else _name(self.attack)
        accuracy = 100 * float(np.mean(self.robust)) if len(self.robust) else float("nan")
        kind = "accuracy" if self.attack is None else "robust accuracy"
        return f"{name}: {self.attacked} images, {kind} {accuracy:.2f} %, {self.seconds:.1f} s"


@dataclass(frozen=True)
class AutoAttack:
    """Attacks in a row; each only attacks the images that are still classified correctly.

    The images that remain are gathered into batches of one size between attacks and between their parts (`InParts`):
    the classes at which `Targeted` aims, every 500 queries of `Square`. The last batch is padded, so that each attack
    is compiled once. Within `jax.jit` or `jax.pmap` all images go through all attacks, with the same result.

    Attributes:
      attacks: called as ``attack(oracle, x, labels, keys)``.
      batch_size: images at a time; None for 128, and 32 on the CPU, where small batches were faster.
      draws: number of draws of a random predictor, averaged in every query (EOT).

    Raises:
      InputError: without an attack, or with a number that is not positive.

    References: Croce & Hein 2020a.

    Examples:
      >>> from deq_jax.attacks import AutoAttack, Linf
      >>> [type(attack).__name__ for attack in AutoAttack.standard(Linf(8 / 255)).attacks]
      ['APGD', 'Targeted', 'Targeted', 'Square']
    """

    attacks: tuple[Attack, ...]
    batch_size: int | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        usual = "a tuple of attacks, such as AutoAttack.standard(threat) has"
        is_tuple = isinstance(self.attacks, tuple | list)
        require(is_tuple, f"AutoAttack: attacks: expected {usual}, got {described(self.attacks)}")
        for attack in self.attacks:
            require_role("AutoAttack: attacks", attack, ("__call__",), usual)
        require(len(self.attacks) > 0, "AutoAttack: expected at least one attack, got none")
        require_count("AutoAttack: batch_size", self.batch_size, optional=True)
        require_count("AutoAttack: draws", self.draws)

    @classmethod
    def standard(cls, threat: Threat, batch_size: int | None = None) -> AutoAttack:
        """APGD-CE, APGD-DLR and FAB targeted at 9 classes, Square: for deterministic predictors."""
        apgd_t = Targeted(APGD(threat, loss=targeted_dlr), classes=9)
        fab_t = Targeted(FAB(threat), classes=9)
        return cls((APGD(threat), apgd_t, fab_t, Square(threat)), batch_size)

    @classmethod
    def plus(cls, threat: Threat, batch_size: int | None = None) -> AutoAttack:
        """Untargeted APGD-CE, APGD-DLR and FAB with 5 restarts, Square, and the two targeted attacks."""
        apgd_ce, apgd_dlr = APGD(threat, restarts=5), APGD(threat, restarts=5, loss=dlr)
        _, apgd_t, fab_t, square = cls.standard(threat).attacks
        return cls((apgd_ce, apgd_dlr, FAB(threat, restarts=5), square, apgd_t, fab_t), batch_size)

    @classmethod
    def rand(cls, threat: Threat, batch_size: int | None = None, draws: int = 20) -> AutoAttack:
        """APGD-CE and APGD-DLR on the mean over draws: for random predictors."""
        return cls((APGD(threat), APGD(threat, loss=dlr)), batch_size, draws)

    @property
    def threat(self) -> Threat | None:
        """The threat model that its attacks declare; see `Attack`.

        Raises:
          InputError: they declare several.
        """
        declared = [threat for attack in self.attacks if (threat := getattr(attack, "threat", None)) is not None]
        same = all(threat == declared[0] for threat in declared)
        require(same, f"AutoAttack: expected attacks of one threat model, got {', '.join(map(str, declared))}")
        return declared[0] if declared else None

    @property
    def uses_gradients(self) -> bool | None:
        """Whether its attacks use gradients; None if they differ, as its success is then evidence of neither kind."""
        kinds = {getattr(attack, "uses_gradients", None) for attack in self.attacks}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def gradient_queries(self) -> int | None:
        """Gradients per image of all its attacks, at most; None if one does not declare them."""
        queries = [getattr(attack, "gradient_queries", None) for attack in self.attacks]
        known = [count for count in queries if count is not None]
        return self.draws * sum(known) if len(known) == len(queries) else None

    def __call__(
        self,
        oracle: Oracle,
        x: Array,
        labels: Array,
        key: int | Array | Keys,
        start: Array | None = None,
        *,
        verbose: bool = False,
    ) -> Array:
        """Adversarial images, the worst case for each; see `APGD.__call__`. The labels are [B].

        All attacks begin at the start, if there is one. With `verbose` a line is printed before the first attack and
        after each, unless within `jax.jit`.
        """
        # Within `jax.jit` even a new array is traced; the oracle may be all that depends on its arguments.
        if any(is_traced(leaf) for leaf in jax.tree.leaves((x, labels, key, start, jnp.zeros(())))):
            averaged = self._averaged(oracle)
            return carry_out(self._run, averaged, x, labels, key, start, threat=self.threat, pairs=False)
        for stage in self.stages(oracle, x, labels, key, start):
            if verbose:
                print(stage.described(), flush=True)
        return jnp.asarray(stage.x_adv)

    def stages(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Iterator[Stage]:
        """Yields the state before the first attack and after each; see `__call__`."""
        return self.bind(oracle)(x, labels, key, start)

    def bind(self, oracle: Oracle) -> Callable[..., Iterator[Stage]]:
        """`stages` of one predictor: ``(x, labels, key, start=None)``, traced once per attack and shape while kept."""
        oracle = self._averaged(oracle)
        judge = Compiled(partial(_judge, oracle))
        attempts = [Compiled(partial(_attempt_batch, attack, oracle, self.threat)) for attack in self.attacks]
        return partial(self._stages, judge, attempts)

    def _stages(
        self,
        judge: Compiled,
        attempts: list[Compiled],
        x: AnyArray,
        labels: AnyArray,
        key: int | Array | Keys,
        start: AnyArray | None = None,
    ) -> Iterator[Stage]:
        x, labels = check_inputs(x, labels, pairs=False)
        begin = None if start is None else np.asarray(check_start(start, x, self.threat))
        keys, started = Keys.of(key, len(x)), time.perf_counter()
        size = min(self.batch_size or (32 if jax.default_backend() == "cpu" else 128), len(x))
        images, every = np.asarray(keys.images), np.arange(len(x))
        best = Best(x.copy(), np.zeros(len(x), bool), np.zeros(len(x), working_type(x)))
        finite, num_classes = np.ones(len(x), bool), 0

        for rows, padded in _batches(every, size):
            own = keys.fold(Purpose.QUERY)._replace(images=images[padded])
            given = None if begin is None else begin[padded]
            found, logits = judge(x[padded], labels[padded], own)
            num_classes = logits.shape[1]
            check_classes(labels, num_classes)
            _write(best, rows, found)
            finite[rows] = np.asarray(all_finite(logits))[: len(rows)]
            for attempt in attempts:  # errors of later attacks are raised now
                state = found._replace(x=x[padded].astype(working_type(x)))
                attempt.trace(np.int32(0), state, found, x[padded], labels[padded], own, given)
        refuse_not_finite(finite)
        yield Stage(None, best.x.copy(), ~best.fooled, len(x), time.perf_counter() - started)

        clean = Best(x.astype(working_type(x)), best.fooled.copy(), best.loss.copy())
        for number, (attack, attempt) in enumerate(zip(self.attacks, attempts, strict=True)):
            attacked, started = int(np.sum(~best.fooled)), time.perf_counter()
            state = Best(*(array.copy() for array in clean))  # of this attack alone
            for part in range(attack.attempts(num_classes) if isinstance(attack, InParts) else 1):
                for rows, padded in _batches(every[~best.fooled], size):
                    own = keys.fold(1 + number)._replace(images=images[padded])
                    both = [Best(*(array[padded] for array in one)) for one in (state, best)]
                    given = None if begin is None else begin[padded]
                    found = attempt(np.int32(part), *both, x[padded], labels[padded], own, given)
                    for one, values in zip((state, best), found, strict=True):
                        _write(one, rows, values)
            yield Stage(attack, best.x.copy(), ~best.fooled, attacked, time.perf_counter() - started)

    def _run(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        best = Best.clean(oracle, margin, x, labels, keys.fold(Purpose.QUERY))
        for number, attack in enumerate(self.attacks):
            _, tried = _attempt(attack, oracle, None, best, best, x, labels, keys.fold(1 + number), start)
            best = best.where(best.fooled, tried)
        x_adv: Array = best.x
        return x_adv

    def _averaged(self, oracle: Oracle) -> Oracle:
        return expectation(oracle, self.draws) if self.draws > 1 else oracle


def _judge(oracle: Oracle, x: Array, labels: Array, keys: Keys) -> tuple[Best, Array]:
    """The state before the first attack, and the logits."""
    guard = Guard.of(oracle, x)
    logits = guard.logits(guard.centre, keys)
    best = Best.of(guard.centre, margin, logits, labels)
    return best._replace(x=x), logits


def _attempt_batch(
    attack: Attack,
    oracle: Oracle,
    threat: Threat | None,
    part: Array,
    state: Best,
    best: Best,
    x: Array,
    labels: Array,
    keys: Keys,
    start: Array | None,
) -> tuple[Best, Best]:
    guard = Guard.of(oracle, x)
    begin = None if start is None else project_start(start, guard.centre, threat)
    best = best._replace(x=best.x.astype(guard.centre.dtype))
    asked, labels = cast(Oracle, guard), labels.astype(jnp.int32)
    state, best = _attempt(attack, asked, part, state, best, guard.centre, labels, keys, begin)
    return state, best._replace(x=guard.rounded(best.x))


def _attempt(
    attack: Attack,
    oracle: Oracle,
    part: Array | None,
    state: Best,
    best: Best,
    x: Array,
    labels: Array,
    keys: Keys,
    start: Array | None,
) -> tuple[Best, Best]:
    """The state of the attack after one of its parts, or after the whole (None), and the best of all attacks."""
    if start is not None:
        best = best.query(oracle, margin, start, labels, keys.fold(Purpose.START))
    own, given = keys.fold(Purpose.ATTACK), {} if start is None else {"start": start}
    if part is not None and isinstance(attack, InParts):
        state = attack.attempt(part, state, oracle, x, labels, own, start)
    else:
        state = state._replace(x=attack(oracle, x, labels, own, **given))
    return state, best.query(oracle, margin, state.x, labels, keys.fold(Purpose.QUERY))


def _name(attack: Attack) -> str:
    """Such as ``Targeted APGD (targeted_dlr)``."""
    inner, loss = getattr(attack, "attack", None), getattr(attack, "loss", None)
    if inner is not None:
        return f"{type(attack).__name__} {_name(inner)}"
    return type(attack).__name__ + (f" ({getattr(loss, '__name__', loss)})" if loss else "")


def _batches(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows in groups of at most `size`, each also padded to that size by repeating itself."""
    for start in range(0, len(rows), max(size, 1)):
        group = rows[start : start + size]
        yield group, np.resize(group, size)


def _write(best: Best, rows: np.ndarray, found: Best) -> None:
    for array, values in zip(best, found, strict=True):
        array[rows] = np.asarray(values)[: len(rows)]
