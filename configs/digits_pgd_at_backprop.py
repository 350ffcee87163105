"""The small DEQ on 8x8 digits, PGD adversarial training, all gradients through the solver.

    python -m deq_jax.train --config configs/digits_pgd_at_backprop.py --workdir runs/digits_pgd_at_backprop

Both gradients of a training step differentiate the solver's own steps: that of the attack, as in
`digits_pgd_at_through`, and that of the parameters.
"""

from dataclasses import replace

from configs import digits_pgd_at
from deq_jax import Backprop, TrainConfig


def get_config() -> TrainConfig:
    base = digits_pgd_at.get_config()
    gradient = Backprop(base.classifier.dynamics.gradient)
    return replace(base, classifier=base.classifier.with_dynamics(gradient=gradient))
