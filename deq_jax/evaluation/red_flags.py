"""Signs that a robust accuracy is too high because an attack failed, not because the model is robust.

References: Athalye et al. 2018; Carlini et al. 2019, "On Evaluating Adversarial Robustness"; Croce et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from scipy import special

from deq_jax.evaluation.plan import Trial
from deq_jax.evaluation.results import Flag, Probe, WorstCase
from deq_jax.evaluation.sanity import SIGNIFICANT
from deq_jax.evaluation.transfers import Transfer
from deq_jax.surrogates.adaptive import OnBase

DRAWS = 20  # over which attacks on a random predictor must average

POINTS = 0.002  # of accuracy: 0.2 percentage points

PLATEAU = 0.005

ZERO_GRADIENTS = 0.01

ROUNDING = 0.01  # of the largest logit


def red_flags(result: WorstCase) -> list[Flag]:
    """All checks of an evaluation, raised or not.

    Args:
      result: the results of all trials.

    References: Carlini et al. 2019, "On Evaluating Adversarial Robustness"; Croce et al. 2022.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import Cost, EvalConfig, Probe, Row, Rows, WorstCase, red_flags
      >>> row = Row(np.array([3]), np.array([-1.0]), np.array([0.25]), np.array([np.nan]))
      >>> logits, clean = np.array([[0.0, 1.0]]), Rows(None, None, row)
      >>> result = WorstCase(
      ...     config=EvalConfig(Linf(0.1), trials=()),
      ...     y=np.array([3]),
      ...     clean=clean,
      ...     zero_gradient=np.array([True]),
      ...     spectral_radius=np.array([0.5]),
      ...     probe=Probe(logits, logits, logits, logits),
      ...     cost=Cost(np.array([15.0]), np.array([0.5])),
      ...     attempts={},
      ...     x_adv=np.zeros((1, 8, 8, 1)),
      ...     worst=clean,
      ... )
      >>> [flag.name for flag in red_flags(result) if flag.raised]
      ['zero gradients']
    """
    correct = {name: row.deployed for name, row in result.robust().items()}
    extra = result.config.diagnostics
    far = None if extra is None else correct[extra.far.name]
    long = None if extra is None else (correct[extra.half.name], correct[extra.long.name])
    return [
        better("black box beats white box", result, _is_black_box),
        better("transfer beats direct attacks", result, _is_transferred),
        zero_gradients(result.zero_gradient),
        not_finite(result),
        batch_dependence(result.probe),
        randomness(result.probe, result.config.draws),
        no_collapse(far, result.probe.whole.shape[1], _far_radius(result)),
        no_plateau(long),
        order_of_strength(_strength(result, correct)),
    ]


def better(name: str, result: WorstCase, is_suspect: Callable[[Trial], bool | None]) -> Flag:
    """Whether attacks that know less about the model broke images that no white-box attack did by itself.

    Attacks that do not say whether they use gradients count neither for nor against. Where they alone broke images
    that would raise the flag if they were suspects, it is not checked.
    """
    trials = result.config.all_trials
    counted = {t.name: result.broken(t.name) & result.attempts[t.name].inside for t in trials}
    others = [counted[trial.name] for trial in trials if is_white_box(trial)]
    certain = [counted[trial.name] for trial in trials if is_suspect(trial)]
    possible = [counted[trial.name] for trial in trials if is_suspect(trial) is not False]
    known, worst = only_by(name, certain, others), only_by(name, possible, others)
    unknown = Flag.of_count(name, None, 0, known.threshold, known.explanation)
    return unknown if worst.raised and not known.raised else known


def only_by(name: str, suspects: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Flag:
    """The images that only suspects broke.

    Args:
      name: name of the flag.
      suspects: [N] bool each, the images that an attack broke which knows less about the model.
      others: [N] bool each, the images that a white-box attack broke.
    """
    alone = np.zeros(0, bool)
    if suspects and others:
        alone = np.logical_or.reduce(suspects) & ~np.logical_or.reduce(others)
    count = int(np.sum(alone)) if len(alone) else None
    cure = "give trials a surrogate with a gradient that is not masked, such as BPDA"
    meaning = f"images that no white-box attack broke: the gradients are masked; {cure}"
    return Flag.of_count(name, count, len(alone), POINTS, meaning)


def zero_gradients(is_zero: np.ndarray) -> Flag:
    """The images at which every gradient that attacks take vanishes, given which do, [N] bool."""
    cure = "try the surrogate BPDA if a step before the classifier has no derivative, for trials and diagnostics"
    meaning = f"gradient attacks cannot move from these images; {cure}"
    return Flag.of_count("zero gradients", int(np.sum(is_zero)), len(is_zero), ZERO_GRADIENTS, meaning)


def not_finite(result: WorstCase) -> Flag:
    """The share of images at which some attack met logits that are not finite; such logits count as correct."""
    met = [~np.isfinite(attempt.measured.deployed.margin) & attempt.inside for attempt in result.attempts.values()]
    share = float(np.mean(np.logical_or.reduce(met))) if met else None
    return Flag.of("logits not finite", share, 0.0, "attacked images with NaN or infinite logits count as correct")


def batch_dependence(probe: Probe) -> Flag:
    """How far an image's logits move with the images around it, relative to the largest logit."""
    moved = max(_distance(probe.whole, other) for other in (probe.reverse, probe.alone))
    return Flag.of("batch dependence", moved, ROUNDING, "an image's logits depend on its batch-mates")


