"""White-box attacks that know about the dynamics of a DEQ [Yang et al. 2022], and AutoAttack.

    python -m deq_jax.evaluate --workdir runs/digits_pgd_at --config configs/eval_white_box.py

PGD-10 takes its gradients from every intermediate state (unrolled for K steps of each damping), from the mean over
the states, from the simultaneous adjoint, and from the exact gradient. APGD also differentiates the solver's own
steps. That finds more than any gradient of the equilibrium if eight steps do not reach it. Every trial attacks every
image, so each row of the table has an accuracy of its own. The last trial starts from the strongest image of all
others.
"""

from deq_jax import Equilibrium, InputError, TrainConfig
from deq_jax.attacks import APGD, PGD, Targeted, Threat
from deq_jax.core import targeted_dlr
from deq_jax.evaluation import EvalConfig, Trial, auto_attack_trials, diagnostics, white_box_trials
from deq_jax.surrogates import ThroughSolver
from deq_jax.training import threat_of


def from_worst(threat: Threat) -> PGD:
    """PGD for images that other attacks have found."""
    return PGD(threat, steps=50, step_size=max(threat.epsilon / 10, 1e-6))


def get_config(train: TrainConfig) -> EvalConfig:
    classifier = train.classifier
    if not isinstance(classifier, Equilibrium) or classifier.dynamics.solver is None:
        raise InputError("these attacks are for a DEQ with a solver; see configs/eval_auto_attack.py")
    threat = threat_of(train)
    return EvalConfig(
        threat,
        trials=(
            *white_box_trials(classifier, threat),
            Trial("apgd-ce.through-solver", APGD(threat), ThroughSolver()),
            Trial("apgd-t.through-solver", Targeted(APGD(threat, 50, loss=targeted_dlr)), ThroughSolver()),
            *auto_attack_trials(threat),
            Trial("pgd-50.from-worst", from_worst(threat), ThroughSolver(), from_worst=True),
        ),
        diagnostics=diagnostics(threat),
        batch_size=train.batch_size,
        skip_broken=False,
    )
