"""MDEQ-LARGE on CIFAR-10, PGD adversarial training at epsilon 8/255, with the exact (implicit) gradient.

    python -m deq_jax.train --config configs/cifar10_large_pgd_at_exact.py --workdir runs/cifar10_large_pgd_at_exact

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs import cifar10_large_pgd_at
from configs.cifar import with_exact_gradient
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    return with_exact_gradient(cifar10_large_pgd_at.get_config())