def randomness(probe: Probe, draws: int | None) -> Flag:
    """How far the logits move with the key, relative to the largest logit, unless attacks average over enough draws."""
    averaged = draws is not None and draws >= DRAWS
    moved = 0.0 if averaged else _distance(probe.whole, probe.other_key)
    cure = f"average over it with EvalConfig(draws={DRAWS}) (EOT)"
    return Flag.of("randomness", moved, ROUNDING, f"logits are random, and the attacks do not average over it; {cure}")


def no_collapse(correct: np.ndarray | None, classes: int, radius: float = 8.0) -> Flag:
    """Accuracy at a radius at which nothing can be robust, compared with guessing.

    Args:
      correct: [N] bool, the images that withstood an attack of this radius; None where it was not run.
      classes: number of classes.
      radius: in multiples of epsilon.
    """
    count, images = (None, 0) if correct is None else (int(np.sum(correct)), len(correct))
    name = f"no collapse at {radius:.3g} epsilon"
    return Flag.of_count(name, count, images, 1 / classes, "at this radius every model can be broken")


def no_plateau(correct: tuple[np.ndarray, np.ndarray] | None) -> Flag:
    """Gain from the second half of the steps of a long attack.

    Args:
      correct: [N] bool each, the images that withstood half of the steps, and all; None where they were not run.
    """
    gain, images = (None, 0) if correct is None else (max(_lead(*correct), 0), len(correct[0]))
    return Flag.of_count("no plateau", gain, images, PLATEAU, "more steps would lower the accuracy further")


def order_of_strength(correct: Sequence[np.ndarray] | None) -> Flag:
    """By how much accuracy is higher under a stronger attack than under the next weaker one, beyond chance.

    Attacks are random: two equally strong attacks each break about half of the images that only one of them breaks. So
    a difference counts that McNemar's exact test tells from that, at 5 %. The value is the largest that counts.

    Args:
      correct: [N] bool each, the images that withstood an attack; from the weakest to the strongest.
    """
    name, expected = "order of strength", "expected noise >= FGSM >= PGD-10 >= AutoAttack's first attack"
    if correct is None:
        return Flag.of(name, None, POINTS, expected)
    count, images = max(_excess(*pair) for pair in pairwise(correct)), len(correct[0])
    return Flag(name, count / images > POINTS, count / images, POINTS, expected, count, images)


def _lead(first: np.ndarray, second: np.ndarray) -> int:
    """How many more images withstood the first attack than the second."""
    return int(np.sum(first)) - int(np.sum(second))


def _excess(weaker: np.ndarray, stronger: np.ndarray) -> int:
    """How many more images withstood the stronger attack than the weaker one; 0 where chance may have done it."""
    only_stronger, differ = int(np.sum(stronger & ~weaker)), int(np.sum(stronger != weaker))
    is_chance = only_stronger == 0 or special.bdtrc(only_stronger - 1, differ, 0.5) > SIGNIFICANT
    return 0 if is_chance else max(_lead(stronger, weaker), 0)


def _strength(result: WorstCase, correct: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    extra = result.config.diagnostics
    if extra is None:
        return None
    suite = [trial for trial in result.config.trials if trial.suite is not None and is_white_box(trial)]
    return [correct[trial.name] for trial in (extra.noise, extra.fgsm, extra.pgd, *suite[:1])]


def _far_radius(result: WorstCase) -> float:
    """Radius of the far attack, in multiples of epsilon; 8 where it is not known."""
    extra, epsilon = result.config.diagnostics, result.config.threat.epsilon
    threat = None if extra is None else getattr(extra.far.attack, "threat", None)
    return 8.0 if threat is None or epsilon == 0 else threat.epsilon / epsilon


def _is_transferred(trial: Trial) -> bool:
    """Whether its images are made against another predictor than the deployed one."""
    return isinstance(trial.attack, Transfer) or isinstance(trial.surrogate, OnBase)


def _uses_gradients(trial: Trial) -> bool | None:
    """As the attack declares; None where it does not."""
    return getattr(trial.attack, "uses_gradients", None)


def _is_black_box(trial: Trial) -> bool | None:
    """None where it is not known."""
    if isinstance(trial.attack, Transfer):
        return False
    uses = _uses_gradients(trial)
    return None if uses is None else not uses


def is_white_box(trial: Trial) -> bool:
    """Whether its success shows that gradients of the deployed predictor can succeed."""
    return _uses_gradients(trial) is True and not _is_transferred(trial) and not trial.from_worst


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(a))), 1e-12))
