"""Signs that a robust accuracy is too high because an attack failed, not because the model is robust.

References: Athalye et al. 2018; Carlini et al. 2019, "On Evaluating Adversarial Robustness"; Croce et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from deq_jax.adaptive import OnBase
from deq_jax.attacks import SPSA, Square
from deq_jax.results import Probe, WorstCase
from deq_jax.transfers import Transfer
from deq_jax.trials import Noise, Trial

DRAWS = 20  # over which attacks on a random predictor must average
POINTS = 0.002  # of accuracy: 0.2 percentage points
PLATEAU = 0.005
ZERO_GRADIENTS = 0.01
ROUNDING = 0.01  # of the largest logit


@dataclass(frozen=True)
class Flag:
    """A check of an evaluation.

    Attributes:
      name: what is checked.
      raised: whether the number cannot be trusted; None where what is needed was not run.
      value: of what is compared with the threshold; None where it was not run.
      threshold: above which the flag is raised.
      explanation: what it would mean.
    """

    name: str
    raised: bool | None
    value: float | None
    threshold: float
    explanation: str

    @classmethod
    def of(cls, name: str, value: float | None, threshold: float, explanation: str) -> Flag:
        """Raised if the value exceeds the threshold."""
        return cls(name, None if value is None else bool(value > threshold), value, threshold, explanation)


def red_flags(result: WorstCase) -> list[Flag]:
    """All checks of an evaluation."""
    correct = {name: row[:, -1] for name, row in result.robust().items()}
    extra = result.config.diagnostics
    far = None if extra is None else float(np.mean(correct[extra.far.name]))
    gain = None if extra is None else float(np.mean(correct[extra.half.name]) - np.mean(correct[extra.long.name]))
    return [
        better("black box beats white box", result, _is_black_box),
        better("transfer beats direct attacks", result, _is_transferred),
        zero_gradients(result.zero_gradient),
        not_finite(result),
        batch_dependence(result.probe),
        randomness(result.probe, result.config.draws),
        no_collapse(far, result.probe.whole.shape[1]),
        no_plateau(gain),
        order_of_strength(_strength(result, correct)),
    ]


def better(name: str, result: WorstCase, is_suspect: Callable[[Trial], bool]) -> Flag:
    """Whether attacks that know less about the model broke images that no white-box attack did by itself."""
    trials = [*result.config.trials, *result.config.extra_trials]
    counted = {t.name: result.broken(t.name) & result.attempts[t.name].inside for t in trials}
    suspects = [counted[trial.name] for trial in trials if is_suspect(trial)]
    others = [counted[t.name] for t in trials if not (_is_black_box(t) or _is_transferred(t) or t.from_worst)]
    return only_by(name, suspects, others)


def only_by(name: str, suspects: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Flag:
    """The share of images that only suspects broke.

    Args:
      name: of the flag.
      suspects: [N] bool each, the images that an attack broke which knows less about the model.
      others: [N] bool each, the images that a white-box attack broke.
    """
    share = None
    if suspects and others:
        share = float(np.mean(np.logical_or.reduce(suspects) & ~np.logical_or.reduce(others)))
    return Flag.of(name, share, POINTS, "images that no white-box attack broke: the gradients are masked")


def zero_gradients(is_zero: np.ndarray) -> Flag:
    """The share of images at which the gradient vanishes, given which do, [N] bool."""
    share = float(np.mean(is_zero))
    return Flag.of("zero gradients", share, ZERO_GRADIENTS, "gradient attacks cannot move from these images")


def not_finite(result: WorstCase) -> Flag:
    """The share of images at which some attack met logits that are not finite; such logits count as correct."""
    met = [~np.isfinite(attempt.measured.margin[:, -1]) & attempt.inside for attempt in result.attempts.values()]
    share = float(np.mean(np.logical_or.reduce(met))) if met else None
    return Flag.of("logits not finite", share, 0.0, "attacked images whose logits are NaN or infinite count as correct")


def batch_dependence(probe: Probe) -> Flag:
    """How far an image's logits move with the images around it, relative to the largest logit."""
    moved = max(_distance(probe.whole, other) for other in (probe.reverse, probe.alone))
    return Flag.of("batch dependence", moved, ROUNDING, "an image's logits depend on its batch-mates")


def randomness(probe: Probe, draws: int | None) -> Flag:
    """How far the logits move with the key, relative to the largest logit, unless attacks average over enough draws."""
    averaged = draws is not None and draws >= DRAWS
    moved = 0.0 if averaged else _distance(probe.whole, probe.other_key)
    return Flag.of("randomness", moved, ROUNDING, "logits are random, and the attacks do not average over it")


def no_collapse(accuracy: float | None, classes: int) -> Flag:
    """The accuracy at a radius so large that nothing can be robust, compared with that of guessing."""
    return Flag.of("no collapse at 8 epsilon", accuracy, 1 / classes, "at this radius every model can be broken")


def no_plateau(gain: float | None) -> Flag:
    """What the second half of the steps of a long attack still gains, as a share of the images."""
    return Flag.of("no plateau", gain, PLATEAU, "more steps would lower the accuracy further")


def order_of_strength(correct: Sequence[np.ndarray] | None) -> Flag:
    """By how much a stronger attack leaves a higher accuracy than the next weaker one, beyond what chance explains.

    Attacks are random: of the images that only one of two equally strong attacks breaks, either breaks about half. So
    the excess counts from two standard errors of the paired difference (McNemar's test).

    Args:
      correct: [N] bool each, the images that withstood an attack; from the weakest to the strongest.
    """
    worst = None if correct is None else max(_excess(*pair) for pair in pairwise(correct))
    return Flag.of("order of strength", worst, POINTS, "expected noise >= FGSM >= PGD-10 >= AutoAttack's first attack")


def _excess(weaker: np.ndarray, stronger: np.ndarray) -> float:
    """The accuracy under the stronger attack minus that under the weaker one and two standard errors; 0 if negative."""
    gain = float(np.mean(stronger) - np.mean(weaker))
    return max(gain - 2 * math.sqrt(np.mean(stronger != weaker) / len(weaker)), 0.0)


def _strength(result: WorstCase, correct: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    extra = result.config.diagnostics
    if extra is None:
        return None
    suite = [t for t in result.config.trials if t.suite is not None and not isinstance(t.attack, Transfer)]
    return [correct[trial.name] for trial in (extra.noise, extra.fgsm, extra.pgd, *suite[:1])]


def _is_transferred(trial: Trial) -> bool:
    """Whether its images are made against another predictor than the deployed one."""
    return isinstance(trial.attack, Transfer) or isinstance(trial.surrogate, OnBase)


def _is_black_box(trial: Trial) -> bool:
    return isinstance(trial.attack, Square | SPSA | Noise)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(a))), 1e-12))
