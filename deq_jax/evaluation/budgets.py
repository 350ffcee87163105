"""The default trials: the strongest ones that a budget allows, for each kind of predictor."""

from __future__ import annotations

from dataclasses import dataclass

from deq_jax.attacks.apgd import APGD
from deq_jax.attacks.pgd import PGD
from deq_jax.attacks.square import Square
from deq_jax.attacks.targeted import Targeted
from deq_jax.attacks.threats import Threat
from deq_jax.core.errors import require
from deq_jax.core.losses import targeted_dlr
from deq_jax.defences.entropy import EntropyReduced
from deq_jax.evaluation.plan import Trial
from deq_jax.models.base import Classifier
from deq_jax.models.classifiers import Equilibrium
from deq_jax.surrogates.adaptive import BPDASolver, EndToEnd, OnBase
from deq_jax.surrogates.base import Direct, Surrogate
from deq_jax.surrogates.dynamics import ThroughSolver


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


_SIZES = {"quick": _Sizes(30, 3, 20, 200, 20), "standard": _Sizes(100, 9, 50, 2000, 50)}

BUDGETS = tuple(_SIZES)


def default_trials(predictor: Classifier, threat: Threat, budget: str = "quick") -> tuple[Trial, ...]:
    """The attacks that suit a predictor, each from the gradients that find most on it.

    Gradients follow the actual computation: through the solver's steps of a DEQ, through and around the updates of
    input entropy reduction, and plainly through any other classifier. Untargeted and targeted APGD come first, then
    Square, which asks for no gradient, then PGD from the worst image of all of them.

    Args:
      predictor: the deployed predictor.
      threat: norm and radius of the attacks.
      budget: "quick" (30 gradients per image untargeted, 3 x 20 targeted, 20 from the worst image, for each source of
        gradients, and 200 queries) or "standard" (100, 9 x 50, 50 and 2,000). Images that are broken are not attacked
        again, so most cost less.

    Raises:
      InputError: the budget is unknown.

    References: Croce & Hein 2020a (APGD, APGD-T), Andriushchenko et al. 2020 (Square).

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import default_trials
      >>> from deq_jax.models import small_cnn
      >>> [trial.name for trial in default_trials(small_cnn(10, 12), Linf(0.1))]
      ['apgd-ce', 'apgd-t', 'square', 'pgd-20.from-worst']
    """
    require(budget in _SIZES, f"budget: expected {' or '.join(_SIZES)}, got {budget!r}")
    sizes, sources = _SIZES[budget], _sources(predictor)
    apgd = APGD(threat, steps=sizes.steps)
    targeted = Targeted(APGD(threat, steps=sizes.target_steps, loss=targeted_dlr), classes=sizes.targets)
    last = PGD(threat, steps=sizes.last_steps, step_size=max(threat.epsilon / 10, 1e-6))
    return (
        *(Trial(f"apgd-ce{name}", apgd, source) for name, source in sources.items()),
        *(Trial(f"apgd-t{name}", targeted, source) for name, source in sources.items()),
        Trial("square", Square(threat, sizes.queries)),
        *(
            Trial(f"pgd-{last.steps}.from-worst{name}", last, source, from_worst=True)
            for name, source in sources.items()
        ),
    )


def _sources(predictor: Classifier) -> dict[str, Surrogate]:
    """Whose gradients attack a predictor, by the end of a trial's name."""
    if isinstance(predictor, EntropyReduced):
        through: dict[str, Surrogate] = {".bpda-solver": BPDASolver(), ".end-to-end": EndToEnd()}
        return {**through, ".base-through-solver": OnBase(ThroughSolver())}
    if isinstance(predictor, Equilibrium) and predictor.dynamics.solver is not None:
        return {".through-solver": ThroughSolver()}
    return {"": Direct()}
