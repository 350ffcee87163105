"""A small DEQ on 8x8 digits, TRADES at epsilon 0.1.

python -m deq_jax.train --config configs/digits_trades.py --workdir runs/digits_trades
"""

from dataclasses import replace

from configs import digits_pgd_at
from deq_jax import Trades, TrainConfig
from deq_jax.attacks import gaussian_start
from deq_jax.core import kl

ATTACK = replace(digits_pgd_at.ATTACK, loss=kl, start=gaussian_start)


def get_config() -> TrainConfig:
    return replace(digits_pgd_at.get_config(), objective=Trades(ATTACK, beta=6.0))
