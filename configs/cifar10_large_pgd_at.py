"""MDEQ-LARGE on CIFAR-10, PGD adversarial training at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar10_large_pgd_at.py --workdir runs/cifar10_large_pgd_at

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs.cifar import recipe
from deq_jax import TrainConfig
from deq_jax.models import mdeq_large


def get_config() -> TrainConfig:
    return recipe("cifar10", mdeq_large(num_classes=10))
