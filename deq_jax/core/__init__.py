"""The mathematics of equilibria: solvers, readouts, gradients and losses. No images, classifiers or files."""

from deq_jax.core.adjoints import Implicit, Neumann, adjoint_residual
from deq_jax.core.box import clip_to_box
from deq_jax.core.errors import InputError, WriteError, require
from deq_jax.core.gradients import AtState, Backprop, Phantom, PhantomUpTo, Unrolled, has_adjoint, straight_through
from deq_jax.core.jacobian import SpectralRadius, gaussian_probes, jacobian_norm, spectral_radius
from deq_jax.core.keys import Keys, Purpose, prng_key
from deq_jax.core.layer import deq
from deq_jax.core.losses import LowEntropy, cross_entropy, dlr, entropy, kl, logit_difference, margin, targeted_dlr
from deq_jax.core.readouts import EnsembleState, FinalState, IntermediateState, LastState, RandomIntermediateState
from deq_jax.core.solve import solve
from deq_jax.core.solvers import Anderson, Broyden, FixedPoint
from deq_jax.core.types import Cell, Gradient, Injection, Loss, Memory, Optimizer, Readout, Solution, Solver

__all__ = [
    "Anderson",
    "AtState",
    "Backprop",
    "Broyden",
    "Cell",
    "EnsembleState",
    "FinalState",
    "FixedPoint",
    "Gradient",
    "Implicit",
    "Injection",
    "InputError",
    "IntermediateState",
    "Keys",
    "LastState",
    "Loss",
    "LowEntropy",
    "Memory",
    "Neumann",
    "Optimizer",
    "Phantom",
    "PhantomUpTo",
    "Purpose",
    "RandomIntermediateState",
    "Readout",
    "Solution",
    "Solver",
    "SpectralRadius",
    "Unrolled",
    "WriteError",
    "adjoint_residual",
    "clip_to_box",
    "cross_entropy",
    "deq",
    "dlr",
    "entropy",
    "gaussian_probes",
    "has_adjoint",
    "jacobian_norm",
    "kl",
    "logit_difference",
    "margin",
    "prng_key",
    "require",
    "solve",
    "spectral_radius",
    "straight_through",
    "targeted_dlr",
]
