"""The parts of an evaluation: trials, each an attack with a source of gradients, and diagnostics."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, cast

from deq_jax.attacks.auto import AutoAttack
from deq_jax.attacks.noise import Noise
from deq_jax.attacks.oracles import Attack
from deq_jax.attacks.pgd import PGD, clean_start
from deq_jax.attacks.threats import Linf, Threat, check_threat
from deq_jax.core.errors import InputError, described, require, require_count, require_role
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.evaluation.recorded import read_plan
from deq_jax.evaluation.transfers import Transfer
from deq_jax.models.base import Classifier
from deq_jax.storage.trees import first_difference, to_tree
from deq_jax.surrogates.base import Direct, Surrogate, check_surrogate

RESERVED = ("clean", "union")  # names of other rows

LONGEST_NAME = 200  # characters of a trial's name, which is also the name of its folder

MOST_AT_ONCE = 2**20  # images: far more than a device holds

UNDEFENDED = "none"  # name of the classifier as trained

REFERENCE = "reference"  # name of the suite of images that were made against it


@dataclass(frozen=True)
class Trial:
    """An attack and its source of gradients. Success is measured on the deployed predictor.

    Attributes:
      name: name of its row and of its folder of results.
      attack: called with labels; or images to be transferred.
      surrogate: gives the gradients. Trials of one attack are compiled once if their surrogates differ only in numbers.
      suite: name of a further row, for the worst case over all trials that share it; None for none.
      from_worst: start from the worst image that the trials before have found, rather than where the attack itself
        would; for attacks that take a start. It also breaks the images that they broke, so it says nothing about its
        own gradients.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.evaluation import Trial
      >>> from deq_jax.surrogates import Intermediate
      >>> Trial("pgd-20.z_4", PGD(Linf(8 / 255), steps=20), Intermediate(4)).surrogate.state
      4
    """

    name: str
    attack: Attack | Transfer
    surrogate: Surrogate = field(default_factory=Direct)
    suite: str | None = None
    from_worst: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Transfer):
            require_role("Trial: attack", self.attack, ("__call__",), "an attack, such as PGD(Linf(8 / 255))")
        check_surrogate("Trial: surrogate", self.surrogate)
        can_start = not self.from_worst or _takes_start(self.attack)
        require(can_start, f"Trial: from_worst is for attacks that take a start, got {self.attack!r}")
        _check_name(self.name)


def _check_name(name: str) -> None:
    valid = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) and name not in RESERVED and len(name) <= LONGEST_NAME
    rule = f"at most {LONGEST_NAME} letters, digits and . _ + -, and is not one of {', '.join(RESERVED)}"
    require(bool(valid), f"Trial: a name consists of {rule}, got {name!r}")


def _takes_start(attack: Attack | Transfer) -> bool:
    return not isinstance(attack, Transfer | Noise) and "start" in inspect.signature(attack).parameters


@dataclass(frozen=True)
class Diagnostics:
    """Trials that give the accuracies for the red flags. They attack every image.

    Attributes:
      noise: random noise of the full radius.
      fgsm: one step of the full radius.
      pgd: a few steps.
      half, long: many steps, and half as many, from the same start.
      far: the same few steps with a multiple of the radius; its images do not count.

    Examples:
      >>> from dataclasses import fields
      >>> from deq_jax.evaluation import Diagnostics
      >>> [field.name for field in fields(Diagnostics)]
      ['noise', 'fgsm', 'pgd', 'half', 'long', 'far']
    """

    noise: Trial
    fgsm: Trial
    pgd: Trial
    half: Trial
    long: Trial
    far: Trial


def diagnostics(threat: Threat, steps: int = 1000, surrogate: Surrogate | None = None) -> Diagnostics:
    """Noise, FGSM, PGD-10, PGD with `steps` and half as many, and PGD-50 far beyond the radius; all in one norm.

    The far radius is 8 epsilon; in ℓ∞ at most 1, at which every image can become any other one. Each name begins with
    "check." and the role.

    Args:
      threat: norm and radius.
      steps: number of steps of the longest attack, at least 2.
      surrogate: gives the gradients of all of them; None for the predictor's own.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import diagnostics
      >>> checks = diagnostics(Linf(8 / 255), steps=100)
      >>> checks.long.name, checks.half.name
      ('check.long-pgd-100', 'check.half-pgd-50')
    """
    check_threat("diagnostics", threat)
    require_count("diagnostics: steps", steps, 2)
    far = 8.0 * threat.epsilon
    beyond = dataclasses.replace(cast(Any, threat), epsilon=min(far, 1.0) if isinstance(threat, Linf) else far)

    def pgd(threat: Threat, steps: int, relative_step: float) -> PGD:
        return PGD(threat, steps=steps, step_size=max(relative_step * threat.epsilon, 1e-6))

    source = Direct() if surrogate is None else surrogate
    fgsm = dataclasses.replace(pgd(threat, 1, 1.0), start=clean_start, best_of=False)
    return Diagnostics(
        noise=Trial("check.noise", Noise(threat)),
        fgsm=Trial("check.fgsm", fgsm, source),
        pgd=Trial("check.pgd-10", pgd(threat, 10, 0.25), source),
        half=Trial(f"check.half-pgd-{steps // 2}", pgd(threat, steps // 2, 0.1), source),
        long=Trial(f"check.long-pgd-{steps}", pgd(threat, steps, 0.1), source),
        far=Trial("check.far-pgd-50", pgd(beyond, 50, 0.1), source),
    )


@dataclass(frozen=True)
class EarlyState:
    """The predictor that classifies the raw state z_t, where t is chosen on held-out training images.

    Attributes:
      attack: the accuracy of z_t is highest under this attack.
      classifier: the DEQ that has these states, with the variables of the run; None for the classifier as trained.

    References: Yang et al. 2022, section 5.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.evaluation import EarlyState, EvalConfig, auto_attack_trials
      >>> ball = Linf(8 / 255)
      >>> early = EarlyState(PGD(ball, steps=10))
      >>> EvalConfig(ball, auto_attack_trials(ball), predictor=early, defence="early state").predictor.attack.steps
      10
    """

    attack: Attack
    classifier: Classifier | None = None


@dataclass(frozen=True)
class EvalConfig:
    """Everything that determines an evaluation of a trained classifier.

    An attack that declares a threat model must declare this one; `Diagnostics.far` may have another radius. If an
    attack declares none, only its images are checked, once they are made.

    Attributes:
      threat: the adversarial images that count lie within this ball.
      trials: their worst case for each image is the accuracy that is reported; in the order in which they run.
      diagnostics: trials for the red flags. Their images within the ball also count. None for no diagnostics.
      predictor: the deployed predictor, with the variables of the run; None for the classifier as trained.
      defence: name of the predictor in reports; "none" for the classifier as trained, and for no other.
      draws: number of draws of a random predictor; every answer to an attack is their mean (EOT), and accuracy is
        measured on one more draw. None: the predictor is asked without keys, and deterministic.
      budget: name of the budget that the trials have, see `default_trials`; None for a choice of your own.
      batch_size: images at a time, over all devices.
      seed: random seed of the attacks; random numbers of an image depend only on it and on the image's number.
      max_images: evaluates only the first ones of the split; None for all.
      skip_broken: a trial skips the images that are misclassified already, clean or by an earlier trial; its
        accuracy is then cumulative. Otherwise every trial attacks every image and has an accuracy of its own, as
        suites of transferred images need it.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import EvalConfig, auto_attack_trials, diagnostics
      >>> ball = Linf(8 / 255)
      >>> config = EvalConfig(ball, auto_attack_trials(ball), diagnostics(ball), max_images=1000)
      >>> len(config.trials), len(config.all_trials)
      (4, 10)
    """

    threat: Threat
    trials: tuple[Trial, ...]
    diagnostics: Diagnostics | None = None
    predictor: Classifier | EarlyState | None = None
    defence: str = UNDEFENDED
    draws: int | None = None
    budget: str | None = None
    batch_size: int = 128
    seed: int = 0
    max_images: int | None = None
    skip_broken: bool = True

    def __post_init__(self) -> None:
        check_threat("EvalConfig", self.threat)
        check_are_trials("EvalConfig", self.trials)
        require_count("EvalConfig: batch_size", self.batch_size)
        fits = self.batch_size <= MOST_AT_ONCE
        require(fits, f"EvalConfig: batch_size must be at most {MOST_AT_ONCE}, got {self.batch_size}")
        require_count("EvalConfig: seed", self.seed, 0)
        for name in ("draws", "max_images"):
            require_count(f"EvalConfig: {name}", getattr(self, name), optional=True)
        named = (self.predictor is None) == (self.defence == UNDEFENDED)
        rule = f"a name for the predictor if there is one, and {UNDEFENDED!r} otherwise"
        require(named, f"EvalConfig: defence must be {rule}, got {self.defence!r} for {described(self.predictor)}")
        _check_names(self)
        suites = {trial.suite for trial in self.trials if trial.suite and isinstance(trial.attack, Transfer)}
        whole = not (self.skip_broken and suites)
        wanted = "expected skip_broken=False, without which its row would count images that other trials broke"
        require(whole, f"EvalConfig: suite {', '.join(sorted(suites))} of transferred images: {wanted}")
        _check_threats(self)

    @property
    def extra_trials(self) -> tuple[Trial, ...]:
        """Trials of the diagnostics."""
        return tuple(_roles(self.diagnostics).values())

    @property
    def all_trials(self) -> tuple[Trial, ...]:
        """All trials, in the order in which they run."""
        return (*self.trials, *self.extra_trials)


def check_are_trials(where: str, trials: Any) -> None:
    """Refuses anything but a tuple or list of `Trial`; `where` begins the message."""
    fits = isinstance(trials, tuple | list) and all(isinstance(trial, Trial) for trial in trials)
    expected = "expected a tuple of Trial, such as (Trial('pgd', PGD(threat)),)"
    require(fits, f"{where}: trials: {expected}, got {described(trials)}")


def _check_names(config: EvalConfig) -> None:
    """Refuses names that occur twice, and names their owners."""
    owners: dict[str, list[str]] = {name: ["a row of every evaluation"] for name in RESERVED}
    for i, trial in enumerate(config.trials):
        owners.setdefault(trial.name, []).append(f"trials[{i}]")
    for suite in dict.fromkeys(trial.suite for trial in config.trials if trial.suite):
        owners.setdefault(suite, []).append("a suite")
    for role, trial in _roles(config.diagnostics).items():
        owners.setdefault(trial.name, []).append(f"diagnostics.{role}")
    twice = [f"{name} ({' and '.join(parts)})" for name, parts in sorted(owners.items()) if len(parts) > 1]
    require(not twice, f"EvalConfig: trials and suites need names of their own, found twice: {', '.join(twice)}")


def _check_threats(config: EvalConfig) -> None:
    """Refuses trials that declare another threat model than the evaluation's."""
    roles, threat = _roles(config.diagnostics), config.threat
    far = roles.pop("far", None)
    for trial in (*config.trials, *roles.values()):
        own = _declared_threat(trial)
        same = own is None or own == threat
        require(same, f"EvalConfig: trial {trial.name} attacks within {own}, but the threat is {threat}")
    own = None if far is None else _declared_threat(far)
    same = own is None or type(own) is type(threat)
    require(same, f"EvalConfig: diagnostics.far attacks within {own}, expected the norm of {threat}")


