"""The small DEQ on 8x8 digits, standard training, with random intermediate states.

python -m deq_jax.train --config configs/digits_standard_random.py --workdir runs/digits_standard_random
"""

from configs import digits_standard
from deq_jax import RandomIntermediateState, TrainConfig
from deq_jax.training import with_readout


def get_config() -> TrainConfig:
    return with_readout(digits_standard.get_config(), RandomIntermediateState())
