"""MDEQ-LARGE on CIFAR-100, TRADES at epsilon 8/255, with random intermediate states.

    python -m deq_jax.train --config configs/cifar100_large_trades_random.py --workdir runs/cifar100_large_trades_random

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs import cifar100_large_trades
from deq_jax import RandomIntermediateState, TrainConfig
from deq_jax.training import with_readout


def get_config() -> TrainConfig:
    return with_readout(cifar100_large_trades.get_config(), RandomIntermediateState())