def _declared_threat(trial: Trial) -> Threat | None:
    try:
        return getattr(trial.attack, "threat", None)
    except InputError as error:
        raise InputError(f"EvalConfig: trial {trial.name}: {error}") from None


def _roles(diagnostics: Diagnostics | None) -> dict[str, Trial]:
    """The trials of diagnostics by the names of their fields."""
    return (
        {} if diagnostics is None else {f.name: getattr(diagnostics, f.name) for f in dataclasses.fields(diagnostics)}
    )


def with_transfers(config: EvalConfig, suites: Iterable[tuple[str, Path]]) -> EvalConfig:
    """The evaluation that also measures the final images of other evaluations' trials, as suites.

    Images beyond the radius and trials that found nothing left to attack are excepted. Every trial then attacks every
    image, so that each suite counts all images that it breaks. Trials that start from the worst image come last.

    Args:
      config: the evaluation.
      suites: pairs of a name and the folder of another evaluation; the name is "reference" if its images were made
        against the undefended predictor of the same run.

    Raises:
      InputError: without a finished evaluation, or for one of another threat model.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import EvalConfig, auto_attack_trials, with_transfers
      >>> config = EvalConfig(Linf(0.1), auto_attack_trials(Linf(0.1)))
      >>> with_transfers(config, suites=[]) == config
      True
    """
    transfers = [trial for suite, folder in suites for trial in _transferred(suite, folder, config.threat)]
    first, last = ([t for t in config.trials if t.from_worst == whether] for whether in (False, True))
    skip = config.skip_broken and not transfers
    return dataclasses.replace(config, trials=(*first, *transfers, *last), skip_broken=skip)


