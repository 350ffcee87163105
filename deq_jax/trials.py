"""What an evaluation consists of: trials, each an attack and whose gradient it takes, and what they are for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from deq_jax.attacks import APGD, FAB, PGD, SPSA, AutoAttack, Linf, Square, Targeted, clean_start
from deq_jax.attacks.threat import Threat
from deq_jax.config import TrainConfig, first_difference, to_tree
from deq_jax.records import read_json
from deq_jax.surrogates import Direct, Surrogate
from deq_jax.transfers import Transfer
from deq_jax.types import Array, Attack, Classifier, InputError, Keys, Oracle, require

RESERVED = ("clean", "union")  # names of other rows
UNDEFENDED = "none"  # name of the classifier as trained
REFERENCE = "reference"  # name of the suite of images that were made against it


@dataclass(frozen=True)
class Noise:
    """A random perturbation of length epsilon: what any attack must beat.

    Attributes:
      threat: norm and radius.
    """

    threat: Threat

    def __call__(self, oracle: Oracle, x: Array, target: Array, key: Array | Keys) -> Array:
        """Perturbed images; see `APGD.__call__`. The oracle is not asked."""
        keys = Keys.of(key, x.shape[0])
        return self.threat.project(x + self.threat.epsilon * self.threat.random_direction(keys, x), x)


@dataclass(frozen=True)
class Trial:
    """An attack, and whose gradient it takes. Its success is judged on the deployed predictor.

    Attributes:
      name: of its row and of its folder of results.
      attack: called with labels as its target; or images to be transferred.
      surrogate: gives the gradients. Trials of one attack whose surrogates differ in numbers only are compiled once.
      suite: name of a further row, for the worst case over all trials that share it; None for none.
      from_worst: start from the worst image that the trials before have found, rather than where the attack itself
        would; for `PGD`. It breaks what they broke, and so says nothing of its own gradients.
    """

    name: str
    attack: Attack | Transfer
    surrogate: Surrogate = field(default_factory=Direct)
    suite: str | None = None
    from_worst: bool = False

    def __post_init__(self):
        can_start = isinstance(self.attack, PGD) or not self.from_worst
        require(can_start, f"Trial: from_worst is for PGD, got {self.attack!r}")
        valid = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", self.name) and self.name not in RESERVED
        rule = f"letters, digits and . _ + -, and not one of {', '.join(RESERVED)}"
        require(bool(valid), f"Trial: a name consists of {rule}, got {self.name!r}")


@dataclass(frozen=True)
class Diagnostics:
    """Trials from whose accuracies the red flags are computed. They attack every image.

    Attributes:
      noise: random noise of the full radius.
      fgsm: one step of the full radius.
      pgd: a few steps.
      half, long: many steps, and half as many, from the same start.
      far: the same few steps with a multiple of the radius; its images do not count.
    """

    noise: Trial
    fgsm: Trial
    pgd: Trial
    half: Trial
    long: Trial
    far: Trial


def diagnostics(threat: Linf, steps: int = 1000) -> Diagnostics:
    """Noise, FGSM, PGD-10, PGD with `steps` and half as many, and PGD-50 at 8 times the radius."""

    def pgd(steps: int, relative_step: float, radius: float = 1.0) -> PGD:
        epsilon = radius * threat.epsilon
        return PGD(Linf(epsilon), steps=steps, step_size=max(relative_step * epsilon, 1e-6))

    return Diagnostics(
        noise=Trial("noise", Noise(threat)),
        fgsm=Trial("fgsm", dataclasses.replace(pgd(1, 1.0), start=clean_start, best_of=False)),
        pgd=Trial("pgd-10", pgd(10, 0.25)),
        half=Trial(f"pgd-{steps // 2}", pgd(steps // 2, 0.1)),
        long=Trial(f"pgd-{steps}", pgd(steps, 0.1)),
        far=Trial("pgd-50-at-8-epsilon", pgd(50, 0.1, radius=8.0)),
    )


@dataclass(frozen=True)
class EarlyState:
    """The predictor that classifies the raw state z_t, where t is chosen on held-out training images.

    Attributes:
      attack: under which the accuracy of z_t is highest.
      classifier: whose states these are, with the variables of the training; None for the classifier as trained.

    References: Yang et al. 2022, section 5.
    """

    attack: Attack
    classifier: Classifier | None = None


@dataclass(frozen=True)
class EvalConfig:
    """Everything that determines an evaluation of a trained classifier.

    Attributes:
      threat: the adversarial images that count lie within this ball.
      trials: their worst case for each image is the accuracy that is reported; in the order in which they run.
      diagnostics: for the red flags. What they find within the ball counts, too. None for none.
      predictor: what is deployed and judged, with the variables of the training; None for the classifier as trained.
      defence: what the predictor is called in reports; "none" for the classifier as trained, and for no other.
      draws: of a random predictor, over which every answer to an attack is the mean (EOT); it is itself judged by one
        more draw. None: the predictor is asked without keys, and deterministic.
      batch_size: images at a time, over all devices.
      seed: of the attacks' randomness; each image draws from it and from its number alone.
      max_images: evaluates only the first ones of the split; None for all.
      skip_broken: a trial leaves alone the images that are misclassified already, clean or by an earlier trial; its
        accuracy is then cumulative. Otherwise every trial attacks every image and has an accuracy of its own, as
        suites of transferred images need it.
    """

    threat: Threat
    trials: tuple[Trial, ...]
    diagnostics: Diagnostics | None = None
    predictor: Classifier | EarlyState | None = None
    defence: str = UNDEFENDED
    draws: int | None = None
    batch_size: int = 128
    seed: int = 0
    max_images: int | None = None
    skip_broken: bool = True

    def __post_init__(self):
        require(self.batch_size >= 1, f"EvalConfig: batch_size must be positive, got {self.batch_size!r}")
        require(self.seed >= 0, f"EvalConfig: seed must be >= 0, got {self.seed!r}")
        counted = self.draws is None or self.draws >= 1
        require(counted, f"EvalConfig: draws must be positive or None, got {self.draws!r}")
        few = self.max_images is None or self.max_images >= 1
        require(few, f"EvalConfig: max_images must be positive or None, got {self.max_images!r}")
        named = (self.predictor is None) == (self.defence == UNDEFENDED)
        rule = f"a name for what is deployed if that is a predictor of its own, and {UNDEFENDED!r} otherwise"
        require(named, f"EvalConfig: defence must be {rule}, got {self.defence!r} for {self.predictor!r}")
        names = [*RESERVED, *(trial.name for trial in (*self.trials, *self.extra_trials))]
        names += sorted({trial.suite for trial in self.trials if trial.suite})
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"EvalConfig: trials and suites need names of their own, found twice: {', '.join(twice)}")
        suites = {trial.suite for trial in self.trials if trial.suite and isinstance(trial.attack, Transfer)}
        whole = not (self.skip_broken and suites)
        wanted = "expected skip_broken=False, without which its row would count what other trials broke"
        require(whole, f"EvalConfig: suite {', '.join(sorted(suites))} of transferred images: {wanted}")
        for trial in self.trials:
            radius = radius_of(trial.attack)
            same = radius is None or radius == self.threat.epsilon
            require(
                same, f"EvalConfig: trial {trial.name} attacks with radius {radius}, but the threat is {self.threat}"
            )

    @property
    def extra_trials(self) -> tuple[Trial, ...]:
        """Those of the diagnostics."""
        if self.diagnostics is None:
            return ()
        return tuple(getattr(self.diagnostics, f.name) for f in dataclasses.fields(self.diagnostics))


def with_transfers(config: EvalConfig, suites: Iterable[tuple[str, Path]]) -> EvalConfig:
    """The evaluation that also judges the final images of all trials of other evaluations, as suites.

    Images beyond the radius and trials that found nothing left to attack are excepted. Every trial then attacks every
    image, so that the suites count what they break themselves. Trials that start from the worst image come last.

    Args:
      config: of the evaluation.
      suites: of each the name, "reference" if its images were made against the undefended predictor of the same
        training, and the folder of the other evaluation.

    Raises:
      InputError: there is no finished evaluation, or it is of another threat model.
    """
    transfers = [trial for suite, folder in suites for trial in _transferred(suite, folder, config.threat)]
    first, last = ([t for t in config.trials if t.from_worst == whether] for whether in (False, True))
    skip = config.skip_broken and not transfers
    return dataclasses.replace(config, trials=(*first, *transfers, *last), skip_broken=skip)


def _transferred(suite: str, folder: Path, threat: Threat) -> list[Trial]:
    finished = (folder / "evaluation.json").exists()
    require(finished, f"{folder}: expected the folder of a finished evaluation, found no evaluation.json")
    config = read_json(folder / "manifest.json")["config"]
    difference = first_difference(config["threat"], to_tree(threat))
    require(difference is None, f"{folder}: its images are of another threat model: {difference}, expected the same")
    extra = config["diagnostics"] or {}
    trials = [*config["trials"], *(trial for name, trial in extra.items() if name not in ("class", "far"))]
    folders = {trial["name"]: folder / "trials" / trial["name"] for trial in trials}
    return [
        Trial(f"{suite}.{name}", Transfer(str(path)), suite=suite) for name, path in folders.items() if path.is_dir()
    ]


def auto_attack(threat: Threat) -> tuple[Trial, ...]:
    """The four attacks of the standard AutoAttack as trials, and their worst case as a suite."""
    names = ("apgd-ce", "apgd-t", "fab-t", "square")
    attacks = AutoAttack.standard(threat).attacks
    return tuple(Trial(name, attack, suite="AutoAttack") for name, attack in zip(names, attacks, strict=True))


def with_surrogates(name: str, attack: Attack, surrogates: Sequence[Surrogate]) -> tuple[Trial, ...]:
    """One trial per surrogate, named by its class and numbers, such as ``pgd-10.Intermediate-3-5-0.5``."""

    def label(surrogate: Surrogate) -> str:
        numbers = [getattr(surrogate, f.name) for f in dataclasses.fields(cast(Any, surrogate))]
        return "-".join([f"{name}.{type(surrogate).__name__}", *(f"{number:g}" for number in numbers)])

    return tuple(Trial(label(surrogate), attack, surrogate) for surrogate in surrogates)


def threat_of(train: TrainConfig) -> Linf:
    """The ball that a training validates with.

    Raises:
      InputError: its validation attack is no PGD.
    """
    attack = train.validation_attack
    if not isinstance(attack, PGD):
        raise InputError("the training's validation_attack is no PGD and gives no radius")
    return cast(Linf, attack.threat)


def radius_of(attack: Attack | Transfer) -> float | None:
    """The radius of an attack; None if that is not known."""
    match attack:
        case Targeted():
            return radius_of(attack.attack)
        case PGD() | APGD() | FAB() | Square() | SPSA() | Noise():
            return attack.threat.epsilon
        case _:
            return None


def gradient_queries(attack: Attack | Transfer) -> int | None:
    """How many gradients an attack asks for, at most, per image; None if that is not known."""
    match attack:
        case Transfer() | Noise() | Square() | SPSA():
            return 0
        case PGD():
            return attack.steps * attack.restarts
        case APGD():
            return (attack.steps + 1) * attack.restarts
        case Targeted():
            queries = gradient_queries(attack.attack)
            return None if queries is None else queries * attack.classes
        case _:
            return None
