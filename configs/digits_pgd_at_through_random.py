"""The small DEQ on 8x8 digits, trained against attacks through the solver, with random intermediate states.

python -m deq_jax.train --config configs/digits_pgd_at_through_random.py --workdir runs/digits_pgd_at_through_random
"""

from configs import digits_pgd_at_through
from deq_jax import RandomIntermediateState, TrainConfig
from deq_jax.training import with_readout


def get_config() -> TrainConfig:
    return with_readout(digits_pgd_at_through.get_config(), RandomIntermediateState())
