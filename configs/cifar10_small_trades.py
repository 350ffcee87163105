r"""A small MDEQ on CIFAR-10, TRADES at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar10_small_trades.py --workdir runs/cifar10_small_trades \
        --set dataset.path=cifar-10-python.tar.gz

Hardware: any, a CPU included. Its accuracy has not been measured here.
"""

from configs import cifar10_small_pgd_at
from configs.cifar import with_trades
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    return with_trades(cifar10_small_pgd_at.get_config())
