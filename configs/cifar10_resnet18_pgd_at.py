"""ResNet-18 on CIFAR-10, PGD adversarial training at epsilon 8/255, by the recipe of the MDEQs.

    python -m deq_jax.train --config configs/cifar10_resnet18_pgd_at.py --workdir runs/cifar10_resnet18_pgd_at

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs import cifar10_large_pgd_at
from configs.cifar import with_module
from deq_jax import TrainConfig
from deq_jax.models import ResNet18


def get_config() -> TrainConfig:
    return with_module(cifar10_large_pgd_at.get_config(), ResNet18(num_classes=10))
