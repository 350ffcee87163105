"""A control of input entropy reduction: the same updates, with the entropy raised.

python -m deq_jax.evaluate --workdir RUN --config configs/eval_entropy_raised.py
"""

from dataclasses import replace

from configs import eval_entropy_reduced
from deq_jax import TrainConfig
from deq_jax.defences import EntropyGradient
from deq_jax.evaluation import EvalConfig


def get_config(train: TrainConfig) -> EvalConfig:
    predictor = replace(eval_entropy_reduced.defence(train), direction=EntropyGradient(ascent=1))
    return replace(eval_entropy_reduced.get_config(train), predictor=predictor, defence="entropy raised")
