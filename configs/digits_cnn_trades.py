"""An explicit network with the parameters of the small DEQ, on 8x8 digits, TRADES.

python -m deq_jax.train --config configs/digits_cnn_trades.py --workdir runs/digits_cnn_trades
"""

from dataclasses import replace

from configs import digits_cnn_standard, digits_trades
from deq_jax import TrainConfig


def get_config() -> TrainConfig:
    return replace(digits_trades.get_config(), classifier=digits_cnn_standard.CLASSIFIER, pretrain_steps=0)
