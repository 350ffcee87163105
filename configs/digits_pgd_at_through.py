"""The small DEQ on 8x8 digits, PGD adversarial training against the gradient of the actual computation.

    python -m deq_jax.train --config configs/digits_pgd_at_through.py --workdir runs/digits_pgd_at_through

The attack of a training step differentiates the solver's own steps (`ThroughSolver`), as the strongest attacks of an
evaluation do. The parameters' gradient remains the phantom gradient.
"""

from dataclasses import replace

from configs import digits_pgd_at
from deq_jax import TrainConfig
from deq_jax.surrogates import ThroughSolver


def get_config() -> TrainConfig:
    base = digits_pgd_at.get_config()
    return replace(base, objective=replace(base.objective, surrogate=ThroughSolver()))
