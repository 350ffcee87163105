"""The small DEQ on 8x8 digits, TRADES, with random intermediate states.

python -m deq_jax.train --config configs/digits_trades_random.py --workdir runs/digits_trades_random
"""

from configs import digits_trades
from deq_jax.config import TrainConfig, with_readout
from deq_jax.readouts import RandomIntermediateState


def get_config() -> TrainConfig:
    return with_readout(digits_trades.get_config(), RandomIntermediateState())
