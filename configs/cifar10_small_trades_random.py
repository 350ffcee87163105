r"""A small MDEQ on CIFAR-10, TRADES at epsilon 8/255, with random intermediate states.

    python -m deq_jax.train --config configs/cifar10_small_trades_random.py --workdir runs/cifar10_small_trades_random \
        --set dataset.path=cifar-10-python.tar.gz

Hardware: any, a CPU included. Its accuracy has not been measured here.
"""

from configs import cifar10_small_trades
from deq_jax import RandomIntermediateState, TrainConfig
from deq_jax.training import with_readout


def get_config() -> TrainConfig:
    return with_readout(cifar10_small_trades.get_config(), RandomIntermediateState())
