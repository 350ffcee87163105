"""A small DEQ on 8x8 digits, standard training.

    python -m deq_jax.train --config configs/digits_standard.py --workdir runs/digits_standard

The other digits configs replace a field or two of this one.
"""

from deq_jax import Broyden, Dynamics, Phantom, Standard, TrainConfig
from deq_jax.attacks import PGD, Linf
from deq_jax.data import Digits
from deq_jax.models import small_deq
from deq_jax.training import AdamCosine

CHANNELS = 12


def get_config() -> TrainConfig:
    return TrainConfig(
        classifier=small_deq(10, CHANNELS, Dynamics(Broyden(8), gradient=Phantom(steps=5, damping=0.5))),
        objective=Standard(),
        dataset=Digits(),
        validation_attack=PGD(Linf(0.1), steps=10, step_size=0.025),
        optimizer=AdamCosine(3e-3),
        batch_size=64,
        epochs=20,
        pretrain_steps=34,
    )
