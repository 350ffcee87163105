r"""The small MDEQ on CIFAR-10, PGD adversarial training at epsilon 8/255, against the gradient of the computation.

    python -m deq_jax.train --config configs/cifar10_small_pgd_at_through.py \
        --workdir runs/cifar10_small_pgd_at_through --set dataset.path=cifar-10-python.tar.gz

The attack of a training step differentiates the solver's own steps; see configs/digits_pgd_at_through.py.
Hardware: any, a CPU included. Its accuracy has not been measured here.
"""

from configs import cifar10_small_pgd_at
from configs.cifar import with_attack_through_solver
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    return with_attack_through_solver(cifar10_small_pgd_at.get_config())