def _transferred(suite: str, folder: Path, threat: Threat) -> list[Trial]:
    own = EvaluationFolder(folder)
    finished = own.record.exists()
    require(finished, f"{folder}: expected the folder of a finished evaluation, found no {own.record.name}")
    plan = read_plan(own)
    difference = first_difference(plan.threat, to_tree(threat))
    require(difference is None, f"{folder}: its images are of another threat model: {difference}, expected the same")
    trials = [*plan.trials, *(trial for role, trial in plan.checks.items() if role != "far")]
    for trial in trials:
        _check_name(trial.name)
    folders = {trial.name: own.trial(trial.name) for trial in trials}
    return [
        Trial(f"{suite}.{name}", Transfer(str(path)), suite=suite) for name, path in folders.items() if path.is_dir()
    ]


def auto_attack_trials(threat: Threat) -> tuple[Trial, ...]:
    """The four attacks of the standard AutoAttack as trials, and their worst case as a suite.

    Args:
      threat: norm and radius.

    References: Croce & Hein 2020a.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import auto_attack_trials
      >>> [trial.name for trial in auto_attack_trials(Linf(8 / 255))]
      ['apgd-ce', 'apgd-t', 'fab-t', 'square']
    """
    names = ("apgd-ce", "apgd-t", "fab-t", "square")
    attacks = AutoAttack.standard(threat).attacks
    return tuple(Trial(name, attack, suite="AutoAttack") for name, attack in zip(names, attacks, strict=True))


