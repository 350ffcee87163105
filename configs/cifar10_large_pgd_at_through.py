"""MDEQ-LARGE on CIFAR-10, PGD adversarial training at epsilon 8/255, against the gradient of the actual computation.

    python -m deq_jax.train --config configs/cifar10_large_pgd_at_through.py --workdir runs/cifar10_large_pgd_at_through

The attack of a training step differentiates the solver's own steps; see configs/digits_pgd_at_through.py.
Hardware: one accelerator; see Memory in the README. Its accuracy has not been measured here.
"""

from configs import cifar10_large_pgd_at
from configs.cifar import with_attack_through_solver
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    return with_attack_through_solver(cifar10_large_pgd_at.get_config())
