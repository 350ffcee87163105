"""Where an evaluation is, for whoever waits for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from deq_jax.storage.briefs import duration


class Moment(NamedTuple):
    """Progress of a running evaluation.

    Attributes:
      name: name of the current part, such as a trial.
      share: share of the whole evaluation that is done.
      line: a sentence on it.
      milestone: whether a part begins or ends, rather than continues.

    Examples:
      >>> from deq_jax.evaluation import Moment
      >>> Moment("apgd-ce", share=0.25, line="[1/4] apgd-ce: nothing left to attack", milestone=True).share
      0.25
    """

    name: str
    share: float
    line: str
    milestone: bool


@dataclass(frozen=True)
class Watch:
    """How far a trial is.

    Attributes:
      name: name of the trial.
      number, trials: it is the number-th of so many, from 1.
      images: number of images that it attacks.
      accuracy: accuracy of the deployed predictor under it, if the images that it has not attacked yet withstand.
      queries: gradients that it asks for, at most, per image; None if that is not known.
      done: number of images that it has attacked.
      seconds: time of each batch, compilation included.
    """

    name: str
    number: int
    trials: int
    images: int
    accuracy: float
    queries: int | None = None
    done: int = 0
    seconds: tuple[float, ...] = ()

    def after(self, images: int, accuracy: float, seconds: float) -> Watch:
        """After a further batch of so many images."""
        return replace(self, done=self.done + images, accuracy=accuracy, seconds=(*self.seconds, seconds))

    def begins(self) -> Moment:
        """Before the first batch that is computed."""
        return self._moment("compiling, and the first batch", True)

    def waits(self) -> Moment:
        """Before other processes have computed the rest."""
        return self._moment("waiting for other processes", False)

    def now(self) -> Moment:
        """After a batch, or where there is none."""
        if self.images == 0:
            return self._moment("nothing left to attack", True)
        time = duration(sum(self.seconds))
        if self.done < self.images:
            told = f"at most {100 * self.accuracy:.2f} % correct, {time}, about {duration(self._left())} left"
            return self._moment(told, False)
        asked = f", at most {self.queries} gradients per image" if self.queries else ""
        return self._moment(f"{100 * self.accuracy:.2f} % correct, {time}{asked}", True)

    def _moment(self, told: str, milestone: bool) -> Moment:
        part = self.done / self.images if self.images else 1.0
        images = "" if self.images == 0 else f"{self.done} of {self.images} images; "
        line = f"[{self.number}/{self.trials}] {self.name}: {images}{told}"
        return Moment(self.name, (self.number - 1 + part) / self.trials, line, milestone)

    def _left(self) -> float:
        """Seconds, as the batches before have taken, but for the first one, which was compiled."""
        later = self.seconds[1:] or self.seconds
        batches = (self.images - self.done) * len(self.seconds) / self.done
        return batches * sum(later) / len(later)
