"""MDEQ-XL on CIFAR-10, PGD adversarial training at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar10_xl_pgd_at.py --workdir runs/cifar10_xl_pgd_at

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs import cifar10_large_pgd_at
from configs.cifar import with_modules
from deq_jax import TrainConfig
from deq_jax.models import mdeq_xl


def get_config() -> TrainConfig:
    return with_modules(cifar10_large_pgd_at.get_config(), mdeq_xl(num_classes=10))
