"""MDEQ-LARGE on CIFAR-10, TRADES at epsilon 8/255, with the Jacobian penalty for entropy reduction.

    python -m deq_jax.train --config configs/cifar10_large_trades_stable.py --workdir runs/cifar10_large_trades_stable

Hardware: one accelerator; see docs/results/speed-and-memory.md. Its accuracy has not been measured here.
"""

from configs import cifar10_large_trades
from configs.cifar import with_jacobian_weight
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    return with_jacobian_weight(cifar10_large_trades.get_config(), 2.0)
