"""Surrogates: the gradients that attack a DEQ or a defence. Success is measured on the deployed predictor."""

from deq_jax.surrogates.adaptive import (
    BPDA,
    BPDAHead,
    BPDAIdentity,
    BPDASolver,
    EndToEnd,
    OnBase,
    PathAverage,
    SmoothSign,
    require_defended,
)
from deq_jax.surrogates.base import Direct, Surrogate, WithGradient, classifier_oracle, judged
from deq_jax.surrogates.dynamics import (
    Intermediate,
    MeanOverStates,
    SimultaneousAdjoint,
    ThroughSolver,
    simultaneous_adjoint,
)

__all__ = [
    "BPDA",
    "BPDAHead",
    "BPDAIdentity",
    "BPDASolver",
    "Direct",
    "EndToEnd",
    "Intermediate",
    "MeanOverStates",
    "OnBase",
    "PathAverage",
    "SimultaneousAdjoint",
    "SmoothSign",
    "Surrogate",
    "ThroughSolver",
    "WithGradient",
    "classifier_oracle",
    "judged",
    "require_defended",
    "simultaneous_adjoint",
]
