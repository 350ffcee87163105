"""The small DEQ on 8x8 digits, TRADES, with random intermediate states.

python -m deq_jax.train --config configs/digits_trades_random.py --workdir runs/digits_trades_random
"""

from configs import digits_trades
from deq_jax import RandomIntermediateState, TrainConfig
from deq_jax.training import with_readout


def get_config() -> TrainConfig:
    return with_readout(digits_trades.get_config(), RandomIntermediateState())
