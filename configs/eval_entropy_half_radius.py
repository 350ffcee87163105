"""A variant of input entropy reduction: the defence moves the input by half the attacks' radius.

python -m deq_jax.evaluate --workdir RUN --config configs/eval_entropy_half_radius.py
"""

from dataclasses import replace

from configs import eval_entropy_reduced
from deq_jax import TrainConfig
from deq_jax.evaluation import EvalConfig


def get_config(train: TrainConfig) -> EvalConfig:
    full = eval_entropy_reduced.defence(train)
    predictor = replace(full, epsilon=full.epsilon / 2)
    return replace(
        eval_entropy_reduced.get_config(train), predictor=predictor, defence="entropy reduction, half radius"
    )
