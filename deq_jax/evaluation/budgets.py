"""The default trials: the strongest ones that a budget allows, for each kind of predictor."""

from __future__ import annotations

from dataclasses import dataclass

from deq_jax.attacks.apgd import APGD
from deq_jax.attacks.pgd import PGD
from deq_jax.attacks.square import Square
from deq_jax.attacks.targeted import Targeted
from deq_jax.attacks.threats import Threat
from deq_jax.core.adjoints import Implicit
from deq_jax.core.errors import require
from deq_jax.core.losses import targeted_dlr
from deq_jax.core.solvers import Broyden
from deq_jax.defences.entropy import EntropyReduced
from deq_jax.evaluation.plan import Trial, auto_attack_trials, with_surrogates
from deq_jax.models.base import Classifier, check_classifier
from deq_jax.models.classifiers import Equilibrium, require_deq
from deq_jax.surrogates.adaptive import BPDAHead, EndToEnd, OnBase, PathAverage
from deq_jax.surrogates.base import Direct, Surrogate, WithGradient
from deq_jax.surrogates.dynamics import Intermediate, MeanOverStates, SimultaneousAdjoint, ThroughSolver


@dataclass(frozen=True)
class _Sizes:
    """Steps and queries per image of a budget.

    Attributes:
      steps: steps of APGD on the cross-entropy.
      targets: number of wrong classes that APGD aims at.
      target_steps: steps of APGD for each of them.
      queries: queries of Square.
      last_steps: steps of PGD from the worst image so far.
    """

    steps: int
    targets: int
    target_steps: int
    queries: int
    last_steps: int


_SIZES = {
    "quick": _Sizes(30, 3, 20, 200, 20),
    "standard": _Sizes(100, 9, 50, 2000, 50),
    "full": _Sizes(100, 9, 100, 5000, 100),
}

BUDGETS = tuple(_SIZES)


def default_trials(predictor: Classifier, threat: Threat, budget: str = "quick") -> tuple[Trial, ...]:
    """The attacks that suit a predictor, each with the gradients that break most of its images.

    Gradients follow the actual computation: through the solver's steps of a DEQ, and plainly through any other
    classifier. Input entropy reduction is attacked at all its states at once, through its updates and around them.
    Untargeted and targeted APGD come first, then Square, which asks for no gradient, then PGD from the worst image of
    all of them.

    Args:
      predictor: the deployed predictor, a classifier without its variables.
      threat: norm and radius of the attacks.
      budget: "quick": for each source of gradients 30 gradients per image untargeted, 3 x 20 targeted and 20 from the
        worst image; 200 queries of Square. "standard": 100, 9 x 50, 50 and 2,000. "full": 100, 9 x 100, 100 and 5,000;
        also FAB-T, and for a DEQ `white_box_trials`. Broken images are not attacked again, so most cost less.

    Raises:
      InputError: the budget is unknown, or the predictor is not a classifier.

    References: Croce & Hein 2020a (APGD, APGD-T), Andriushchenko et al. 2020 (Square).

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import default_trials
      >>> from deq_jax.models import small_cnn
      >>> [trial.name for trial in default_trials(small_cnn(10, 12), Linf(0.1))]
      ['apgd-ce', 'apgd-t', 'square', 'pgd-20.from-worst']
    """
    check_classifier("default_trials: predictor", predictor)
    require(budget in _SIZES, f"budget: expected quick, standard or full, got {budget!r}")
    sizes, sources = _SIZES[budget], _sources(predictor)
    apgd = APGD(threat, steps=sizes.steps)
    targeted = Targeted(APGD(threat, steps=sizes.target_steps, loss=targeted_dlr), classes=sizes.targets)
    last = PGD(threat, steps=sizes.last_steps, step_size=max(threat.epsilon / 10, 1e-6))
    first = (
        *(Trial(f"apgd-ce{name}", apgd, source) for name, source in sources.items()),
        *(Trial(f"apgd-t{name}", targeted, source) for name, source in sources.items()),
        Trial("square", Square(threat, sizes.queries)),
    )
    further = _further_trials(predictor, threat) if budget == "full" else ()
    from_worst = (
        Trial(f"pgd-{last.steps}.from-worst{name}", last, source, from_worst=True) for name, source in sources.items()
    )
    return (*first, *further, *from_worst)


def _further_trials(predictor: Classifier, threat: Threat) -> tuple[Trial, ...]:
    """The trials that the full budget adds."""
    minimal = tuple(trial for trial in auto_attack_trials(threat) if trial.name == "fab-t")
    if not isinstance(predictor, Equilibrium) or predictor.dynamics.solver is None:
        return minimal
    return (*minimal, *white_box_trials(predictor, threat))


def white_box_trials(classifier: Equilibrium, threat: Threat) -> tuple[Trial, ...]:
    """PGD-10 by all gradients that know about the dynamics of a DEQ.

    The gradients of every intermediate state, unrolled for 1, 5 and 9 steps, plain or damped; of the mean over the
    states; of the simultaneous adjoint after each step, which needs Broyden's method; and the exact one of the
    equilibrium.

    Args:
      classifier: the deployed predictor.
      threat: norm and radius.

    Raises:
      InputError: the classifier has no solver.

    References: Yang et al. 2022, section 4.

    Examples:
      >>> import deq_jax as dj
      >>> model = dj.models.small_deq(num_classes=10, channels=4, dynamics=dj.Dynamics(dj.Anderson(3)))
      >>> trials = dj.evaluation.white_box_trials(model, dj.attacks.Linf(0.1))
      >>> len(trials), trials[0].name, trials[-1].name  # 3 states x 6, the mean, the exact one
      (20, 'pgd-10.Intermediate-1-1-0.5', 'pgd-10.exact')
    """
    _, solver = require_deq(classifier, "white_box_trials")
    settings = [(k, damping) for k in (1, 5, 9) for damping in (0.5, 1.0)]
    states = range(1, solver.steps + 1)
    intermediate = [Intermediate(state, k, damping) for k, damping in settings for state in states]
    adjoint = [SimultaneousAdjoint(step) for step in states] if isinstance(solver, Broyden) else []
    pgd = PGD(threat, steps=10)
    return (
        *with_surrogates("pgd-10", pgd, [*intermediate, MeanOverStates(), *adjoint]),
        Trial("pgd-10.exact", pgd, WithGradient(Implicit(Broyden(30)))),
    )


def _sources(predictor: Classifier) -> dict[str, Surrogate]:
    """Whose gradients attack a predictor, by the end of a trial's name."""
    if isinstance(predictor, EntropyReduced):
        through: dict[str, Surrogate] = {".path": PathAverage(BPDAHead()), ".end-to-end": EndToEnd()}
        return {**through, ".base-through-solver": OnBase(ThroughSolver())}
    if isinstance(predictor, Equilibrium) and predictor.dynamics.solver is not None:
        return {".through-solver": ThroughSolver()}
    return {"": Direct()}
