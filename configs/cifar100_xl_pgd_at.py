"""MDEQ-XL on CIFAR-100, PGD adversarial training at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar100_xl_pgd_at.py --workdir runs/cifar100_xl_pgd_at

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs import cifar100_large_pgd_at
from configs.cifar import with_modules
from deq_jax import TrainConfig
from deq_jax.models import mdeq_xl


def get_config() -> TrainConfig:
    return with_modules(cifar100_large_pgd_at.get_config(), mdeq_xl(num_classes=100))
