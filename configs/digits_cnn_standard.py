"""An explicit network with the parameters of the small DEQ, on 8x8 digits, standard training.

python -m deq_jax.train --config configs/digits_cnn_standard.py --workdir runs/digits_cnn_standard
"""

from dataclasses import replace

from configs import digits_standard
from deq_jax import TrainConfig
from deq_jax.models import small_cnn

CLASSIFIER = small_cnn(10, digits_standard.CHANNELS)


def get_config() -> TrainConfig:
    return replace(digits_standard.get_config(), classifier=CLASSIFIER, pretrain_steps=0)
