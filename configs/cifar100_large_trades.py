"""MDEQ-LARGE on CIFAR-100, TRADES at epsilon 8/255.

    python -m deq_jax.train --config configs/cifar100_large_trades.py --workdir runs/cifar100_large_trades

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs import cifar100_large_pgd_at
from configs.cifar import with_trades
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    return with_trades(cifar100_large_pgd_at.get_config())
