"""Input entropy reduction [Yang et al. 2023], under attacks that know of it.

    python -m deq_jax.evaluate --workdir RUN --config configs/eval_white_box.py
    python -m deq_jax.evaluate --workdir RUN --config configs/eval_entropy_reduced.py \\
        --transfer reference=RUN/evaluation/test-eval_white_box

The first evaluation attacks the undefended predictor. The second tests its final images on the defended predictor: this
is the papers' protocol, row "reference". It then adds the attacks below: through the defence, around it, without
gradients, and from the strongest image of all of these. The number to quote is the worst case over all, row "union".
"""

from dataclasses import replace

from configs.eval_white_box import from_worst
from deq_jax import EntropyReduced, Equilibrium, InputError, TrainConfig
from deq_jax.attacks import APGD, PGD, SPSA, Attack, Linf, Square, Targeted, Threat
from deq_jax.core import LowEntropy, targeted_dlr
from deq_jax.evaluation import EvalConfig, Trial, diagnostics
from deq_jax.surrogates import (
    BPDAHead,
    BPDAIdentity,
    BPDASolver,
    Direct,
    EndToEnd,
    Intermediate,
    OnBase,
    PathAverage,
    Surrogate,
    ThroughSolver,
)
from deq_jax.training import threat_of


def defence(train: TrainConfig) -> EntropyReduced:
    """The papers' settings: the ball of the attacks, and updates of a quarter of its radius."""
    base, threat = train.classifier, threat_of(train)
    if not isinstance(base, Equilibrium) or base.dynamics.solver is None:
        raise InputError("input entropy reduction is for a DEQ with a solver; see configs/eval_auto_attack.py")
    if not isinstance(threat, Linf):
        raise InputError(f"input entropy reduction moves images within an ℓ∞ ball, expected Linf, got {threat}")
    return EntropyReduced(base, step_size=max(threat.epsilon / 4, 1e-6), epsilon=threat.epsilon)


def trials(threat: Threat, states: int) -> tuple[Trial, ...]:
    """The adaptive attacks on a defended DEQ of this many states."""
    many, few = APGD(threat, steps=50), APGD(threat, steps=20)
    targeted = Targeted(replace(few, loss=targeted_dlr))
    confident = PGD(threat, steps=20, step_size=max(threat.epsilon / 4, 1e-6), loss=LowEntropy())
    attempts: list[tuple[str, Attack, Surrogate]] = [
        ("apgd", many, Direct()),
        ("apgd.bpda-identity", many, BPDAIdentity()),
        ("apgd.bpda-head", many, BPDAHead()),
        ("apgd.bpda-solver", many, BPDASolver()),
        ("apgd-t.bpda-solver", targeted, BPDASolver()),
        ("apgd.end-to-end", many, EndToEnd()),
        ("apgd-t.end-to-end", targeted, EndToEnd()),
        ("apgd.path", few, PathAverage(BPDAHead())),
        ("apgd-t.path", targeted, PathAverage(BPDAHead())),
        ("low-entropy", Targeted(confident, classes=3), BPDAIdentity()),
        ("apgd.base", many, OnBase(Direct())),
        ("apgd.base-through-solver", many, OnBase(ThroughSolver())),
        *((f"apgd.base-z_{t}", few, OnBase(Intermediate(t))) for t in range(1, states + 1)),
        ("spsa", SPSA(threat, steps=10, samples=16, step_size=max(threat.epsilon / 10, 1e-6)), Direct()),
        ("square", Square(threat, 5000), Direct()),
    ]
    sources: dict[str, Surrogate] = {
        "direct": Direct(),
        "bpda-head": BPDAHead(),
        "bpda-solver": BPDASolver(),
        "end-to-end": EndToEnd(),
        "path": PathAverage(BPDAHead()),
    }
    return (
        *(Trial(name, attack, surrogate, suite="adaptive") for name, attack, surrogate in attempts),
        *(
            Trial(f"pgd-50.from-worst.{name}", from_worst(threat), surrogate, from_worst=True)
            for name, surrogate in sources.items()
        ),
    )


def get_config(train: TrainConfig) -> EvalConfig:
    predictor, threat = defence(train), threat_of(train)
    return EvalConfig(
        threat,
        trials=trials(threat, predictor.solver.steps),
        diagnostics=diagnostics(threat, steps=200),
        predictor=predictor,
        defence="entropy reduction",
        batch_size=train.batch_size,
        skip_broken=False,
    )
