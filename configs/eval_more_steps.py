"""A control of input entropy reduction: as many cell evaluations, spent on more solver steps.

python -m deq_jax.evaluate --workdir RUN --config configs/eval_more_steps.py
"""

from dataclasses import replace

from configs import eval_entropy_reduced, eval_white_box
from deq_jax import TrainConfig
from deq_jax.evaluation import EvalConfig


def get_config(train: TrainConfig) -> EvalConfig:
    defence = eval_entropy_reduced.defence(train)
    dynamics = defence.base.dynamics
    purifications = defence.blocks * (defence.steps * defence.direction.applications + 1)
    steps = defence.solver.steps + purifications - dynamics.gradient.applications
    longer = replace(defence.solver, steps=steps, tolerance=0.0)  # no image stops before
    predictor = replace(defence.base, dynamics=replace(dynamics, solver=longer))
    return replace(eval_white_box.get_config(train), predictor=predictor, defence=f"{steps} solver steps")
