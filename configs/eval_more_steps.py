"""A control of input entropy reduction: what it costs is spent on more steps of the solver.

python -m deq_jax.evaluate --workdir RUN --config configs/eval_more_steps.py
"""

from dataclasses import replace

from configs import eval_entropy_reduced, eval_white_box
from deq_jax.config import TrainConfig
from deq_jax.trials import EvalConfig


def get_config(train: TrainConfig) -> EvalConfig:
    defence = eval_entropy_reduced.defence(train)
    steps = defence.solver.steps + defence.blocks * (2 * defence.steps + 1)  # an update costs two evaluations
    dynamics = defence.base.dynamics
    longer = replace(dynamics, solver=replace(defence.solver, steps=steps))
    predictor = replace(defence.base, dynamics=longer)
    return replace(eval_white_box.get_config(train), predictor=predictor, defence=f"{steps} solver steps")
