"""The worst case over trials in one call, in memory or in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from deq_jax.attacks.threats import Threat
from deq_jax.core.errors import InputError, described, require, require_role
from deq_jax.core.types import AnyArray
from deq_jax.data.datasets import Images
from deq_jax.evaluation.budgets import default_trials
from deq_jax.evaluation.engine import worst_case
from deq_jax.evaluation.moments import Moment
from deq_jax.evaluation.plan import Diagnostics, EvalConfig, Trial, check_are_trials
from deq_jax.evaluation.predictor import Predictor
from deq_jax.evaluation.results import WorstCase


def assess(
    predictor: Predictor,
    images: Images | tuple[AnyArray, AnyArray],
    trials: Sequence[Trial] | None = None,
    *,
    threat: Threat | None = None,
    budget: str = "quick",
    diagnostics: Diagnostics | None = None,
    draws: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    skip_broken: bool = True,
    out: Path | str | None = None,
    report: Callable[[Moment], None] = lambda moment: None,
) -> WorstCase:
    """Attacks a predictor with all trials: the worst case for each image, with red flags.

    Nothing is written without `out`. `worst_case` takes an `EvalConfig`, which has further options.

    Args:
      predictor: the deployed predictor.
      images: x [N, H, W, C], floating in [0, 1] or uint8, and labels [N].
      trials: attacks, such as ``evaluation.auto_attack_trials(Linf(8 / 255))``; None for default ones that suit the
        predictor, within the budget.
      threat: adversarial images count within it; None for the one that the first trial's attack declares.
      budget: without trials, see `default_trials`.
      diagnostics: further trials for the red flags, such as ``evaluation.diagnostics(threat)``; without them some
        flags are not checked.
      draws, seed, skip_broken: see `EvalConfig`.
      batch_size: images at a time, at most; over all devices.
      out: folder that keeps and resumes the evaluation.
      report: called before every long step, and after every batch.

    Returns:
      The worst case; `robust_accuracy`, `clean_accuracy` and `red_flags` are the summary, and
      ``evaluation.headline(evaluation.EvaluationRecord.of(result))`` says it in a line.

    Raises:
      InputError: no threat is declared or given; see also `EvalConfig` and `worst_case`.

    For example::

        ball = dj.attacks.Linf(0.1)
        result = dj.assess(run.predictor, run.data.test, dj.evaluation.auto_attack_trials(ball))
        print(result.robust_accuracy, result.red_flags)

    Examples:
      >>> import jax.numpy as jnp
      >>> import deq_jax as dj
      >>> model, x = dj.models.small_cnn(num_classes=10, channels=4), jnp.zeros((2, 8, 8, 1))
      >>> predictor = dj.Predictor(model, model.init(0, x))
      >>> result = dj.assess(predictor, (x, jnp.array([3, 4])), trials=[], threat=dj.attacks.Linf(0.1))
      >>> result.robust_accuracy is None
      True
    """
    chosen = None
    expected = "a Predictor, such as run.predictor of a run, or Predictor(classifier, variables)"
    require_role("assess: predictor", predictor, ("classifier", "variables"), expected)
    is_pair = isinstance(images, tuple | list) and len(images) == 2
    pairs = "expected a pair of images and labels, such as run.data.test"
    require(is_pair, f"assess: images: {pairs}, got {described(images)}")
    if trials is None:
        if threat is None:
            raise InputError("assess: expected a threat, such as threat=Linf(8 / 255), or trials that declare one")
        trials, chosen = default_trials(predictor.classifier, threat, budget), budget
    check_are_trials("assess", trials)
    if threat is None:
        threat = getattr(trials[0].attack, "threat", None) if trials else None
    if threat is None:
        raise InputError("assess: expected a threat, such as threat=Linf(8 / 255), since the first trial declares none")
    data, devices = Images(np.asarray(images[0]), np.asarray(images[1])), jax.device_count()
    needed = max(-(-len(data.y) // devices), 1) * devices
    config = EvalConfig(
        threat,
        tuple(trials),
        diagnostics,
        draws=draws,
        budget=chosen,
        batch_size=min(batch_size, needed),
        seed=seed,
        skip_broken=skip_broken,
    )
    folder = None if out is None else Path(out)
    return worst_case(config, predictor.classifier, predictor.variables, data, folder, report=report)
