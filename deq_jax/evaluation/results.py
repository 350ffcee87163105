"""Results of an evaluation: per trial, and the worst case for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple, cast

import jax
import numpy as np
from scipy import special

from deq_jax.evaluation.plan import EvalConfig
from deq_jax.evaluation.rows import Correct, Measured, Outcomes, both, is_correct, named, replaced
from deq_jax.evaluation.sanity import SIGNIFICANT


class Attempt(NamedTuple):
    """The result of a trial. Its images are the clean ones where it attacked none.

    Attributes:
      read: () -> its images x_adv [N, H, W, C], read from the folder if there is one, because the images of many trials
        do not fit into memory.
      measured: measurements of these images.
      attacked: [N] bool, whether the image was attacked.
      inside: [N] bool, whether x_adv lies within the threat model's ball.
      seconds: time spent on it, compilation included.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Attempt, Row, Rows
      >>> row = Row(np.array([3, 5]), np.array([-1.0, 0.5]), np.array([0.25, 0.5]), np.array([np.nan, np.nan]))
      >>> attacked, inside = np.array([True, True]), np.array([True, True])
      >>> attempt = Attempt(lambda: np.zeros((2, 8, 8, 1)), Rows(None, None, row), attacked, inside, seconds=0.5)
      >>> attempt.read().shape, attempt.measured.deployed.label.tolist()
      ((2, 8, 8, 1), [3, 5])
    """

    read: Callable[[], np.ndarray]
    measured: Measured
    attacked: np.ndarray
    inside: np.ndarray
    seconds: float


class Worst(NamedTuple):
    """For each image the worst one so far; see `WorstCase`.

    Attributes:
      x_adv: [N, H, W, C].
      measured: measurements of x_adv.
    """

    x_adv: np.ndarray
    measured: Measured

    def updated(self, y: np.ndarray, x_adv: np.ndarray, measured: Measured, inside: np.ndarray) -> Worst:
        """The worst after a further trial.

        Args:
          y: the true labels [N].
          x_adv: images [N, H, W, C].
          measured: measurements of these images.
          inside: [N] bool, which of them count.
        """
        fooled, kept = (~is_correct(one, y).deployed for one in (measured, self.measured))
        higher = measured.deployed.margin > self.measured.deployed.margin
        better = inside & ((fooled & ~kept) | ((fooled == kept) & higher))
        images = np.where(better.reshape(-1, *[1] * (x_adv.ndim - 1)), x_adv, self.x_adv)
        return Worst(images, replaced(self.measured, better, jax.tree.map(lambda leaf: leaf[better], measured)))


class Probe(NamedTuple):
    """Logits of the first images, asked in several ways.

    Attributes:
      whole: [n, K], of all of them in one batch.
      reverse: [n, K], of the batch in reverse order.
      alone: [n, K], of each image alone.
      other_key: [n, K], of the batch with another key.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Probe
      >>> logits = np.array([[2.0, 1.0]])
      >>> probe = Probe(whole=logits, reverse=logits, alone=logits, other_key=logits + 0.5)
      >>> float(abs(probe.other_key - probe.whole).max())  # a random predictor
      0.5
    """

    whole: np.ndarray
    reverse: np.ndarray
    alone: np.ndarray
    other_key: np.ndarray


class Cost(NamedTuple):
    """The cost of a prediction.

    Attributes:
      evaluations: [n], applications of the cell to each of the first images, where a vector-Jacobian product counts as
        one; NaN for an explicit network.
      seconds: [repeats], time per image of a batch, on one device, compilation excluded.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.evaluation import Cost
      >>> Cost(evaluations=np.array([15.0, 15.0]), seconds=np.array([0.5, 0.25, 0.25])).evaluations.mean().tolist()
      15.0
    """

    evaluations: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True)
class Flag:
    """A check of an evaluation.

    Attributes:
      name: name of the check.
      raised: whether the robust accuracy cannot be trusted. None where a needed trial was not run, or where the images
        are too few to say: see `is_unsure`.
      value: number that is compared with the threshold; None where it was not measured.
      threshold: the flag is raised above it.
      explanation: meaning of a raised flag.
      count: how many images the value counts; None for a value that counts none.
      images: how many were checked.

    Examples:
      >>> from deq_jax.evaluation import Flag
      >>> Flag.of("batch dependence", value=0.02, threshold=0.01, explanation="logits depend on batch-mates").raised
      True
      >>> flags = [Flag.of_count("no plateau", count, 400, threshold=0.005, explanation="") for count in (2, 4, 9)]
      >>> [(flag.raised, flag.is_unsure) for flag in flags]  # 4 of 400 are above 0.5 %, but may be so by chance
      [(False, False), (None, True), (True, False)]
    """

    name: str
    raised: bool | None
    value: float | None
    threshold: float
    explanation: str = field(repr=False)
    count: int | None = None
    images: int | None = None

    @property
    def is_unsure(self) -> bool:
        """Whether the value is above the threshold, but on so few images that chance may have done it."""
        return self.raised is None and self.value is not None

    @classmethod
    def of(cls, name: str, value: float | None, threshold: float, explanation: str) -> Flag:
        """Raised if the value exceeds the threshold."""
        return cls(name, None if value is None else bool(value > threshold), value, threshold, explanation)

    @classmethod
    def of_count(cls, name: str, count: int | None, images: int, threshold: float, explanation: str) -> Flag:
        """Raised if the share of the images exceeds the threshold beyond chance: exact binomial test at 5 %."""
        if count is None:
            return cls(name, None, None, threshold, explanation)
        share = count / images
        chance = special.bdtrc(count - 1, images, threshold) if count else 1.0
        raised = False if share <= threshold else True if chance <= SIGNIFICANT else None
        return cls(name, raised, share, threshold, explanation, count, images)


@dataclass(frozen=True, repr=False)
class WorstCase:
    """The results of all trials, and the worst case for each image.

    Attributes:
      config: the evaluation.
      y: [N], the true labels.
      clean: measurements of the clean images.
      zero_gradient: [N] bool, whether the deployed predictor's gradient at the clean image vanishes or is NaN. If it
        does for too many images: whether the gradients of all surrogates vanish.
      spectral_radius: [N], spectral radius of the trained cell at the image's equilibrium; NaN for an explicit network.
      probe, cost: answers of the deployed predictor, and its cost.
      attempts: results by the names of trials and diagnostics, in the order in which they ran.
      x_adv: [N, H, W, C], the worst image within the ball: misclassified images first, then the highest margin; the
        clean image if no trial did worse.
      worst: measurements of x_adv.
      early_state: accuracies of z_1 .. z_T under attack, on held-out images, if the predictor was chosen by them.
      radius_settled: [N] bool, whether the estimate of the spectral radius has settled.
      adjoint_residual: [N], adjoint residual of the trained classifier's gradient estimator; None where it has no
        adjoint state.
      red_flags: all checks of the evaluation, raised or not; none without trials.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import Cost, EvalConfig, Probe, Row, Rows, WorstCase
      >>> row = Row(np.array([3, 5]), np.array([-1.0, 0.5]), np.array([0.25, 0.5]), np.array([np.nan, np.nan]))
      >>> clean, nothing = Rows(None, None, row), np.zeros(2)
      >>> result = WorstCase(
      ...     config=EvalConfig(Linf(0.1), trials=()),
      ...     y=np.array([3, 4]),
      ...     clean=clean,
      ...     zero_gradient=np.array([False, False]),
      ...     spectral_radius=nothing,
      ...     probe=Probe(nothing, nothing, nothing, nothing),
      ...     cost=Cost(nothing, nothing),
      ...     attempts={},
      ...     x_adv=np.zeros((2, 8, 8, 1)),
      ...     worst=clean,
      ... )
      >>> result.clean_accuracy, result.robust_accuracy
      (0.5, None)
      >>> result
      WorstCase(2 images: clean 50.00 %, not attacked)
    """

    config: EvalConfig
    y: np.ndarray
    clean: Measured
    zero_gradient: np.ndarray
    spectral_radius: np.ndarray
    probe: Probe
    cost: Cost
    attempts: dict[str, Attempt]
    x_adv: np.ndarray
    worst: Measured
    early_state: list[float] | None = None
    radius_settled: np.ndarray | None = None
    adjoint_residual: np.ndarray | None = None
    red_flags: tuple[Flag, ...] = ()

    def __repr__(self) -> str:
        robust, raised = self.robust_accuracy, [flag.name for flag in self.red_flags if flag.raised]
        attacked = "not attacked" if robust is None else f"robust at most {100 * robust:.2f} %"
        flags = f"; red flags raised: {', '.join(raised)}" if raised else ""
        return f"WorstCase({len(self.y)} images: clean {100 * self.clean_accuracy:.2f} %, {attacked}{flags})"

    @property
    def clean_accuracy(self) -> float:
        """Share of the clean images that the deployed predictor classifies correctly."""
        return float(np.mean(self._clean().deployed))

    @property
    def robust_accuracy(self) -> float | None:
        """Accuracy on the worst cases; None without trials. Not to be trusted while a red flag is raised."""
        return float(np.mean(self.robust()["union"].deployed)) if self.attempts else None

    @property
    def outcomes(self) -> Outcomes:
        """Measurements of the clean images and of the worst case of each."""
        if not self.attempts:
            return Outcomes(self.y, self.clean, None, None)
        return Outcomes(self.y, self.clean, self.worst, self.x_adv)

    def broken(self, name: str) -> np.ndarray:
        """[N] bool: images that are classified correctly when clean, and that a trial broke."""
        broken: np.ndarray = self._clean().deployed & ~self._own(name).deployed
        return broken

    def robust(self) -> dict[str, Correct]:
        """Which images are classified correctly, bool: clean, after each trial and suite, and in the union.

        The union is over all images within the ball, including the images of the diagnostics. In an evaluation that
        skips broken images, trials and suites are cumulative.
        """
        rows = {"clean": self._clean()}
        union = self._clean()
        for i, trial in enumerate(self.config.trials):
            own = self._own(trial.name)
            union = both(union, own)
            rows[trial.name] = union if self.config.skip_broken else own
            ends = trial.suite is not None and trial.suite not in {later.suite for later in self.config.trials[i + 1 :]}
            if ends:
                suite = [rows[other.name] for other in self.config.trials if other.suite == trial.suite]
                rows[cast(str, trial.suite)] = reduce(both, suite)
        for trial in self.config.extra_trials:
            rows[trial.name] = self._own(trial.name)
            union = both(union, self._counted(trial.name))
        return rows | ({"union": union} if self.attempts else {})

    def accuracies(self) -> dict[str, dict[str, float]]:
        """Means of `robust`: name of clean, trial, suite or union -> name of the predictor -> accuracy."""
        return {
            row: {name: float(np.mean(values)) for name, values in named(correct).items()}
            for row, correct in self.robust().items()
        }

    def _clean(self) -> Correct:
        return is_correct(self.clean, self.y)

    def _own(self, name: str) -> Correct:
        return both(self._clean(), is_correct(self.attempts[name].measured, self.y))

    def _counted(self, name: str) -> Correct:
        """As `_own`, but images beyond the ball count as correct."""
        outside = ~self.attempts[name].inside
        counted: Correct = jax.tree.map(lambda own: own | outside.reshape(-1, *[1] * (own.ndim - 1)), self._own(name))
        return counted
