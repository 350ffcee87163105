r"""A small MDEQ on CIFAR-10, PGD adversarial training at epsilon 8/255, with random intermediate states.

    python -m deq_jax.train --config configs/cifar10_small_pgd_at_random.py --workdir runs/cifar10_small_pgd_at_random \
        --set dataset.path=cifar-10-python.tar.gz

Hardware: any, a CPU included. Measured with one seed, on 256 test images with budget quick:
53.5 % clean, at most 18.8 % in the worst case.
"""

from configs import cifar10_small_pgd_at
from deq_jax import RandomIntermediateState, TrainConfig
from deq_jax.training import with_readout


def get_config() -> TrainConfig:
    return with_readout(cifar10_small_pgd_at.get_config(), RandomIntermediateState())
