r"""A small MDEQ on CIFAR-10, standard training.

    python -m deq_jax.train --config configs/cifar10_small_standard.py --workdir runs/cifar10_small_standard \
        --set dataset.path=cifar-10-python.tar.gz

Hardware: any, a CPU included. Its accuracy has not been measured here.
"""

from dataclasses import replace

from configs import cifar10_small_pgd_at
from deq_jax import Standard, TrainConfig


def get_config() -> TrainConfig:
    return replace(cifar10_small_pgd_at.get_config(), objective=Standard(), radius=None)