def with_surrogates(name: str, attack: Attack, surrogates: Sequence[Surrogate]) -> tuple[Trial, ...]:
    """One trial per surrogate, named by its class and parameters, such as ``pgd-10.Intermediate-3-5-0.5``.

    Args:
      name: first part of the trials' names.
      attack: the same for all of them.
      surrogates: each gives the gradients of one trial.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.evaluation import with_surrogates
      >>> from deq_jax.surrogates import Intermediate, ThroughSolver
      >>> [trial.name for trial in with_surrogates("pgd", PGD(Linf(0.1)), [Intermediate(3), ThroughSolver()])]
      ['pgd.Intermediate-3-5-0.5', 'pgd.ThroughSolver']
    """
    return tuple(Trial(f"{name}.{_label(surrogate)}", attack, surrogate) for surrogate in surrogates)


def _label(part: Any) -> str:
    """Names and numbers of an object, in the characters of a trial's name; numbers that differ have different texts."""
    if dataclasses.is_dataclass(part):
        return "-".join([type(part).__name__, *(_label(getattr(part, f.name)) for f in dataclasses.fields(part))])
    if isinstance(part, tuple):
        return "-".join(map(_label, part))
    if isinstance(part, FunctionType | type):
        return part.__name__
    short = f"{part:g}" if isinstance(part, int | float) else str(part)
    exact = not isinstance(part, int | float) or float(short) == part
    return re.sub(r"[^A-Za-z0-9._+-]", "", short if exact else repr(part))
