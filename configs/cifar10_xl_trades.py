"""MDEQ-XL on CIFAR-10, TRADES at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar10_xl_trades.py --workdir runs/cifar10_xl_trades

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs import cifar10_xl_pgd_at
from configs.cifar import with_trades
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    return with_trades(cifar10_xl_pgd_at.get_config())
