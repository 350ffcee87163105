"""MDEQ-LARGE on CIFAR-100, PGD adversarial training at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar100_large_pgd_at.py --workdir runs/cifar100_large_pgd_at

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from dataclasses import replace

from configs import cifar10_large_pgd_at
from configs.cifar import with_modules
from deq_jax import TrainConfig
from deq_jax.data import Tfds
from deq_jax.models import mdeq_large


def get_config() -> TrainConfig:
    config = with_modules(cifar10_large_pgd_at.get_config(), mdeq_large(num_classes=100))
    return replace(config, dataset=Tfds("cifar100"))
