r"""The small MDEQ's cell, applied as often without a solver, on CIFAR-10, PGD adversarial training at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar10_small_tied_pgd_at.py --workdir runs/cifar10_small_tied_pgd_at \
        --set dataset.path=cifar-10-python.tar.gz

Hardware: any, a CPU included. Measured with one seed, on 256 test images with budget quick:
55.1 % clean, at most 24.2 % in the worst case.
"""

from configs import cifar10_small_pgd_at
from configs.cifar import cell_evaluations, with_twin
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    config = cifar10_small_pgd_at.get_config()
    return with_twin(config, cell_evaluations(config.classifier))
