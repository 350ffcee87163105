"""A small DEQ on 8x8 digits, PGD adversarial training at epsilon 0.1.

python -m deq_jax.train --config configs/digits_pgd_at.py --workdir runs/digits_pgd_at
"""

from dataclasses import replace

from configs import digits_standard
from deq_jax import PGDAdversarialTraining, TrainConfig
from deq_jax.attacks import PGD, Linf

ATTACK = PGD(Linf(0.1), steps=5, step_size=0.035, best_of=False)


def get_config() -> TrainConfig:
    return replace(digits_standard.get_config(), objective=PGDAdversarialTraining(ATTACK))
