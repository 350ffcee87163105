r"""A small MDEQ on CIFAR-10, PGD adversarial training at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar10_small_pgd_at.py --workdir runs/cifar10_small_pgd_at \
        --set dataset.path=cifar-10-python.tar.gz

The training attack has two steps, and its radius grows over the first 40 % of the run. The other cifar10_small
configs replace a field or two of this one.
Hardware: any, a CPU included. Measured with one seed, on 256 test images with budget quick:
53.9 % clean, at most 27.3 % in the worst case.
"""

from configs.cifar import small_recipe
from deq_jax import TrainConfig
from deq_jax.data import Cifar


def get_config() -> TrainConfig:
    return small_recipe(Cifar(""), num_classes=10)
